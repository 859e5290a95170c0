"""Build: two packages from two folders, and the compiled library inside one of them. Metadata is in pyproject.toml.

``python setup.py build_native`` compiles the library into the source tree, where development and editable installs find
it. An install goes on without the library where it cannot be compiled, and says so.

The environment variable FISHERTUNE_CUDA says whether the library gets its CUDA kernels: AUTO, the default, where nvcc
works; ON, or the build fails; OFF. It adds seconds to the build and 1.5 MB to the library.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import ClassVar

from setuptools import Command, Distribution, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
KERNELS = Path("kernels", "fishertune_kernels")
REASON_FILE = "not_built.txt"
COST = (
    "Everything still works on the plain torch implementations, but on CPUs (measured on one core) exact selection "
    "takes about 50 times as long, posterior draws and updates 20 times, sparse optimizer steps and scores 10 times."
)


def compile_library(target: Path) -> str | None:
    """Compile csrc/ and put the library into ``target``. Returns why that failed, or None."""
    cuda = os.environ.get("FISHERTUNE_CUDA", "AUTO").upper()
    if cuda not in ("AUTO", "ON", "OFF"):
        raise SystemExit(f"FISHERTUNE_CUDA={cuda} is not known. Set it to AUTO, ON or OFF, or unset it for AUTO.")
    reason = run_cmake(target, f"-DFISHERTUNE_CUDA={cuda}")
    if reason is not None and cuda == "ON":
        raise SystemExit(f"FISHERTUNE_CUDA=ON, but {reason}")
    if reason is not None and cuda == "AUTO":
        # Whatever is wrong with CUDA here must not cost the CPU kernels.
        message = "compiling its CUDA part failed"
        if run_cmake(target, "-DFISHERTUNE_CUDA=OFF", f"-DFISHERTUNE_CUDA_REASON={message}") is None:
            print(f"\nWARNING: fishertune's native library is without CUDA kernels: {reason}\n", file=sys.stderr)
            return None
    return reason


def run_cmake(target: Path, *options: str) -> str | None:
    """Configure, build, install. Returns why that failed, or None."""
    shutil.rmtree(target, ignore_errors=True)  # an older library must not pass for a fresh one
    cmake = shutil.which("cmake")
    if cmake is None:
        return "CMake was not found (install cmake 3.24 or newer, and ninja)"
    build = ROOT / "build" / f"native-{sysconfig.get_platform()}"
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    steps = (
        # Fresh: a cache made in another build environment names a cmake and a ninja that are gone.
        (
            "configure",
            [cmake, "--fresh", *generator, "-S", str(ROOT), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release", *options],
        ),
        ("build", [cmake, "--build", str(build), "--config", "Release", "--parallel", str(os.cpu_count() or 1)]),
        ("install", [cmake, "--install", str(build), "--config", "Release", "--prefix", str(target)]),
    )
    for step, command in steps:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
        if done.returncode != 0:
            shutil.rmtree(target, ignore_errors=True)
            lines = done.stdout.splitlines()
            # Other files were still being compiled when one failed: its message may be further up.
            telling = [line for line in lines[:-15] if "error" in line.lower()][:5] + lines[-15:]
            return (
                f"the CMake {step} step failed; usually a C++17 compiler is missing (for example "
                "`apt-get install g++`). What it printed:\n" + "\n".join(telling)
            )
    return None


def compile_or_explain(target: Path) -> bool:
    """Compile into ``target``, or warn and leave the reason there for the package to report at run time."""
    reason = compile_library(target)
    if reason is None:
        return True
    print(f"\nWARNING: fishertune is installed without its native library: {reason}\n{COST}\n", file=sys.stderr)
    target.mkdir(parents=True, exist_ok=True)
    (target / REASON_FILE).write_text(reason + "\n", encoding="utf-8")
    return False


class BuildNative(Command):
    description = "compile the native library into the source tree"
    user_options: ClassVar[list[tuple[str, str | None, str]]] = []

    def initialize_options(self) -> None:
        pass

    def finalize_options(self) -> None:
        pass

    def run(self) -> None:
        if not compile_or_explain(ROOT / KERNELS / "lib"):
            raise SystemExit(1)


class BuildPython(build_py):
    """Python files, then the library: into the source tree for an editable install, else into the build tree."""

    def run(self) -> None:
        if not self.editable_mode:
            # setuptools adds to what an earlier build left here: a module deleted since would be shipped again.
            for package in ("fishertune", "fishertune_kernels"):
                shutil.rmtree(Path(self.build_lib, package), ignore_errors=True)
        super().run()
        parent = ROOT / KERNELS if self.editable_mode else Path(self.build_lib, "fishertune_kernels")
        compile_or_explain(parent / "lib")


class PlatformWheel(bdist_wheel):
    """One wheel for a platform and every Python 3: the library is machine code without the Python ABI."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


class PlatformDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return True


setup(
    # kernels/ is a folder, not a package: a top-level package `kernels` would shadow the one of that name on PyPI.
    packages=find_packages(include=["fishertune", "fishertune.*"])
    + find_packages("kernels", include=["fishertune_kernels", "fishertune_kernels.*"]),
    package_dir={"fishertune": "fishertune", "fishertune_kernels": KERNELS.as_posix()},
    package_data={
        "": ["py.typed"],
        "fishertune": ["**/*.safetensors", "**/*.json", "**/*.yaml", "**/*.html", "**/*.css"],
    },
    include_package_data=False,
    distclass=PlatformDistribution,
    cmdclass={"build_native": BuildNative, "build_py": BuildPython, "bdist_wheel": PlatformWheel},
)
