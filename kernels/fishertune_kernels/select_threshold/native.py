"""Counts, samples and brackets of order-preserving keys in C++: one read of the scores, no copy of them."""

from __future__ import annotations

import ctypes

import torch

from ..native import DTYPES, Rows, call


class Bracket(ctypes.Structure):
    """``ft_bracket``, and the tensors that it points to."""

    _fields_ = [
        ("low", ctypes.c_int64),
        ("high", ctypes.c_int64),
        ("capacity", ctypes.c_int64),
        ("counts", ctypes.c_void_p),
        ("candidates", ctypes.c_void_p),
    ]

    def __init__(self, n_tensors: int, low: int, high: int, capacity: int) -> None:
        self._counts_L3 = torch.empty(n_tensors, 3, dtype=torch.int64, device="cpu")
        self._candidates = torch.empty(capacity, dtype=torch.int64, device="cpu")
        super().__init__(low, high, capacity, self._counts_L3.data_ptr(), self._candidates.data_ptr())

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        found = int(self._counts_L3[:, 1].sum())
        return self._counts_L3, self._candidates[: found if found <= self.capacity else 0]


def key_histogram(scores: list[torch.Tensor], shift: int, bits: int, prefix_mask: int, prefix: int) -> torch.Tensor:
    counts = torch.zeros(2**bits + 1, dtype=torch.int64, device="cpu")
    call("ft_key_histogram", _rows(scores), shift, bits, prefix_mask, prefix, counts.data_ptr())
    return counts


def sample_scores(scores: list[torch.Tensor], stride: int) -> torch.Tensor:
    strata = sum(-(-tensor.numel() // stride) for tensor in scores)
    sample = torch.empty(strata, dtype=torch.float32, device="cpu")
    call("ft_sample_scores", _rows(scores), stride, sample.data_ptr())
    return sample


def collect_bracket(
    scores: list[torch.Tensor], low: int, high: int, capacity: int
) -> tuple[torch.Tensor, torch.Tensor]:
    bracket = Bracket(len(scores), low, high, capacity)
    call("ft_collect_bracket", _rows(scores), ctypes.addressof(bracket))
    return bracket.result()


def _rows(scores: list[torch.Tensor]) -> Rows:
    rows = Rows()
    for tensor in scores:
        rows.add(rows.read(tensor), tensor.numel(), DTYPES[tensor.dtype])
    return rows
