"""The threshold and the selected set against numpy: ``partition`` for the value, a stable sort for which ties win."""

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fishertune_kernels as fk
from fishertune_kernels import dispatch

TINY = np.float32(1e-45)  # the smallest denormal


def check_selection(scores: list[torch.Tensor], k: int) -> fk.Threshold:
    flat = np.concatenate([tensor.double().numpy().reshape(-1) for tensor in scores]) if scores else np.empty(0)
    threshold = fk.select_threshold(scores, k)
    expected = np.partition(flat, flat.size - k)[flat.size - k] if k else math.inf
    assert threshold.value == expected
    assert threshold.n_greater == (flat > expected).sum()
    assert threshold.n_ties_kept == sum(threshold.ties_kept_per_tensor) == k - threshold.n_greater

    indices = fk.compact(scores, threshold)
    starts = np.cumsum([0, *(tensor.numel() for tensor in scores)])
    found = np.concatenate([start + index.numpy() for start, index in zip(starts, indices, strict=False)] or [[]])
    np.testing.assert_array_equal(found, np.sort(np.argsort(-flat, kind="stable")[:k]))
    assert all(index.dtype == torch.int32 for index in indices)
    return threshold


CASES = {
    "ties": [[3, 1, 3, 2], [3, 3], [2, 3, 1]],
    "all equal": [[0.5] * 40, [0.5], [0.5] * 9],
    "all zero": [[0.0] * 17, [-0.0] * 5],  # one value
    "signed zeros and denormals": [[TINY, -TINY, 0.0, -0.0], [2 * TINY, -0.0, 0.0, TINY]],
    "negatives": [[-1.0, -2.0, -1.5], [-1e-30, -3e38]],
    "infinities": [[math.inf, -math.inf, 1.0], [-math.inf, math.inf, math.inf], [-math.inf]],
    "non-candidates": [[-math.inf] * 6, [1.0, -math.inf], [-math.inf] * 3],
    "empty tensors": [[], [2.0, 1.0], [], [2.0], []],
    "only empty tensors": [[], []],
    "one element": [[7.0]],
    "neighbouring floats": [np.nextafter(np.float32(1), np.float32([0, 2, 1])).tolist(), [1.0, 1.0]],
}


