"""The page on how far each kernel is verified says what is there: no row is stale, none claims a run without a file."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

import fishertune_kernels as fk

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def generator():
    spec = importlib.util.spec_from_file_location("make_verification", ROOT / "docs" / "make_verification.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def rows(page):
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("| `")
    ]
    return {row[0].strip("`"): row[1:] for row in cells}


def invented_run(repeatable=True):
    check = {"kind": "check", "operator": "selection", "case": "x", "error": 0.5, "repeatable": True}
    return {
        "device": "Invented_Card", "date": "2026-01-02T03:04:05+00:00", "commit": "abc", "quick": False, "goals": [],
        "card": {"memory_gib": 80.0},
        "operators": {"selection": ["compact", "select_threshold"], "values": ["gather_values"]},
        "parts": {"check selection": {"state": "done", "records": [check, {**check, "repeatable": repeatable}]}},
    }  # fmt: skip


def test_the_committed_page_is_what_the_generator_gives(generator):
    assert generator.PAGE.read_text(encoding="utf-8") == generator.page(), "run: python docs/make_verification.py"


def test_every_operator_has_a_row_with_tests_and_compiled_kernels(generator):
    found = rows(generator.page())
    public = {name for name in fk.__all__ if not isinstance(getattr(fk, name), type)}
    assert set(found) == public - generator.CHOOSERS.keys()
    assert not [name for name, cells in found.items() if any("none" in cell for cell in cells)]


def test_no_row_claims_a_run_that_left_no_file(generator, tmp_path):
    assert {cells[-1] for cells in rows(generator.page(tmp_path)).values()} == {generator.NOT_RUN}
    committed = generator.PAGE.read_text(encoding="utf-8")
    linked = re.findall(r"\(\.\./(benchmarks/results/[^)]+)\)", committed)
    assert all((ROOT / path).is_file() for path in linked)
    claimed = [name for name, cells in rows(committed).items() if cells[-1] != generator.NOT_RUN]
    assert bool(claimed) == bool(linked)


def test_a_result_file_fills_the_rows_of_its_operators_only(generator, tmp_path):
    (tmp_path / "Invented_Card-2026-01-02-abc.json").write_text(json.dumps(invented_run(repeatable=False)))
    found = rows(generator.page(tmp_path))
    assert found["compact"][-1] == found["select_threshold"][-1]
    assert "[Invented Card, 2026-01-02, abc]" in found["compact"][-1] and found["compact"][-1].endswith(": 1 of 2")
    assert {cells[-1] for name, cells in found.items() if name not in ("compact", "select_threshold")} == {
        generator.NOT_RUN
    }


def test_files_of_cpus_and_other_benchmarks_are_no_gpu_runs(generator, tmp_path):
    (tmp_path / "cpu-quick.json").write_text(json.dumps({**invented_run(), "quick": True, "card": None}))
    (tmp_path / "cpu-2026.json").write_text(json.dumps({"machine": "2 cores", "benchmarks": []}))
    assert generator.gpu_runs(tmp_path) == []


def test_calls_are_found_and_mentions_are_not(generator, tmp_path):
    path = tmp_path / "test_x.py"
    path.write_text(
        "import fishertune_kernels as fk\n"
        "def test_x(backend):\n"
        "    '''compact(x)'''\n"
        "    fk.gather_values([], [])\n"
        "    fk.precision_update_([], [], method='natural')\n"
    )
    called = generator.called_in(path)
    assert {"gather_values", "precision_update_natural_"} <= called and "compact" not in called
    assert generator.uses_both_backends(path)


def test_a_spill_or_an_unknown_entry_of_the_budget_is_seen(generator):
    folders = {"compact": "compact", "gather_values": "values"}
    budget = {"triton": "3.7", "sm_90": {"compact count": {"spills": 0}, "gather_values x": {"spills": 4}}}
    assert generator.kernels(budget, folders) == {"sm_90": {"compact": ["compact count"]}}
    begun = {"sm_90": {"gather x": {"spills": 0}}}
    assert generator.kernels(begun, folders) == {"sm_90": {"values": ["gather x"]}}
    for entry in ("other kernel", "c kernel"):
        with pytest.raises(SystemExit, match=f"'{entry}' belongs to no operator, or to several"):
            generator.kernels({"sm_90": {entry: {"spills": 0}}}, {**folders, "collect_bracket": "select_threshold"})
