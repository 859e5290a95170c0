"""Everything the command runs, in its order: right before fast, what a goal waits for before what none does.

A new operator is a file beside this one with an ``OPERATOR``, and a line in ``OPERATORS``.
"""

from __future__ import annotations

import torch

from ..operator import Operator, Part
from . import (
    dr_fim_score,
    fisher,
    gaussian_perturb,
    limits,
    per_sample_affine_squared_grad,
    per_sample_squared_grad,
    precision_update,
    profiles,
    selected_grad_norm,
    selection,
    sparse_adamw,
    squared_grad_accumulate,
    values,
)

OPERATORS: tuple[Operator, ...] = (
    squared_grad_accumulate.OPERATOR,
    per_sample_squared_grad.OPERATOR,
    per_sample_affine_squared_grad.OPERATOR,
    gaussian_perturb.OPERATOR,
    *precision_update.OPERATORS,
    dr_fim_score.OPERATOR,
    selection.OPERATOR,
    sparse_adamw.OPERATOR,
    selected_grad_norm.OPERATOR,
    values.OPERATOR,
)


def cpu_parts() -> list[Part]:
    """What a CPU can be measured by: operators that stream memory, beside its own copy bandwidth."""
    streaming = [operator for operator in OPERATORS if operator is not per_sample_squared_grad.OPERATOR]
    return [
        *(operator.checks() for operator in streaming),
        limits.PART,
        *(part for goal in (True, False) for operator in streaming for part in operator.timings(goal)),
    ]


def all_parts() -> list[Part]:
    return [
        *(operator.checks() for operator in OPERATORS),
        *(part for operator in OPERATORS for part in operator.large_checks()),
        limits.PART,
        *(part for operator in OPERATORS for part in operator.timings(goal=True)),
        *fisher.PARTS,
        profiles.launches(OPERATORS),
        *(part for operator in OPERATORS for part in operator.timings(goal=False)),
        Part("profile of the Fisher pass, bf16 autocast", 20, profiles.fisher_profile(torch.bfloat16)),
        Part("profile of the streaming operators", 15, profiles.stream_profiles(OPERATORS)),
        *(part for operator in OPERATORS for part in operator.variant_timings()),
    ]
