"""Operators that rank, select and touch selected elements."""

import numpy as np
import pytest
import torch
from interpreter_inputs import CANARY, FLOATS, SIZES, Fenced, assert_close, doubles, normal, positive

import fishertune_kernels as fk
from fishertune_kernels.select_threshold import reference as threshold_reference
from fishertune_kernels.select_threshold import search
from fishertune_kernels.sparse_adamw import reference as adamw_reference


def scores_with_ties(dtype, seed):
    scores = [torch.round(s * 4) / 4 for s in normal(SIZES, seed=seed)]
    scores[3][:100] = float("-inf")
    scores[3][100:120] = -0.0
    scores[3][120:125] = 1e-45
    return [s.to(dtype) for s in scores]


@pytest.fixture
def gpu_digits(monkeypatch):
    """The passes a GPU makes."""
    monkeypatch.setattr(search, "_digits", lambda width, device: (8,) * (width // 8))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("shift", "bits", "prefix_mask", "prefix"), [
    (24, 8, 0, 0), (16, 8, 0xFF000000, 0xBF000000), (0, 4, 0xFFFFFFF0, 0xBF800000), (21, 11, 0, 0), (31, 1, 0, 0),
])  # fmt: skip
def test_key_histogram(dtype, shift, bits, prefix_mask, prefix):
    scores = scores_with_ties(dtype, 20)
    scores[5][::1000] = float("nan")
    options = {"shift": shift, "bits": bits, "prefix_mask": prefix_mask, "prefix": prefix}
    counts = fk.key_histogram(scores, **options)
    assert torch.equal(counts, threshold_reference.key_histogram(scores, **options))
    assert counts[-1] == 10
    if not prefix_mask:
        assert counts.sum() == sum(s.numel() for s in scores)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("k", [0, 1, 137, 5000, 12000, sum(int(np.prod(s)) for s in SIZES)])
def test_threshold_and_compaction(gpu_digits, dtype, k):
    scores = scores_with_ties(dtype, 21)
    threshold = fk.select_threshold(scores, k)
    flat = torch.cat([s.double().flatten() for s in scores]).numpy()
    # numpy's stable sort of the negated scores: larger first, ties by index.
    chosen = np.sort(np.argsort(-flat, kind="stable")[:k])
    if k:
        assert threshold.value == np.partition(flat, flat.size - k)[flat.size - k]
    indices = fk.compact(scores, threshold)
    offsets = np.cumsum([0] + [s.numel() for s in scores])
    ours = np.concatenate([index.numpy() + offset for index, offset in zip(indices, offsets, strict=False)])
    assert np.array_equal(ours, chosen)
    assert all(index.dtype == torch.int32 for index in indices)


@pytest.mark.parametrize("stride", [1, 7, 64, 5000])
def test_sample(stride):
    from fishertune_kernels.select_threshold import triton as backend

    scores = [s.to(FLOATS[i % 3]) for i, s in enumerate(normal(SIZES, seed=23))]
    fence = Fenced()  # a draw behind a tensor gives the fence's value instead of NaN
    scores += [fence(score) for score in normal([(n,) for n in range(1, 40)], seed=24)]
    ours, expected = backend.sample_scores(scores, stride), threshold_reference.sample_scores(scores, stride)
    assert torch.equal(ours.nan_to_num(nan=-9.0), expected.nan_to_num(nan=-9.0))


@pytest.mark.parametrize(("dtypes", "shift"), [((torch.float32,), 0), (FLOATS, 1)])
@pytest.mark.parametrize(("low", "high"), [
    (0, 2**32 - 1), (0xBF800000, 0xBF800000), (0x80000000, 0x80000000), (0x40000000, 0xBF400000), (1, 2),
])  # fmt: skip
def test_collect_bracket(dtypes, low, high, shift):
    scores = [Fenced(shift)(s.to(dtypes[i % len(dtypes)])) for i, s in enumerate(scores_with_ties(torch.float32, 24))]
    scores[5][::1000] = float("nan")
    counts, expected = threshold_reference.collect_bracket(scores, low, high, 10**5)
    assert counts[5, 2] == 10
    for capacity in {len(expected), max(len(expected) - 1, 0), 0}:
        ours, candidates = fk.collect_bracket(scores, low=low, high=high, capacity=capacity)
        assert torch.equal(ours, counts)
        fits = capacity >= len(expected)
        assert torch.equal(candidates.sort().values, expected.sort().values if fits else expected[:0])


