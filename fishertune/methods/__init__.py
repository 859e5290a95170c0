"""What can be tuned, side by side: one file per method, one interface (:class:`~fishertune.methods.base.Method`)."""

from __future__ import annotations

import difflib

from fishertune.methods.base import Method
from fishertune.methods.delta_f import DeltaF
from fishertune.methods.dr_fim import DRFIM
from fishertune.methods.fisher import Fisher
from fishertune.methods.fishertune import FisherTune
from fishertune.methods.freeze import Freeze
from fishertune.methods.full import Full
from fishertune.methods.random_subset import RandomSubset

__all__ = ["Method", "get_method", "list_methods"]

_METHODS: dict[str, type[Method]] = {
    method.name: method for method in (FisherTune, DRFIM, Fisher, DeltaF, RandomSubset, Full, Freeze)
}


def list_methods() -> tuple[str, ...]:
    """Names that a run configuration may use for ``method``."""
    return tuple(_METHODS)


def get_method(name: str) -> Method:
    """The method of that name.

    Raises:
        ValueError: if there is none, with the list of those there are.
    """
    if name not in _METHODS:
        close = difflib.get_close_matches(name, _METHODS, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise ValueError(f"method={name!r} does not exist.{hint} Methods: {', '.join(_METHODS)}.")
    return _METHODS[name]()
