"""AdamW that moves selected elements only and keeps state for these alone; a decoder can train densely beside them."""

from __future__ import annotations

import difflib
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from fishertune.selection import ActiveThreshold, Schedule, Selection
from fishertune_kernels import gather_values, scatter_values_, selected_grad_norm, sparse_adamw_

NamedParameters = Mapping[str, Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]


@dataclass(frozen=True, eq=False)
class _Sparse:
    """What is fixed about a parameter of which only selected elements move."""

    name: str
    indices: Tensor
    scores: Tensor | None
    offset: int
    """Of its first element when all parameters the selection scored are one long vector."""
    shape: torch.Size
    dtype: torch.dtype


class SparseAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter 2019, as ``torch.optim.AdamW``) on the elements of a :class:`Selection`.

    Unselected elements are never written: no weight decay, momentum, clipping or rounding reaches them. Dense
    parameters (a decoder) join through :meth:`add_param_group` and get exactly torch's AdamW.

    Everything an ordinary optimizer does works as usual: groups with their own ``lr``, ``betas``, ``eps`` and
    ``weight_decay``, schedulers, closures, hooks, ``torch.amp.GradScaler`` (a step it skips counts for nothing),
    ``state_dict`` and ``load_state_dict``, ``deepcopy`` and pickle.

    Memory per selected element: 4 bytes of index and 8 of moments, so 0.6 bytes per parameter at 5 % (dense AdamW: 8);
    ``growth`` adds 4 bytes for the score, ``master`` 4 for the fp32 copy. Where the selection is on the parameters'
    device, index and score are shared with it and not copied. Gradients stay dense.

    State exists from construction on and not from the first step, so tools that initialise an optimizer by stepping on
    zero gradients (torch.distributed.checkpoint does when state is empty) find it and step on nothing. A zero gradient
    is not a missing one: as in torch, a step on it decays moments and weights, while ``None`` leaves a parameter and
    its state alone.

    Args:
        named_parameters: ``model.named_parameters()``, a dict of name → parameter, or param groups: dicts whose
            ``"params"`` is either, with their own hyper-parameters. Parameters the selection did not score are left out
            (add them as dense groups); those it scored without selecting an element are held so that ``zero_grad``
            clears them, and never move.
        selection: of :func:`fishertune.selection.select`, for these names and shapes.
        lr: learning rate.
        betas: decay of the two moments.
        eps: added to the denominator.
        weight_decay: decoupled; reaches only the elements that take part.
        growth: schedule of the elements that take part (:class:`~fishertune.selection.Growth`,
            :class:`~fishertune.selection.PaperThreshold`). Before its time an element's moments are kept and its value
            is not touched: it behaves as under AdamW with a learning rate of zero until then. The first step is step 1.
        master: keep an fp32 copy of the selected elements of bf16 and fp16 parameters, and round it into the parameter
            at each step, so that small updates add up. The copy is read when the first step is taken, so weights may be
            loaded before that; weights loaded later must come with their optimizer state.
        rounding: "stochastic" rounds bf16 parameters at random in proportion to what is dropped, so that small updates
            add up on average without the memory of ``master``; float32 parameters beside them need no such help. The
            bits depend on seed, step and the element's place in the selection's parameters alone: a resumed run draws
            the same ones, and param groups may be split in any way.
        seed: of the stochastic rounding. It is part of ``state_dict()``.
        max_norm: clips within every step, by the norm :meth:`clip_selected_grad_norm_` has. The factor goes into the
            step's kernel: the gradients of selected elements are read once more and not written (those of dense groups
            are scaled in place), and the host does not wait for the device. The norm is then in :attr:`grad_norm`.

    Raises:
        TypeError: for parameters that are no dense floating-point leaf tensors, or a ``growth`` that is no schedule.
        ValueError: for a selection whose names or shapes do not fit the parameters, hyper-parameters out of range, or
            stochastic rounding where it means nothing.
    """

    grad_norm: Tensor | None = None
    """Norm of the last step's gradient before clipping, a scalar tensor; None without ``max_norm``."""

    def __init__(
        self,
        named_parameters: NamedParameters,
        selection: Selection,
        *,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        growth: Schedule | None = None,
        master: bool = False,
        rounding: str = "nearest",
        seed: int = 0,
        max_norm: float | None = None,
    ) -> None:
        if growth is not None and not hasattr(growth, "bind"):
            raise TypeError(f"growth must be a schedule such as Growth(0.01, 0.05, 1000), got {type(growth).__name__}.")
        groups = _named_groups(named_parameters)
        _check_fit(groups, selection)
        if max_norm is not None:
            _check_max_norm(max_norm)
        self._max_norm = max_norm
        _check_rounding(rounding, seed, master, [pair for group in groups for pair in group["params"]], selection)
        offsets, total = {}, 0
        for name, shape in selection.shapes.items():
            offsets[name] = total
            total += math.prod(shape)
        self._active_threshold: ActiveThreshold | None = None if growth is None else growth.bind(selection)
        self._keep_master = master
        self._sparse: dict[Tensor, _Sparse] = {}
        digest = selection.digest()
        sparse_groups = []
        for group in groups:
            named = [(name, param) for name, param in group["params"] if name in selection.indices]
            for name, param in named:
                scores = None if growth is None else selection.scores[name].to(param.device, _state_dtype(param))
                indices = selection.indices[name].to(param.device)
                self._sparse[param] = _Sparse(name, indices, scores, offsets[name], param.shape, param.dtype)
            if named:
                own = {"params": [param for _, param in named], "names": [name for name, _ in named]}
                fixed = {"selection": digest, "rounding_seed": seed if rounding == "stochastic" else None}
                sparse_groups.append({**group, **own, **fixed, "growth_step": 0})
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(sparse_groups, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a dense group: ``{"params": parameters or named parameters, **hyper-parameters}``.

        torch's own AdamW steps it, fused where the device has that; ``"fused": False`` in the group forbids it.

        Raises:
            TypeError: for a group that is not a dict, or parameters that are not floating-point leaf tensors.
            ValueError: for hyper-parameters out of range, or a parameter that is in a group already.
        """
        if not isinstance(param_group, dict) or "params" not in param_group:
            raise TypeError(f"A param group must be a dict with 'params', got {type(param_group).__name__}.")
        group = dict(param_group)
        if not _is_sparse(group):
            params = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
            # torch wants names in every group or in none, so names of dense groups are dropped
            group["params"] = [item[1] if isinstance(item, tuple) else item for item in params]
            group.setdefault("fused", all(_can_fuse(param) for param in group["params"]))
        _check_hyper_parameters({**self.defaults, **group})
        super().add_param_group(group)
        for param in group["params"]:
            self.state[param] = self._new_state(param, group)

    def _new_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        if not _is_sparse(group):
            return {
                "step": torch.zeros((), dtype=torch.float32, device=param.device if group["fused"] else "cpu"),
                "exp_avg": torch.zeros_like(param, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(param, memory_format=torch.preserve_format),
            }
        count, dtype = self._sparse[param].indices.numel(), _state_dtype(param)
        moments = ["exp_avg", "exp_avg_sq"] + (["master"] if self._keep_master and param.dtype != dtype else [])
        state = {name: torch.zeros(count, dtype=dtype, device=param.device) for name in moments}
        return {"step": torch.zeros((), dtype=torch.float32), **state}

    @property
    def active_threshold(self) -> float | None:
        """Score an element needed to take part in the last step (step 0 before the first); None without growth."""
        if self._active_threshold is None:
            return None
        return self._active_threshold(max(group.get("growth_step", 0) for group in self.param_groups))

    def state_bytes(self) -> int:
        """Bytes held for the selected elements: indices, moments, and scores and master copies where they are used."""
        total = 0
        for param, sparse in self._sparse.items():
            state = self.state[param]
            held = [sparse.indices, sparse.scores, *(state.get(name) for name in ("exp_avg", "exp_avg_sq", "master"))]
            total += sum(tensor.numel() * tensor.element_size() for tensor in held if tensor is not None)
        return total

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Takes one step; ``closure`` recomputes the loss and its gradients, and its loss is returned.

        A step in which no selected parameter has a gradient does not advance the growth.

        Raises:
            RuntimeError: if a parameter changed device, dtype or shape since construction; nothing has moved then.
            TypeError: if a gradient is sparse; nothing has moved then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        ready = [[param for param in group["params"] if param.grad is not None] for group in self.param_groups]
        for params in ready:
            self._check_unchanged(params)
        moving = [(group, params) for group, params in zip(self.param_groups, ready, strict=True) if params]
        if any(_is_sparse(group) for group, _ in moving):
            for group in filter(_is_sparse, self.param_groups):
                group["growth_step"] += 1
        scale = None if self._max_norm is None else self._clip_factor(self._max_norm)
        for group, params in moving:
            if _is_sparse(group):
                self._step_selected(group, params, scale)
            else:
                self._step_dense(group, params)
        return loss

    def _check_unchanged(self, params: list[Tensor]) -> None:
        for param in params:
            assert param.grad is not None
            if param.grad.layout != torch.strided:
                raise TypeError(f"A gradient has the layout {param.grad.layout}; SparseAdamW takes dense gradients.")
            sparse = self._sparse.get(param)
            if sparse is None:
                continue
            now = (param.device, param.dtype, param.shape)
            then = (sparse.indices.device, sparse.dtype, sparse.shape)
            if now != then:
                raise RuntimeError(
                    f"'{sparse.name}' is {_describe(*now)} now and was {_describe(*then)} when SparseAdamW was built. "
                    "Move or convert the model first and build the optimizer afterwards."
                )

    def _clip_factor(self, max_norm: float) -> Tensor:
        """Measures the gradient, scales that of dense groups, and returns the factor for the selected elements."""
        together, dense = self._gradients()
        norms = [selected_grad_norm(grads, indices) for grads, indices in together]
        self.grad_norm = _joint_norm(norms, dense)
        scale = _scale(max_norm, self.grad_norm)
        for gradient in dense:
            gradient.mul_(scale.to(gradient.device))
        return scale

    def _gradients(self) -> tuple[list[tuple[list[Tensor], list[Tensor]]], list[Tensor]]:
        """Gradients of sparse groups with their indices, split by device and dtype, and those of dense groups."""
        together: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
        dense = []
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                if _is_sparse(group):
                    grads, indices = together.setdefault((param.grad.device, param.grad.dtype), ([], []))
                    grads.append(param.grad)
                    indices.append(self._sparse[param].indices)
                else:
                    dense.append(param.grad)
        return list(together.values()), dense

    def _step_selected(self, group: dict[str, Any], params: list[Tensor], scale: Tensor | None) -> None:
        threshold = None if self._active_threshold is None else self._active_threshold(group["growth_step"])
        seed = group.get("rounding_seed")  # a state saved before there was one has none
        together: dict[tuple[Any, ...], list[Tensor]] = defaultdict(list)
        for param in params:
            state = self.state[param]
            if "master" in state and state["step"] == 0:
                state["master"].copy_(gather_values([param], [self._sparse[param].indices])[0])
            state["step"] += 1
            together[param.device, param.dtype, "master" in state, int(state["step"])].append(param)
        for (device, dtype, has_master, step), members in together.items():
            states = [self.state[param] for param in members]
            fixed = [self._sparse[param] for param in members]
            sparse_adamw_(
                members,
                [param.grad for param in members if param.grad is not None],
                [sparse.indices for sparse in fixed],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                lr=float(group["lr"]),
                betas=group["betas"],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                step=step,
                scores=[sparse.scores for sparse in fixed if sparse.scores is not None] or None,
                active_threshold=threshold,
                grad_scale=1.0 if scale is None else scale.to(device, _state_dtype(members[0])),
                master=[state["master"] for state in states] if has_master else None,
                rounding="stochastic" if seed is not None and dtype == torch.bfloat16 else "nearest",
                seed=seed or 0,
                offsets=[sparse.offset for sparse in fixed],
            )

    def _step_dense(self, group: dict[str, Any], params: list[Tensor]) -> None:
        states = [self.state[param] for param in params]
        beta1, beta2 = group["betas"]
        adamw(
            params,
            [param.grad for param in params if param.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=group["fused"] or None,  # None lets torch choose between its loop and foreach
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    @torch.no_grad()
    def clip_selected_grad_norm_(self, max_norm: float, *, error_if_nonfinite: bool = False) -> Tensor:
        """Clips by joint L2 norm the gradient of what this optimizer moves: selected elements and dense groups.

        ``torch.nn.utils.clip_grad_norm_`` measures whole tensors, of which 95 % may never move. Here the norm is that
        of the vector being stepped, and only its elements of ``.grad`` are scaled, in place. Elements that growth still
        holds back count: their moments see the gradient. ``max_norm`` of the constructor does the same within the step
        and leaves ``.grad`` alone, which saves writing it.

        Args:
            max_norm: largest norm left.
            error_if_nonfinite: raise on a NaN or infinite norm instead of scaling by it.

        Returns:
            The norm before clipping, a scalar tensor.

        Raises:
            ValueError: if ``max_norm`` is negative or NaN.
            RuntimeError: for a norm that is not finite, if asked to.
        """
        _check_max_norm(max_norm)
        together, dense = self._gradients()
        # The selected values are 5 % of the gradient: measured and scaled in one small buffer, they cost one pass of
        # scattered reads and one of scattered writes.
        flats = [grads[0].new_empty(sum(index.numel() for index in indices)) for grads, indices in together]
        for (grads, indices), flat in zip(together, flats, strict=True):
            gather_values(grads, indices, out=flat)
        norm = _joint_norm([selected_grad_norm(flat) for flat in flats], dense)
        if error_if_nonfinite and not bool(norm.isfinite()):
            raise RuntimeError(
                f"The gradient norm is non-finite ({float(norm)}), so it cannot be clipped. Look for the loss or layer "
                "that overflowed; error_if_nonfinite=False scales by it all the same."
            )
        scale = _scale(max_norm, norm)
        for gradient in flats + dense:
            gradient.mul_(scale.to(gradient.device))
        for (grads, indices), flat in zip(together, flats, strict=True):
            contiguous = [gradient.contiguous() for gradient in grads]
            scatter_values_(contiguous, indices, flat)
            for gradient, written in zip(grads, contiguous, strict=True):
                if written is not gradient:
                    gradient.copy_(written)
        return norm

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues exactly, bit for bit, where ``state_dict()`` was taken; the tensors are copied.

        Raises:
            ValueError: if the state belongs to another selection, to other parameters or to another ``master`` setting;
                nothing has changed then.
        """
        saved: dict[str, Any] = {}

        def check_and_keep(_: torch.optim.Optimizer, final: dict[str, Any]) -> None:
            self._check_loadable(final)
            saved.update(final)

        before, fused = self.state, [group.get("fused") for group in self.param_groups]
        # registered last, it sees the state after any hooks of the user's and before anything is changed
        handle = self.register_load_state_dict_pre_hook(check_and_keep)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        for group, saved_group, own_fused in zip(self.param_groups, saved["param_groups"], fused, strict=True):
            if not _is_sparse(group):
                group["fused"] = own_fused  # what this machine can do, not what the other one could
            # torch rounds floating-point state to the parameter's dtype, which would spoil fp32 moments of bf16
            for param, key in zip(group["params"], saved_group["params"], strict=True):
                self.state[param] = {
                    name: torch.empty_like(tensor).copy_(saved["state"][key][name])
                    for name, tensor in before[param].items()
                }

    def _check_loadable(self, state_dict: dict[str, Any]) -> None:
        # torch's own check refuses groups that differ in number or length, with a clear message
        for group, saved_group in zip(self.param_groups, state_dict["param_groups"], strict=False):
            for key in ("names", "selection"):
                if group.get(key) != saved_group.get(key):
                    raise ValueError(
                        f"This optimizer state belongs to another selection: its group has {key} "
                        f"{_shorten(saved_group.get(key))}, this optimizer's {_shorten(group.get(key))}. "
                        "Build the optimizer with the selection (and groups) the state was saved with."
                    )
            for i, (param, key) in enumerate(zip(group["params"], saved_group["params"], strict=False)):
                found = state_dict["state"].get(key, {})
                name = group["names"][i] if _is_sparse(group) else f"parameter {i} of a dense group"
                if self.state[param].keys() != found.keys():
                    raise ValueError(
                        f"The optimizer state of {name} holds {sorted(found)}, expected {sorted(self.state[param])}. "
                        "Build the optimizer with the settings the state was saved with (master=True keeps a copy)."
                    )
                for what, tensor in self.state[param].items():
                    if tensor.shape != found[what].shape:
                        raise ValueError(
                            f"The optimizer state of {name} has {what} of shape {tuple(found[what].shape)}, expected "
                            f"{tuple(tensor.shape)}. It belongs to another model."
                        )

    def __getstate__(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("_active_threshold", "_keep_master", "_max_norm", "_sparse")}
        return {**super().__getstate__(), **own}


def _is_sparse(group: Mapping[str, Any]) -> bool:
    return "selection" in group


def _state_dtype(param: Tensor) -> torch.dtype:
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def _joint_norm(norms: list[Tensor], dense: list[Tensor]) -> Tensor:
    wide = [grad.float() if grad.dtype in (torch.bfloat16, torch.float16) else grad for grad in dense]
    norms = norms + ([torch.nn.utils.get_total_norm(wide)] if wide else [])
    return selected_grad_norm([norm.to(norms[0].device) for norm in norms])


def _scale(max_norm: float, norm: Tensor) -> Tensor:
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)  # torch's clip_grad_norm_, to the letter


