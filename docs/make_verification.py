"""Writes docs/verification.md from what is there: public operators, their tests, the compile budget, GPU result files.

    python docs/make_verification.py

A test holds the committed page to what this gives, so a row can neither go stale nor claim a run that left no file.
"""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "verification.md"
RESULTS = ROOT / "benchmarks" / "results"
TESTS = ROOT / "tests" / "kernels"
BUDGET = TESTS / "triton" / "compiled" / "budget.json"
CONTRACTS = (TESTS / "test_ops.py", TESTS / "test_contract.py")
"""What torch and the package's users expect of every operator; they say nothing about values."""
CHOOSERS = {"precision_update_": ("precision_update_natural_", "precision_update_sgvb_")}
"""Functions that only choose among others by name: testing them tests those, and they have no row of their own."""
NOT_RUN = "not run"

PROSE = """
## What each column means

**Reference.** `reference.py` of the operator holds the formula in plain torch. The files named hold it, and the C++
kernel beside it, to numpy, `torch.optim`, autograd or a literal formula (every test with the `backend` fixture runs
on both).

**Interpreter** (`tests/kernels/triton/interpreter/`, run by `test_interpreter.py` in a process with
`TRITON_INTERPRET=1`). The kernel's own source, program by program, on CPU tensors against float64: odd sizes, empty
tensors, one element, several chunks, mixed dtypes in one list, unaligned and non-contiguous inputs; outputs
allocated over NaN; fences around every written tensor. It does not show: races, the order of warps, what the
compiler does, approximate hardware functions, speed. The tiles of the matrix product are smaller there.

**Compiled** (`tests/kernels/triton/compiled/`). How many kernels of the operator's folder are compiled with the
tile sizes they are launched with, by the compiler that the GPU would use, without the GPU. Required of each: no
spilled register; registers and shared memory within `budget.json` (for the triton version it was taken with); every
pointer offset 64 bits wide; no float64 arithmetic; 16-byte loads where data is streamed. It does not show results.

**CUDA C++** (`csrc/cuda`, the other implementation of `select_threshold`, `collect_bracket`, `key_histogram` and
`compact`) is in none of these columns. `tests/kernels/cuda/` runs the same source on a CPU, every CUDA thread a fiber
in seeded random order, against numpy, with every barrier removed once; and compiles it with nvcc, where there is one,
for sm_80 and sm_90: no spills, no float64, 64-bit addresses, 16-byte loads (`cuda_budget.json`). The emulator does not
model weak memory order. Not run on a GPU.

**Run on a GPU.** A file in `benchmarks/results/` written by `python benchmarks/gpu_acceptance.py` on the card it
names: the operator against float64 on fresh random data, twice for the same bits, with more than 2³¹ elements where
the memory allows. The figure is how many of its checks passed. The same command times every operator beside its
strongest rivals and holds it to the goals. Its `--quick` mode, in the suite, runs the same code on a CPU at toy
sizes and reports no figures. AMD GPUs: compiled only.

## What only a GPU can settle

- Whether the accuracy of `ex2.approx`, `rsqrt.approx` and three TF32 products meets the tolerances that exact
  arithmetic meets.
- Tile sizes and chunk sizes: chosen for zero spills, not timed. The `variants` parts of the command time the
  alternatives.
- That two streams may use the same tables (each stream builds its own; reasoned, not run).
"""


@dataclass(frozen=True)
class Run:
    """A result file of a GPU."""

    path: Path
    content: dict[str, Any]

    def checks(self, function: str) -> list[bool]:
        """Whether they passed: the checks of the operator that a function belongs to."""
        covered = {name for name, functions in self.content["operators"].items() if function in functions}
        return [
            record["error"] is not None and record["error"] <= 1 and record["repeatable"] is not False
            for part in self.content["parts"].values()
            for record in part["records"]
            if record["kind"] == "check" and record["operator"] in covered
        ]

    def link(self) -> str:
        card = self.content["device"].replace("_", " ")
        where = self.path.relative_to(ROOT).as_posix() if self.path.is_relative_to(ROOT) else self.path.name
        return f"[{card}, {self.content['date'][:10]}, {self.content['commit']}](../{where})"


def functions() -> dict[str, str]:
    """Public function → its folder, for every operator with a kernel of its own."""
    import fishertune_kernels

    return {
        name: getattr(fishertune_kernels, name).__module__.split(".")[1]
        for name in fishertune_kernels.__all__
        if not isinstance(getattr(fishertune_kernels, name), type) and name not in CHOOSERS
    }


