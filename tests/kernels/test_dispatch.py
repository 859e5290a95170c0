"""Which implementation runs: by device, type and availability, by the environment, and with a reason."""

import importlib.util
import logging
import os
import subprocess
import sys

import pytest
import torch

import fishertune_kernels as fk
from fishertune_kernels import dispatch, native


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FISHERTUNE_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(dispatch, "_chosen", {})


def chosen(operator: str = "compact", device: str = "cpu", *dtypes: torch.dtype) -> str:
    module = dispatch.implementation(operator, torch.device(device), dtypes or (torch.float32,))
    return module.__name__.rpartition(".")[2]


def absent_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "available", lambda: False)
    monkeypatch.setattr(native, "why_not", lambda: "the library was not built; build it")


def test_cpu_tensors_run_native_where_it_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "available", lambda: True)
    assert chosen() == "native"
    assert chosen("compact", "cpu", torch.bfloat16, torch.float16, torch.float32) == "native"


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_types_the_kernels_do_not_take_run_the_reference(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(native, "available", lambda: True)
    assert chosen("values", "cpu", torch.float32, dtype) == "reference"
    monkeypatch.setenv("FISHERTUNE_BACKEND", "native")
    assert chosen("values", "cpu", torch.float32, dtype) == "reference"


def test_without_the_library_the_reference_runs_and_says_why_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    absent_library(monkeypatch)
    with caplog.at_level(logging.INFO, logger="fishertune_kernels"):
        for _ in range(3):
            fk.squared_grad_accumulate_(torch.zeros(2), torch.ones(2))
    assert [record.getMessage() for record in caplog.records] == [
        "squared_grad_accumulate on cpu: reference (the library was not built; build it)"
    ]


def test_other_devices_run_the_reference() -> None:
    assert chosen("compact", "mps") == "reference"


def test_cuda_without_triton_runs_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec

    def without_triton(name: str, package: str | None = None) -> object:
        return None if name == "triton" else find_spec(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", without_triton)
    assert chosen("compact", "cuda") == "reference"
    monkeypatch.setenv("FISHERTUNE_BACKEND", "triton")
    with pytest.raises(RuntimeError, match="cannot run compact on cuda tensors"):
        chosen("compact", "cuda")


def test_an_operator_may_lack_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FISHERTUNE_BACKEND", "cuda")
    with pytest.raises(RuntimeError, match="values has no cuda implementation, only reference, native, triton"):
        chosen("values", "cuda")


def test_a_choice_for_some_operators_leaves_the_others_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native, "available", lambda: True)
    monkeypatch.setattr(native, "cuda_why_not", lambda: None)
    monkeypatch.setattr(dispatch.importlib, "import_module", lambda name, package: importlib.util.module_from_spec(
        importlib.util.find_spec(name, package)
    ))  # fmt: skip
    monkeypatch.setenv("FISHERTUNE_BACKEND", "select_threshold=cuda, compact=cuda,values=reference")
    with caplog.at_level(logging.INFO, logger="fishertune_kernels"):
        for _ in range(2):
            assert chosen("select_threshold", "cuda") == "cuda"
    assert [record.getMessage() for record in caplog.records] == ["select_threshold on cuda: cuda (FISHERTUNE_BACKEND)"]
    assert chosen("compact", "cuda") == "cuda"
    assert chosen("compact", "cuda", torch.float64) == "reference"
    assert chosen("values", "cpu") == "reference"
    assert chosen("sparse_adamw", "cpu") == "native"
    if importlib.util.find_spec("triton") is not None:
        assert chosen("sparse_adamw", "cuda") == "triton"


def test_cuda_tensors_run_triton_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(native, "cuda_why_not", lambda: None)
    assert dispatch._choose("select_threshold", "cuda", frozenset({torch.float32}), "") == ("triton", "cuda tensors")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("compact=cuda,select=cuda", r"'select' is no operator; expected compact, dr_fim_score, .*values\."),
        ("compact=opencl", r"'opencl' is no backend; expected reference, native, triton, cuda\."),
        ("compact=cuda,", r"'' is no operator; expected"),
        ("triton,compact=cuda", r"'triton' is no operator; expected"),
    ],
)
def test_a_mistake_in_a_choice_by_operator_lists_what_exists(
    monkeypatch: pytest.MonkeyPatch, setting: str, message: str
) -> None:
    monkeypatch.setenv("FISHERTUNE_BACKEND", setting)
    with pytest.raises(ValueError, match=message):
        chosen("values")


def test_cuda_kernels_that_cannot_run_are_an_error_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FISHERTUNE_BACKEND", "compact=cuda")
    with pytest.raises(
        RuntimeError, match=r"FISHERTUNE_BACKEND=compact=cuda cannot run compact on cpu tensors: the CUDA"
    ):
        chosen()
    monkeypatch.setattr(native, "cuda_why_not", lambda: "the library has no CUDA kernels; rebuild it")
    with pytest.raises(
        RuntimeError, match="cannot run compact on cuda tensors: the library has no CUDA kernels; rebuild"
    ):
        chosen("compact", "cuda")


def test_the_environment_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "available", lambda: True)
    for backend in ("reference", "native"):
        monkeypatch.setenv("FISHERTUNE_BACKEND", backend)
        assert chosen() == backend
    monkeypatch.delenv("FISHERTUNE_BACKEND")
    assert chosen() == "native"


def test_a_misspelt_backend_lists_the_good_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FISHERTUNE_BACKEND", "cpp")
    with pytest.raises(ValueError, match=r"FISHERTUNE_BACKEND='cpp' is not a backend.*reference, native, triton"):
        fk.select_threshold(torch.ones(3), 1)


def test_a_forced_backend_that_cannot_run_is_an_error_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    absent_library(monkeypatch)
    monkeypatch.setenv("FISHERTUNE_BACKEND", "native")
    with pytest.raises(RuntimeError, match="native cannot run compact on cpu tensors: the library was not built"):
        chosen()
    with pytest.raises(RuntimeError, match=r"the C\+\+ kernels take CPU tensors only"):
        chosen("compact", "cuda")
    monkeypatch.setenv("FISHERTUNE_BACKEND", "triton")
    with pytest.raises(RuntimeError, match=r"FISHERTUNE_BACKEND=triton cannot run"):
        chosen()


def test_without_the_library_everything_still_works() -> None:
    """In a process of its own, where the library's path leads nowhere and triton cannot be imported."""
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, fishertune_kernels as fk\n"
        "from fishertune_kernels import native\n"
        "assert not native.available() and '/nowhere/lib.so' in native.why_not()\n"
        "scores = torch.tensor([3.0, 1.0, 2.0])\n"
        "assert fk.compact(scores, fk.select_threshold(scores, 2))[0].tolist() == [0, 2]\n"
    )
    subprocess.run(
        [sys.executable, "-c", program],
        check=True,
        timeout=60,
        env={**os.environ, "FISHERTUNE_NATIVE_LIBRARY": "/nowhere/lib.so"},
    )
