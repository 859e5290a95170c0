"""What an install contains, with a working build of the native library and with a failing one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILDS = shutil.which("cmake") is not None and shutil.which("c++") is not None
NVCC = shutil.which("nvcc") is not None


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of what the build reads, so that nothing is built in the working tree and nothing in it is stale."""
    target = tmp_path / "source"
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info", "build")
    for name in ("fishertune", "kernels", "csrc"):
        shutil.copytree(ROOT / name, target / name, ignore=ignored)
    for name in ("pyproject.toml", "setup.py", "CMakeLists.txt", "MANIFEST.in", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, target / name)
    return target


def wheel(source: Path, *, cuda: str = "OFF", **environment: str) -> tuple[zipfile.ZipFile, str]:
    """Build a wheel without isolation, which would need a package index; returns it and what the build printed."""
    out = source.parent / "wheels"
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps", "--wheel-dir", out, source],
        env={**os.environ, "FISHERTUNE_CUDA": cuda, **environment},
        capture_output=True,
        text=True,
        errors="replace",
    )
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed[-4000:]
    [path] = out.glob("*.whl")
    return zipfile.ZipFile(path), printed


def install(archive: zipfile.ZipFile, target: Path, program: str) -> str:
    """What ``program`` prints when only the unpacked wheel is importable beside the test's own site-packages."""
    archive.extractall(target)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("FISHERTUNE_")}
    environment["PYTHONPATH"] = str(target)
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=target, capture_output=True, text=True, check=True
    )
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not BUILDS, reason="cmake or a C++ compiler is missing")
def test_wheel_has_both_packages_and_the_library(source, tmp_path):
    archive, _ = wheel(source, cuda="AUTO")
    names = archive.namelist()
    tops = {name.split("/")[0] for name in names}
    assert {"fishertune", "fishertune_kernels"} <= tops
    assert not {"kernels", "csrc", "tests", "benchmarks"} & tops
    assert [name for name in names if "libfishertune" in name] == ["fishertune_kernels/lib/libfishertune.so"]
    assert "fishertune_kernels/select_threshold/native.py" in names
    for package, folder in (("fishertune", ROOT), ("fishertune_kernels", ROOT / "kernels")):
        for file in (folder / package).rglob("*.py"):
            assert file.relative_to(folder).as_posix() in names
    assert archive.filename.rsplit("-", 3)[1:3] == ["py3", "none"]
    program = (
        "import torch, fishertune_kernels as fk\nfrom fishertune_kernels import native\n"
        "print(native.available(), fk.select_threshold(torch.arange(10.), 3).value)\nprint(native.cuda_why_not())"
    )
    answer, cuda = install(archive, tmp_path / "site", program).splitlines()
    assert answer == "True 7.0"
    if NVCC:
        assert "not built" not in cuda
    else:
        assert "not built with CUDA (no working nvcc was found)" in cuda


@pytest.mark.slow
@pytest.mark.skipif(not BUILDS, reason="cmake or a C++ compiler is missing")
def test_second_build_after_the_build_tools_moved(source):
    """An isolated build leaves a CMake cache that names a ninja which is gone by the next build."""
    wheel(source)
    shutil.rmtree(source.parent / "wheels")
    [cache] = (source / "build").glob("native-*/CMakeCache.txt")
    text = cache.read_text()
    cache.write_text(
        "\n".join(
            "CMAKE_MAKE_PROGRAM:FILEPATH=/nowhere/ninja" if line.startswith("CMAKE_MAKE_PROGRAM") else line
            for line in text.splitlines()
        )
    )
    (source / "fishertune" / "files.py").unlink()  # and a module deleted in between must not come back
    archive, _ = wheel(source)
    assert "fishertune_kernels/lib/libfishertune.so" in archive.namelist()
    assert "fishertune/files.py" not in archive.namelist()


@pytest.mark.slow
@pytest.mark.skipif(not (BUILDS and NVCC), reason="cmake, a C++ compiler or nvcc is missing")
def test_cuda_code_that_does_not_compile_costs_only_the_cuda_kernels(source, tmp_path):
    with (source / "csrc" / "cuda" / "api.cu").open("a") as file:
        file.write("#error broken on purpose\n")
    archive, printed = wheel(source, cuda="AUTO")
    assert "WARNING: fishertune's native library is without CUDA kernels" in printed
    assert "broken on purpose" in printed
    program = (
        "import torch, fishertune_kernels as fk\nfrom fishertune_kernels import native\n"
        "print(native.available(), fk.select_threshold(torch.arange(10.), 3).value)\nprint(native.cuda_why_not())"
    )
    answer, cuda = install(archive, tmp_path / "site", program).splitlines()
    assert answer == "True 7.0"
    assert "not built with CUDA (compiling its CUDA part failed); rebuild it with FISHERTUNE_CUDA=ON" in cuda


@pytest.mark.skipif(not BUILDS, reason="cmake or a C++ compiler is missing")
@pytest.mark.parametrize(
    ("cuda", "explanation"),
    [("ON", "FISHERTUNE_CUDA=ON, but the CMake configure step failed"), ("yes", "FISHERTUNE_CUDA=YES is not known")],
)
def test_cuda_that_was_asked_for_and_cannot_be_had_is_an_error(source, tmp_path, cuda, explanation):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'this nvcc does not work'\nexit 1\n")
    nvcc.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "setup.py", "build_native"],
        env={**os.environ, "FISHERTUNE_CUDA": cuda, "CUDACXX": str(nvcc)},
        cwd=source,
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert explanation in done.stderr


@pytest.mark.slow
def test_a_failing_build_still_installs_and_says_why(source, tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    cmake = tools / "cmake"
    cmake.write_text("#!/bin/sh\necho 'No CMAKE_CXX_COMPILER could be found.'\nexit 1\n")
    cmake.chmod(0o755)
    archive, printed = wheel(source, PATH=f"{tools}{os.pathsep}{os.environ['PATH']}")
    assert not [name for name in archive.namelist() if name.endswith(".so")]
    assert "WARNING: fishertune is installed without its native library" in printed
    assert "No CMAKE_CXX_COMPILER could be found." in printed
    assert "times as long" in printed
    program = (
        "import torch, fishertune_kernels as fk\nfrom fishertune_kernels import native\n"
        "print(fk.select_threshold(torch.arange(10.), 3).value)\nprint(native.why_not())"
    )
    answer = install(archive, tmp_path / "site", program)
    assert answer.startswith("7.0\n")
    # pip hides what a successful build prints: the package itself must still know the reason.
    assert "No CMAKE_CXX_COMPILER could be found." in answer
    assert "reinstall" in answer


@pytest.mark.slow
@pytest.mark.skipif(not BUILDS, reason="cmake or a C++ compiler is missing")
def test_editable_install_builds_into_the_source_tree(source):
    program = "import setuptools.build_meta as backend, sys; backend.build_editable(sys.argv[1])"
    environment = {**os.environ, "FISHERTUNE_CUDA": "OFF"}
    subprocess.run(
        [sys.executable, "-c", program, source.parent], cwd=source, check=True, capture_output=True, env=environment
    )
    assert (source / "kernels" / "fishertune_kernels" / "lib" / "libfishertune.so").is_file()


def test_no_package_named_kernels():
    """PyPI's `kernels` is imported by transformers; a package of ours by that name would shadow it."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