def called_in(path: Path) -> set[str]:
    """Names of the functions that a file calls, as ``f(…)`` or ``module.f(…)``; a chooser calls what it chooses."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", None))
            names |= {name, *CHOOSERS.get(str(name), ())}
    return names


def uses_both_backends(path: Path) -> bool:
    """Whether its tests take the fixture that runs them on the reference and on C++."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return any(
        isinstance(node, ast.FunctionDef) and node.name.startswith("test_") and "backend" in _arguments(node)
        for node in ast.walk(tree)
    )


def _arguments(node: ast.FunctionDef) -> set[str]:
    return {argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)}


def kernels(budget: dict[str, Any], folders: dict[str, str]) -> dict[str, dict[str, list[str]]]:
    """Target → folder → its compiled kernels: the first word of an entry names a folder or a function, or begins one.

    Raises:
        SystemExit: for an entry that names neither, or several.
    """
    owners = {name.rstrip("_"): folder for name, folder in folders.items()} | {f: f for f in folders.values()}
    found: dict[str, dict[str, list[str]]] = {}
    for target, entries in budget.items():
        if target == "triton":
            continue
        by_folder = found.setdefault(target, {})
        for entry, use in entries.items():
            word = entry.split()[0]
            begun = {folder for name, folder in owners.items() if name.startswith(word)}
            possible = {owners[word]} if word in owners else begun
            if len(possible) != 1:
                raise SystemExit(
                    f"{BUDGET.name}: the entry {entry!r} belongs to no operator, or to several. Its first word must "
                    f"begin the name of one operator's folder or function: {', '.join(sorted(owners))}."
                )
            if use["spills"] == 0:
                by_folder.setdefault(*possible, []).append(entry)
    return found


def gpu_runs(folder: Path = RESULTS) -> list[Run]:
    """Result files of ``gpu_acceptance.py``; other benchmarks' files and those of runs on a CPU are none."""
    runs = []
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        if {"parts", "goals", "card"} <= content.keys() and content["card"]:
            runs.append(Run(path, content))
    return runs


def page(results: Path = RESULTS) -> str:
    budget = json.loads(BUDGET.read_text(encoding="utf-8"))
    folders = functions()
    compiled = kernels(budget, folders)
    runs = gpu_runs(results)
    tests = [path for path in sorted(TESTS.glob("test_*.py")) if path not in CONTRACTS]
    references = _calls(filter(uses_both_backends, tests))
    interpreted = _calls(sorted((TESTS / "triton" / "interpreter").glob("test_*.py")))

    header = ["operator", "reference", "interpreter", *(f"compiled {target}" for target in compiled), "run on a GPU"]
    rows = []
    for name, folder in sorted(folders.items(), key=lambda item: (item[1], item[0])):
        rows.append(
            [
                f"`{name}`",
                _files(name, references),
                _files(name, interpreted),
                *(_count(by_folder.get(folder, [])) for by_folder in compiled.values()),
                _gpu(name, runs),
            ]
        )
    lines = ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)]
    return "\n".join(["# How far each kernel is verified", "", *_introduction(runs), "", *lines]) + "\n" + PROSE


def _introduction(runs: list[Run]) -> list[str]:
    generated = "Written by `python docs/make_verification.py` from the tests, the compile budget and the result files."
    if runs:
        return [generated, f"GPU runs: {', '.join(run.link() for run in runs)}."]
    return [
        "No GPU has run these kernels yet. What can be known without one is checked by the suite on every run; the",
        "last column changes only with a file in `benchmarks/results/` that names the card.",
        generated,
    ]


def _calls(paths: Iterable[Path]) -> dict[Path, set[str]]:
    return {path: called_in(path) for path in paths}


def _files(name: str, calls: dict[Path, set[str]]) -> str:
    return ", ".join(f"`{path.name}`" for path, names in calls.items() if name in names) or "**none**"


def _count(entries: list[str]) -> str:
    return f"{len(entries)} kernel{'s' if len(entries) > 1 else ''}" if entries else "**none**"


def _gpu(name: str, runs: list[Run]) -> str:
    cells = []
    for run in runs:
        passed = run.checks(name)
        if passed:
            cells.append(f"{run.link()}: {sum(passed)} of {len(passed)}")
    return "; ".join(cells) or NOT_RUN


def main() -> None:
    sys.path[:0] = [str(ROOT / "kernels")]
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
