"""Scores of Eq. 4, 5, 7 and 15 on GPUs: one pass, the running mean and the counting for a threshold included."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..select_threshold.triton import Collection, collect
from ..triton_common import TL_DTYPES, by_dtype, chunk_offsets, launch, list_table, locate, pointer

CONFIG = {"BLOCK": 2048, "num_warps": 8}


@triton.jit(do_not_specialize=["n_tensors"])
def dr_fim_score_kernel(
    pointers,
    layout,
    owners,
    n_tensors,
    scale,
    task_weight,
    change_weight,
    damping,
    mean_gain,
    FISHER: tl.constexpr,
    SHIFTED: tl.constexpr,
    TASK_ONLY: tl.constexpr,
    FIRST: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """score = scale·(task_weight·F + change_weight·|F − F'|/(min(F, F') + damping)), or F where TASK_ONLY.

    FIRST stores it; otherwise it moves the mean by mean_gain of the difference.
    """
    owner, size, chunk = locate(layout, owners, n_tensors, tl.program_id(0).to(tl.int64))
    scores = pointer(pointers, n_tensors, owner, 0, tl.float32, ALIGNED)
    fisher = pointer(pointers, n_tensors, owner, 1, FISHER, ALIGNED)
    shifted = pointer(pointers, n_tensors, owner, 2, SHIFTED, ALIGNED)
    start = chunk * BLOCK
    if start + BLOCK <= size:
        _score(
            scores, fisher, shifted, start, size, scale, task_weight, change_weight, damping, mean_gain,
            TASK_ONLY, FIRST, False, BLOCK,
        )  # fmt: skip
    else:
        _score(
            scores, fisher, shifted, start, size, scale, task_weight, change_weight, damping, mean_gain,
            TASK_ONLY, FIRST, True, BLOCK,
        )  # fmt: skip


@triton.jit(do_not_specialize=["n_tensors", "n_chunks", "low", "high", "capacity"])
def dr_fim_score_collect_kernel(
    pointers,
    layout,
    owners,
    n_tensors,
    scale,
    task_weight,
    change_weight,
    damping,
    mean_gain,
    n_chunks,
    numbers,
    counts,
    cursor,
    candidates,
    low,
    high,
    capacity,
    FISHER: tl.constexpr,
    SHIFTED: tl.constexpr,
    TASK_ONLY: tl.constexpr,
    FIRST: tl.constexpr,
    KEEP: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``dr_fim_score_kernel``, and ``collect_bracket`` of the new scores while they are in registers."""
    owner, size, chunk = locate(layout, owners, n_tensors, tl.program_id(0).to(tl.int64))
    scores = pointer(pointers, n_tensors, owner, 0, tl.float32, ALIGNED)
    fisher = pointer(pointers, n_tensors, owner, 1, FISHER, ALIGNED)
    shifted = pointer(pointers, n_tensors, owner, 2, SHIFTED, ALIGNED)
    start = chunk * BLOCK
    if start + BLOCK <= size:
        score = _score(
            scores, fisher, shifted, start, size, scale, task_weight, change_weight, damping, mean_gain,
            TASK_ONLY, FIRST, False, BLOCK,
        )  # fmt: skip
    else:
        score = _score(
            scores, fisher, shifted, start, size, scale, task_weight, change_weight, damping, mean_gain,
            TASK_ONLY, FIRST, True, BLOCK,
        )  # fmt: skip
    inside = chunk_offsets(start, BLOCK) < size
    number = tl.load(numbers + owner)
    collect(score, inside, n_chunks, counts, cursor, candidates, number, low, high, capacity, KEEP, BLOCK)


