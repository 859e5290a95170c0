"""The result of a run as a sparse difference to public weights, applied and taken back bit for bit.

A delta holds the positions of the changed elements and the XOR of their bit patterns before and after. XOR is its own
inverse, so applying and undoing are one operation, exact for every value (−0 and NaN payloads too), which adding and
subtracting a difference is not.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fishertune.files import load_tensors, save_tensors
from fishertune.selection import Selection

_FORMAT = "fishertune.delta"
_VERSION = 1

_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_DTYPES = {str(dtype): dtype for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}
# Dtypes that widen exactly to fp32: how far the mantissa moves up, the exponent bits of NaN, the mantissa bits.
_NARROW = {torch.float16: (13, 0x7C00, 0x03FF), torch.bfloat16: (16, 0x7F80, 0x007F)}


@dataclass(frozen=True)
class TensorDelta:
    """What changes in one tensor."""

    indices: Tensor
    """Flat (row-major) positions of the changed elements: 1-D, ascending, int32 (int64 beyond 2³¹ elements)."""
    bits: Tensor
    """Bits that flip there: before XOR after, never 0, int16, int32 or int64 by the width of ``dtype``."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    """Dtype of the tuned tensor."""
    base_dtype: torch.dtype
    """Dtype the base was given in, the same or one that widens exactly to ``dtype``."""
    base_sha256: str
    """Fingerprint of the tensor before: SHA-256 over its name, shape and bytes in ``dtype``."""
    tuned_sha256: str | None
    """Fingerprint of the tensor after; None where two deltas of one base were merged without the weights at hand."""

    def matches(self, name: str, value: Tensor, *, applied: bool) -> bool:
        """Whether ``value`` is the base of this delta (or, with ``applied``, becomes it when the delta is undone)."""
        value = _widen(value, self.dtype)
        return _sha256(name, _flipped(value, self) if applied else value) == self.base_sha256


@dataclass(frozen=True)
class Delta:
    """Changed elements of named tensors, bound to the weights they change by a fingerprint of each tensor.

    On disk and in memory it takes, per changed element, 4 bytes for the position and 4 (fp32) or 2 (bf16, fp16) for the
    bits. Tensors and elements that did not change are not in it.
    """

    tensors: dict[str, TensorDelta]
    metadata: dict[str, Any] = field(default_factory=dict)
    """Free for the user, JSON-able; saved with the delta."""

    def __len__(self) -> int:
        """Number of changed elements."""
        return sum(tensor.indices.numel() for tensor in self.tensors.values())

    @property
    def nbytes(self) -> int:
        """Bytes of positions and bits: the size on disk, but for about 300 bytes of header per tensor."""
        return sum(part.numel() * part.element_size() for t in self.tensors.values() for part in (t.indices, t.bits))

    @property
    def fingerprint(self) -> str:
        """SHA-256 that identifies the base weights, over the fingerprints of all tensors the delta touches."""
        return hashlib.sha256(
            "".join(f"{name}:{self.tensors[name].base_sha256};" for name in sorted(self.tensors)).encode()
        ).hexdigest()

    @staticmethod
    def between(
        base: Mapping[str, Tensor] | nn.Module,
        tuned: Mapping[str, Tensor] | nn.Module,
        selection: Selection,
        *,
        metadata: Mapping[str, Any] | None = None,
    ) -> Delta:
        """The delta that turns ``base`` into ``tuned`` in the parameters of ``selection``.

        Args:
            base: weights before tuning. fp16 and bf16 tensors may stand for a tuned fp32 one: they widen exactly.
            tuned: weights after tuning. Tensors the selection did not score (a decoder) are ignored.
            selection: the elements that were allowed to change.
            metadata: anything JSON-able to keep with the delta.

        Raises:
            ValueError: if a tensor is missing or of another shape; if a dtype of the base does not widen exactly to the
                tuned one; if an element outside the selection changed.
        """
        before, after = _state(base), _state(tuned)
        tensors = {}
        for name, indices in selection.indices.items():
            if indices.numel() == 0 and not (name in before and name in after):
                continue
            for which, state in (("base", before), ("tuned", after)):
                if name not in state:
                    raise ValueError(f"The {which} weights have no '{name}', which the selection covers.")
                if tuple(state[name].shape) != selection.shapes[name]:
                    raise ValueError(
                        f"'{name}' has the shape {tuple(state[name].shape)} in the {which} weights, the selection was "
                        f"made for {selection.shapes[name]}."
                    )
            tensor = _tensor_between(name, before[name], after[name], indices)
            if tensor.indices.numel():
                tensors[name] = tensor
        return Delta(tensors, dict(metadata or {}))

    def save(self, path: str | Path) -> None:
        """Writes the delta as one safetensors file, whole or not at all."""
        tensors = {f"indices/{name}": tensor.indices for name, tensor in self.tensors.items()}
        tensors |= {f"bits/{name}": tensor.bits for name, tensor in self.tensors.items()}
        described = {
            name: {
                "shape": list(tensor.shape),
                "dtype": str(tensor.dtype),
                "base_dtype": str(tensor.base_dtype),
                "base_sha256": tensor.base_sha256,
                "tuned_sha256": tensor.tuned_sha256,
            }
            for name, tensor in self.tensors.items()
        }
        header = {"format": _FORMAT, "version": _VERSION, "tensors": described, "metadata": self.metadata}
        save_tensors(path, tensors, header | {"fingerprint": self.fingerprint})

    @staticmethod
    def load(path: str | Path) -> Delta:
        """Reads a file of :meth:`save`.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is no delta, was written by a newer version, or its tensors do not fit its metadata.
        """
        stored, header = load_tensors(path)
        if header.get("format") != _FORMAT:
            raise ValueError(
                f"{path} holds no delta (format {header.get('format')!r}, expected {_FORMAT!r}). "
                "Pass a file written by Delta.save, such as delta.safetensors of a run."
            )
        if header.get("version") != _VERSION:
            raise ValueError(
                f"{path} is a delta of version {header.get('version')}, this program reads version {_VERSION}. "
                "Update fishertune."
            )
        try:
            tensors = {
                name: TensorDelta(
                    indices=stored.pop(f"indices/{name}"),
                    bits=stored.pop(f"bits/{name}"),
                    shape=tuple(described["shape"]),
                    dtype=_DTYPES[described["dtype"]],
                    base_dtype=_DTYPES[described["base_dtype"]],
                    base_sha256=described["base_sha256"],
                    tuned_sha256=described["tuned_sha256"],
                )
                for name, described in header["tensors"].items()
            }
            delta = Delta(tensors, header["metadata"])
            fingerprint = header["fingerprint"]
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is damaged: {error} is missing or malformed. Fetch it again.") from error
        problems = [problem for name, tensor in tensors.items() if (problem := _inconsistency(name, tensor))]
        if stored:
            problems.append(f"unexpected tensor '{next(iter(stored))}'")
        if fingerprint != delta.fingerprint:
            problems.append("its fingerprint does not match its tensors")
        if problems:
            raise ValueError(f"{path} is damaged: {problems[0]}. Fetch it again.")
        return delta

    def apply_(self, target: nn.Module | MutableMapping[str, Tensor]) -> None:
        """Turns the base weights in ``target`` into the tuned ones, in place.

        In a state dict, a tensor of a narrower dtype (a fp16 file, tuned in fp32) is replaced by its exact widening
        first; tensors the delta does not touch keep their dtype. Everything is checked before anything is written.

        Raises:
            ValueError: if a tensor is missing, has another shape, a dtype that does not widen exactly, or other values
                than the base (other weights, or the delta is applied already).
        """
        self._flip(target, undo=False, dtype=None)

    def undo_(self, target: nn.Module | MutableMapping[str, Tensor], *, dtype: torch.dtype | None = None) -> None:
        """Turns the tuned weights in ``target`` back into the base, bit for bit, in place.

        Args:
            target: weights the delta was applied to.
            dtype: in a state dict, dtype to return touched tensors to; by default that of the base the delta was made
                from. A module keeps its dtype.

        Raises:
            ValueError: if a tensor is missing, has another shape or dtype, if undoing does not give the base (other
                weights, or the delta is not applied), or if ``dtype`` cannot hold the base exactly. Nothing has changed
                then.
        """
        self._flip(target, undo=True, dtype=dtype)

    def _flip(self, target: nn.Module | MutableMapping[str, Tensor], *, undo: bool, dtype: torch.dtype | None) -> None:
        state = _state(target)
        is_module = isinstance(target, nn.Module)
        self._check_target(state, is_module=is_module, undo=undo)
        different = [name for name, delta in self.tensors.items() if not delta.matches(name, state[name], applied=undo)]
        if different:
            raise ValueError(self._explain_mismatch(state, different, undo=undo))
        returned = {
            name: _narrow(name, _flipped(state[name], tensor), dtype or tensor.base_dtype)
            for name, tensor in self.tensors.items()
            if undo and not is_module and (dtype or tensor.base_dtype) != tensor.dtype
        }
        widened = {
            name: _flipped(_widen(state[name], tensor.dtype), tensor)
            for name, tensor in self.tensors.items()
            if not undo and state[name].dtype != tensor.dtype
        }
        replaced = returned | widened
        flipped: list[str] = []
        try:
            for name in (name for name in self.tensors if name not in replaced):
                _flip_in_place(state[name], self.tensors[name])
                flipped.append(name)
        except BaseException:
            # a tensor that cannot be written, or an interrupt: flip back, so that nothing is half applied
            for name in flipped:
                _flip_in_place(state[name], self.tensors[name])
            raise
        if not isinstance(target, nn.Module):
            target.update(replaced)

    def _check_target(self, state: Mapping[str, Tensor], *, is_module: bool, undo: bool) -> None:
        verb = "undo" if undo else "apply"
        missing = [name for name in self.tensors if name not in state]
        if missing:
            longer = [name for name in state if name.endswith(f".{missing[0]}")]
            hint = f" It has '{longer[0]}': pass that part of the model." if longer else ""
            raise ValueError(
                f"Cannot {verb} the delta: {len(missing)} of its {len(self.tensors)} tensors are missing in the "
                f"weights, first '{missing[0]}'.{hint} Nothing was changed."
            )
        for name, tensor in self.tensors.items():
            value = state[name]
            if tuple(value.shape) != tensor.shape:
                raise ValueError(
                    f"Cannot {verb} the delta: '{name}' has the shape {tuple(value.shape)}, the delta is for "
                    f"{tensor.shape}. It belongs to another model. Nothing was changed."
                )
            widens = not undo and not is_module and _widens(value.dtype, tensor.dtype)
            if value.dtype != tensor.dtype and not widens:
                raise ValueError(
                    f"Cannot {verb} the delta: '{name}' is {value.dtype}, the delta is for {tensor.dtype}. Convert "
                    f"the {'module' if is_module else 'weights'} with .to({tensor.dtype}) first. Nothing was changed."
                )
        if len({state[name].data_ptr() for name in self.tensors}) < len(self.tensors):
            raise ValueError(
                f"Cannot {verb} the delta: two of its tensors share memory in these weights (tied parameters) and "
                "would be changed twice. Clone them first. Nothing was changed."
            )

    def _explain_mismatch(self, state: Mapping[str, Tensor], different: list[str], *, undo: bool) -> str:
        if all(tensor.matches(name, state[name], applied=not undo) for name, tensor in self.tensors.items()):
            return f"The delta is {'not' if undo else 'already'} applied to these weights. Nothing was changed."
        base = "weights the delta was applied to" if undo else "base weights the delta was made for"
        return (
            f"These are not the {base}: {len(different)} of {len(self.tensors)} tensors differ, first '{different[0]}' "
            f"(expected the base with fingerprint {self.fingerprint[:12]}). Pass the same checkpoint as at tuning. "
            "Nothing was changed."
        )

    def merge(self, other: Delta) -> Delta:
        """One delta with the changes of both.

        Two deltas of the same base are united if they change different elements. A delta made on top of the other (its
        base is what the other results in) is composed with it, in either order of the call; elements that return to
        their base value disappear. In tensors only one of them touches there is nothing to reconcile. ``metadata`` of
        ``other`` wins where keys meet.

        Raises:
            ValueError: if deltas of the same base change the same elements (with their number; tune the second on top
                of the first instead), or if neither holds, because they were made for different weights.
        """
        shared = [name for name in self.tensors if name in other.tensors]
        mine, theirs = self.tensors, other.tensors
        if all(mine[name].base_sha256 == theirs[name].base_sha256 for name in shared):
            overlap = {name: _common(mine[name], theirs[name]) for name in shared}
            if any(overlap.values()):
                tensors = sum(1 for count in overlap.values() if count)
                raise ValueError(
                    f"Both deltas change {sum(overlap.values())} elements in {tensors} tensors, and one base cannot "
                    "have two values. Tune the second on top of the first, or select disjoint elements."
                )
            first, second, stacked = mine, theirs, False
        elif all(mine[name].tuned_sha256 == theirs[name].base_sha256 for name in shared):
            first, second, stacked = mine, theirs, True
        elif all(theirs[name].tuned_sha256 == mine[name].base_sha256 for name in shared):
            first, second, stacked = theirs, mine, True
        else:
            name = next(name for name in shared if mine[name].base_sha256 != theirs[name].base_sha256)
            raise ValueError(
                f"The deltas were made for different weights: '{name}' is the first tensor whose base differs, and "
                "neither delta starts where the other ends. Merge deltas of one base, or of consecutive tunings."
            )
        united = {**first, **second}
        for name in shared:
            result = second[name].tuned_sha256 if stacked else None
            united[name] = _composed(first[name], second[name], tuned_sha256=result)
        kept = {name: tensor for name, tensor in united.items() if tensor.indices.numel()}
        return Delta(kept, {**self.metadata, **other.metadata})


def _state(weights: Mapping[str, Tensor] | nn.Module) -> Mapping[str, Tensor]:
    if isinstance(weights, nn.Module):
        # not state_dict(): hooks may make it a copy, and writing to that would change nothing
        named = [*weights.named_parameters(remove_duplicate=False), *weights.named_buffers(remove_duplicate=False)]
        return {name: tensor.detach() for name, tensor in named}
    if not isinstance(weights, Mapping):
        raise TypeError(f"Weights must be a module or a dict of name → tensor, got {type(weights).__name__}.")
    return {name: tensor.detach() for name, tensor in weights.items() if isinstance(tensor, Tensor)}


def _tensor_between(name: str, base: Tensor, tuned: Tensor, indices: Tensor) -> TensorDelta:
    if tuned.dtype not in _DTYPES.values() or not _widens(base.dtype, tuned.dtype):
        raise ValueError(
            f"'{name}' is {base.dtype} in the base weights and {tuned.dtype} in the tuned ones, which does not widen "
            f"exactly. Convert the base with .to({tuned.dtype}) and publish the delta for those weights."
        )
    widened, after = _widen(base.cpu(), tuned.dtype), tuned.cpu()
    flips = _bits(widened) ^ _bits(after)
    positions = indices.cpu()
    selected = flips.index_select(0, positions)
    outside = int(flips.index_fill_(0, positions.long(), 0).count_nonzero())
    if outside:
        raise ValueError(
            f"{outside} elements of '{name}' outside the selection differ from the base weights. Either the base is "
            "not the checkpoint that was tuned, or something else than SparseAdamW changed the parameter."
        )
    changed = selected != 0
    return TensorDelta(
        indices=positions[changed],
        bits=selected[changed],
        shape=tuple(tuned.shape),
        dtype=tuned.dtype,
        base_dtype=base.dtype,
        base_sha256=_sha256(name, widened),
        tuned_sha256=_sha256(name, after),
    )


def _widens(narrow: torch.dtype, wide: torch.dtype) -> bool:
    return narrow == wide or (wide == torch.float32 and narrow in _NARROW)


def _widen(value: Tensor, dtype: torch.dtype) -> Tensor:
    """``value`` in fp32, exactly; conversion in hardware quiets signalling NaN, so NaN is widened by its bits."""
    if value.dtype == dtype:
        return value
    widened = value.to(dtype)
    nan = value.isnan()
    if nan.any():
        shift, _, mantissa = _NARROW[value.dtype]
        bits = value.view(torch.int16)[nan].int()
        widened.view(torch.int32)[nan] = ((bits & 0x8000) << 16) | 0x7F800000 | ((bits & mantissa) << shift)
    return widened


def _narrow(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of :func:`_widen`; refuses what ``dtype`` cannot hold."""
    narrowed = value.to(dtype) if _widens(dtype, value.dtype) else None
    if narrowed is not None and narrowed.dtype != value.dtype:
        nan = value.isnan()
        if nan.any():
            shift, exponent, mantissa = _NARROW[dtype]
            bits = value.view(torch.int32)[nan]
            patched = ((bits >> 16) & 0x8000) | exponent | ((bits >> shift) & mantissa)
            narrowed.view(torch.int16)[nan] = patched.to(torch.int16)
    if narrowed is None or not torch.equal(_bits(_widen(narrowed, value.dtype)), _bits(value)):
        raise ValueError(
            f"Cannot undo the delta to {dtype}: it does not hold the base values of '{name}' exactly. Leave dtype out. "
            "Nothing was changed."
        )
    return narrowed