def _check_max_norm(max_norm: float) -> None:
    if not max_norm >= 0:
        raise ValueError(f"max_norm must be at least 0, got {max_norm}.")


def _can_fuse(param: Tensor) -> bool:
    on_supported_device = isinstance(param, Tensor) and param.device.type in ("cpu", "cuda", "xpu", "mps")
    return on_supported_device and param.is_floating_point()


def _named_groups(named_parameters: NamedParameters) -> list[dict[str, Any]]:
    """Param groups whose "params" are lists of (name, parameter)."""
    if isinstance(named_parameters, Mapping):
        return [{"params": list(named_parameters.items())}]
    if isinstance(named_parameters, Tensor):
        raise TypeError("SparseAdamW needs named parameters, got a tensor. Pass model.named_parameters().")
    items: list[Any] = list(named_parameters)
    if items and all(isinstance(item, dict) for item in items):
        return [{**group, **_named_groups(group["params"])[0]} for group in items]
    for item in items:
        if not (isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str)):
            raise TypeError(
                f"SparseAdamW needs (name, parameter) pairs, got {type(item).__name__}. Pass model.named_parameters(), "
                "not model.parameters()."
            )
    return [{"params": items}]


def _check_fit(groups: list[dict[str, Any]], selection: Selection) -> None:
    named = [pair for group in groups for pair in group["params"]]
    given = dict(named)
    if len(given) != len(named):
        twice = next(name for name in given if sum(name == other for other, _ in named) > 1)
        raise ValueError(f"'{twice}' is given twice. Leave it in one param group.")
    missing = [name for name, index in selection.indices.items() if index.numel() and name not in given]
    if missing:
        close = difflib.get_close_matches(missing[0], given, n=1)
        nearest = f" The nearest name is '{close[0]}'." if close else ""
        raise ValueError(
            f"The selection has elements in '{missing[0]}' ({len(missing)} such parameters), which is not among the "
            f"{len(given)} named parameters.{nearest} Pass the model the scores were computed on."
        )
    held = {name: param for name, param in given.items() if name in selection.indices}
    if not held:
        raise ValueError("None of the named parameters was scored by the selection. Pass the model it was made for.")
    for name, param in held.items():
        if not isinstance(param, Tensor) or not param.is_floating_point():
            raise TypeError(f"'{name}' must be a floating-point tensor, got {getattr(param, 'dtype', type(param))}.")
        if hasattr(param, "to_local"):
            raise TypeError(f"'{name}' is a sharded DTensor, SparseAdamW takes plain tensors. Use DDP for this model.")
        if tuple(param.shape) != selection.shapes[name]:
            raise ValueError(
                f"'{name}' has the shape {tuple(param.shape)}, the selection was made for {selection.shapes[name]}. "
                "Pass the model the scores were computed on."
            )
        if not param.is_contiguous():
            raise ValueError(f"'{name}' is not contiguous. Set param.data = param.data.contiguous() first.")