@triton.jit
def _score(
    scores, fisher, shifted, start, size, scale, task_weight, change_weight, damping, mean_gain,
    TASK_ONLY: tl.constexpr, FIRST: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    offsets = chunk_offsets(start, BLOCK)
    mask = offsets < size if MASKED else None
    f = tl.load(fisher + offsets, mask=mask).to(tl.float32)
    if TASK_ONLY:
        score = f
    else:
        f_shifted = tl.load(shifted + offsets, mask=mask).to(tl.float32)
        smaller = tl.minimum(f, f_shifted) + tl.cast(damping, tl.float32)
        change = tl.div_rn(tl.cast(change_weight, tl.float32) * tl.abs(f - f_shifted), smaller)
        score = tl.cast(scale, tl.float32) * (tl.cast(task_weight, tl.float32) * f + change)
    if not FIRST:
        mean = tl.load(scores + offsets, mask=mask)
        score = mean + tl.cast(mean_gain, tl.float32) * (score - mean)
    tl.store(scores + offsets, score, mask=mask)
    return score


def dr_fim_score(
    fisher: list[torch.Tensor],
    shifted: list[torch.Tensor],
    kind: str,
    c: float,
    gamma: float = 1.0,
    prior_precision: float = 0.0,
    eps: float = 1e-8,
) -> list[torch.Tensor]:
    scores = [torch.empty(tensor.shape, dtype=torch.float32, device=tensor.device) for tensor in fisher]
    dr_fim_score_(scores, fisher, shifted, 1, kind, c, gamma, prior_precision, eps)
    return scores


def dr_fim_score_(
    scores: list[torch.Tensor],
    fisher: list[torch.Tensor],
    shifted: list[torch.Tensor],
    count: int,
    kind: str,
    c: float,
    gamma: float = 1.0,
    prior_precision: float = 0.0,
    eps: float = 1e-8,
) -> None:
    constants, options = _constants(count, kind, c, gamma, prior_precision, eps)
    for scores_, fisher_, shifted_ in by_dtype(scores, fisher, shifted):
        table = list_table(CONFIG["BLOCK"], scores_, fisher_, shifted_)
        launch(
            dr_fim_score_kernel,
            table.n_chunks,
            scores_[0].device,
            *table.arguments,
            *constants,
            FISHER=TL_DTYPES[fisher_[0].dtype],
            SHIFTED=TL_DTYPES[shifted_[0].dtype],
            ALIGNED=table.aligned,
            **options,
            **CONFIG,
        )


def dr_fim_score_collect_(
    scores: list[torch.Tensor],
    fisher: list[torch.Tensor],
    shifted: list[torch.Tensor],
    count: int,
    kind: str,
    c: float,
    gamma: float,
    prior_precision: float,
    eps: float,
    low: int,
    high: int,
    capacity: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    constants, options = _constants(count, kind, c, gamma, prior_precision, eps)
    collection = Collection(len(scores), low, high, capacity, scores[0].device)
    for scores_, fisher_, shifted_, places_ in by_dtype(scores, fisher, shifted, range(len(scores))):
        table = list_table(CONFIG["BLOCK"], scores_, fisher_, shifted_)
        launch(
            dr_fim_score_collect_kernel,
            table.n_chunks,
            scores_[0].device,
            *table.arguments,
            *constants,
            *collection.arguments(table, places_),
            FISHER=TL_DTYPES[fisher_[0].dtype],
            SHIFTED=TL_DTYPES[shifted_[0].dtype],
            ALIGNED=table.aligned,
            **options,
            **collection.options,
            **CONFIG,
        )
        collection.add_counts(table)
    return collection.result()


def _constants(
    count: int, kind: str, c: float, gamma: float, prior_precision: float, eps: float
) -> tuple[list[float], dict[str, bool]]:
    scale, task_weight, change_weight, damping = {
        "f": (1.0, 1.0, 0.0, 0.0),
        "delta_f": (1.0, 0.0, 1.0, eps),
        "dr_fim": (1.0, 1.0, c, eps),
        "dr_fim_variational": (gamma, 1.0, c, prior_precision + eps / gamma),
    }[kind]
    constants = [float(scale), float(task_weight), float(change_weight), float(damping), 1.0 / count]
    return constants, {"TASK_ONLY": kind == "f", "FIRST": count == 1}
