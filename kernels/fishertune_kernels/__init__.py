"""Kernels for Fisher-guided sparse tuning: Fisher estimation, exact selection, sparse optimizer steps.

Usable alone: needs torch, and for speed the compiled library (CPU) or triton (GPU). Every operator is a folder, to be
read as a ladder: ``reference.py`` (the formula), ``native.py`` (C++), ``triton.py`` (GPU), ``__init__.py`` (the public
function). ``ops.py`` registers and checks them, ``dispatch.py`` chooses the implementation.
"""

from .compact import compact
from .dr_fim_score import dr_fim_score, dr_fim_score_, dr_fim_threshold_
from .gaussian_perturb import gaussian_perturb
from .per_sample_affine_squared_grad import per_sample_affine_squared_grad_
from .per_sample_squared_grad import per_sample_squared_grad_
from .precision_update import precision_update_, precision_update_natural_, precision_update_sgvb_
from .select_threshold import Threshold, collect_bracket, key_histogram, select_threshold
from .selected_grad_norm import selected_grad_norm
from .sparse_adamw import sparse_adamw_
from .squared_grad_accumulate import squared_grad_accumulate_
from .values import gather_values, scatter_values_

__all__ = [
    "Threshold",
    "collect_bracket",
    "compact",
    "dr_fim_score",
    "dr_fim_score_",
    "dr_fim_threshold_",
    "gather_values",
    "gaussian_perturb",
    "key_histogram",
    "per_sample_affine_squared_grad_",
    "per_sample_squared_grad_",
    "precision_update_",
    "precision_update_natural_",
    "precision_update_sgvb_",
    "scatter_values_",
    "select_threshold",
    "selected_grad_norm",
    "sparse_adamw_",
    "squared_grad_accumulate_",
]