def _bits(value: Tensor) -> Tensor:
    """Flat bit patterns; shares memory with a contiguous ``value``."""
    return value.contiguous().view(_INTEGER[value.element_size()]).view(-1)


def _flip_in_place(value: Tensor, tensor: TensorDelta) -> None:
    contiguous = value.contiguous()
    bits, index = _bits(contiguous), tensor.indices.long().to(value.device)
    bits.index_copy_(0, index, bits.index_select(0, index) ^ tensor.bits.to(value.device))
    if contiguous is not value:
        # as integers: copying floats may not keep the payload of NaN
        value.view(bits.dtype).copy_(contiguous.view(bits.dtype))


def _flipped(value: Tensor, tensor: TensorDelta) -> Tensor:
    flipped = value.clone()
    _flip_in_place(flipped, tensor)
    return flipped


def _sha256(name: str, value: Tensor) -> str:
    sha = hashlib.sha256(f"{name}|{list(value.shape)}|{value.dtype}|".encode())
    sha.update(_bits(value).cpu().numpy().tobytes())
    return sha.hexdigest()


def _common(first: TensorDelta, second: TensorDelta) -> int:
    return int(torch.isin(first.indices, second.indices).sum())


def _composed(first: TensorDelta, second: TensorDelta, *, tuned_sha256: str | None) -> TensorDelta:
    indices, inverse = torch.cat([first.indices, second.indices]).unique(return_inverse=True)
    bits = torch.zeros(indices.numel(), dtype=first.bits.dtype)
    split = first.indices.numel()
    bits[inverse[:split]] = first.bits
    bits[inverse[split:]] ^= second.bits
    changed = bits != 0
    return replace(first, indices=indices[changed], bits=bits[changed], tuned_sha256=tuned_sha256)


def _inconsistency(name: str, tensor: TensorDelta) -> str | None:
    index, bits = tensor.indices, tensor.bits
    if index.dtype not in (torch.int32, torch.int64) or index.dim() != 1 or index.shape != bits.shape:
        return f"'{name}' has indices {index.dtype} of shape {tuple(index.shape)} for {bits.numel()} bit patterns"
    if bits.dtype != _INTEGER[tensor.dtype.itemsize] or not _widens(tensor.base_dtype, tensor.dtype):
        return f"'{name}' has bit patterns {bits.dtype} for {tensor.dtype} on a base of {tensor.base_dtype}"
    if index.numel() == 0:
        return f"'{name}' is listed without a changed element"
    if index[0] < 0 or index[-1] >= math.prod(tensor.shape) or bool((index[1:] <= index[:-1]).any()):
        return f"the indices of '{name}' are not ascending positions in shape {tensor.shape}"
    return None
