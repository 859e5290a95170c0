"""Compiles csrc/ with its CUDA part for the emulator: the whole library, kernels of csrc/cuda too, on CPU tensors."""

import ctypes
import fcntl
import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fishertune_kernels import native

ROOT = Path(__file__).resolve().parents[3]
EMULATOR = Path(__file__).with_name("emulator")
CSRC = ROOT / "csrc"
CPU_SOURCES = ("status.cpp", "cpu/api.cpp", "cpu/portable.cpp", "cpu/absent.cpp", "cuda/absent.cpp")


def compile_objects(folder: Path, *sources: Path, csrc: Path, options: tuple[str, ...] = ()) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    includes = [f"-I{path}" for path in (EMULATOR, csrc / "include", csrc, csrc / "cpu")]
    subprocess.run(
        ["g++", "-std=c++17", "-U_FORTIFY_SOURCE", "-fPIC", "-fvisibility=hidden", "-w", *options, *includes,
         "-c", "-x", "c++", *map(str, sources)],
        check=True, capture_output=True, text=True, cwd=folder,
    )  # fmt: skip
    return [folder / f"{source.stem}.o" for source in sources]


def compile_kernels(folder: Path, csrc: Path = CSRC) -> list[Path]:
    return compile_objects(folder, csrc / "cuda" / "api.cu", csrc=csrc, options=("-O1", "-ffp-contract=off"))


def link(target: Path, *objects: Path) -> Path:
    part = target.with_suffix(".part")
    subprocess.run(["g++", "-shared", *map(str, objects), "-o", str(part)], check=True, capture_output=True)
    part.rename(target)
    return target


def library_folder() -> Path:
    """Where ``emulated.so``, ``without-cuda.so`` and their objects are; compiled when the sources have changed."""
    if sys.platform != "linux" or shutil.which("g++") is None:
        pytest.skip("the emulator needs Linux and g++")
    digest = hashlib.sha256()
    for path in sorted((*CSRC.rglob("*"), *EMULATOR.rglob("*"), Path(__file__))):
        if path.is_file():
            digest.update(path.read_bytes())
    parent = ROOT / "build" / "emulator"
    folder = parent / digest.hexdigest()[:16]
    parent.mkdir(parents=True, exist_ok=True)
    with (parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several test processes want it
        if not (folder / "emulated.so").exists():
            for stale in parent.iterdir():
                if stale.is_dir():
                    shutil.rmtree(stale)
            absent = ('-DFT_CUDA_ABSENT="for a test"',)
            # By folder: two of the sources have the same name.
            cpu = [
                compiled
                for i, name in enumerate(CPU_SOURCES)
                for compiled in compile_objects(folder / f"cpu{i}", CSRC / name, csrc=CSRC, options=absent)
            ]
            link(folder / "without-cuda.so", *cpu)
            emulator = compile_objects(folder / "emulator", EMULATOR / "emulator.cpp", csrc=CSRC, options=("-O1",))
            link(folder / "emulated.so", *cpu[:-1], *emulator, *compile_kernels(folder / "kernels"))
    return folder


class Emulated:
    """The emulator's own functions, and fences around all memory that the callers allocate."""

    def __init__(self) -> None:
        self._buffers: list[tuple[torch.Tensor, int]] = []

    def schedule(self, seed: int, blocks: int = 3) -> None:
        native.lib().emulator_schedule(ctypes.c_uint64(seed), ctypes.c_int32(blocks))

    def machine(self, devices: int = 2, driver: int = 13000) -> None:
        native.lib().emulator_machine(ctypes.c_int32(devices), ctypes.c_int32(driver))
        native.cuda_why_not.cache_clear()

    def current_device(self) -> int:
        return native.lib().emulator_current_device()

    def empty(self, *size: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
        assert torch.device(device).type == "cpu"
        n_bytes = torch.Size(size).numel() * dtype.itemsize
        buffer = torch.full((64 + n_bytes + 64,), 0xA5, dtype=torch.uint8)
        self._buffers.append((buffer, n_bytes))
        return buffer[64 : 64 + n_bytes].view(dtype).view(size)

    def zeros(self, *size: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
        return self.empty(*size, dtype=dtype, device=device).zero_()

    def check_fences(self) -> None:
        for buffer, n_bytes in self._buffers:
            assert (buffer[:64] == 0xA5).all(), "written before the memory"
            assert (buffer[64 + n_bytes :] == 0xA5).all(), "written behind the memory"