@pytest.mark.parametrize("name", CASES)
def test_every_k(backend: str, name: str) -> None:
    scores = [torch.tensor(values, dtype=torch.float32) for values in CASES[name]]
    for k in range(sum(tensor.numel() for tensor in scores) + 1):
        check_selection(scores, k)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_list(backend: str, data: st.DataObject) -> None:
    """Random bit patterns, so that every exponent appears, mixed with few values, so that ties do."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    scores = []
    for size in data.draw(st.lists(st.integers(0, 70), min_size=1, max_size=5)):
        values = rng.integers(0, 2**32, size, dtype=np.uint32).view(np.float32)
        few = rng.choice(np.float32([0.0, -0.0, 1.0, -1.0, 1e-40, math.inf, -math.inf]), size)
        tied = rng.random(size) < data.draw(st.sampled_from([0.0, 0.5, 1.0]))
        scores.append(torch.from_numpy(np.where(np.isnan(values) | tied, few, values)))
    check_selection(scores, data.draw(st.integers(0, sum(tensor.numel() for tensor in scores))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_float_type(backend: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    wide = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in [(30, 41), (0,), (7,)]]
    scores = [tensor.to(dtype) for tensor in wide]
    for k in (0, 1, 60, 600, 1237):
        check_selection(scores, k)


def test_types_of_different_precision_rank_together(backend: str, generator: torch.Generator) -> None:
    """A float32 threshold between two bfloat16 values must not be rounded to one of them."""
    scores = [torch.randn(50, generator=generator).bfloat16(), torch.randn(50, generator=generator)]
    for k in range(101):
        check_selection(scores, k)
    for k in (1, 50, 149):
        check_selection([*scores, torch.randn(50, generator=generator, dtype=torch.float64)], k)


def test_more_scores_than_a_block(backend: str, generator: torch.Generator) -> None:
    scores = [torch.rand(300_001, generator=generator), torch.rand(10, generator=generator).round()]
    for k in (1, 15_000, 300_000):
        threshold = check_selection(scores, k)
        assert threshold.n_ties_kept >= 1


def test_one_tensor_and_views(backend: str, generator: torch.Generator) -> None:
    whole = torch.randn(20, 30, generator=generator)
    threshold = fk.select_threshold(whole.T, 17)  # flat index means that of the transposed tensor
    (index,) = fk.compact(whole.T, threshold)
    assert set(index.tolist()) == set(whole.T.reshape(-1).topk(17).indices.tolist())


def test_nan_is_refused_with_the_count(backend: str) -> None:
    scores = [torch.tensor([1.0, math.nan]), torch.tensor([math.nan, -math.nan, 2.0], dtype=torch.bfloat16)]
    for k in (0, 2, 5):
        with pytest.raises(ValueError, match=r"3 of 5 scores are NaN.*-inf"):
            fk.select_threshold(scores, k)


def test_k_out_of_range_is_refused(backend: str) -> None:
    with pytest.raises(ValueError, match=r"k=4, but there are only 3 scores"):
        fk.select_threshold([torch.ones(2), torch.ones(1)], 4)
    with pytest.raises(ValueError, match=r"k=-1 is negative"):
        fk.select_threshold(torch.ones(2), -1)
    with pytest.raises(ValueError, match=r"k=1, but there are no scores"):
        fk.select_threshold([], 1)
    assert fk.select_threshold([], 0) == fk.Threshold(math.inf, (), ())
    assert fk.compact([], fk.Threshold(math.inf, (), ())) == []


def test_integer_scores_are_refused() -> None:
    with pytest.raises(TypeError, match=r"scores\[1\] is torch.int64.*float32"):
        fk.select_threshold([torch.ones(2), torch.arange(3)], 1)


def test_compact_refuses_scores_that_are_not_the_thresholds(backend: str) -> None:
    scores = torch.arange(10.0)
    threshold = fk.select_threshold(scores, 3)
    with pytest.raises(ValueError, match=r"stands for 3 elements but the scores hold 5.*Call select_threshold again"):
        fk.compact(scores + 2, threshold)
    with pytest.raises(ValueError, match=r"greater_per_tensor has 1 entries but scores has 2"):
        fk.compact([scores, scores], threshold)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_histogram_counts_digits_under_a_prefix(backend: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    scores = [torch.randn(500, generator=generator, dtype=dtype), torch.empty(0, dtype=dtype)]
    scores[0][:3] = torch.tensor([math.nan, 0.0, -0.0])
    width, unsigned = (32, np.uint32) if dtype == torch.float32 else (64, np.uint64)
    values = np.sort(scores[0][1:].numpy() + 0)  # −0 + 0 = +0
    bits = values.view(unsigned)
    keys = np.where(values < 0, ~bits, bits | unsigned(1 << (width - 1)))
    assert (np.diff(keys.astype(object)) >= 0).all()  # the oracle's keys do order as the values

    top = fk.key_histogram(scores, shift=width - 8, bits=8)
    assert top.dtype == torch.int64
    assert top[-1] == 1
    np.testing.assert_array_equal(top[:-1].numpy(), np.bincount(keys >> unsigned(width - 8), minlength=256))

    prefix = int(top[:-1].argmax())
    member = keys >> unsigned(width - 8) == prefix
    digits = ((keys >> unsigned(width - 16)) & unsigned(255))[member]
    mask, prefix = np.array([0xFF << (width - 8), prefix << (width - 8)], unsigned).astype(np.int64).tolist()
    under = fk.key_histogram(scores, shift=width - 16, bits=8, prefix_mask=mask, prefix=prefix)
    assert under[-1] == 1
    np.testing.assert_array_equal(under[:-1].numpy(), np.bincount(digits.astype(np.int64), minlength=256))


def test_passes_per_device() -> None:
    """Every bit of a key is counted once, whatever the device."""
    from fishertune_kernels.select_threshold.search import _digits

    for device in ("cpu", "cuda"):
        for width in (32, 64):
            assert sum(_digits(width, device)) == width


def test_backend_was_the_forced_one(backend: str) -> None:
    fk.select_threshold(torch.ones(1), 1)
    module = dispatch.implementation("select_threshold", torch.device("cpu"), {torch.float32})
    assert module.__name__ == f"fishertune_kernels.select_threshold.{backend}"
