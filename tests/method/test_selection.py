"""Selection of exactly k elements against numpy's stable sort, files, and growth schedules."""

import math
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st

from fishertune.files import load_tensors, save_tensors
from fishertune.selection import Growth, PaperThreshold, Selection, budget, select


def scores_of(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {f"p{i}": torch.rand(shape, generator=generator) for i, shape in enumerate(shapes)}


def expected_flat(scores, k):
    """The first k of a stable descending sort: ties go to the lowest global flat index."""
    flat = np.concatenate([score.double().numpy().ravel() for score in scores.values()])
    return np.sort(np.argsort(-flat, kind="stable")[:k])


def chosen_flat(selection):
    offsets = np.cumsum([0] + [math.prod(shape) for shape in selection.shapes.values()])
    return np.concatenate([index.numpy() + offset for index, offset in zip(selection.indices.values(), offsets)])


@settings(deadline=None)  # a busy machine is no failure
@given(
    values=st.lists(st.sampled_from([-1.0, -0.0, 0.0, 1e-42, 0.5, 2.0]), min_size=1, max_size=40),
    cut=st.integers(0, 40),
    k=st.integers(0, 40),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_selects_the_first_k_of_a_stable_sort(values, cut, k, dtype):
    values = torch.tensor(values, dtype=dtype)
    scores = {"first": values[:cut], "second": values[cut:]}
    k = min(k, values.numel())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        selection = select(scores, k=k, allow_ties=True)
    np.testing.assert_array_equal(chosen_flat(selection), expected_flat(scores, k))
    assert len(selection) == selection.k == k
    for name, index in selection.indices.items():
        assert torch.equal(selection.scores[name], scores[name].float()[index.long()])


def test_the_budget_rounds_the_exact_product():
    assert budget(0.05, 304_199_680) == 15_209_984
    assert budget(0.05, 10) == 0  # 0.5 goes to the even integer
    assert budget(0.05, 30) == 2  # 1.5 too
    assert budget(0.35, 90) == 32  # 31.5 exactly; the product of floats is 31.499999999999996
    with pytest.raises(ValueError, match=r"0.05 is 5 %.*got 5"):
        budget(5, 100)


@settings(deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 10**9))
def test_the_budget_is_the_nearest_integer(parts, base):
    exact = Fraction(parts, 10_000) * base
    assert abs(budget(parts / 10_000, base) - exact) <= Fraction(1, 2)


def test_a_fraction_may_refer_to_more_parameters_than_are_scored():
    selection = select(scores_of((10, 10)), fraction=0.05, base=1000)
    assert (selection.k, selection.base, selection.numel()) == (50, 1000, 100)
    assert select(scores_of((10, 10)), fraction=0.05).k == 5


def test_non_candidates_are_never_selected():
    scores = scores_of((4, 5), (10,))
    scores["p0"][1:] = -math.inf
    selection = select(scores, k=15)
    assert selection.candidates == 15
    assert selection.indices["p0"].tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match=r"16 elements were asked for, but only 15 of 30 are candidates"):
        select(scores, k=16)


def test_parameters_without_selected_elements_stay_present():
    scores = {"low": torch.rand(5), "high": torch.rand(5) + 1, "none": torch.empty(0, 3)}
    selection = select(scores, k=2)
    assert list(selection.indices) == ["low", "high", "none"]
    assert selection.indices["low"].numel() == 0
    assert selection.shares() == {"low": 0.0, "high": 0.4, "none": 0.0}
    assert not selection.mask("low").any()


def test_masks_have_the_parameters_shape():
    scores = scores_of((3, 4), (5,))
    selection = select(scores, k=6)
    masks = {name: selection.mask(name) for name in scores}
    assert masks["p0"].shape == (3, 4) and sum(int(mask.sum()) for mask in masks.values()) == 6
    for name, mask in masks.items():
        assert torch.equal(scores[name][mask], selection.scores[name])
        assert (scores[name][~mask] < selection.threshold).all()
    with pytest.raises(ValueError, match="Did you mean 'p0'"):
        selection.mask("p00")


def test_non_contiguous_scores_are_ranked_by_logical_position():
    scores = {"transposed": torch.arange(12.0).view(3, 4).t()}
    selection = select(scores, k=1)
    assert selection.mask("transposed").nonzero().tolist() == [[3, 2]]


def test_nan_is_refused_with_its_parameter():
    scores = scores_of((4,), (4,))
    scores["p1"][2] = math.nan
    with pytest.raises(ValueError, match=r"1 scores are NaN \(1 in 'p1'\)"):
        select(scores, k=1)


def test_scores_that_rank_nothing_are_refused():
    zero = {"a": torch.zeros(10), "b": torch.zeros(10)}
    with pytest.raises(ValueError, match=r"best scores are zero: 20 elements tie for 3 places.*no gradient"):
        select(zero, k=3)
    with pytest.raises(ValueError, match=r"all equal 0\.25"):
        select({"a": torch.full((10,), 0.25)}, fraction=0.5)
    assert select(zero, k=3, allow_ties=True).indices["a"].tolist() == [0, 1, 2]
    assert len(select(zero, k=20)) == 20  # all of them: nothing is left to chance


