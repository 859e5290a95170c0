"""The page for a bug report: complete, true, and without paths of the user."""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fishertune import collect_env
from fishertune_kernels import dispatch, native

KERNELS = Path(native.__file__).parent


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.delenv("FISHERTUNE_BACKEND", raising=False)
    monkeypatch.setattr(dispatch, "_chosen", {})


def test_the_page_prints_from_the_command_line():
    done = subprocess.run(
        [sys.executable, "-m", "fishertune.collect_env"], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stderr == ""
    for needed in (
        "fishertune",
        "torch",
        "triton",
        "timm",
        "numpy",
        "xformers",
        "processor",
        "memory",
        "GPU",
        "threads",
    ):
        assert needed in done.stdout
    assert f"  torch         {torch.__version__}\n" in done.stdout


def test_versions_are_those_installed_and_fit_into_json(monkeypatch):
    monkeypatch.setattr(collect_env, "PACKAGES", ("torch", "numpy", "no-such-package-of-ours"))
    found = json.loads(json.dumps(collect_env.versions()))
    assert found["numpy"] == importlib.metadata.version("numpy")
    assert found["torch"] == torch.__version__
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["no-such-package-of-ours"] is None
    assert collect_env.collect()["versions"]["no-such-package-of-ours"] == "not installed"


def test_every_operator_is_listed_with_the_implementation_it_takes(monkeypatch):
    operators = {path.parent.name for path in KERNELS.glob("*/reference.py")}
    monkeypatch.setenv("FISHERTUNE_BACKEND", "reference")
    report = collect_env.collect()
    assert report["operators on cpu"] == dict.fromkeys(operators, "reference")
    assert report["environment"]["FISHERTUNE_BACKEND"] == "reference"
    monkeypatch.delenv("FISHERTUNE_BACKEND")
    report = collect_env.collect()
    assert set(report["operators on cpu"].values()) <= {"native", "reference"}
    assert ("native" in report["operators on cpu"].values()) == native.available()
    assert report["environment"]["FISHERTUNE_BACKEND"] == "not set"


def test_a_missing_library_is_explained_and_a_home_folder_is_not_shown(monkeypatch):
    reason = f"the native library was not built: {Path.home()}/src/broken.cpp"
    monkeypatch.setattr(native, "why_not", lambda: reason)
    monkeypatch.setattr(native, "available", lambda: False)
    report = collect_env.collect()
    assert report["native library"] == {"not loaded": "the native library was not built: ~/src/broken.cpp"}
    assert set(report["operators on cpu"].values()) == {"reference"}


def test_a_forced_backend_that_cannot_run_is_reported_not_raised(monkeypatch):
    monkeypatch.setenv("FISHERTUNE_BACKEND", "native")
    monkeypatch.setattr(native, "available", lambda: False)
    monkeypatch.setattr(native, "why_not", lambda: "the library was not built")
    for choice in collect_env.collect()["operators on cpu"].values():
        assert choice.startswith("none: FISHERTUNE_BACKEND=native cannot run")


@pytest.mark.skipif(not native.available(), reason="the native library is not built")
def test_the_native_library_is_named_with_its_instruction_set():
    report = collect_env.collect()["native library"]
    assert os.path.samefile(os.path.expanduser(report["path"]), native.lib()._name)
    assert report["instruction set"] == native.isa()


def test_a_gpu_and_its_driver_are_described(monkeypatch, tmp_path):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nprintf '999.12.34\\n999.12.34\\n'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    class Card:
        name, total_memory, major, minor = "Big GPU", 80 * 2**30, 9, 0

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Card)
    report = collect_env.collect()
    assert report["GPU"] == {
        "toolkit of torch": "13.0",
        "driver": "999.12.34",
        "cuda:0": "Big GPU, 80.0 GiB, capability 9.0",
    }
    assert report["operators on cuda"].keys() == report["operators on cpu"].keys()


def test_a_driver_that_cannot_be_asked_does_not_stop_the_page(monkeypatch, tmp_path):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nexit 9\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert collect_env._driver() == "unknown (nvidia-smi: CalledProcessError)"
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert collect_env._driver() == "unknown (no nvidia-smi)"
