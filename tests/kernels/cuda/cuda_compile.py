"""Every kernel of csrc/cuda compiled by nvcc without a GPU.

``python tests/kernels/cuda/cuda_compile.py`` prints what each kernel uses and writes ``cuda_budget.json``, which
test_compiled_cuda.py holds them to.
"""

import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

CSRC = Path(__file__).resolve().parents[3] / "csrc"
BUDGET = Path(__file__).with_name("cuda_budget.json")
TARGETS = ("sm_80", "sm_90")
STREAMING = {
    # Loads of a whole aligned tile: four of 16 bytes for fp32, two each for bf16 and fp16.
    "collect_bracket_kernel": 8,
    "compact_mark_kernel": 8,
    "key_histogram_kernel<0>": 8,
    "key_histogram_kernel<1>": 8,
}


def missing() -> str | None:
    """Why nothing can be compiled here."""
    if shutil.which("nvcc") is None:
        return "nvcc is not installed"
    return None if shutil.which("g++") is not None else "nvcc has no g++ to work with"


def nvcc_version() -> str:
    text = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release (\d+\.\d+)", text)[1]


def _nvcc(*options: str) -> str:
    command = [
        "nvcc",
        "-std=c++17",
        "-O3",
        f"-I{CSRC / 'include'}",
        f"-I{CSRC}",
        *options,
        str(CSRC / "cuda" / "api.cu"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def _readable(mangled: str) -> str:
    name, flag = re.search(r"\d+([a-z_]+_kernel)(?:ILb(\d)E)?", mangled).groups()
    return name if flag is None else f"{name}<{flag}>"


def use(target: str) -> dict[str, dict[str, int]]:
    """Registers, bytes of shared memory and bytes spilled, by kernel."""
    with tempfile.TemporaryDirectory() as folder:
        report = _nvcc(f"-arch={target}", "-cubin", "-Xptxas", "-v", "-o", f"{folder}/kernels.cubin")
    found = {}
    for part in report.split("Compiling entry function '")[1:]:
        shared = re.search(r"(\d+) bytes smem", part)
        found[_readable(part.split("'")[0])] = {
            "registers": int(re.search(r"Used (\d+) registers", part)[1]),
            "shared": int(shared[1]) if shared else 0,
            "spills": sum(int(size) for size in re.findall(r"(\d+) bytes spill", part))
            + int(re.search(r"(\d+) bytes stack frame", part)[1]),
        }
    return dict(sorted(found.items()))


def ptx(target: str) -> dict[str, str]:
    """The PTX of each kernel, and under "" what comes before the first."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernels.ptx")
        _nvcc(f"-arch={target.replace('sm', 'compute')}", "-ptx", "-o", str(path))
        head, *entries = re.split(r"^\s*(?:\.visible )?\.entry ", path.read_text(), flags=re.M)
    return {"": head} | {_readable(entry.split("(")[0]): entry for entry in entries}


def main() -> None:
    if reason := missing():
        raise SystemExit(reason)
    budget: dict = {"nvcc": nvcc_version()}
    for target in TARGETS:
        budget[target] = use(target)
        for name, figures in budget[target].items():
            print(f"{target:6s} {name:26s} {figures}")
    BUDGET.write_text(json.dumps(budget, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