@pytest.mark.parametrize("kind", ["f", "dr_fim_variational"])
@pytest.mark.parametrize("low", [0xB8000000, 0x80000000])  # the key of the zeros behind a tensor, too
@pytest.mark.parametrize("dtype", FLOATS)
def test_scores_and_their_bracket_in_one_pass(dtype, kind, low):
    from fishertune_kernels.dr_fim_score import triton as backend

    fence = Fenced()
    fisher, shifted = positive(SIZES, dtype, seed=25), positive(SIZES, dtype, seed=26)
    scores = [fence(start) for start in positive(SIZES, seed=27)]
    apart = [score.clone() for score in scores]
    options, bracket = (2, kind, 0.7, 2.0, 1e-3, 1e-8), (low, 0xBA000000, 20_000)
    counts, candidates = backend.dr_fim_score_collect_(scores, fisher, shifted, *options, *bracket)
    backend.dr_fim_score_(apart, fisher, shifted, *options)
    assert all(torch.equal(a, b) for a, b in zip(scores, apart, strict=True))
    expected_counts, expected = threshold_reference.collect_bracket(apart, *bracket)
    assert torch.equal(counts, expected_counts)
    assert 0 < len(expected) <= 20_000 and torch.equal(candidates.sort().values, expected.sort().values)
    fence.check()


@pytest.mark.parametrize("k", [1, 300, 7000])
def test_a_sample_brackets_the_threshold(gpu_digits, monkeypatch, k):
    monkeypatch.setattr(search, "SMALL", 1)
    monkeypatch.setattr(search, "LARGEST_SHARE", 1)
    scores = normal(SIZES, seed=28)
    calls = []
    monkeypatch.setattr(search, "_brackets", lambda *a, of=search._brackets: (calls.append(b) or b for b in of(*a)))
    threshold = fk.select_threshold(scores, k)
    flat = torch.cat([s.flatten() for s in scores])
    assert threshold.value == flat.topk(k).values[-1].item() and threshold.n_greater + threshold.n_ties_kept == k
    assert len(calls) == 1 and calls[0].low < calls[0].high
    means = [torch.empty_like(s) for s in scores]
    assert fk.dr_fim_threshold_(means, scores, None, k, count=1, kind="f", c=0.0) == threshold


def test_compaction_of_mixed_dtypes_and_of_everything_equal(gpu_digits):
    scores = [torch.full((3000,), 0.5, dtype=dtype) for dtype in FLOATS]
    threshold = fk.select_threshold(scores, 4100)
    assert threshold.n_greater == 0 and threshold.ties_kept_per_tensor == (3000, 1100, 0)
    indices = fk.compact(scores, threshold)
    assert [index.tolist() for index in indices] == [list(range(3000)), list(range(1100)), []]


def test_compaction_writes_int64_indices_where_a_tensor_is_too_large_for_int32(monkeypatch):
    from fishertune_kernels.compact import triton as backend

    monkeypatch.setattr(backend, "_index_dtype", lambda numel: torch.int64 if numel >= 4096 else torch.int32)
    scores = normal(SIZES, seed=22)
    expected = fk.compact(scores, fk.select_threshold(scores, 2000))
    actual = backend.compact(scores, fk.select_threshold(scores, 2000))
    assert [index.dtype for index in actual[-3:]] == [torch.int64, torch.int32, torch.int64]
    assert all(torch.equal(a.long(), e.long()) for a, e in zip(actual, expected, strict=True))


def test_nothing_behind_the_scores_is_ranked(gpu_digits):
    """A fence behind every tensor would be its largest score."""
    fence = Fenced()
    scores = [fence(tensor) for tensor in scores_with_ties(torch.float32, 23)]
    assert max(float(tensor.max()) for tensor in scores if tensor.numel()) < CANARY
    threshold = fk.select_threshold(scores, 500)
    assert sum(len(index) for index in fk.compact(scores, threshold)) == 500
    assert int(fk.key_histogram(scores, shift=24, bits=8).sum()) == sum(tensor.numel() for tensor in scores)


def test_the_index_dtype_changes_behind_two_to_the_31():
    from fishertune_kernels.compact.triton import _index_dtype

    assert _index_dtype(2**31) == torch.int32  # the last index is 2³¹ − 1
    assert _index_dtype(2**31 + 1) == torch.int64


