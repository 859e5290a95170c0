"""The compiled library of ``csrc/``, found and opened on first use: C++ for CPUs, CUDA C++ where it was built with it.

It is a plain C library (``csrc/include/fishertune.h``) called through ctypes, so that one build serves every torch
version. It is looked for in ``fishertune_kernels/lib`` or at the path in ``FISHERTUNE_NATIVE_LIBRARY``. A missing
library is no error until something asks for it: the reference implementations do the same work more slowly.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from array import array
from pathlib import Path

import torch  # also loads torch's OpenMP runtime, which the library then shares instead of bringing a second one

ABI_VERSION = 2
"""The version of csrc/include/fishertune.h these callers are written against."""

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""dtypes the library computes with, and their codes."""

INDEX_DTYPES = {torch.int32: 0, torch.int64: 1}

_FILE_NAME = {"darwin": "libfishertune.dylib", "win32": "fishertune.dll"}.get(sys.platform, "libfishertune.so")

_ROWS, _COUNT, _THREADS = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
_DOUBLE, _INT, _UINT64, _POINTER = ctypes.c_double, ctypes.c_int32, ctypes.c_uint64, ctypes.c_void_p

# Arguments between (rows, n_rows) and threads.
_ARGUMENTS: dict[str, list[type]] = {
    "ft_squared_grad_accumulate": [_DOUBLE],
    "ft_per_sample_affine": [_DOUBLE],
    "ft_gaussian_perturb": [_DOUBLE, _UINT64, _UINT64, _DOUBLE],
    "ft_precision_update_natural": [_DOUBLE, _DOUBLE],
    "ft_precision_update_sgvb": [_POINTER],
    "ft_dr_fim_score": [_INT, _DOUBLE, _DOUBLE, _DOUBLE, _DOUBLE, ctypes.c_int64, _POINTER],
    "ft_key_histogram": [_INT, _INT, ctypes.c_uint32, ctypes.c_uint32, _POINTER],
    "ft_sample_scores": [ctypes.c_int64, _POINTER],
    "ft_collect_bracket": [_POINTER],
    "ft_compact": [ctypes.c_float, _POINTER],
    "ft_sparse_adamw": [_POINTER],
    "ft_selected_grad_norm": [_POINTER],
    "ft_gather_values": [],
    "ft_scatter_values": [],
}

# Arguments between (table, n_rows, work) and (device, stream).
_CUDA_ARGUMENTS: dict[str, list[type]] = {
    "ft_cuda_key_histogram": [_INT, _INT, ctypes.c_uint32, ctypes.c_uint32, _POINTER],
    "ft_cuda_collect_bracket": [ctypes.c_uint32, ctypes.c_uint32, _POINTER, _POINTER, _COUNT, _POINTER],
    "ft_cuda_sample_scores": [_POINTER, _COUNT, _POINTER],
    "ft_cuda_compact": [ctypes.c_float, _POINTER, _POINTER, _POINTER],
}


@functools.cache
def _load() -> ctypes.CDLL | str:
    """The opened library, or the reason why there is none."""
    override = os.environ.get("FISHERTUNE_NATIVE_LIBRARY")
    path = Path(override) if override else Path(__file__).parent / "lib" / _FILE_NAME
    if not path.is_file():
        if override:
            return (
                f"FISHERTUNE_NATIVE_LIBRARY={override} names no file; "
                "correct it, or unset it to use the package's own library"
            )
        reason = path.with_name("not_built.txt")  # left by setup.py
        detail = f": {reason.read_text(encoding='utf-8').strip()}" if reason.is_file() else ""
        return (
            f"the native library {path} was not built{detail}; build it with `python setup.py build_native` in the "
            "source tree, or reinstall the package where a C++17 compiler is present"
        )
    try:
        library = ctypes.CDLL(str(path))
        library.ft_abi_version.restype = ctypes.c_int32
        version = library.ft_abi_version()
    except (OSError, AttributeError) as error:
        return f"the native library {path} cannot be used: {error}"
    if version != ABI_VERSION:
        return (
            f"the native library {path} has interface version {version}, this package needs {ABI_VERSION}; "
            "rebuild it with `python setup.py build_native` or reinstall the package"
        )
    try:
        _declare(library)
    except AttributeError as error:
        return (
            f"the native library {path} is older than this package ({error}); "
            "rebuild it with `python setup.py build_native` or reinstall the package"
        )
    return library


