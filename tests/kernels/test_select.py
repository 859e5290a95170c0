"""The threshold and the selected set against numpy: ``partition`` for the value, a stable sort for which ties win."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fishertune_kernels as fk
from fishertune_kernels import dispatch
from fishertune_kernels.select_threshold import reference, search

TINY = np.float32(1e-45)  # the smallest denormal


@pytest.fixture
def sampling(monkeypatch: pytest.MonkeyPatch) -> list[search.Bracket]:
    """Small inputs are bracketed by a sample, too. Lists the brackets that were tried: a read of the scores each."""
    tried: list[search.Bracket] = []

    def brackets(*arguments: object) -> Iterator[search.Bracket]:
        for bracket in original(*arguments):
            tried.append(bracket)
            yield bracket

    original = search._brackets
    monkeypatch.setattr(search, "SMALL", 1)
    monkeypatch.setattr(search, "LARGEST_SHARE", 1.0)
    monkeypatch.setattr(search, "_brackets", brackets)
    return tried


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


@pytest.mark.parametrize("name", CASES)
def test_every_k_by_a_sample(backend: str, sampling: list, name: str) -> None:
    test_every_k(backend, name)


@pytest.mark.parametrize("small", [1, search.SMALL])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_list(
    backend: str, sampling: list, monkeypatch: pytest.MonkeyPatch, small: int, data: st.DataObject
) -> None:
    """Random bit patterns, so that every exponent appears, mixed with few values, so that ties do."""
    monkeypatch.setattr(search, "SMALL", small)
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


N, STRIDE = 40_000, search.sampling_stride(40_000)
LARGEST_SHARE = search.LARGEST_SHARE


def adversarial(name: str) -> torch.Tensor:
    """What makes a sample unlike the whole, or a bracket too full."""
    g = torch.Generator().manual_seed(7)
    ramp = torch.arange(float(N))
    return {
        "rising": ramp,
        "falling": -ramp,
        "clustered": torch.where((ramp // 2000) == 7, ramp, ramp % 2000 - 3000),  # the largest 5 % are neighbours
        "in step with the runs": torch.where(ramp % STRIDE == 0, ramp, -ramp),
        "in step with two runs": torch.where(ramp % (2 * STRIDE) < STRIDE, ramp, -ramp),
        "all equal": torch.full((N,), -0.5),
        "a mass of ties": torch.where(torch.rand(N, generator=g) < 0.9, 0.25, torch.rand(N, generator=g)),
        "few values": torch.randint(0, 4, (N,), generator=g).float(),
        "dead": torch.relu(torch.randn(N, generator=g)),  # half are zero
        "heavy tail": torch.randn(N, generator=g).pow(9),
        "infinities": torch.where(ramp % 3 == 0, math.inf, -math.inf),
    }[name]


@pytest.mark.parametrize(
    "name",
    ["rising", "falling", "clustered", "in step with the runs", "in step with two runs", "all equal", "a mass of ties",
     "few values", "dead", "heavy tail", "infinities"],
)  # fmt: skip
def test_a_sample_cannot_be_fooled(backend: str, sampling: list, name: str) -> None:
    scores = adversarial(name)
    for k in (1, 2, STRIDE, N // 20, N // 10, N // 2, N - 1, N):
        check_selection([scores], k)
    check_selection(list(scores.split([1, 17_000, 0, N - 17_001])), N // 20)


@pytest.mark.parametrize(
    "name", ["rising", "clustered", "in step with the runs", "in step with two runs", "heavy tail"]
)
@pytest.mark.parametrize("k", [1, 400, N // 20, N // 2])
def test_one_read_is_enough_for_the_usual(backend: str, sampling: list, name: str, k: int) -> None:
    fk.select_threshold(adversarial(name), k)
    assert len(sampling) == 1


@pytest.mark.parametrize(("name", "k"), [("all equal", N // 20), ("a mass of ties", N // 2), ("dead", 3 * N // 4)])
def test_ties_that_fill_a_bracket_are_counted_not_copied(backend: str, sampling: list, name: str, k: int) -> None:
    fk.select_threshold(adversarial(name), k)
    assert len(sampling) == 1
    assert sampling[0].low == sampling[0].high
    assert sampling[0].capacity == 0


def test_the_sample_errs_no_more_than_its_margin_allows() -> None:
    """The number of sampled scores among the k largest: mean k/stride, variance at most that of m independent draws."""
    g = torch.Generator().manual_seed(11)
    for k in (40, N // 20, N // 2):
        expected = k / STRIDE
        deviation = math.sqrt(expected * (1 - k / N))
        errors = []
        for _ in range(200):
            scores = torch.randperm(N, generator=g).float()
            drawn = reference.sample_scores([scores], STRIDE)
            errors.append((int((drawn >= N - k).sum()) - expected) / deviation)
        # The mean of 200 draws is right to 1/√200 = 0.07 deviations, their spread to 1/√400 = 5 %; four times that.
        assert abs(np.mean(errors)) < 4 * 0.071
        assert np.std(errors) < 1 + 4 * 0.05
        assert np.max(np.abs(errors)) < search.DEVIATIONS + 1


def test_every_element_is_as_likely_to_be_sampled() -> None:
    """Also in tensors shorter than a run, and in the last run of each."""
    sizes = [3, 10, 17, 25, 1] * 40
    drawn = reference.sample_scores([torch.ones(size) for size in sizes], 10)
    # One of ten elements; where 80 of 320 runs are short, the count varies by less than √80.
    assert abs(int((~drawn.isnan()).sum()) - sum(sizes) / 10) < 9


WRONG = {
    "above": search.Bracket(0xC0000000, 0xC1000000, 1000),  # 2 to 8
    "below": search.Bracket(0x80000001, 0x80100000, 1000),
    "one key": search.Bracket(0xBF800000, 0xBF800000, 0),
    "no room": search.Bracket(0x80000000, 0xC1000000, 999),
    "no room at all": search.Bracket(0x80000000, 0xC1000000, 0),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_bracket_costs_time_only(
    backend: str, sampling: list, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator, name: str
) -> None:
    scores = [torch.rand(1000, generator=generator), torch.rand(30, 40, generator=generator)]
    monkeypatch.setattr(search, "sampled_bracket", lambda *_: WRONG[name])
    for k in (1, 110, 1100):
        sampling.clear()
        check_selection(scores, k)
        assert len(sampling) == 2
        assert sampling[1].low == sampling[1].high


def test_a_crowded_bracket_is_not_tried(backend: str, sampling: list, monkeypatch: pytest.MonkeyPatch) -> None:
    """k at the border of two masses: one read by the radix search's key, not another that copies half of the scores."""
    monkeypatch.setattr(search, "LARGEST_SHARE", LARGEST_SHARE)
    scores = adversarial("few values")
    check_selection([scores], int((scores >= 2).sum()))
    assert [bracket.low == bracket.high for bracket in sampling] == [True]


