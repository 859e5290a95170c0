"""What importing the packages needs, brings along, and must not shadow."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# What only some functions need and what takes seconds to import; numpy comes with torch.
HEAVY = {"timm", "torchvision", "matplotlib", "transformers", "torchmetrics", "triton", "jinja2", "PIL", "xformers"}


def run(program, *, cwd=ROOT, **environment):
    """Runs a program in a process of its own that sees both packages; returns what it prints, read as JSON."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    env = {**os.environ, "PYTHONPATH": path, **environment}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, cwd=cwd, env=env, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def top_level_modules_after(module):
    return set(
        run(f"import sys, json, {module}\nprint(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))")
    )


def test_import_fishertune_brings_nothing_heavy_not_even_torch():
    assert not top_level_modules_after("fishertune") & (HEAVY | {"torch", "numpy"})


@pytest.mark.parametrize(
    "module",
    [
        "fishertune_kernels",
        "fishertune.selection, fishertune.optim, fishertune.delta, fishertune.partition, fishertune.domain, "
        "fishertune.fisher.per_sample, fishertune.fisher.posterior, fishertune.fisher.score, fishertune.collect_env",
        "fishertune.cli",
    ],
    ids=["kernels", "method", "command line"],
)
def test_the_method_and_the_kernels_import_without_the_heavy_packages(module):
    assert not top_level_modules_after(module) & HEAVY


def test_both_packages_work_without_triton_native_library_and_gpu():
    program = """
import sys, json
sys.modules["triton"] = None  # importing it now raises ImportError
import torch, fishertune, fishertune_kernels
from fishertune.fisher.posterior import Natural
from fishertune.fisher.score import ScoreAverage
from fishertune.selection import select
from fishertune_kernels import native

torch.manual_seed(0)
model = torch.nn.Linear(3, 2)
estimator = Natural(0.1, 0.1)
estimator.update(model, lambda model, batch: model(batch).square().sum(1), torch.randn(2, 3))
average = ScoreAverage("f")
average.update(estimator.fisher())
selection = select(average.scores, k=3)
print(json.dumps([native.available(), torch.cuda.is_available(), len(selection)]))
"""
    found = run(program, FISHERTUNE_NATIVE_LIBRARY="/nowhere/library.so", CUDA_VISIBLE_DEVICES="")
    assert found == [False, False, 3]


def test_the_folder_kernels_does_not_shadow_the_package_of_that_name(tmp_path):
    """transformers imports PyPI's ``kernels``; our folder of that name lies on the path inside the source tree."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("whose = 'theirs'\n")
    program = "import json, kernels\nprint(json.dumps(kernels.whose))"
    later = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), str(tmp_path)])  # theirs comes last
    assert run(program, PYTHONPATH=later) == "theirs"


def test_the_kernel_package_imports_without_the_method():
    program = "import sys, json, fishertune_kernels\nprint(json.dumps('fishertune' in sys.modules))"
    assert run(program, cwd=ROOT / "kernels", PYTHONPATH=str(ROOT / "kernels")) is False