def _check_rounding(
    rounding: str, seed: int, master: bool, named: list[tuple[str, Tensor]], selection: Selection
) -> None:
    if rounding not in ("nearest", "stochastic"):
        raise ValueError(f"rounding must be 'nearest' or 'stochastic', got {rounding!r}.")
    if rounding == "nearest":
        return
    if not 0 <= seed < 1 << 63:
        raise ValueError(f"seed must be at least 0 and below 2**63, got {seed}.")
    if master:
        raise ValueError("A master copy keeps what rounding drops: set master=True or rounding='stochastic', not both.")
    held = [(name, param) for name, param in named if name in selection.indices]
    for name, param in held:
        if param.dtype == torch.float16:
            raise ValueError(
                f"'{name}' is float16, and rounding='stochastic' is for bfloat16, whose dropped bits are 16 for every "
                "value. Set master=True instead."
            )
    if all(param.dtype != torch.bfloat16 for _, param in held):
        raise ValueError(
            f"rounding='stochastic' is for bfloat16 parameters; these are {held[0][1].dtype}, which keeps small "
            "updates anyway. Set rounding='nearest'."
        )


def _check_hyper_parameters(group: Mapping[str, Any]) -> None:
    for name in ("lr", "eps", "weight_decay"):
        if not 0.0 <= float(group[name]) < math.inf:
            raise ValueError(f"{name} must be at least 0 and finite, got {group[name]}.")
    for beta in group["betas"]:
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"betas must lie in [0, 1), got {group['betas']}.")


def _describe(device: torch.device, dtype: torch.dtype, shape: torch.Size) -> str:
    return f"{dtype} of shape {tuple(shape)} on {device}"


def _shorten(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
