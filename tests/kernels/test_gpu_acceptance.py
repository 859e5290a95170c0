"""The GPU acceptance command: its logic runs on a CPU, sees what is wrong, goes on where it was cut, and never invents
a GPU figure."""

import dataclasses
import importlib.util
import json
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

import fishertune_kernels as fk

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from acceptance import compare, goals, measure, race, records, results, roofline, runner, supervise  # noqa: E402
from acceptance.operator import NotHere, Part  # noqa: E402
from acceptance.parts import OPERATORS, all_parts, cpu_parts, fisher, limits, profiles  # noqa: E402
from acceptance.records import Check, Launches, Limit, Timing  # noqa: E402
from acceptance.report import report  # noqa: E402

FIGURES = {"median_ms", "p10_ms", "p90_ms", "peak_gib", "per_second", "wall_ms", "kernel_ms", "launches", "kernels",
           "slowest", "found", "seconds"}  # fmt: skip


@pytest.fixture(scope="module")
def command():
    spec = importlib.util.spec_from_file_location("gpu_acceptance", BENCHMARKS / "gpu_acceptance.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def bench():
    return measure.Bench(torch.device("cpu"), seed=1, quick=True)


def only(command, monkeypatch, *parts):
    """Leaves these parts of the run."""
    monkeypatch.setattr(command, "all_parts", lambda: list(parts))


def written(folder):
    (path,) = folder.glob("*.json")
    return json.loads(path.read_text(encoding="utf-8"))


# The whole of it ------------------------------------------------------------------------------------------------------


def test_quick_run_goes_through_everything_and_gives_no_figures(command, tmp_path, capsys):
    assert command.main(["--quick", "--seed", "1", "--out", str(tmp_path)]) == 0
    content = written(tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]  # and no picture
    assert content["quick"] and content["seed"] == 1 and content["device"] == "cpu-quick"
    parts = content["parts"]
    assert list(parts) == [part.name for part in all_parts()]
    assert all(part["state"] == "done" for part in parts.values())

    found = [record for part in parts.values() for record in part["records"]]
    checked = {record["operator"] for record in found if record["kind"] == "check"}
    assert checked == {operator.name for operator in OPERATORS} | {fisher.NAME}
    assert {function for operator in OPERATORS for function in operator.functions} == {
        name for name in fk.__all__ if name not in ("Threshold", "precision_update_")
    }
    others = [record for record in found if record["kind"] == "timing" and record["role"] in ("rival", "variant")]
    assert sum(record["role"] == "rival" for record in others) > 15
    assert [(record["work"], record["who"]) for record in others if record["note"].startswith("wrong")] == []

    entries = [content, *parts.values(), *found, *content["goals"]]
    assert not [(key, value) for entry in entries for key, value in entry.items() if key in FIGURES and value]
    assert all(goal["state"] == "not run" for goal in content["goals"])
    output = capsys.readouterr().out
    assert "no GPU was measured" in output and " ms" not in output


@pytest.mark.parametrize("mistake", ["a wrong value", "an element not written", "other bits the second time"])
def test_a_wrong_kernel_is_seen(command, monkeypatch, tmp_path, capsys, mistake):
    right, calls = fk.gaussian_perturb, 0

    def wrong(*arguments, **options):
        nonlocal calls
        calls += 1
        perturbed = right(*arguments, **options)
        last = perturbed[-1].view(-1)
        if mistake == "a wrong value":
            last[-1] += 0.1
        elif mistake == "an element not written":
            last[-1] = torch.empty(1, dtype=last.dtype)[0]
        elif calls % 2:
            last[-1] = torch.nextafter(last[-1], last[-1] + 1)
        return perturbed

    monkeypatch.setattr(fk, "gaussian_perturb", wrong)
    perturb = next(operator for operator in OPERATORS if operator.name == "gaussian_perturb")
    accumulate = next(operator for operator in OPERATORS if operator.name == "squared_grad_accumulate_")
    only(command, monkeypatch, perturb.checks(), accumulate.checks())
    assert command.main(["--quick", "--seed", "3", "--out", str(tmp_path)]) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if "WRONG" in line]
    assert lines and all(line.startswith("gaussian_perturb") for line in lines)
    checks = [record for part in written(tmp_path)["parts"].values() for record in part["records"]]
    failed = [check for check in checks if not records.from_json(check).passed]
    assert failed and {check["operator"] for check in failed} == {"gaussian_perturb"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so_and_writes_nothing(command, tmp_path):
    with pytest.raises(SystemExit, match=r"no CUDA device.*--quick"):
        command.main(["--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_operators_that_would_not_run_their_gpu_kernels_are_refused(command):
    command._require_gpu_kernels({"compact": "triton", "select_threshold": "cuda"})
    with pytest.raises(SystemExit, match=r"compact \(reference\)"):
        command._require_gpu_kernels({"compact": "reference", "values": "triton"})


# Cut, failed, resumed -------------------------------------------------------------------------------------------------


def right(name):
    return Check(name, "case", 0.5, True)


def test_an_interrupted_run_goes_on_without_repeating_what_is_done(command, monkeypatch, tmp_path):
    ran = []

    def part(name, interrupt=False):
        def run(bench):
            ran.append(name)
            yield right(name)
            if interrupt and ran.count(name) == 1:
                raise KeyboardInterrupt
            yield right(name)

        return Part(name, 1, run)

    only(command, monkeypatch, part("a"), part("b", interrupt=True), part("c"))
    assert command.main(["--quick", "--seed", "7", "--out", str(tmp_path)]) == supervise.INTERRUPTED
    states = {name: (found["state"], len(found["records"])) for name, found in written(tmp_path)["parts"].items()}
    assert states == {"a": ("done", 2), "b": ("cut", 1)}

    assert command.main(["--quick", "--out", str(tmp_path)]) == 0  # the file's seed, not a new one
    assert ran == ["a", "b", "b", "c"]
    content = written(tmp_path)
    assert content["seed"] == 7
    assert {name: len(found["records"]) for name, found in content["parts"].items()} == {"a": 2, "b": 2, "c": 2}

    assert command.main(["--quick", "--out", str(tmp_path)]) == 0
    assert len(ran) == 4
    assert command.main(["--quick", "--out", str(tmp_path), "--fresh"]) == 0
    assert len(ran) == 7


@pytest.mark.parametrize("what", ["commit", "sources", "device", "seed"])
def test_only_the_same_code_on_the_same_card_is_continued(tmp_path, what):
    about = {
        "device": "card",
        "date": "2026-01-02T03:04:05",
        "commit": "abc",
        "sources": "123",
        "quick": False,
        "seed": 1,
    }
    first = results.Results.open(tmp_path, about, None, fresh=False)
    first.put("a", results.Outcome("done"))
    assert results.Results.open(tmp_path, {**about, "date": "2026-01-03"}, 1, fresh=False).settled("a")
    other = {**about, what: 2 if what == "seed" else "other"}
    assert not results.Results.open(tmp_path, other, 2 if what == "seed" else None, fresh=False).parts


def test_changed_code_is_other_code(monkeypatch, tmp_path):
    monkeypatch.setattr(results, "ROOT", tmp_path)
    (tmp_path / "kernels").mkdir()
    source = tmp_path / "kernels" / "a.py"
    source.write_text("x = 1\n")
    before = results.sources()
    source.write_text("x = 2\n")
    assert results.sources() != before


def test_a_part_that_explodes_is_recorded_and_stops_no_other(command, monkeypatch, tmp_path, capsys):
    ran = []

    def explode(bench):
        ran.append("bad")
        yield right("bad")
        raise RuntimeError("ptxas: too many registers\nsecond line")

    def fine(bench):
        ran.append("good")
        yield right("good")

    only(command, monkeypatch, Part("bad", 1, explode), Part("good", 1, fine))
    assert command.main(["--quick", "--out", str(tmp_path)]) == 1
    parts = written(tmp_path)["parts"]
    assert parts["bad"]["state"] == "failed" and parts["good"]["state"] == "done"
    assert parts["bad"]["note"] == "RuntimeError: ptxas: too many registers"
    assert "in explode" in parts["bad"]["traceback"]
    assert any(line.startswith("bad") and "ptxas" in line for line in capsys.readouterr().out.splitlines())

    assert command.main(["--quick", "--out", str(tmp_path)]) == 1  # a failure stays one
    assert ran == ["bad", "good"]
    assert command.main(["--quick", "--out", str(tmp_path), "--retry"]) == 1
    assert ran == ["bad", "good", "bad"]


def test_a_part_without_time_is_listed_and_smaller_ones_still_run(bench):
    def run(bench):
        yield right("x")

    def slow(bench):
        for _ in range(50):
            time.sleep(0.02)
            yield right("slow")

    found = results.Results(None, {"quick": True})
    parts = [Part("large", 100, run), Part("small", 0, run), Part("longer than it said", 0, slow)]
    runner.run_parts(parts, bench, found, time.time() + 0.3)
    states = {name: outcome.state for name, outcome in found.parts.items()}
    assert states == {"large": "not run", "small": "done", "longer than it said": "cut"}
    assert "100 s" in found.parts["large"].note
    assert 0 < len(found.parts["longer than it said"].records) < 50
    assert "large" in report(found, [])


def test_what_a_machine_cannot_run_is_no_failure(bench):
    def run(bench):
        raise NotHere("needs 20 GiB of free GPU memory, 10 are")
        yield

    found = results.Results(None, {"quick": True})
    runner.run_parts([Part("big", 1, run)], bench, found, time.time() + 60)
    assert found.parts["big"].state == "not run" and runner.all_right(found)


def test_a_lost_device_ends_the_process_after_the_failure_is_written(bench, monkeypatch):
    def run(bench):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
        yield

    monkeypatch.setattr(runner, "_answers", lambda bench: False)
    found = results.Results(None, {"quick": True})
    with pytest.raises(runner.DeviceLost):
        runner.run_parts([Part("bad", 1, run), Part("next", 1, run)], bench, found, time.time() + 60)
    assert {name: outcome.state for name, outcome in found.parts.items()} == {"bad": "failed"}


WORKER = """
    import json, os, signal, sys, time
    path, deed = sys.argv[1:]
    content = json.load(open(path))
    parts = content["parts"]
    for name in "abc":
        if name in parts and parts[name]["state"] in ("done", "failed"):
            continue
        parts[name] = {"state": "running", "records": []}
        json.dump(content, open(path + ".new", "w")); os.replace(path + ".new", path)
        if name == "b" and deed == "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        if name == "b" and deed == "hang":
            time.sleep(600)
        parts[name]["state"] = "done"
        json.dump(content, open(path + ".new", "w")); os.replace(path + ".new", path)
    sys.exit(0)
"""


@pytest.mark.parametrize(("deed", "note"), [("segfault", "SIGSEGV"), ("hang", "hung")])
def test_a_part_that_kills_its_process_costs_itself_only(tmp_path, deed, note):
    worker, path = tmp_path / "worker.py", tmp_path / "card-2026-01-01-abc.json"
    worker.write_text(textwrap.dedent(WORKER))
    results.Results(path, {"quick": False}).write()
    command = [sys.executable, str(worker), str(path), deed]
    assert supervise.supervise(command, path, dict.fromkeys("abc", 0.1), time.time() + 60, patience=1.5) == 0
    parts = results.Results.read(path).parts
    assert {name: outcome.state for name, outcome in parts.items()} == {"a": "done", "b": "failed", "c": "done"}
    assert note in parts["b"].note


def test_a_part_that_runs_over_the_whole_time_is_cut_and_not_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(supervise, "GRACE", 1.0)
    worker, path = tmp_path / "worker.py", tmp_path / "card-2026-01-01-abc.json"
    worker.write_text(textwrap.dedent(WORKER))
    results.Results(path, {"quick": False}).write()
    command = [sys.executable, str(worker), str(path), "hang"]
    assert supervise.supervise(command, path, dict.fromkeys("abc", 100), time.time() + 1) == 0
    assert {name: outcome.state for name, outcome in results.Results.read(path).parts.items()} == {
        "a": "done",
        "b": "cut",
    }


def test_the_parts_run_in_a_process_of_their_own(command, tmp_path, capsys):
    assert command.main(["--cpu", "--minutes", "0", "--out", str(tmp_path)]) == 0
    parts = written(tmp_path)["parts"]
    assert list(parts) == [part.name for part in cpu_parts()]
    assert {part["state"] for part in parts.values()} == {"not run"}
    assert "goes on with the rest" in capsys.readouterr().out


def test_a_worker_that_cannot_even_start_is_not_started_for_ever(tmp_path):
    path = tmp_path / "card.json"
    results.Results(path, {"quick": False}).write()
    with pytest.raises(SystemExit, match="does not come further"):
        supervise.supervise([sys.executable, "-c", "raise SystemExit(5)"], path, {"a": 1}, time.time() + 60)


# Races ----------------------------------------------------------------------------------------------------------------


def work(**rivals):
    def ours(problem):
        return lambda: [problem * 2]

    return race.Work(
        "double", "it", "4 elements", lambda: torch.arange(4.0), lambda: torch.arange(8.0), ours, compare.wrong,
        rivals, n_bytes=1, flops=1,
    )  # fmt: skip


def test_a_rival_is_timed_only_if_its_answer_is_ours(bench):
    def absent(problem):
        raise ModuleNotFoundError("No module named 'x'", name="x")

    def too_large(problem):
        raise torch.OutOfMemoryError("CUDA out of memory")

    found = race.race(
        bench,
        work(
            right=lambda p: lambda: [p + p], wrong=lambda p: lambda: [p * 3], absent=absent, large=too_large,
            broken=lambda p: lambda: [p @ torch.ones(3)],
        ),
    )  # fmt: skip
    by_name = {timing.who: timing for timing in found}
    assert by_name["ours"].median_ms > 0 and by_name["right"].median_ms > 0
    assert by_name["wrong"].median_ms is None and by_name["wrong"].note.startswith("wrong: off by inf")
    assert by_name["absent"].note == "not installed: x"
    assert by_name["large"].note == "out of memory"
    assert by_name["broken"].note.startswith("RuntimeError") and by_name["broken"].median_ms is None


@pytest.mark.parametrize("off", [2.0, float("nan")])
def test_a_rival_beyond_the_tolerance_has_no_time(bench, off):
    strict = dataclasses.replace(work(rival=lambda p: lambda: [p + p]), differs=lambda actual, expected: off)
    (rival,) = [timing for timing in race.race(bench, strict) if timing.role == "rival"]
    assert rival.median_ms is None and rival.note.startswith("wrong")


def test_an_error_of_ours_is_an_error(bench):
    def out_of_memory(problem):
        raise torch.OutOfMemoryError("CUDA out of memory")

    broken = race.Work("x", "x", "x", lambda: 0, lambda: 0, out_of_memory, compare.wrong)
    with pytest.raises(torch.OutOfMemoryError):
        list(race.race(bench, broken))


def test_a_variant_replaces_the_tiles_of_its_own_calls_only(bench):
    pytest.importorskip("triton")
    from fishertune_kernels.compact import triton as module

    seen, before = [], dict(module.CONFIG)

    def ours(problem):
        return lambda: seen.append(dict(module.CONFIG)) or [problem]

    (variant,) = race.tiles("compact", ours, [{"BLOCK": 64, "num_stages": 2}]).values()
    variant(torch.ones(1))()
    ours(torch.ones(1))()
    assert seen == [{**before, "BLOCK": 64, "num_stages": 2}, before] and before == module.CONFIG


# Right or wrong -------------------------------------------------------------------------------------------------------


def test_errors_are_measured_against_the_tolerance():
    one = torch.ones(3)
    assert compare.error([one], [one.double()]) == 0
    assert compare.error([one + 1e-3], [one.double()], atol=1e-2) == pytest.approx(0.1, rel=1e-3)
    assert compare.error([torch.tensor([1.0, float("nan")])], [torch.ones(2)]) == float("inf")
    assert compare.error([torch.empty(0)], [torch.empty(0)]) == 0
    assert compare.of_largest(0.1)([one * 1.05], [one]) == pytest.approx(0.5, rel=1e-4)
    assert compare.of_largest(0.1)([one * float("nan")], [one]) == float("inf")


def test_outputs_are_allocated_over_nan_while_a_check_runs():
    empty = compare.Case("x", lambda: [torch.empty(64)], lambda actual: 0.0 if actual[0].isnan().all() else 2.0)
    assert compare.check("x", empty).passed
    assert not torch.are_deterministic_algorithms_enabled()


def test_same_bits_tells_zeros_and_nans_apart():
    zero = torch.zeros(2)
    assert compare.same_bits([zero], [zero.clone()])
    assert not compare.same_bits([zero], [-zero])
    assert compare.same_bits([zero / 0], [zero / 0])


@pytest.mark.parametrize("layout", compare.LAYOUTS)
def test_layouts_keep_the_values(layout):
    tensors = [torch.randn(3, 4), torch.randn(0), torch.randn(1)]
    for laid in (compare.read_only(tensors, layout), compare.written(tensors, layout)):
        assert all(torch.equal(a, b) for a, b in zip(laid, tensors, strict=True))
    strided, shifted = compare.read_only(tensors, "strided")[0], compare.written(tensors, "unaligned")[0]
    assert not strided.is_contiguous() and shifted.is_contiguous() and shifted.data_ptr() % 16


def test_data_depend_on_the_seed_and_the_part_alone(bench):
    bench.reseed("a part")
    first = bench.normal((5,))
    bench.normal((7,))
    bench.reseed("a part")
    assert torch.equal(bench.normal((5,)), first)
    bench.reseed("another")
    assert not torch.equal(bench.normal((5,)), first)


# Goals and pictures, on invented figures ------------------------------------------------------------------------------


def facts(copy=1e12, **changes):
    """A run that meets every goal, except for ``changes``: factors on the time of ours, by operator."""
    found = [Limit(limits.COPY, "", copy), Limit(limits.PRODUCT, "", 1e15)]
    operators = {operator for operator, _ in goals.STREAMS}
    operators |= {"select_threshold", "sparse_adamw_", "per_sample_squared_grad_", fisher.NAME}
    found += [right(operator) for operator in sorted(operators)]

    def timing(operator, work, who, role, ms, n_bytes=None, flops=None):
        slower = changes.get(operator.strip("_").replace(" ", "_"), 1) if role == "ours" else 1
        found.append(
            Timing(operator, work, "invented", who, role, n_bytes, flops, median_ms=ms * slower, p10_ms=ms, p90_ms=ms)
        )

    for operator, name in goals.STREAMS:
        timing(operator, name, "ours", "ours", 10, 0.9 * 10e-3 * 1e12, 1e9)
    timing("select_threshold", "5 %", "ours", "ours", 3, 2.5e-3 * 1e12, 1e9)
    timing("select_threshold", "5 %", "torch.topk", "rival", 120)
    timing("sparse_adamw_", "bf16 random 5 %", "ours", "ours", 2, 1e9, 1e8)
    timing("sparse_adamw_", "bf16 random 5 %", "torch fused AdamW, dense", "baseline", 10)
    for model in ("ViT-L", "SAM-H"):
        for layer in ("qkv", "proj", "fc1", "fc2"):
            timing("per_sample_squared_grad_", f"{model} {layer} bf16", "ours", "ours", 1, 1e8, 7e11)
            timing("per_sample_squared_grad_", f"{model} {layer} bf16", "weight gradient", "baseline", 0.7)
    for name in ("bf16 autocast", "fp32"):
        timing(fisher.NAME, name, "ours", "ours", 120)
        timing(fisher.NAME, name, fisher.PLAIN, "baseline", 100)
        timing(fisher.NAME, name, "one by one", "rival", 400)
        found.append(Timing(fisher.NAME, name, "invented", "vmap(grad)", "rival", note="out of memory"))
    found.append(Launches("sparse_adamw_", "two dtypes", 2, launches=2, kernels={"sparse_adamw_kernel": 2}))
    return found


def states(found):
    return {verdict.goal: verdict.state for verdict in goals.judge(found)}


def test_goals_are_met_by_figures_that_meet_them():
    assert set(states(facts()).values()) == {goals.PASS}
    fisher_notes = [verdict.note for verdict in goals.judge(facts()) if "Fisher" in verdict.goal]
    assert all("one by one 4.00 ×" in note and "vmap(grad) out of memory" in note for note in fisher_notes)


@pytest.mark.parametrize(
    ("operator", "part_of_name"),
    [
        ("squared_grad_accumulate", "squared_grad_accumulate_: share"),
        ("gaussian_perturb", "gaussian_perturb: share"),
        ("precision_update_sgvb", "precision_update_sgvb_: share"),
        ("select_threshold", "threshold of 632 M"),
        ("sparse_adamw", "sparse step"),
        ("per_sample_squared_grad", "per-sample squares"),
        ("Fisher_pass", "exact Fisher"),
    ],
)
def test_a_slower_kernel_falls_short_of_its_goal_only(operator, part_of_name):
    short = {goal for goal, state in states(facts(**{operator: 1.4})).items() if state == goals.SHORT}
    assert short and all(part_of_name in goal for goal in short)


def test_the_slowest_layer_decides():
    slow = Timing("per_sample_squared_grad_", "ViT-L proj bf16", "invented", "ours", "ours", median_ms=1.4)
    short = {goal for goal, state in states([*facts(), slow]).items() if state == goals.SHORT}
    assert short == {"per-sample squares, ViT-L: share of cuBLAS's weight-gradient rate"}


def test_a_fast_wrong_kernel_reaches_no_goal():
    found = [*facts(), Check("sparse_adamw_", "bf16", 3.0, True)]
    assert states(found)["sparse step, bf16, random 5 %: torch fused AdamW's time / ours"] == goals.SHORT
    unchecked = [record for record in facts() if not (isinstance(record, Check) and record.operator == fisher.NAME)]
    assert {state for goal, state in states(unchecked).items() if "exact Fisher" in goal} == {goals.NOT_RUN}


def test_goals_without_figures_are_not_run_and_say_why():
    verdicts = goals.judge([])
    assert {verdict.state for verdict in verdicts} == {goals.NOT_RUN}
    assert all(verdict.note and verdict.found is None for verdict in verdicts)
    without_copy = [record for record in facts() if not isinstance(record, Limit)]
    notes = {verdict.goal: verdict.note for verdict in goals.judge(without_copy)}
    assert "copy bandwidth" in notes["gaussian_perturb: share of the measured copy bandwidth"]


def test_one_launch_too_many_falls_short():
    found = [*facts(), Launches("dr_fim_score", "two dtypes", 2, launches=5, kernels={})]
    (verdict,) = [verdict for verdict in goals.judge(found) if "launches" in verdict.goal]
    assert verdict.state == goals.SHORT and verdict.found == 2.5 and "dr_fim_score" in verdict.note


def test_the_picture_shows_every_timed_work_under_the_roofs(tmp_path):
    pytest.importorskip("matplotlib")
    about = {"device": "Invented_Card", "date": "2026-01-01", "commit": "abc"}
    png = roofline.draw(facts(), about)
    assert png.startswith(b"\x89PNG") and len(png) > 10_000
    drawn = [point for point in roofline.points(facts()) if point[0].startswith("sparse_adamw_")]
    assert drawn == [("sparse_adamw_, invented", 0.1, pytest.approx(5e10))]
    assert roofline.draw([record for record in facts() if not isinstance(record, Limit)], about) is None


def test_tables_of_a_full_run(tmp_path):
    found = results.Results(None, {"quick": False})
    variants = [Timing("double", "it", "4", who, "variant", median_ms=ms) for who, ms in (("a", 3.0), ("b", 1.0))]
    profile = profiles.summary("a pass", [("gemm", 2.0), ("gemm", 1.0), ("add", 0.5)], 5.0)
    found.parts["all"] = results.Outcome("done", records=[*facts(), *variants, profile])
    found.parts["late"] = results.Outcome("not run", note="takes about 9 s, 3 s were left")
    text = report(found, goals.judge(found.records()))
    lines = text.splitlines()
    assert any("double" in line and line.rstrip().endswith("wins") and " b " in line for line in lines)
    assert "a pass: 3 launches, kernels 3.500 ms of 5.000 ms" in lines
    assert any(line.startswith("gemm") and "3.000" in line for line in lines)
    assert any(line.startswith("late") and "not run" in line for line in lines)
    assert any(line.startswith("gaussian_perturb") and "90%" in line for line in lines)
    assert lines[-1].startswith("launches per group")  # the goals come last


def test_records_survive_the_file():
    for record in [*facts(), profiles.summary("x", [("a", 1.0)], 2.0)]:
        entry = json.loads(json.dumps(records.to_json(record)))
        assert records.from_json(entry) == record


def test_kernels_are_told_from_copies_and_annotations():
    from torch.autograd import DeviceType
    from torch.autograd.profiler_util import FunctionEvent

    def event(name, device, annotation=False):
        return FunctionEvent(
            id=0, name=name, thread=0, start_us=10.0, end_us=25.0, device_type=device, is_user_annotation=annotation
        )

    events = [
        event("sparse_adamw_kernel", DeviceType.CUDA),
        event("Memcpy HtoD (Pageable -> Device)", DeviceType.CUDA),
        event("Memset (Device)", DeviceType.CUDA),
        event("ProfilerStep*", DeviceType.CUDA, annotation=True),
        event("cuLaunchKernel", DeviceType.CPU),
    ]
    assert profiles.kernels(events) == [("sparse_adamw_kernel", pytest.approx(0.015))]
