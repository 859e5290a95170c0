"""Which implementation of an operator runs, and why.

CPU tensors go to ``native`` (C++ through ctypes), CUDA tensors to ``triton``, and whatever these cannot take to
``reference`` (plain torch, every device, also float64). Some operators have a ``cuda`` implementation as well (CUDA C++
in the compiled library), which runs where it is asked for. Nothing is imported before a tensor asks for it, so the
package imports without triton, without the compiled library and without a GPU. The choice for each operator is logged
once, with its reason, to the logger ``fishertune_kernels``.

Environment variables, all that this package reads:

``FISHERTUNE_BACKEND``
    ``reference``, ``native``, ``triton`` or ``cuda``: use this one for every operator. Or a choice for some of them, as
    in ``select_threshold=cuda,compact=cuda``; the others choose by device. Where a backend cannot run (no library,
    wrong device) the call fails with the reason. Types it does not know (float64) still go to the reference.
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
import pkgutil
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import torch

BACKENDS = ("reference", "native", "triton", "cuda")
KERNEL_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
_logger = logging.getLogger("fishertune_kernels")
_chosen: dict[tuple[str, str, frozenset[torch.dtype], str], ModuleType] = {}


def implementation(operator: str, device: torch.device, dtypes: Iterable[torch.dtype]) -> ModuleType:
    """The module whose functions run ``operator`` on tensors of this device and these dtypes.

    Raises:
        ValueError: if ``FISHERTUNE_BACKEND`` names no backend, or an operator that does not exist.
        RuntimeError: if the backend it names cannot run here.
    """
    setting = os.environ.get("FISHERTUNE_BACKEND", "")
    key = (operator, device.type, frozenset(dtypes), setting)
    module = _chosen.get(key)
    if module is None:
        backend, why = _choose(*key)
        module = _chosen[key] = importlib.import_module(f".{operator}.{backend}", __package__)
        _logger.info("%s on %s: %s (%s)", operator, device.type, backend, why)
    return module


def _choose(operator: str, device: str, dtypes: frozenset[torch.dtype], setting: str) -> tuple[str, str]:
    forced = _forced(operator, setting)
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
            f"FISHERTUNE_BACKEND={setting} cannot run {operator} on {device} tensors: {obstacle}. "
            "Unset the variable to let the operator choose."
        )
    return "reference", obstacle


def _forced(operator: str, setting: str) -> str:
    """The backend that ``FISHERTUNE_BACKEND`` asks for this operator; empty where it asks for none."""
    if "=" not in setting:
        if setting and setting not in BACKENDS:
            raise ValueError(
                f"FISHERTUNE_BACKEND={setting!r} is not a backend. Set it to one of {', '.join(BACKENDS)}, or to a "
                "choice for some operators, as in select_threshold=cuda,compact=cuda, or unset it to let every "
                "operator choose by device."
            )
        return setting
    operators = [module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)]) if module.ispkg]
    choices: dict[str, str] = {}
    for entry in setting.split(","):
        name, _, backend = (part.strip() for part in entry.partition("="))
        for what, word, known in (("operator", name, operators), ("backend", backend, BACKENDS)):
            if word not in known:
                raise ValueError(f"FISHERTUNE_BACKEND={setting!r}: {word!r} is no {what}; expected {', '.join(known)}.")
        choices[name] = backend
    return choices.get(operator, "")


def _obstacle(operator: str, backend: str, device: str) -> str | None:
    """Why ``backend`` cannot run ``operator`` on this device, or None if it can."""
    if not _exists(operator, backend):
        return (
            f"{operator} has no {backend} implementation, only {', '.join(b for b in BACKENDS if _exists(operator, b))}"
        )
    if backend == "cuda":
        if device != "cuda":
            return "the CUDA kernels take CUDA tensors only"
        from . import native

        return native.cuda_why_not()
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


def _exists(operator: str, backend: str) -> bool:
    return importlib.util.find_spec(f".{operator}.{backend}", __package__) is not None