def test_large_inputs_are_sampled(monkeypatch: pytest.MonkeyPatch, generator: torch.Generator) -> None:
    """The real limits: one read by the sample above SMALL, none below."""
    tried = []
    monkeypatch.setattr(
        search, "sampled_bracket", lambda *a, of=search.sampled_bracket: tried.append(of(*a)) or tried[-1]
    )
    scores = torch.rand(search.SMALL + 5, generator=generator)
    for k in (1, search.SMALL // 20, search.SMALL // 2):
        tried.clear()
        check_selection([scores], k)
        assert len(tried) == 1
        assert tried[0] is not None
    tried.clear()
    check_selection([scores[: search.SMALL - 1]], 1000)
    assert tried == []


def test_sampling_takes_any_layout(backend: str, sampling: list, generator: torch.Generator) -> None:
    scores = [
        torch.randn(50, 40, generator=generator).T,
        torch.randn(1, 30, generator=generator).expand(40, 30),
        torch.randn(4, 5, 6, 7, generator=generator).bfloat16().permute(3, 1, 0, 2),
        torch.randn(90, generator=generator).half()[::3],
        torch.empty(0, 3),
        torch.tensor(0.5),
    ]
    n = sum(tensor.numel() for tensor in scores)
    for k in (0, 1, n // 20, n // 2, n):
        check_selection(scores, k)


def test_nan_is_counted_by_the_sampling_search(backend: str, sampling: list) -> None:
    scores = torch.rand(5000)
    scores[::100] = math.nan
    for k in (0, 7, 2500, 5000):
        with pytest.raises(ValueError, match=r"50 of 5000 scores are NaN"):
            fk.select_threshold([scores, torch.empty(0)], k)


def score_inputs(dtype: torch.dtype, shapes: list[tuple[int, ...]]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    g = torch.Generator().manual_seed(13)
    return tuple([torch.rand(shape, generator=g).pow(4).to(dtype) for shape in shapes] for _ in range(2))


@pytest.mark.parametrize("kind", ["f", "delta_f", "dr_fim", "dr_fim_variational"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_scoring_and_selecting_in_one_pass(backend: str, sampling: list, kind: str, dtype: torch.dtype) -> None:
    """The same bits as the two calls, and no read of the scores after the pass that writes them."""
    shapes = [(90, 100), (0,), (41,), (5, 7, 9)]
    fisher, shifted = score_inputs(dtype, shapes)
    state = torch.float64 if dtype == torch.float64 else torch.float32
    ours, theirs = ([torch.full(shape, math.nan, dtype=state) for shape in shapes] for _ in range(2))
    for count, k in enumerate((500, 1, 4000, 9356, 0), start=1):
        options = {"count": count, "kind": kind, "c": 0.3 / count, "gamma": 0.5, "prior_precision": 2.0, "eps": 1e-3}
        threshold = fk.dr_fim_threshold_(ours, fisher, shifted, k, **options)
        used = len(sampling)
        fk.dr_fim_score_(theirs, fisher, shifted, **options)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        assert threshold == fk.select_threshold(theirs, k)
        fisher, shifted = shifted, fisher
        if dtype == torch.float32 and 1 < k < 9000:
            assert used == 0
        sampling.clear()


@pytest.mark.parametrize("name", WRONG)
def test_scoring_survives_a_wrong_bracket(
    backend: str, sampling: list, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(search, "sampled_bracket", lambda *_: WRONG[name])
    fisher, _ = score_inputs(torch.float32, [(50, 60), (700,)])
    scores = [torch.empty_like(tensor) for tensor in fisher]
    assert fk.dr_fim_threshold_(scores, fisher, None, 300, count=1, kind="f", c=0) == fk.select_threshold(fisher, 300)
    assert all(torch.equal(a, b) for a, b in zip(scores, fisher, strict=True))


def test_scoring_and_selecting_refuses_before_it_writes(backend: str) -> None:
    fisher, scores = torch.ones(5), torch.zeros(5)
    options = {"count": 1, "kind": "f", "c": 0.0}
    with pytest.raises(ValueError, match="k=6, but there are only 5 scores"):
        fk.dr_fim_threshold_(scores, fisher, None, 6, **options)
    with pytest.raises(ValueError, match="k=-1 is negative"):
        fk.dr_fim_threshold_(scores, fisher, None, -1, **options)
    with pytest.raises(ValueError, match="count=0 is out of range"):
        fk.dr_fim_threshold_(scores, fisher, None, 1, **{**options, "count": 0})
    assert not scores.any()
    fisher[2] = math.nan
    version = scores._version
    with pytest.raises(ValueError, match="1 of 5 scores are NaN"):
        fk.dr_fim_threshold_(scores, fisher, None, 1, **options)
    assert scores.isnan().sum() == 1 and scores._version > version
    assert fk.dr_fim_threshold_([], [], None, 0, **options) == fk.Threshold(math.inf, (), ())


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


def test_bracket_arguments_are_checked(backend: str) -> None:
    score = torch.ones(3)
    for changes, message in (
        ({"low": 7, "high": 6}, "low=7, high=6: expected 0 ≤ low ≤ high"),
        ({"high": 2**32}, "high=4294967296: expected"),
        ({"capacity": -1}, "capacity=-1 is negative"),
    ):
        with pytest.raises(ValueError, match=message):
            fk.collect_bracket(score, **{"low": 0, "high": 5, "capacity": 1, **changes})
    with pytest.raises(ValueError, match="scores is an empty list"):
        fk.collect_bracket([], low=0, high=5, capacity=1)
    with pytest.raises(TypeError, match=r"scores\[1\] is torch.float64; brackets are of 32-bit keys"):
        fk.collect_bracket([score, score.double()], low=0, high=5, capacity=1)


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
    with pytest.raises(ValueError, match=r"selects 0 \+ 11 elements of scores\[0\], which has 10"):
        fk.compact(scores, threshold._replace(greater_per_tensor=(0,), ties_kept_per_tensor=(11,)))
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
