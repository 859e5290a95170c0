"""The whole of Algorithm 1 on a small run: what it leaves behind, and that its delta is exact."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fishertune.cli import main
from fishertune.files import load_json, load_tensors, save_tensors
from fishertune.segmentation.datasets.base import Sample
from fishertune.selection import Selection
from fishertune.train.config import ConfigError, TuneConfig, save_config
from fishertune.train.data import BatchStream, InMemory
from fishertune.train.loop import NonFiniteLossError
from fishertune.train.pipeline import evaluate_folder, load_run, run
from fishertune.train.setup import build_backbone, build_context


@pytest.fixture
def finished(small_config, tmp_path, quiet):
    """A finished run and its folder."""
    return small_config, tmp_path / "run", run(small_config, tmp_path / "run", reporter=quiet)


def test_a_run_leaves_what_it_promises_and_an_exact_delta(finished, quiet, tmp_path):
    config, folder, metrics = finished
    assert {path.name for path in folder.iterdir()} == {
        "config.yaml", "scores.safetensors", "selection.safetensors", "delta.safetensors", "decoder.safetensors",
        "metrics.json", "pictures.safetensors", "report.html",
    }  # fmt: skip
    pretrained = build_backbone(config)
    total = sum(p.numel() for p in pretrained.parameters())
    # exactly round(5 % × backbone parameters), of the backbone and not of the candidates
    assert metrics["selection"]["selected"] == metrics["tuned_parameters"] == round(0.05 * total)
    selection = Selection.load(folder / "selection.safetensors")

    # weight decay, momentum, clipping and growth are on in the configuration: none may reach an unselected weight
    context = load_run(folder, quiet)
    moved = 0
    for name, tuned in context.model.backbone.named_parameters():
        before = pretrained.get_parameter(name)
        if name not in selection.indices:
            assert torch.equal(tuned, before), name
            continue
        mask = selection.mask(name)
        assert torch.equal(tuned[~mask], before[~mask]), name
        moved += int((tuned[mask] != before[mask]).sum())
    assert moved > 0.5 * len(selection)

    # the command line gives the same bits, and takes them off again
    public, tuned_file, back = (tmp_path / f"{name}.safetensors" for name in ("public", "tuned", "back"))
    save_tensors(public, pretrained.state_dict(), {})
    assert (
        main(["--quiet", "apply", str(folder / "delta.safetensors"), "--to", str(public), "--out", str(tuned_file)])
        == 0
    )
    weights = load_tensors(tuned_file)[0]
    assert all(torch.equal(weights[name], value) for name, value in context.model.backbone.state_dict().items())
    images = torch.randn(1, 3, 32, 64, generator=torch.Generator().manual_seed(0))
    rebuilt = build_context(config, quiet).model
    rebuilt.backbone.load_state_dict(weights)
    rebuilt.decode_head.load_state_dict(load_tensors(folder / "decoder.safetensors")[0])
    with torch.no_grad():
        assert torch.equal(rebuilt.eval()(images), context.model.eval()(images))
    undo = [
        "--quiet",
        "apply",
        str(folder / "delta.safetensors"),
        "--to",
        str(tuned_file),
        "--out",
        str(back),
        "--undo",
    ]
    assert main(undo) == 0
    restored = load_tensors(back)[0]
    assert all(torch.equal(restored[name], value) for name, value in pretrained.state_dict().items())
    assert main(undo) == 2  # the output exists: nothing is overwritten


def test_metrics_and_report_say_what_was_measured(finished):
    _, folder, metrics = finished
    assert load_json(folder / "metrics.json") == metrics
    assert set(metrics["domains"]) == {"source", "night"}
    assert metrics["unseen_mean"] == metrics["domains"]["night"]["miou"]
    assert metrics["domains"]["night"]["images"] == 3
    shares = metrics["selection"]["share_by_block_and_kind"]
    assert sum(shares.values()) == pytest.approx(1.0)
    assert set(shares) == {f"{block}.{kind}" for block in (0, 1) for kind in ("Q", "K", "V", "FFN")}
    assert sum(metrics["selection"]["term_shares"].values()) == pytest.approx(1.0)
    assert all(stage["seconds"] > 0 and stage["peak_memory_bytes"] > 1e7 for stage in metrics["stages"].values())
    assert len(metrics["curves"]["tuning"]["loss"]) == 4
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org", "")  # opens offline
    assert page.count("data:image/png;base64,") >= 3 * 4 + 3  # three pictures of four images, three figures
    assert "night" in page


def test_evaluating_a_finished_run_again_gives_the_same_numbers(finished, quiet, tmp_path):
    _, folder, metrics = finished
    assert evaluate_folder(folder, None, reporter=quiet)["domains"] == metrics["domains"]
    (tmp_path / "more.yaml").write_text("fog: {kind: scenes, domain: fog, count: 2, size: [32, 64]}\n")
    more = evaluate_folder(folder, ["night", str(tmp_path / "more.yaml")], reporter=quiet)
    assert list(more["domains"]) == ["night", "fog"]
    with pytest.raises(ConfigError, match=r"no such domain\. Domains: source, night"):
        evaluate_folder(folder, ["dusk"], reporter=quiet)


@pytest.mark.parametrize("method", ["full", "freeze", "random", "fisher"])
def test_every_method_runs_and_loads_back(small_config, tmp_path, quiet, method):
    config = replace(small_config, method=method, tune=replace(small_config.tune, growth=None))
    metrics = run(config, tmp_path / method, reporter=quiet)
    assert evaluate_folder(tmp_path / method, None, reporter=quiet)["domains"] == metrics["domains"]
    pretrained, tuned = build_backbone(config), load_run(tmp_path / method, quiet).model.backbone
    changed = sum(int((a != b).sum()) for a, b in zip(pretrained.parameters(), tuned.parameters(), strict=True))
    total = sum(p.numel() for p in pretrained.parameters())
    if method == "freeze":
        assert changed == 0
        assert metrics["tuned_parameters"] == 0
    elif method == "full":
        assert changed > 0.1 * total  # the blocks after the last feature get no gradient
    else:
        assert 0 < changed <= round(0.05 * total)


def test_bf16_accumulation_and_estimators_run(small_config, tmp_path, quiet):
    tune = replace(small_config.tune, precision="bf16", accumulate=2)
    estimate = replace(small_config.estimate, estimator="natural", labels="sampled", draw="scalar", c="abs")
    metrics = run(replace(small_config, tune=tune, estimate=estimate), tmp_path / "run", reporter=quiet)
    assert metrics["selection"]["selected"] == metrics["tuned_parameters"]


def test_estimation_from_single_images_uses_the_running_spread(small_config, tmp_path, quiet):
    estimate = replace(small_config.estimate, batch_size=1)
    with pytest.warns(UserWarning, match="batch of one; it uses the spread over all 3 samples so far"):
        metrics = run(replace(small_config, estimate=estimate), tmp_path / "run", reporter=quiet)
    assert metrics["selection"]["term_shares"]["domain"] > 0


def test_accumulating_two_batches_equals_one_of_twice_the_size(small_config, quiet):
    data = build_context(small_config, quiet).data.train
    config = replace(small_config.augment, flip=0.5)
    small = BatchStream(data, 2, seed=1, stage="s", config=config)
    large = BatchStream(data, 4, seed=1, stage="s", config=config)
    halves = [small.batch(0)[0], small.batch(1)[0]]
    whole = large.batch(0)[0]
    assert torch.equal(torch.cat([images for images, _ in halves]), whole[0])
    assert torch.equal(torch.cat([labels for _, labels in halves]), whole[1])


def test_samples_are_kept_within_their_budget_and_come_back_the_same(small_config, quiet):
    class Counting:
        classes = ("a",)
        reads = 0

        def __len__(self):
            return 4

        def __getitem__(self, index):
            Counting.reads += 1
            return Sample(
                torch.full((3, 2, 2), index, dtype=torch.uint8), torch.zeros(2, 2, dtype=torch.uint8), str(index)
            )

    kept = InMemory(Counting(), budget=2 * (12 + 4))  # room for two of the four
    names = [kept[i].name for _ in range(2) for i in range(4)]
    assert names == ["0", "1", "2", "3"] * 2
    assert Counting.reads == 4 + 2


def test_every_image_is_seen_once_an_epoch(small_config, quiet):
    data = build_context(small_config, quiet).data.train
    stream = BatchStream(data, 3, seed=1, stage="s", config=small_config.augment)
    epoch = [name for step in range(2) for name in stream.batch(step)[1]]
    assert sorted(epoch) == sorted(data[i].name for i in range(len(data)))
    other = [
        name
        for step in range(2)
        for name in BatchStream(data, 3, seed=2, stage="s", config=small_config.augment).batch(step)[1]
    ]
    assert epoch != other


# -- what can go wrong -------------------------------------------------------------------------------------------------


def test_a_folder_in_use_is_refused(small_config, tmp_path, quiet):
    out = tmp_path / "run"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"not empty\. Add --resume"):
        run(small_config, out, reporter=quiet)
    assert [path.name for path in out.iterdir()] == ["precious.txt"]
    with pytest.raises(ConfigError, match="is a file"):
        run(small_config, out / "precious.txt", reporter=quiet)


def test_resuming_with_another_configuration_is_refused(small_config, tmp_path, quiet):
    out = tmp_path / "run"
    out.mkdir()
    save_config(out / "config.yaml", small_config)
    other = replace(small_config, tune=replace(small_config.tune, lr=0.5))
    with pytest.raises(ConfigError, match=r"tune\.lr was 0\.001, now 0\.5"):
        run(other, out, resume=True, reporter=quiet)


def test_a_diverging_loss_stops_the_run_and_keeps_the_checkpoint(small_config, tmp_path, quiet):
    wild = replace(
        small_config, tune=TuneConfig(steps=40, batch_size=2, lr=1e30, head_lr=1e30, clip=None, weight_decay=0)
    )
    with pytest.raises(
        NonFiniteLossError, match=r"The loss became (nan|inf) at step \d+ of tuning .*Lower the learning rate"
    ):
        run(wild, tmp_path / "run", reporter=quiet)
    assert not (tmp_path / "run" / "delta.safetensors").exists()
    assert (tmp_path / "run" / "selection.safetensors").exists()


def test_unknown_names_suggest_the_nearest(small_config, tmp_path, quiet):
    for change, expected in (
        ({"method": "fishertun"}, "Did you mean fishertune"),
        ({"device": "gpu0"}, "use auto, cpu or cuda"),
        ({"backbone": replace(small_config.backbone, blocks=(99,))}, "There is no block 99"),
        ({"head": replace(small_config.head, kind="linaer")}, "Known: linear"),
    ):
        with pytest.raises(ValueError, match=expected):
            run(replace(small_config, **change), tmp_path / "run", reporter=quiet)
        assert not (tmp_path / "run").exists()  # nothing is written before everything is checked


def test_the_command_line_prints_one_line_for_what_people_can_mend(tmp_path, capsys):
    assert main(["run", str(tmp_path / "absent.yaml"), "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: Configuration file")
    assert "Traceback" not in message


def test_classes_the_source_never_shows_are_named(small_config, capsys):
    from fishertune.train.progress import Reporter

    build_context(small_config, Reporter())
    assert "the source domain never shows" in capsys.readouterr().err.replace("\n", " ")
