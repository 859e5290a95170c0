"""The examples run as they stand, offline, and do what they say."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fishertune.delta import Delta

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"

# Runs the script as it stands and keeps its tensors, so that a test can look at them.
KEEPING = """
import runpy, sys, torch
script, kept, *sys.argv[1:] = sys.argv[1:]
end = runpy.run_path(script)
torch.save({"base": end["base"], "tuned": end["model"].state_dict(), "selected": end["selection"].indices}, kept)
"""


def run(*command, cwd):
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    finished = subprocess.run(
        [sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.splitlines()[-1]


def numbers(printed):
    return map(float, re.findall(r"[\d.]+", printed))


def test_sparse_finetune_timm(tmp_path):
    script = EXAMPLES / "sparse_finetune_timm.py"
    assert len(script.read_text().splitlines()) <= 40
    accuracy, changed, total = numbers(run(str(script), "result.safetensors", cwd=tmp_path))
    delta = Delta.load(tmp_path / "result.safetensors")
    # every selected element has a gradient in 40 steps of AdamW, but a few may end where they began or tie in rounding
    assert 0.99 * round(0.05 * total) <= changed == len(delta) <= round(0.05 * total)
    assert accuracy > 0.5  # chance is 0.25


def test_bare_timm_loop(tmp_path):
    """The kernels alone: the package fishertune is never imported."""
    script = EXAMPLES / "bare_timm_loop.py"
    assert len(script.read_text().splitlines()) <= 60
    program = (
        "import runpy, sys\n"
        "import torch\n"
        "shim = runpy.run_path(sys.argv[2])\n"  # lets timm import beside a CPU build of torch
        "variables = runpy.run_path(sys.argv[1])\n"
        "assert 'fishertune_kernels' in sys.modules and 'fishertune' not in sys.modules\n"
        "torch.save([[w.detach() for w in variables['weights']], variables['before'], variables['indices']], 'kept.pt')"
    )
    printed = run("-c", program, str(script), str(ROOT / "fishertune" / "_torchvision.py"), cwd=tmp_path)
    accuracy, changed, k = numbers(printed)
    assert accuracy > 0.5  # chance is 0.25
    weights, before, indices = torch.load(tmp_path / "kept.pt")
    assert sum(index.numel() for index in indices) == k == round(0.05 * sum(weight.numel() for weight in weights))
    assert 0.99 * k <= changed <= k
    for weight, old, index in zip(weights, before, indices, strict=True):
        weight.view(-1)[index.long()] = old.view(-1)[index.long()]
        assert torch.equal(weight, old)  # nothing but the selected elements had changed


@pytest.fixture(scope="module")
def trainer_run(tmp_path_factory):
    """The Trainer example, run to its end once: its folder, its last line, and the tensors it worked on."""
    if importlib.util.find_spec("transformers") is None or importlib.util.find_spec("accelerate") is None:
        pytest.skip("transformers or accelerate is not installed")
    folder = tmp_path_factory.mktemp("trainer")
    printed = run("-c", KEEPING, str(EXAMPLES / "hf_trainer_sparse.py"), "kept.pt", "run", cwd=folder)
    return folder / "run", printed, torch.load(folder / "kept.pt")


def test_trainer_learns_by_changing_five_percent(trainer_run):
    folder, printed, kept = trainer_run
    accuracy, changed, total = numbers(printed)
    assert accuracy > 0.6  # chance is 0.25
    k = round(0.05 * total)
    assert sum(index.numel() for index in kept["selected"].values()) == k
    # AdamW moves every selected element in every step, but a few may end on the bits they began with.
    assert 0.99 * k <= changed == len(Delta.load(folder / "delta.safetensors")) <= k
    different = 0
    for name, old in kept["base"].items():
        if name.startswith("classifier."):
            assert not torch.equal(kept["tuned"][name], old)
            continue
        free = torch.zeros(old.numel(), dtype=torch.bool)
        free[kept["selected"].get(name, torch.empty(0)).long()] = True
        new, old = kept["tuned"][name].flatten(), old.flatten()
        assert torch.equal(new[~free], old[~free]), name
        different += int((new != old).sum())
    assert different == changed


def test_trainer_continues_bit_for_bit(trainer_run, tmp_path):
    """From the checkpoint at one third, in a new process, to the same weights and the same optimizer state."""
    whole, printed, _ = trainer_run
    part = tmp_path / "run"
    part.mkdir()
    shutil.copy(whole / "selection.safetensors", part)
    shutil.copytree(whole / "checkpoint-20", part / "checkpoint-20")
    assert run(str(EXAMPLES / "hf_trainer_sparse.py"), "run", cwd=tmp_path) == printed
    assert (part / "delta.safetensors").read_bytes() == (whole / "delta.safetensors").read_bytes()
    ours, theirs = (torch.load(run / "checkpoint-60" / "optimizer.pt") for run in (part, whole))
    assert ours["param_groups"] == theirs["param_groups"]
    for key, state in theirs["state"].items():
        assert state["step"] == 60
        assert all(torch.equal(ours["state"][key][name], value) for name, value in state.items())


def test_the_delta_turns_the_public_weights_into_the_tuned_ones(trainer_run):
    folder, _, kept = trainer_run
    weights = {name: tensor.clone() for name, tensor in kept["base"].items()}
    Delta.load(folder / "delta.safetensors").apply_(weights)
    assert all(
        torch.equal(weights[name], kept["tuned"][name]) for name in weights if not name.startswith("classifier.")
    )
