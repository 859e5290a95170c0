"""Which implementation of an operator runs, and why.

CPU tensors go to ``native`` (C++ through ctypes), CUDA tensors to ``triton``, and whatever these cannot take to
``reference`` (plain torch, every device, also float64). Nothing is imported before a tensor asks for it, so the
package imports without triton, without the compiled library and without a GPU. The choice for each operator is logged
once, with its reason, to the logger ``fishertune_kernels``.

Environment variables, all that this package reads:

``FISHERTUNE_BACKEND``
    ``reference``, ``native`` or ``triton``: use this one for every operator. Where it cannot run (no library, wrong
    device) the call fails with the reason. Types it does not know (float64) still go to the reference.
``FISHERTUNE_NATIVE_LIBRARY``
    Path of the C++ library, instead of the one in ``fishertune_kernels/lib``. Read once, by ``native.py``.
``FISHERTUNE_NATIVE_ISA``
    Instruction set the library runs instead of the best one of this machine. Read once, by the library.
``TRITON_INTERPRET``
    Triton's own switch; ``1``, set before triton is imported, lets ``FISHERTUNE_BACKEND=triton`` run on CPU tensors.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from collections.abc import Iterable
from types import ModuleType

import torch

BACKENDS = ("reference", "native", "triton")
KERNEL_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
_logger = logging.getLogger("fishertune_kernels")
_chosen: dict[tuple[str, str, frozenset[torch.dtype], str], ModuleType] = {}


def implementation(operator: str, device: torch.device, dtypes: Iterable[torch.dtype]) -> ModuleType:
    """The module whose functions run ``operator`` on tensors of this device and these dtypes.

    Raises:
        ValueError: if ``FISHERTUNE_BACKEND`` is not a backend's name.
        RuntimeError: if the backend it names cannot run here.
    """
    forced = os.environ.get("FISHERTUNE_BACKEND", "")
    key = (operator, device.type, frozenset(dtypes), forced)
    module = _chosen.get(key)
    if module is None:
        backend, why = _choose(*key)
        module = _chosen[key] = importlib.import_module(f".{operator}.{backend}", __package__)
        _logger.info("%s on %s: %s (%s)", operator, device.type, backend, why)
    return module


def _choose(operator: str, device: str, dtypes: frozenset[torch.dtype], forced: str) -> tuple[str, str]:
    if forced and forced not in BACKENDS:
        raise ValueError(
            f"FISHERTUNE_BACKEND={forced!r} is not a backend. Set it to one of {', '.join(BACKENDS)}, "
            "or unset it to let every operator choose by device."
        )
    if forced == "reference":
        return forced, "FISHERTUNE_BACKEND"
    usual = {"cpu": "native", "cuda": "triton"}.get(device)
    backend = forced or usual
    if backend is None:
        return "reference", f"no kernels for {device} tensors"
    unknown = dtypes - KERNEL_DTYPES
    if unknown:
        return "reference", f"the {backend} kernels do not take {', '.join(sorted(map(str, unknown)))}"
    obstacle = _obstacle(operator, backend, device)
    if obstacle is None:
        return backend, "FISHERTUNE_BACKEND" if forced else f"{device} tensors"
    if forced:
        raise RuntimeError(
            f"FISHERTUNE_BACKEND={forced} cannot run {operator} on {device} tensors: {obstacle}. "
            "Unset the variable to let the operator choose."
        )
    return "reference", obstacle


def _obstacle(operator: str, backend: str, device: str) -> str | None:
    """Why ``backend`` cannot run ``operator`` on this device, or None if it can."""
    if importlib.util.find_spec(f".{operator}.{backend}", __package__) is None:
        return f"{operator} has no {backend} implementation"
    if backend == "native":
        if device != "cpu":
            return "the C++ kernels take CPU tensors only"
        from . import native

        return None if native.available() else native.why_not()
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device != "cuda" and os.environ.get("TRITON_INTERPRET", "0") != "1":
        return f"triton needs CUDA tensors, or TRITON_INTERPRET=1 to interpret its kernels on {device}"
    return None
