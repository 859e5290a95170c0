"""The examples run as they stand, offline, and do what they say."""

import os
import re
import subprocess
import sys
from pathlib import Path

from fishertune.delta import Delta

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(script, *arguments, cwd):
    paths = [str(EXAMPLES.parent), str(EXAMPLES.parent / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    finished = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_sparse_finetune_timm(tmp_path):
    script = "sparse_finetune_timm.py"
    assert len((EXAMPLES / script).read_text().splitlines()) <= 40
    printed = run(script, "result.safetensors", cwd=tmp_path)
    accuracy, changed, total = map(float, re.findall(r"[\d.]+", printed))
    delta = Delta.load(tmp_path / "result.safetensors")
    # every selected element has a gradient in 40 steps of AdamW, but a few may end where they began or tie in rounding
    assert 0.99 * round(0.05 * total) <= changed == len(delta) <= round(0.05 * total)
    assert accuracy > 0.5  # chance is 0.25
