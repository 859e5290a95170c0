"""What a bug report needs, on one page: ``python -m fishertune.collect_env``.

Versions, processor, GPU, the native library or why it is missing, and which implementation each operator takes here.
Imports nothing it only reports the version of, and prints no path but the library's.
"""

from __future__ import annotations

import importlib.metadata
import os
import pkgutil
import platform
import shutil
import subprocess
from pathlib import Path

import torch

import fishertune
import fishertune_kernels
from fishertune_kernels import dispatch, native

PACKAGES = (
    "torch",
    "triton",
    "timm",
    "torchvision",
    "numpy",
    "safetensors",
    "torchmetrics",
    "xformers",
    "transformers",
)

VARIABLES = (
    "FISHERTUNE_BACKEND",
    "FISHERTUNE_NATIVE_LIBRARY",
    "FISHERTUNE_NATIVE_ISA",
    "TRITON_INTERPRET",
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "OMP_PROC_BIND",
    "MKL_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "CUDA_LAUNCH_BLOCKING",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "TORCH_COMPILE_DISABLE",
)

Report = dict[str, dict[str, str]]


def versions() -> dict[str, str | None]:
    """Installed versions by package name, None for what is not installed. JSON-able; nothing is imported for it."""
    found: dict[str, str | None] = {"fishertune": fishertune.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    found["torch"] = torch.__version__  # with the build, such as 2.13.0+cpu, which the metadata may lack
    return found


def collect() -> Report:
    """Section → item → value, everything as text."""
    report: Report = {
        "versions": {name: version or "not installed" for name, version in versions().items()},
        "machine": _machine(),
        "threads": {
            "torch": str(torch.get_num_threads()),
            "torch between operators": str(torch.get_num_interop_threads()),
        },
        "GPU": _gpus(),
        "native library": _native_library(),
    }
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        report[f"operators on {device}"] = _backends(device)
    report["environment"] = {name: os.environ.get(name, "not set") for name in VARIABLES}
    return {section: {item: _without_home(value) for item, value in items.items()} for section, items in report.items()}


def main() -> None:
    for section, items in collect().items():
        print(f"{section}:")
        width = max(map(len, items))
        for item, value in items.items():
            print(f"  {item:<{width}}  {value}")


def _machine() -> dict[str, str]:
    cores = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    return {
        "system": platform.platform(),
        "processor": _processor(),
        "instruction set": torch.backends.cpu.get_cpu_capability(),
        "logical cores": f"{cores}, {usable} usable by this process",
        "memory": _memory(),
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def _memory() -> str:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # no sysconf on Windows
        return "unknown"
    text = f"{total / 2**30:.1f} GiB"
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
    except OSError:
        return text
    return f"{text}, limited to {int(limit) / 2**30:.1f} GiB" if limit.isdigit() else text


def _gpus() -> dict[str, str]:
    build = torch.version.cuda or torch.version.hip
    if build is None:
        return {"none": "this torch is a CPU build"}
    if not torch.cuda.is_available():
        return {"none": f"torch is built for {build} but finds no usable GPU"}
    found = {"toolkit of torch": build, "driver": _driver()}
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        memory = f"{card.total_memory / 2**30:.1f} GiB"
        found[f"cuda:{index}"] = f"{card.name}, {memory}, capability {card.major}.{card.minor}"
    return found


def _driver() -> str:
    program = shutil.which("nvidia-smi")
    if program is None:
        return "unknown (no nvidia-smi)"
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown (nvidia-smi: {type(error).__name__})"
    return ", ".join(dict.fromkeys(answer.split())) or "unknown"


def _native_library() -> dict[str, str]:
    missing = native.why_not()
    if missing is not None:
        return {"not loaded": missing}
    return {
        "path": native.lib()._name,
        "interface version": str(native.ABI_VERSION),
        "instruction set": native.isa(),
        "CUDA kernels": native.cuda_why_not() or "available",
    }


def _backends(device: str) -> dict[str, str]:
    """The implementation of each operator for float32 tensors."""
    found = {}
    for module in pkgutil.iter_modules(fishertune_kernels.__path__):
        if module.ispkg:
            try:
                chosen = dispatch.implementation(module.name, torch.device(device), (torch.float32,))
                found[module.name] = chosen.__name__.rpartition(".")[2]
            except (ValueError, RuntimeError) as error:  # a forced backend that cannot run: that is the report
                found[module.name] = f"none: {error}"
    return found


def _without_home(text: str) -> str:
    home = str(Path.home())
    return text.replace(home, "~") if len(home) > 1 else text


if __name__ == "__main__":
    main()