def selection(seed, fraction=0.3):
    """At most 1023 of a tensor but the largest: one element short of a whole chunk."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.rand(int(np.prod(size)), generator=generator) < fraction)
        .nonzero()
        .squeeze(1)[: 1023 if size != SIZES[-1] else None]
        .to(dtype)
        for size, dtype in zip(SIZES, [torch.int32, torch.int64] * 3, strict=True)
    ]


@pytest.mark.parametrize("master", [False, True])
@pytest.mark.parametrize("threshold", [None, 0.6, -1.0])  # -1: whatever a masked lane holds passes the gate
@pytest.mark.parametrize("dtype", FLOATS)
def test_sparse_adamw(dtype, threshold, master):
    gated = threshold is not None
    fence = Fenced()
    params = [fence(p) for p in normal(SIZES, dtype, seed=30)]
    original = [p.clone() for p in params]
    indices = selection(31)
    mean, square = [fence(torch.zeros(len(i))) for i in indices], [fence(torch.zeros(len(i))) for i in indices]
    scores = [torch.rand(len(i), generator=torch.Generator().manual_seed(32)) for i in indices]
    for s in scores:
        s[::10] = threshold if gated else 0.0  # equal to the threshold is active
    copies = [fence(p.flatten()[i.long()].float()) for p, i in zip(params, indices, strict=True)]
    wide = [doubles(tensors) for tensors in (params, mean, square, copies)]
    for step in (1, 2):
        grads = normal(SIZES, torch.float32 if step == 1 else dtype, seed=40 + step)
        options = {
            "lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-3, "weight_decay": 0.1, "step": step, "grad_scale": 0.5,
        }  # fmt: skip
        gate = {"active_threshold": threshold} if gated else {}
        fk.sparse_adamw_(
            params, grads, indices, mean, square, **options, **gate,
            scores=scores if gated else None, master=copies if master else None,
        )  # fmt: skip
        adamw_reference.sparse_adamw_(
            wide[0], doubles(grads), indices, wide[1], wide[2], **options, **gate,
            scores=doubles(scores) if gated else None, master=wide[3] if master else None,
        )  # fmt: skip
        if not master:  # the rounding of the weights is part of what the next step sees
            wide[0] = [torch.where(w == o, w, p.double()) for w, o, p in zip(wide[0], doubles(original), params,
                                                                             strict=True)]  # fmt: skip
    # Terms up to 0.2 cancel in the mean: a few of their roundings of 1e-8 stay.
    assert_close(mean, wide[1], atol=5e-8)
    assert_close(square, wide[2])
    # Ten roundings of weights near 1 and of steps near lr; half weights also round once a step.
    assert_close(params, wide[0], atol=1e-6)
    if master:
        assert_close(copies, wide[3], atol=1e-6)
        for p, i, c, s in zip(params, indices, copies, scores, strict=True):
            written = s >= threshold if gated else torch.ones_like(s, dtype=torch.bool)
            assert torch.equal(p.flatten()[i.long()][written], c.to(dtype)[written])
    for p, o, i, s in zip(params, original, indices, scores, strict=True):
        free = torch.zeros(p.numel(), dtype=torch.bool)
        free[i.long()[s >= threshold] if gated else i.long()] = True
        assert torch.equal(p.flatten()[~free], o.flatten()[~free])
        assert gated or not len(i) or (p.flatten()[free] != o.flatten()[free]).any()
    fence.check()


def test_sparse_adamw_with_everything_selected_follows_torch():
    param = torch.nn.Parameter(torch.randn(3000))
    ours, index = param.detach().clone(), torch.arange(3000, dtype=torch.int32)
    mean, square = torch.zeros(3000), torch.zeros(3000)
    optimizer = torch.optim.AdamW([param], lr=0.01, weight_decay=0.1)
    for step in range(1, 6):
        param.grad = torch.randn(3000)
        optimizer.step()
        fk.sparse_adamw_(
            ours, param.grad, index, mean, square, lr=0.01, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1, step=step
        )
    # Five steps of about ten float32 roundings of weights below 4.
    torch.testing.assert_close(ours, param.detach(), rtol=0, atol=5 * 10 * 4 * 2.0**-24)


@pytest.mark.parametrize("dtype", FLOATS)
def test_gather_and_scatter_move_bits(dtype):
    fence = Fenced()
    tensors, indices = [fence(t) for t in normal(SIZES, dtype, seed=50)], selection(51)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    tensors[5].view(bits)[:3000] = 0x7FF1  # in half precision a NaN with a payload
    before = [t.clone() for t in tensors]
    values = fk.gather_values(tensors, indices)
    for value, tensor, index in zip(values, tensors, indices, strict=True):
        assert torch.equal(value.view(bits), tensor.flatten()[index.long()].view(bits))
    fk.scatter_values_(tensors, indices, [value.flip(0) for value in values])
    for tensor, old, value, index in zip(tensors, before, values, indices, strict=True):
        expected = old.flatten().view(bits).clone()
        expected[index.long()] = value.flip(0).view(bits)
        assert torch.equal(tensor.flatten().view(bits), expected)
    fence.check()


def test_one_and_none_selected():
    param = torch.zeros(10)
    nothing, last = torch.empty(0, dtype=torch.int32), torch.tensor([9], dtype=torch.int32)
    options = {"lr": 1.0, "betas": (0.9, 0.999), "eps": 0.0, "weight_decay": 0.0, "step": 1}
    fk.sparse_adamw_(param, torch.ones(10), nothing, torch.empty(0), torch.empty(0), **options)
    assert not param.any()
    fk.sparse_adamw_(param, torch.ones(10), last, torch.zeros(1), torch.zeros(1), **options)
    # m̂ = v̂ = 1 up to rounding
    assert_close([param], [torch.tensor([0.0] * 9 + [-1.0])])
    assert fk.gather_values(param, nothing)[0].numel() == 0
