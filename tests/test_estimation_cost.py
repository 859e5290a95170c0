"""The estimation-cost study: its logic at toy sizes, and its measures against independent answers."""

import itertools
import json
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def study():
    """The command as a module, with its folder on the path as Python puts it for a script."""
    sys.path.insert(0, str(BENCHMARKS))
    import estimation_cost

    yield estimation_cost
    sys.path.remove(str(BENCHMARKS))
    for name in [name for name in sys.modules if name.split(".")[0] in ("estimation_cost", "fisher_study")]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def problem(study, tmp_path_factory):
    config = study.load_config(study.BUILT_IN, study.QUICK)
    return study.build(config, study.Reporter(quiet=True), tmp_path_factory.mktemp("problem"))


# The command ----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_a_quick_run_is_whole_and_a_second_one_computes_nothing(study, monkeypatch, tmp_path):
    arguments = ["--quick", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    labels = ("ours", "one by one", "natural", "local, antithetic")
    monkeypatch.setattr(study.cost, "CONTENDERS", {label: study.cost.CONTENDERS[label] for label in labels})
    study.main(arguments)
    written = {path.suffix: path for path in (tmp_path / "out").iterdir()}
    assert set(written) == {".json", ".md", ".png"}
    assert all(path.name.startswith("estimation-cost-tiny-quick-") for path in written.values())
    result = json.loads(written[".json"].read_text())

    nested, exact = result["overlap"]["exact, nested"], result["overlap"]["exact"]
    assert nested[-1] == {"images": 16, "overlap": 1.0, "overlap_all": 1.0, "spearman": 1.0}, "a sample against itself"
    assert [point["images"] for point in exact] == [8, 16]
    assert all(0.5 < point["overlap"] < inside["overlap"] for point, inside in zip(exact, nested))
    for settings in study.POSTERIORS:
        points = result["overlap"][settings.label]
        assert [point["images"] for point in points] == [8] and 0 <= points[0]["overlap"] <= 1
    assert set(result["spread"]["variants"]) == {"labels drawn from the model", "whole frames, no augmentation"}
    samples = result["spread"]["samples"]
    assert [len(samples[kind]["overlaps"]) for kind in ("disjoint", "nested", "pairs", "ceiling")] == [4, 4, 2, 1]
    assert samples["ceiling"]["overlaps"] == [exact[-1]["overlap"]]
    assert (
        exact[0]["overlap"] in samples["disjoint"]["overlaps"] and nested[0]["overlap"] in samples["nested"]["overlaps"]
    )
    assert set(result["cost"]) == {"plain", *labels}
    assert all(row["ratio"] > 0 and 0 < row["covered"] <= 1 for row in result["cost"].values()), result["cost"]
    assert str(BENCHMARKS.parent) not in written[".json"].read_text(), "no path of this machine"
    table = written[".md"].read_text()
    assert "| exact |" in table and "| one by one |" in table and "the ceiling" in table

    def forbidden(*_, **__):
        raise AssertionError("computed again")

    for module in (study.cost, sys.modules["fisher_study.estimates"]):
        for name in ("PerSampleSquares", "make_estimator", "Bench"):
            monkeypatch.setattr(module, name, forbidden, raising=False)
    study.main(arguments)
    again = json.loads(written[".json"].read_text())
    assert all(again[key] == result[key] for key in ("overlap", "spread", "cost"))
    with pytest.raises(SystemExit, match=r"warmup=.*Give another folder"):
        study.main([*arguments, "warmup.lr=0.5"])


@pytest.mark.filterwarnings("ignore")
def test_a_contender_that_computes_something_else_gets_no_figures(study, monkeypatch):
    def wrong(model, batch):
        right = study.cost.bench_fisher.one_by_one(model, batch)
        return lambda: {name: value * 1.01 for name, value in right().items()}

    monkeypatch.setitem(study.cost.CONTENDERS, "BackPACK", wrong)
    config = study.load_config(study.BUILT_IN, study.QUICK)
    row = study.cost.Bench(config, 2, 1, None).measure("BackPACK")
    assert set(row) == {"error"} and "BackPACK is wrong about backbone." in row["error"]


# What is estimated ----------------------------------------------------------------------------------------------------


def test_the_two_samples_share_no_frame(problem):
    names = {name: {stream.batch(i)[1][0] for i in range(24)} for name, stream in problem.samples.items()}
    assert len(names["reference"]) == len(names["estimate"]) == 12
    assert not names["reference"] & names["estimate"]
    assert names["reference"] == names["reference-whole"]


def test_candidates_are_the_methods_and_vectors_follow_the_parameters(problem):
    marks = {name: torch.full_like(p, i) for i, (name, p) in enumerate(problem.model.named_parameters())}
    vector = problem.flat({name: marks[name] for name in problem.names})
    back = problem.split(vector)
    assert all(bool((back[name.removeprefix("backbone.")] == marks[name]).all()) for name in problem.names)
    assert problem.candidates.sum() == problem.parts.n_candidates
    assert problem.k == round(0.05 * sum(p.numel() for p in problem.model.backbone.parameters()))
    missing = problem.flat({problem.names[0]: marks[problem.names[0]]})
    assert missing.isneginf().sum() == vector.numel() - marks[problem.names[0]].numel()


def test_squared_batches_are_the_squares_of_the_gradients_of_whole_batches(study, problem, monkeypatch):
    monkeypatch.setattr(sys.modules["fisher_study.estimates"], "SQUARED_BATCHES", (2, 4))
    found = {(label, used): values for label, used, values in study.squared_batches(problem, [4, 9], lambda _: None)}
    assert {used for _, used in found} == {4, 8}
    parameters = [dict(problem.model.named_parameters())[name] for name in problem.names]
    for size in (2, 4):
        expected = 0
        for first in range(0, 8, size):
            loss = problem.loss(problem.model, problem.images("estimate", first, first + size)).mean()
            grads = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
            expected = expected + torch.cat([grad.flatten() for grad in grads]).square()
        got = found[f"batch-squared, {size} images", 8]
        # fp32 gradients whose sums run in another order: 1e-6 of the largest element, and squares double it
        assert (got - expected).abs().max() < 1e-5 * expected.max()


def test_labels_are_drawn_anew_for_the_other_sample_and_again_after_a_resume(study, problem, tmp_path):
    """Two samples that share their random numbers would agree on more than the Fisher."""
    seeds, sums = [], []
    for sample in ("reference", "estimate", "reference"):
        exact = study.ExactSums(problem, tmp_path / str(len(seeds)), sample, [2], "sampled")
        exact.compute(lambda _: None)
        seeds.append(problem.loss.generator.initial_seed())
        sums.append(exact.sum(0, 2))
    assert seeds[0] == seeds[2] != seeds[1]
    assert torch.equal(sums[0], sums[2])
    truth = study.ExactSums(problem, tmp_path, "reference", [2], "empirical")
    truth.compute(lambda _: None)
    assert not torch.allclose(truth.sum(0, 2), sums[0], rtol=0.1)


def test_shrinking_keeps_what_rows_and_columns_say_and_borrows_less_from_more_images(study, problem):
    torch.manual_seed(0)
    total = torch.rand(problem.candidates.numel())
    views = problem.split(total)
    item = next(item for item in problem.parts if item.kind == "FFN" and item.view(views[item.name]).dim() == 2)
    outer = torch.outer(torch.rand(item.view(views[item.name]).shape[0]), torch.rand(views[item.name].shape[1]))
    item.view(views[item.name]).copy_(outer)
    few, many = (study.shrunk(problem, total, count) for count in (40, 4000))
    torch.testing.assert_close(item.view(problem.split(few)[item.name]), outer, msg="rank one stays what it is")
    assert torch.equal(few[~problem.candidates], total[~problem.candidates])
    fused = next(item for item in problem.parts if item.kind == "V" and item.view(views[item.name]).dim() == 2)
    before, after = fused.view(views[fused.name]), fused.view(problem.split(few)[fused.name])
    for dim in (0, 1):  # the product of the means has the same row and column means
        torch.testing.assert_close(after.mean(dim), before.mean(dim), rtol=1e-4, atol=0)
    product = before.mean(1, keepdim=True) * before.mean(0, keepdim=True) / before.mean()
    torch.testing.assert_close(after, (before + product) / 2, rtol=1e-4, atol=0)  # 40/(40+40)
    assert (many - total).abs().max() < 0.02 * (few - total).abs().max() + 1e-6


# How estimates are compared -------------------------------------------------------------------------------------------


def test_the_overlap_of_ties_is_the_mean_over_all_ways_to_break_them(study):
    compare = sys.modules["fisher_study.compare"]
    scores = torch.tensor([3.0, 1.0, 1.0, 1.0, 0.0, 1.0])
    reference = torch.tensor([5.0, 4.0, 0.0, 3.0, 2.0, 1.0])
    for k in range(1, 7):
        best = set(reference.topk(k).indices.tolist())
        overlaps = []
        for order in itertools.permutations(range(6)):  # every order in which equal scores can be ranked
            ranked = sorted(order, key=lambda i: -float(scores[i]))
            overlaps.append(len(best & set(ranked[:k])) / k)
        chances = compare.selection_chances(scores, k)
        assert float(chances.sum()) == pytest.approx(k)
        found = compare.expected_overlap(chances, compare.selection_chances(reference, k))
        assert found == pytest.approx(sum(overlaps) / len(overlaps), abs=1e-6)


def test_the_rank_correlation_is_spearmans(study):
    stats = pytest.importorskip("scipy.stats")
    torch.manual_seed(0)
    a = torch.randint(0, 20, (200,)).float()
    b = a + torch.randint(0, 15, (200,)).float()
    expected = stats.spearmanr(a.numpy(), b.numpy()).statistic
    assert sys.modules["fisher_study.compare"].rank_correlation(a, b) == pytest.approx(expected, abs=1e-9)


def test_a_few_heavy_images_count_as_few(study):
    size = sys.modules["fisher_study.compare"].effective_sample_size
    assert size(torch.ones(50)) == pytest.approx(50)
    assert size(torch.tensor([100.0] * 4 + [0.0] * 96)) == pytest.approx(4)


def test_features_of_other_models_come_from_the_same_heights(study):
    middle = sys.modules["fisher_study.problem"].middle_blocks
    assert middle(12) == (7, 9) and middle(24) == (15, 19) and middle(40) == (26, 32)
    config = study.load_config(study.BUILT_IN)
    backbone = study.with_model(config, "vit_tiny_patch16_224", None).backbone
    assert (backbone.name, backbone.blocks, backbone.weights) == ("vit_tiny_patch16_224", (7, 9), None)
