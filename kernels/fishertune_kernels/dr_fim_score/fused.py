"""The running mean of scores and its exact threshold in one pass over memory.

A sample of the inputs is scored first and brackets the threshold; the pass that writes the scores then counts what lies
above the bracket and keeps the candidates inside it, as ``select_threshold`` would in a pass of its own.
"""

from __future__ import annotations

from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor

from ..select_threshold import search


def score_and_search(
    module: ModuleType,
    scores: list[Tensor],
    fisher: list[Tensor],
    shifted: list[Tensor],
    options: tuple[object, ...],
    k: int,
    group: dist.ProcessGroup | None,
) -> search.Threshold:
    """Arguments of :func:`fishertune_kernels.dr_fim_threshold_`, already checked; ``options`` from ``count`` on."""
    n = search.agreed_size(scores, k, group)
    bracket: search.Bracket | None = None
    if k and n >= search.SMALL and not any(tensor.dtype == torch.float64 for tensor in scores):
        stride = search.sampling_stride(n)
        drawn, drawn_fisher, drawn_shifted = (search.sample(tensors, stride) for tensors in (scores, fisher, shifted))
        module.dr_fim_score_([drawn], [drawn_fisher], [drawn_shifted], *options)
        bracket = search.sampled_bracket(drawn, k, n, group)
    if bracket is None:
        module.dr_fim_score_(scores, fisher, shifted, *options)
        return search.search(scores, k, group)
    counts_L3, candidates = module.dr_fim_score_collect_(scores, fisher, shifted, *options, *bracket)
    threshold = search.settled(bracket, counts_L3, candidates, k, n, group)
    return search.search(scores, k, group) if threshold is None else threshold