def test_a_selection_filled_up_with_ties_warns():
    sparse = torch.zeros(100)
    sparse[:3] = torch.arange(1.0, 4.0)
    with pytest.warns(UserWarning, match="7 of 10 selected elements were taken by position from 97"):
        assert select({"a": sparse}, k=10).threshold == 0


def test_bad_arguments_are_refused():
    scores = scores_of((10,))
    with pytest.raises(ValueError, match="either fraction or k"):
        select(scores)
    with pytest.raises(ValueError, match="either fraction or k"):
        select(scores, fraction=0.1, k=1)
    with pytest.raises(ValueError, match="rounds to 0 elements"):
        select(scores, fraction=0.01)
    with pytest.raises(ValueError, match="negative"):
        select(scores, k=-1)
    with pytest.raises(ValueError, match="empty"):
        select({}, k=1)
    with pytest.raises(TypeError, match=r"'a' must be a floating-point tensor, got torch.int64"):
        select({"a": torch.arange(3)}, k=1)
    with pytest.raises(TypeError, match="dict of name"):
        select([torch.rand(3)], k=1)


@pytest.mark.parametrize("k", [0, 7])
def test_a_selection_survives_its_file(tmp_path, k):
    selection = select(scores_of((3, 4), (5,), seed=3), k=k, base=100)
    selection.save(tmp_path / "selection.safetensors")
    loaded = Selection.load(tmp_path / "selection.safetensors")
    assert list(loaded.indices) == list(selection.indices)
    for name in selection.indices:
        assert torch.equal(loaded.indices[name], selection.indices[name])
        assert torch.equal(loaded.scores[name], selection.scores[name])
    for key in ("shapes", "threshold", "k", "base", "candidates"):
        assert getattr(loaded, key) == getattr(selection, key)
    assert loaded.digest() == selection.digest()


def test_digests_tell_selections_apart():
    scores = scores_of((3, 4), (5,))
    digests = {select(scores, k=k).digest() for k in (3, 4)}
    digests.add(select({"p0": scores["p0"].view(4, 3), "p1": scores["p1"]}, k=3).digest())
    digests.add(select({"q": scores["p0"], "p1": scores["p1"]}, k=3).digest())
    assert len(digests) == 4


def _edit(name, change):
    def damage(tensors, metadata):
        tensors[name] = change(tensors[name])

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda tensors, metadata: metadata.update(format="other"), "holds no selection"),
        (lambda tensors, metadata: metadata.update(version=99), "version 99"),
        (lambda tensors, metadata: metadata.pop("base"), "'base' is missing"),
        (lambda tensors, metadata: tensors.pop("scores/p0"), "'scores/p0' is missing"),
        (lambda tensors, metadata: tensors.update(extra=torch.ones(1)), "unexpected tensor 'extra'"),
        (lambda tensors, metadata: metadata.update(k=3), "7 elements are listed, but k is 3"),
        (_edit("indices/p0", lambda index: index.flip(0)), "not ascending"),
        (_edit("indices/p0", lambda index: index + 12), "not ascending positions in shape"),
        (_edit("indices/p0", lambda index: index.float()), "torch.float32"),
        (_edit("scores/p0", lambda score: score[:-1]), "scores torch.float32 of shape"),
        (_edit("scores/p0", lambda score: score - 1), "below the threshold"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, damage, message):
    path = tmp_path / "selection.safetensors"
    select(scores_of((3, 4), (5,)), k=7).save(path)
    tensors, metadata = load_tensors(path)
    damage(tensors, metadata)
    save_tensors(path, tensors, metadata)
    with pytest.raises(ValueError, match=message):
        Selection.load(path)


def test_a_truncated_or_absent_file_is_refused(tmp_path):
    path = tmp_path / "selection.safetensors"
    with pytest.raises(FileNotFoundError):
        Selection.load(path)
    select(scores_of((30,)), k=7).save(path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="truncated"):
        Selection.load(path)


def active_counts(selection, schedule, steps):
    threshold = schedule.bind(selection)
    return [sum(int((score >= threshold(step)).sum()) for score in selection.scores.values()) for step in steps]


@pytest.mark.parametrize("shape", ["exponential", "linear", "constant"])
def test_growth_reaches_its_end_exactly(shape):
    selection = select(scores_of((40, 20), (200,)), fraction=0.1)
    counts = active_counts(selection, Growth(0.02, 0.1, 50, shape), range(60))
    assert counts[0] == (100 if shape == "constant" else 20)
    assert counts == sorted(counts)
    assert counts[49] < 100 or shape == "constant"
    assert counts[50:] == [100] * 10


