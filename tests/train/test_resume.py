"""Killed anywhere and resumed, a run ends with the bits of one that was never killed."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from fishertune.train.pipeline import run

RESULTS = ("scores", "selection", "delta", "decoder", "pictures")


class Killed(BaseException):
    """No handler of the product may swallow it, as none could a SIGKILL."""


def bits(folder: Path) -> dict[str, str]:
    """Digests of every result; of the metrics all but what the clock says."""
    digests = {}
    for name in RESULTS:
        data = (folder / f"{name}.safetensors").read_bytes()
        if name == "scores":  # its header holds the seconds the estimation took
            length = int.from_bytes(data[:8], "little")
            data = data[8 + length :]
        digests[name] = hashlib.sha256(data).hexdigest()
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics.pop("stages")
    digests["metrics"] = json.dumps(metrics, sort_keys=True)
    return digests


@pytest.mark.parametrize("moment", ["before", "after"])
def test_killed_at_every_single_write(small_config, tmp_path, quiet, monkeypatch, moment):
    """Each attempt dies at its first write that no earlier attempt died at, just before or just after the rename."""
    run(small_config, tmp_path / "whole", reporter=quiet)
    survived: set[str] = set()
    replace_file = os.replace

    def mortal(source, target):
        key = f"{Path(target).name}:{writes.get(Path(target).name, 0)}"
        writes[Path(target).name] = writes.get(Path(target).name, 0) + 1
        if key in survived:
            return replace_file(source, target)
        survived.add(key)
        if moment == "after":
            replace_file(source, target)
        raise Killed(key)

    deaths = 0
    monkeypatch.setattr("fishertune.files.os.replace", mortal)
    while True:
        writes: dict[str, int] = {}
        try:
            run(small_config, tmp_path / "killed", resume=True, reporter=quiet)
            break
        except Killed:
            deaths += 1
            assert deaths < 60
    assert deaths >= 10  # configuration, checkpoints of three stages, selection, results, metrics, report
    assert bits(tmp_path / "killed") == bits(tmp_path / "whole")
    assert not (tmp_path / "killed" / "state").exists()


def test_killed_in_the_middle_of_every_stage(small_config, tmp_path, quiet, monkeypatch):
    run(small_config, tmp_path / "whole", reporter=quiet)
    for module, name, at in (
        ("fishertune.train.loop", "normalise", 3),  # the last step of the warm-up
        ("fishertune.train.stages.Estimation", "update", 3),
        ("fishertune.train.loop", "normalise", 4),  # tuning, a step after its checkpoint
        ("fishertune.train.pipeline", "evaluate", 2),  # the second domain
    ):
        owner = _resolve(module)
        original, calls = getattr(owner, name), [0]

        def mortal(*args, original=original, calls=calls, at=at, **kwargs):
            calls[0] += 1
            if calls[0] == at:
                raise Killed
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, mortal)
        with pytest.raises(Killed):
            run(small_config, tmp_path / "killed", resume=True, reporter=quiet)
        monkeypatch.setattr(owner, name, original)
    run(small_config, tmp_path / "killed", resume=True, reporter=quiet)
    assert bits(tmp_path / "killed") == bits(tmp_path / "whole")


def _resolve(path: str) -> object:
    import importlib

    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        module, _, attribute = path.rpartition(".")
        return getattr(importlib.import_module(module), attribute)


def test_a_killed_process_resumes(tmp_path, plain_config):
    """The same with a real SIGKILL, sent as soon as tuning has written its first checkpoint."""
    plain_config["tune"]["steps"] = 30
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(plain_config))

    def command(out: str) -> list[str]:
        return [
            sys.executable,
            "-m",
            "fishertune.cli",
            "--quiet",
            "run",
            str(config),
            "--out",
            str(tmp_path / out),
            "--resume",
        ]

    subprocess.run(command("whole"), check=True, capture_output=True)
    process = subprocess.Popen(command("killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    checkpoint = tmp_path / "killed" / "state" / "tune.safetensors"
    deadline = time.monotonic() + 60
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "metrics.json").exists(), "the process was not killed in time"
    subprocess.run(command("killed"), check=True, capture_output=True)
    assert bits(tmp_path / "killed") == bits(tmp_path / "whole")
