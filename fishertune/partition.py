"""Names the Q, K, V and FFN parameters of any vision transformer (paper Eq. 3).

Most vision transformers keep Q, K and V as rows of one fused matrix, so a candidate is a *slice of a parameter*: block,
kind, parameter name, rows. What is counted:

* Q, K, V: rows of the projections' weights and biases. The K bias counts only where position enters by rotation (RoPE)
  or keys are normalised: elsewhere it adds the same to all logits of a query, softmax removes it, its gradient is
  rounding noise, and a ratio of two noises must not win a ranking.
* FFN: weights and biases of every Linear layer of the feed-forward network, gates included.
* PROJ (not tuned by the paper): weight and bias of the attention's output projection.

Norms, LayerScale, embeddings, relative position tables and heads are never candidates.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor, nn

KINDS = ("Q", "K", "V", "FFN", "PROJ")

_FUSED = {"qkv": "QKV", "Wqkv": "QKV", "kv": "KV"}
_SPLIT = {
    **dict.fromkeys(("q_proj", "query", "q", "to_q", "wq"), "Q"),
    **dict.fromkeys(("k_proj", "key", "k", "to_k", "wk"), "K"),
    **dict.fromkeys(("v_proj", "value", "v", "to_v", "wv"), "V"),
}
_OUT = frozenset({"proj", "out_proj", "o_proj", "dense", "to_out", "projection"})
_APART = {"q_bias": "Q", "k_bias": "K", "v_bias": "V"}  # biases beside a fused matrix without one (EVA, DINOv3)
_IN_FFN = re.compile(r"(^|\.)(mlps?|ffns?|feed_forward|intermediate)(\.|$)")
_IN_ATTENTION = re.compile(r"(^|\.)(attns?|attention|self_attn|self_attention)(\.|$)")


@dataclass(frozen=True)
class Slice:
    """Some rows (of dimension 0) of one parameter.

    Attributes:
        block: number of the transformer block, from 0.
        kind: one of :data:`KINDS`.
        name: the parameter's name in ``model.named_parameters()``.
        rows: the rows; start and stop are set.
    """

    block: int
    kind: str
    name: str
    rows: slice

    def view(self, tensor: Tensor) -> Tensor:
        """These rows of a tensor shaped as the parameter: a view, writable in place."""
        return tensor[self.rows]


class Partition(Sequence[Slice]):
    """The candidates of a model, by block and kind. Made by :func:`partition`."""

    def __init__(self, slices: Iterable[Slice], shapes: Mapping[str, torch.Size]) -> None:
        self._slices = tuple(slices)
        self._shapes = {item.name: torch.Size(shapes[item.name]) for item in self._slices}

    @overload
    def __getitem__(self, index: int) -> Slice: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Slice, ...]: ...
    def __getitem__(self, index: int | slice) -> Slice | tuple[Slice, ...]:
        return self._slices[index]

    def __len__(self) -> int:
        return len(self._slices)

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters that hold candidates, each once."""
        return tuple(self._shapes)

    @property
    def n_candidates(self) -> int:
        """Number of candidate elements."""
        return sum(stop - start for _, start, stop in self._ranges())

    def mask_scores(self, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``scores`` with −inf, the mark of a non-candidate, everywhere else.

        Args:
            scores: by parameter name, shaped as the parameters; names without candidates become −inf altogether.

        Returns:
            Floating-point tensors under the same names; one that is all candidates is passed through, not copied.

        Raises:
            ValueError: if a parameter with candidates has no scores, or scores of another shape.
        """
        self._check("scores", scores)
        kept = {name: torch.zeros(shape[0], dtype=torch.bool) for name, shape in self._shapes.items()}
        for item in self._slices:
            kept[item.name][item.rows] = True
        masked = {}
        for name, values in scores.items():
            if name not in kept:
                masked[name] = torch.full_like(values, -math.inf)
            elif bool(kept[name].all()):
                masked[name] = values
            else:
                masked[name] = values.clone()
                masked[name][~kept[name].to(values.device)] = -math.inf
        return masked

    def share(self, indices: Mapping[str, Tensor]) -> dict[tuple[int, str], int]:
        """How many selected elements lie in each block and kind.

        Args:
            indices: by parameter name, sorted flat indices (1-D), as in ``Selection.indices``; absent names count as
                empty.

        Returns:
            {(block, kind): count}, every pair of the partition, zeros included.
        """
        counts = dict.fromkeys(((item.block, item.kind) for item in self._slices), 0)
        for item, start, stop in self._ranges():
            index = indices.get(item.name)
            if index is not None and index.numel():
                bounds = torch.tensor([start, stop], dtype=index.dtype, device=index.device)
                low, high = torch.searchsorted(index.contiguous(), bounds).tolist()
                counts[item.block, item.kind] += high - low
        return counts

    def by_block_and_kind(self, values: Mapping[str, Tensor]) -> dict[tuple[int, str], float]:
        """Mean of ``values`` (by parameter name, shaped as the parameters) over each block and kind.

        Raises:
            ValueError: as in :meth:`mask_scores`.
        """
        self._check("values", values)
        sums: dict[tuple[int, str], float] = {}
        counts: dict[tuple[int, str], int] = {}
        for item in self._slices:
            part, key = item.view(values[item.name]), (item.block, item.kind)
            sums[key] = sums.get(key, 0.0) + part.sum(dtype=torch.float64).item()
            counts[key] = counts.get(key, 0) + part.numel()
        return {key: sums[key] / counts[key] for key in sums}

    def _check(self, what: str, tensors: Mapping[str, Tensor]) -> None:
        for name, shape in self._shapes.items():
            got = tuple(tensors[name].shape) if name in tensors else "nothing"
            if got != tuple(shape):
                raise ValueError(
                    f"{what}[{name!r}] is {got}; expected a tensor of shape {tuple(shape)}. Pass one for every name in "
                    "Partition.names, computed on the model that was partitioned."
                )

    def _ranges(self) -> Iterator[tuple[Slice, int, int]]:
        """Every slice with its first flat index and the one after its last."""
        for item in self._slices:
            row = math.prod(self._shapes[item.name][1:])
            yield item, item.rows.start * row, item.rows.stop * row


def partition(
    model: nn.Module, *, kinds: Iterable[str] = ("Q", "K", "V", "FFN"), blocks: Iterable[int] | None = None
) -> Partition:
    """The candidates of a vision transformer: Q, K, V and FFN slices of every block (paper Eq. 3).

    Recognises blocks by what they hold, not by class: fused ``qkv`` (rows Q|K|V), split ``q_proj``, ``k_proj``,
    ``v_proj`` and their usual other names, ``torch.nn.MultiheadAttention``, biases kept beside the matrix, and Linear
    layers inside ``mlp`` or ``ffn``. Covers timm's ViT, DeiT, CLIP, MAE, DINOv2, DINOv3, SigLIP, SAM, EVA and Swin
    families. Reads names and shapes only, so a model on the meta device will do.

    Args:
        model: a backbone, or a model that contains one: the largest stack of equal blocks is taken.
        kinds: which kinds, of :data:`KINDS`.
        blocks: which blocks, counted from 0; all if None.

    Raises:
        ValueError: if there is no stack of transformer blocks, a block holds no recognisable Q, K and V, or ``kinds``
            or ``blocks`` name what does not exist.
    """
    wanted = tuple(dict.fromkeys(kinds))
    unknown = [kind for kind in wanted if kind not in KINDS]
    if unknown or not wanted:
        raise ValueError(f"kinds={wanted!r} must name at least one of {', '.join(KINDS)} and nothing else.")
    found = find_blocks(model)
    numbers = list(range(len(found))) if blocks is None else sorted(set(blocks))
    beyond = [number for number in numbers if not 0 <= number < len(found)]
    if beyond or not numbers:
        raise ValueError(f"blocks={numbers} but {type(model).__name__} has blocks 0 to {len(found) - 1} only.")
    rotary = any(re.search(r"rotary|rope", type(module).__name__, re.IGNORECASE) for module in model.modules())
    slices = []
    for number in numbers:
        name, block = found[number]
        block_slices = list(_slices_of_block(number, name, block, rotary))
        missing = {"Q", "K", "V"} - {item.kind for item in block_slices}
        if missing:
            raise ValueError(
                f"Block {name} ({type(block).__name__}) holds no {'/'.join(sorted(missing))} under a known name: "
                f"{', '.join([*_FUSED, *_SPLIT])}. Name the slices yourself: Partition([Slice(…), …], shapes)."
            )
        slices += [item for kind in wanted for item in block_slices if item.kind == kind]
    return Partition(slices, {name: parameter.shape for name, parameter in model.named_parameters()})


def find_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The transformer blocks of a model in order, with their names in ``model.named_modules()``.

    A block is an element of an ``nn.ModuleList`` or ``nn.Sequential`` that holds both attention and a feed-forward
    network, and no smaller such element. Hierarchical models count on through their stages.

    Raises:
        ValueError: if there is none, listing what was looked for.
    """
    stacks: dict[str, list[tuple[str, nn.Module]]] = {}
    for name, container in model.named_modules():
        if isinstance(container, (nn.ModuleList, nn.Sequential)):
            blocks = [
                (f"{name}.{key}" if name else key, child)
                for key, child in container.named_children()
                if _holds_attention(child) and _holds_ffn(child)
            ]
            if blocks:
                for outer in [other for other in stacks if name.startswith(f"{other}.") or not other]:
                    del stacks[outer]
                stacks[name] = blocks
    if not stacks:
        raise ValueError(
            f"{type(model).__name__} has no transformer blocks that are recognised. Looked for elements of "
            "nn.ModuleList or nn.Sequential that hold attention (an nn.MultiheadAttention or a Linear layer named "
            f"{', '.join([*_FUSED, *(key for key, kind in _SPLIT.items() if kind == 'Q')])}) and a feed-forward "
            "network (a Linear layer inside mlp, ffn, feed_forward or intermediate)."
        )

    def types(stack: list[tuple[str, nn.Module]]) -> frozenset[type]:
        return frozenset(type(block) for _, block in stack)

    sizes: dict[frozenset[type], int] = {}
    for stack in stacks.values():
        size = sum(parameter.numel() for _, block in stack for parameter in block.parameters())
        sizes[types(stack)] = sizes.get(types(stack), 0) + size
    largest = max(sizes, key=lambda key: sizes[key])
    return [item for stack in stacks.values() if types(stack) <= largest for item in stack]


def _holds_attention(module: nn.Module) -> bool:
    return any(
        isinstance(child, nn.MultiheadAttention)
        or (isinstance(child, nn.Linear) and (leaf in _FUSED or _SPLIT.get(leaf) == "Q"))
        for leaf, child in ((name.rpartition(".")[2], child) for name, child in module.named_modules())
    )


def _holds_ffn(module: nn.Module) -> bool:
    return any(isinstance(child, nn.Linear) and _is_ffn(name) for name, child in module.named_modules())


def _is_ffn(name: str) -> bool:
    # transformers' ViT keeps its second layer in `output.dense`, outside the attention
    return bool(_IN_FFN.search(name)) or (name.endswith("output.dense") and not _IN_ATTENTION.search(name))


def _slices_of_block(number: int, prefix: str, block: nn.Module, rotary: bool) -> Iterator[Slice]:
    for path, module in block.named_modules():
        parent_path, _, leaf = path.rpartition(".")
        parent = block.get_submodule(parent_path)
        full = f"{prefix}.{path}" if path else prefix
        k_bias = rotary or not isinstance(getattr(parent, "k_norm", None), (nn.Identity, type(None)))
        own = dict(module.named_parameters(recurse=False))
        if isinstance(module, nn.MultiheadAttention):
            yield from _packed(number, full, own, rotary)
        elif isinstance(module, nn.Linear) and leaf in _FUSED and not _is_ffn(path):
            if getattr(parent, "head_first", False):
                raise ValueError(
                    f"{full} keeps Q, K and V of each head together: they are not row blocks. Not supported."
                )
            for name, parameter in own.items():
                yield from _cut(number, _FUSED[leaf], f"{full}.{name}", parameter, k_bias)
        elif isinstance(module, nn.Linear) and (kind := _kind_of_linear(path, leaf)) is not None:
            for name, parameter in own.items():
                if kind != "K" or name != "bias" or k_bias:
                    yield Slice(number, kind, f"{full}.{name}", slice(0, parameter.shape[0]))
        for name, kind in _APART.items():
            if name in own and (kind != "K" or rotary):
                yield Slice(number, kind, f"{full}.{name}", slice(0, own[name].shape[0]))


def _kind_of_linear(path: str, leaf: str) -> str | None:
    if _is_ffn(path):
        return "FFN"
    if leaf in _SPLIT:
        return _SPLIT[leaf]
    return "PROJ" if leaf in _OUT and _IN_ATTENTION.search(path) else None


def _cut(number: int, kinds: str, name: str, parameter: Tensor, k_bias: bool) -> Iterator[Slice]:
    """Equal row blocks of a fused parameter."""
    size, rest = divmod(parameter.shape[0], len(kinds))
    if rest:
        raise ValueError(f"{name} has {parameter.shape[0]} rows, not {len(kinds)} equal blocks {'|'.join(kinds)}.")
    for position, kind in enumerate(kinds):
        if kind != "K" or parameter.dim() > 1 or k_bias:
            yield Slice(number, kind, name, slice(position * size, (position + 1) * size))


def _packed(number: int, prefix: str, own: Mapping[str, Tensor], rotary: bool) -> Iterator[Slice]:
    """The parameters of ``nn.MultiheadAttention`` itself; its output projection is a module of its own."""
    for name, parameter in own.items():
        if name in ("in_proj_weight", "in_proj_bias"):
            yield from _cut(number, "QKV", f"{prefix}.{name}", parameter, rotary)
        elif name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
            yield Slice(number, name[0].upper(), f"{prefix}.{name}", slice(0, parameter.shape[0]))