def test_growth_follows_its_formula():
    growth = Growth(0.01, 0.05, 100)
    # the mirror of exp(−t/T), stretched so that it ends at 1
    for step in (1, 37, 99):
        rise = (1 - math.exp(-step / 100)) / (1 - math.exp(-1))
        assert growth.fraction(step) == pytest.approx(0.01 + 0.04 * rise, rel=1e-12)
    assert Growth(0.01, 0.05, 100, "linear").fraction(25) == pytest.approx(0.02, rel=1e-12)
    assert growth.fraction(100) == growth.fraction(1000) == 0.05
    # exactly, although start + (end − start) is not always end in floats
    assert 0.03 + (0.3 - 0.03) != 0.3 == Growth(0.03, 0.3, 7).fraction(7)


def test_growth_may_start_from_nothing():
    selection = select(scores_of((100,)), fraction=0.1)
    assert active_counts(selection, Growth(0.0, 0.1, 10, "linear"), (0, 1, 10)) == [0, 1, 10]


def test_elements_tied_at_the_threshold_join_together():
    scores = {"a": torch.tensor([5.0, 4, 4, 4, 3, 2, 1, 0, 0, 0])}
    selection = select(scores, fraction=0.6)
    assert active_counts(selection, Growth(0.2, 0.6, 4, "linear"), range(5)) == [4, 4, 4, 5, 6]


def test_a_schedule_must_fit_its_selection():
    selection = select(scores_of((100,)), fraction=0.1)
    with pytest.raises(ValueError, match=r"ends at 0.2 of 100 = 20 elements, but 10 are selected"):
        Growth(0.1, 0.2, 10).bind(selection)
    with pytest.raises(ValueError, match=r"lets 50 of 100 candidates.*only 10 are selected. Select with k=50"):
        PaperThreshold(0.5, 0.5, 10).bind(selection)
    with pytest.raises(ValueError, match="not be negative"):
        Growth(0.05, 0.1, 10).bind(selection)(-1)


def test_bad_schedules_are_refused():
    with pytest.raises(ValueError, match=r"start=0\.2, end=0\.1"):
        Growth(0.2, 0.1, 10)
    with pytest.raises(ValueError, match="steps=0"):
        Growth(0.1, 0.2, 0)
    with pytest.raises(ValueError, match="Did you mean 'linear'"):
        Growth(0.1, 0.2, 10, "liner")
    with pytest.raises(ValueError, match="quantiles"):
        PaperThreshold(0.99, 0.95, 10)
    with pytest.raises(ValueError, match="steps=-1"):
        PaperThreshold(0.95, 0.99, -1)


def test_paper_threshold_is_equation_16_on_quantiles():
    scores = scores_of((500,), (300,), seed=5)
    scores["p1"][:100] = -math.inf
    scores["p0"][::7] = scores["p0"][0].item()  # ties
    candidates = torch.cat([scores["p0"], scores["p1"][100:]]).numpy()
    selection = select(scores, k=400)
    # empirical distribution function among the candidates, literally
    quantile = (candidates[None, :] <= candidates[:, None]).mean(axis=1)
    steps, delta_min, delta_max = 20, 0.6, 0.95
    thresholds = [delta_min + (delta_max - delta_min) * math.exp(-min(t, steps) / steps) for t in range(25)]
    expected = [int((quantile > threshold).sum()) for threshold in thresholds]
    assert active_counts(selection, PaperThreshold(delta_min, delta_max, steps), range(25)) == expected
    assert expected[0] < expected[10] < expected[20] == expected[24]


def _select_sharded(rank, folder, full, k):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        rows = slice(0, 3) if rank == 0 else slice(3, None)
        shard = {name: score[rows] for name, score in full.items()}
        selection = select(shard, k=k, group=dist.group.WORLD, allow_ties=True)
        assert (selection.k, selection.base) == (k, sum(score.numel() for score in full.values()))
        torch.save({name: selection.mask(name) for name in full}, f"{folder}/masks{rank}.pt")
        for scores, message in (
            ({name: torch.zeros_like(score) for name, score in shard.items()}, "would be arbitrary"),
            ({name: score.where(score != full["b"][-1, -1], math.nan) for name, score in shard.items()}, "NaN"),
        ):
            with pytest.raises(ValueError, match=message):  # on every rank, or the others would wait for ever
                select(scores, k=k, group=dist.group.WORLD)
        if len(selection) < k:
            with pytest.raises(ValueError, match="one rank's share"):
                Growth(0.0, k / selection.base, 10).bind(selection)
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_select_what_one_does(tmp_path):
    generator = torch.Generator().manual_seed(0)
    full = {name: torch.rand(5, 4, generator=generator).mul(8).round() for name in "ab"}
    full["b"][-1, -1] = -1.0  # only there: this rank alone will hold NaN
    mp.spawn(_select_sharded, args=(str(tmp_path), full, 13), nprocs=2)
    masks = [torch.load(tmp_path / f"masks{rank}.pt") for rank in range(2)]
    whole = select(full, k=13, allow_ties=True)
    for name in full:
        assert torch.equal(torch.cat([mask[name] for mask in masks]), whole.mask(name))
