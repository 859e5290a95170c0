"""Fixtures that put the emulated library in the place of the package's own."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from emulated_library import Emulated, library_folder

from fishertune_kernels import cuda_common, native


@pytest.fixture(scope="session")
def libraries() -> Path:
    return library_folder()


@pytest.fixture
def use_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], None]]:
    """Makes the package load another library, for one test."""

    def forget() -> None:
        for cached in (native._load, native.cuda_why_not, cuda_common._table):
            cached.cache_clear()

    def use(path: Path) -> None:
        monkeypatch.setenv("FISHERTUNE_NATIVE_LIBRARY", str(path))
        forget()

    yield use
    forget()


@pytest.fixture
def emulated(
    libraries: Path, use_library: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Emulated]:
    use_library(libraries / "emulated.so")
    emulator = Emulated()
    monkeypatch.setattr(cuda_common, "launch_place", lambda device: (0, 0))
    monkeypatch.setattr(torch, "empty", emulator.empty)
    monkeypatch.setattr(torch, "zeros", emulator.zeros)
    emulator.schedule(0)
    yield emulator
    emulator.machine()
    emulator.check_fences()