def _declare(library: ctypes.CDLL) -> None:
    """Argument and result types of every function."""
    for name, arguments in _ARGUMENTS.items():
        function = getattr(library, name)
        function.argtypes = [_ROWS, _COUNT, *arguments, _THREADS]
        function.restype = ctypes.c_int32
    for name, arguments in _CUDA_ARGUMENTS.items():
        function = getattr(library, name)
        function.argtypes = [_ROWS, _COUNT, _COUNT, *arguments, _INT, _POINTER]
        function.restype = ctypes.c_int32
    library.ft_cuda_available.restype = ctypes.c_int32
    library.ft_cuda_table.argtypes = [_ROWS, _COUNT, _POINTER, _POINTER]
    library.ft_cuda_table.restype = ctypes.c_int32
    library.ft_cuda_compact_workspace.argtypes = [_COUNT]
    library.ft_cuda_compact_workspace.restype = ctypes.c_int64
    library.ft_set_isa.argtypes = [ctypes.c_char_p]
    library.ft_set_isa.restype = ctypes.c_int32
    library.ft_isa.restype = ctypes.c_char_p
    library.ft_last_error.restype = ctypes.c_char_p


def available() -> bool:
    """Whether the library can be used on this machine."""
    return not isinstance(_load(), str)


def why_not() -> str | None:
    """Why the library cannot be used and how to mend it; None where it can."""
    loaded = _load()
    return loaded if isinstance(loaded, str) else None


@functools.cache
def cuda_why_not() -> str | None:
    """Why the library's CUDA kernels cannot be used and how to mend it; None where they can. Starts the CUDA driver."""
    loaded = _load()
    if isinstance(loaded, str):
        return loaded
    if loaded.ft_cuda_available() == 0:
        return None
    reason = loaded.ft_last_error().decode()
    remedy = (
        "; rebuild it with FISHERTUNE_CUDA=ON, which needs nvcc, for example "
        "`FISHERTUNE_CUDA=ON python setup.py build_native`"
        if reason.startswith("not built")
        else ""
    )
    return f"the native library {loaded._name}: {reason}{remedy}"


def lib() -> ctypes.CDLL:
    """The opened library. Raises RuntimeError with the reason of ``why_not`` where there is none."""
    loaded = _load()
    if isinstance(loaded, str):
        raise RuntimeError(loaded)
    return loaded


def isa() -> str:
    """The instruction set the library runs: ``avx512``, ``avx2`` or ``portable``. Results do not depend on it."""
    return lib().ft_isa().decode()


def set_isa(name: str) -> None:
    """Make the library run another instruction set, to test or time it; the environment's FISHERTUNE_NATIVE_ISA does so
    from the start. Raises ValueError for one this machine or build lacks."""
    check("ft_set_isa", lib().ft_set_isa(name.encode()))


class Rows:
    """The list of tensors of one call: what the header calls rows, as plain 64-bit integers.

    Holds on to every tensor whose address it has taken.
    """

    def __init__(self) -> None:
        self._fields = array("q")
        self._kept: list[torch.Tensor] = []
        self._count = 0

    def add(self, *fields: int) -> None:
        self._fields.extend(fields)
        self._count += 1

    def read(self, tensor: torch.Tensor) -> int:
        """Address of a dense copy of the tensor, which is the tensor itself where it is dense."""
        tensor = tensor.contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()

    def read_float(self, tensor: torch.Tensor) -> int:
        return self.read(tensor.float())

    def write(self, tensor: torch.Tensor, *, dtype: torch.dtype | None = torch.float32) -> int:
        """Address of a tensor that the call changes; ``dtype`` None accepts any."""
        if not tensor.is_contiguous():
            raise ValueError(
                f"a tensor of shape {tuple(tensor.shape)} and strides {tensor.stride()} is to be changed in place; "
                "expected a contiguous one"
            )
        if dtype is not None and tensor.dtype != dtype:
            raise TypeError(f"a tensor of dtype {tensor.dtype} is to be changed in place; expected {dtype}")
        return tensor.data_ptr()

    @property
    def arguments(self) -> tuple[int, int]:
        return self._fields.buffer_info()[0], self._count


def call(function: str, rows: Rows, *arguments: object) -> None:
    """Run a list operator on as many threads as torch uses."""
    check(function, getattr(lib(), function)(*rows.arguments, *arguments, torch.get_num_threads()))


def check(function: str, status: int) -> None:
    """Raise what a function's status stands for, with the library's message."""
    if status == 0:
        return
    message = f"{function}: {lib().ft_last_error().decode()}"
    raise {1: ValueError, 2: MemoryError}.get(status, RuntimeError)(message)
