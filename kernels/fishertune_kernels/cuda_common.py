"""What the callers of the CUDA kernels in ``csrc/cuda`` share: lists of tensors on the device, and the launch."""

from __future__ import annotations

import ctypes
import functools
from typing import NamedTuple

import torch

from .native import DTYPES, Rows, check, lib


class ScoreTable(NamedTuple):
    """A list of score tensors as the kernels read it. It holds addresses: the tensors must outlive its use."""

    rows_L4: torch.Tensor
    """``ft_cuda_row`` of each tensor, on its device, as four 64-bit integers."""
    n_tiles: int


def score_table(scores: list[torch.Tensor]) -> ScoreTable:
    """The table of dense scores on one device, built once for the same tensors on the same stream."""
    device = scores[0].device
    rows = tuple((tensor.data_ptr(), tensor.numel(), DTYPES[tensor.dtype]) for tensor in scores)
    # Another stream builds its own table instead of waiting for this one's copy.
    return _table(device, launch_place(device)[1], rows)


@functools.lru_cache(maxsize=64)
def _table(device: torch.device, stream: int, rows: tuple[tuple[int, int, int], ...]) -> ScoreTable:
    given = Rows()
    for row in rows:
        given.add(*row)
    rows_L4 = torch.empty(len(rows), 4, dtype=torch.int64, device="cpu")
    n_tiles = ctypes.c_int64()
    check("ft_cuda_table", lib().ft_cuda_table(*given.arguments, rows_L4.data_ptr(), ctypes.byref(n_tiles)))
    return ScoreTable(rows_L4.to(device), n_tiles.value)


def launch(function: str, table: ScoreTable, *arguments: object, work: int | None = None) -> None:
    """Queue work on the table's tensors on the current stream of their device; ``work`` where it is not the tiles."""
    rows_L4, n_tiles = table
    status = getattr(lib(), function)(
        rows_L4.data_ptr(),
        len(rows_L4),
        n_tiles if work is None else work,
        *arguments,
        *launch_place(rows_L4.device),
    )
    check(function, status)


def launch_place(device: torch.device) -> tuple[int, int]:
    """The device's number and its current stream."""
    stream = torch.cuda.current_stream(device)
    return stream.device_index, stream.cuda_stream
