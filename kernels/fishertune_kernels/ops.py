"""Every operator of the package: its schema, what it accepts, its shapes under tracing, the hand-over to the backend.

Registered with ``torch.library.Library`` at list level: one call for a whole model, a few microseconds of overhead,
traceable by ``torch.compile(fullgraph=True)``. Hyper-parameters are ``Scalar`` in the schemas, never ``float``: a
traced ``float`` becomes a constant, and every new learning rate would compile anew. Nothing here is differentiable.

The ``_check_*`` functions look at types, shapes and layouts only, and run for real and for traced tensors; what needs
values is checked in the ``_run_*`` functions, before anything is written.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from . import dispatch

if TYPE_CHECKING:
    from .select_threshold.search import Threshold

LIBRARY = torch.library.Library("fishertune", "DEF")

STATE_DTYPES = (torch.float32, torch.float64)  # sums in half precision lose what is small: they change the selection
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INDEX_DTYPES = (torch.int32, torch.int64)
SCORE_KINDS = ("f", "delta_f", "dr_fim", "dr_fim_variational")


def as_list(name: str, tensors: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """A tensor becomes a list of one.

    Raises:
        TypeError: if it is neither a tensor nor a sequence of tensors.
    """
    if isinstance(tensors, Tensor):
        return [tensors]
    if not isinstance(tensors, (list, tuple)):
        raise TypeError(
            f"{name} is a {type(tensors).__name__}; expected a tensor or a list of tensors. For a dict pass "
            "list(d.values()), for a generator list(g)."
        )
    for i, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}[{i}] is a {type(tensor).__name__}; expected a tensor. Leave out what has none.")
    return list(tensors)


def as_flat_list(name: str, values: Tensor | Sequence[Tensor], indices: Sequence[Tensor]) -> list[Tensor]:
    """Compact values as a list, one tensor per index tensor; a single tensor holds all of them, one after the other.

    Raises:
        TypeError: if it is neither a tensor nor a sequence of tensors.
        ValueError: if a single tensor is not 1-D with one value for every index.
    """
    if not isinstance(values, Tensor):
        return as_list(name, values)
    counts = [index.numel() for index in indices]
    if values.dim() != 1 or values.numel() != sum(counts):
        raise ValueError(
            f"{name} has shape {tuple(values.shape)}; expected ({sum(counts)},), one value for every index of the "
            f"{len(counts)} tensors in order. Pass the buffer that gather_values filled for these indices."
        )
    return list(values.split(counts))


def running_offsets(tensors: Sequence[Tensor]) -> list[int]:
    """Global flat index of each tensor's first element when the list is one long vector."""
    offsets, total = [], 0
    for tensor in tensors:
        offsets.append(total)
        total += tensor.numel()
    return offsets


# What the checks share ------------------------------------------------------------------------------------------------


def _check_tensors(
    name: str,
    tensors: Sequence[Tensor],
    device: torch.device,
    dtypes: tuple[torch.dtype, ...] | None = FLOAT_DTYPES,
    *,
    mutated: bool = False,
) -> None:
    for i, tensor in enumerate(tensors):
        if tensor.layout is not torch.strided:
            raise TypeError(f"{name}[{i}] has layout {tensor.layout}; expected a dense tensor. Use .to_dense().")
        if dtypes is not None and tensor.dtype not in dtypes:
            expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise TypeError(f"{name}[{i}] is {tensor.dtype}; expected one of {expected}. Convert with .to(dtype).")
        if tensor.device != device:
            raise ValueError(f"{name}[{i}] is on {tensor.device}, others are on {device}. Use one device in a call.")
        if mutated and not tensor.is_contiguous():
            raise ValueError(
                f"{name}[{i}] (shape {tuple(tensor.shape)}, strides {tuple(tensor.stride())}) is not contiguous and is "
                "written in place. Make it contiguous where it is created: t = t.contiguous()."
            )


def _check_lengths(expected_name: str, expected: Sequence[object], **lists: Sequence[object]) -> None:
    for name, values in lists.items():
        if len(values) != len(expected):
            raise ValueError(
                f"{name} has {len(values)} entries but {expected_name} has {len(expected)}. Pass one each, in order."
            )


def _check_shapes(expected_name: str, expected: Sequence[Tensor], **lists: Sequence[Tensor]) -> None:
    _check_lengths(expected_name, expected, **lists)
    for name, tensors in lists.items():
        for i, (tensor, other) in enumerate(zip(tensors, expected, strict=True)):
            if tensor.shape != other.shape:
                raise ValueError(
                    f"{name}[{i}] has shape {tuple(tensor.shape)} but {expected_name}[{i}] has {tuple(other.shape)}. "
                    "Pass both lists in the same order."
                )


def _check_compact(indices: Sequence[Tensor], **lists: Sequence[Tensor]) -> None:
    """Compact lists hold one value per index."""
    for i, index in enumerate(indices):
        if index.dim() != 1:
            raise ValueError(f"indices[{i}] has shape {tuple(index.shape)}; expected flat indices, one dimension.")
    _check_shapes("indices", indices, **lists)


def _check_range(name: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    """low ≤ value < high, or low < value < high; NaN fails."""
    if not (low < value if open_low else low <= value) or not value < high:
        bounds = f"{'above' if open_low else 'at least'} {low:g}" + (
            " and finite" if high == math.inf else f" and below {high:g}"
        )
        raise ValueError(f"{name}={value} is out of range: it must be {bounds}.")


def _check_finite(**values: float) -> None:
    for name, value in values.items():
        if not math.isfinite(value):
            raise ValueError(f"{name}={value} is not finite. Find what produced it; nothing was changed.")


def check_seed(seed: int, **steps: int) -> None:
    """Seeds and noise steps are 64-bit counters; torch carries them as signed integers.

    Raises:
        ValueError: outside [0, 2⁶³).
    """
    for name, value in {"seed": seed, **steps}.items():
        if not 0 <= value < 1 << 63:
            raise ValueError(f"{name}={value} is out of range: it must be at least 0 and below 2**63.")


def _check_offsets(offsets: Sequence[int]) -> None:
    for i, offset in enumerate(offsets):
        if offset < 0:
            raise ValueError(f"offsets[{i}]={offset} is negative; expected the global flat index of the first element.")


_known_indices: dict[int, tuple[weakref.ref[Tensor], int, int]] = {}  # id → index, its version, its tensor's size


def _check_indices(names: str, tensors: Sequence[Tensor], indices: Sequence[Tensor]) -> None:
    """In range, rising, without repeats: parallel writes rely on it. Reads an index tensor once and remembers it."""
    for i, (tensor, index) in enumerate(zip(tensors, indices, strict=True)):
        known = _known_indices.get(id(index))
        if known and known[0]() is index and known[1] == index._version and known[2] == tensor.numel():
            continue
        if index.numel():
            low, high = int(index[0]), int(index[-1])
            if low < 0 or high >= tensor.numel():
                raise ValueError(
                    f"indices[{i}] runs from {low} to {high}, but {names}[{i}] has {tensor.numel()} elements. "
                    "Use the indices of a selection made for this tensor."
                )
            if not bool((index[1:] > index[:-1]).all()):
                raise ValueError(f"indices[{i}] is not rising or repeats an entry. Pass torch.unique(index).")
        if not index.is_inference():  # inference tensors have no version to tell whether they changed
            key = id(index)
            forget = functools.partial(_forget_index, key)
            _known_indices[key] = (weakref.ref(index, forget), index._version, tensor.numel())


def _forget_index(key: int, _: weakref.ref[Tensor]) -> None:
    _known_indices.pop(key, None)


def _contiguous(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.contiguous() for tensor in tensors]


def _dense_rows(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of it whose last dimension is dense."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()


def join_windows(name: str, tensor: Tensor, samples: int) -> Tensor:
    """(samples · windows, tokens, features) as (samples, windows · tokens, features), a view where it can be.

    Raises:
        ValueError: if the leading dimension does not hold equally many windows of every sample.
    """
    if tensor.dim() != 3 or samples < 1 or tensor.shape[0] % samples:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)} and samples={samples}; expected (samples · windows, tokens, "
            "features) with the same number of windows for every sample. Pass samples=None for one window a sample."
        )
    return tensor.reshape(samples, tensor.shape[0] // samples * tensor.shape[1], tensor.shape[2])


def _implementation(operator: str, *lists: Iterable[Tensor]) -> ModuleType:
    tensors = [tensor for tensors in lists for tensor in tensors]
    return dispatch.implementation(operator, tensors[0].device, {tensor.dtype for tensor in tensors})


def _mark_written(*lists: Sequence[Tensor]) -> None:
    """Tells autograd that these tensors changed, as torch's own in-place functions do."""
    torch.autograd.graph.increment_version([t for tensors in lists for t in tensors if not t.is_inference()])


def _register(schema: str, run: Callable, fake: Callable) -> None:
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fishertune::{name}", fake, lib=LIBRARY)


# squared_grad_accumulate_ ---------------------------------------------------------------------------------------------


def _check_squared_grad_accumulate_(accumulators: list[Tensor], grads: list[Tensor], weight: float = 1.0) -> None:
    _check_shapes("accumulators", accumulators, grads=grads)
    if accumulators:
        device = accumulators[0].device
        _check_tensors("accumulators", accumulators, device, STATE_DTYPES, mutated=True)
        _check_tensors("grads", grads, device)


def _run_squared_grad_accumulate_(accumulators: list[Tensor], grads: list[Tensor], weight: float = 1.0) -> None:
    _check_squared_grad_accumulate_(accumulators, grads)
    _check_finite(weight=weight)
    if accumulators:
        module = _implementation("squared_grad_accumulate", accumulators, grads)
        module.squared_grad_accumulate_(accumulators, _contiguous(grads), weight)
        _mark_written(accumulators)


_register(
    "squared_grad_accumulate_(Tensor(a!)[] accumulators, Tensor[] grads, Scalar weight=1.0) -> ()",
    _run_squared_grad_accumulate_,
    _check_squared_grad_accumulate_,
)


# per_sample_squared_grad_ ---------------------------------------------------------------------------------------------


def _check_per_sample_squared_grad_(
    accumulator_OI: Tensor,
    x_NTI: Tensor,
    dy_NTO: Tensor,
    weight: float = 1.0,
    bias_accumulator_O: Tensor | None = None,
) -> None:
    device = accumulator_OI.device
    heads = accumulator_OI.dim() == 3
    wanted = "(samples, heads, tokens, features)" if heads else "(samples, tokens, features)"
    for name, tensor in (("x_NTI", x_NTI), ("dy_NTO", dy_NTO)):
        _check_tensors(name, [tensor], device)
        if tensor.dim() != 3 + heads:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; expected {wanted}, as accumulator_OI has shape "
                f"{tuple(accumulator_OI.shape)}. Without a token axis pass {name}.unsqueeze(-2); merge several token "
                "axes with .flatten(1, -2)."
            )
    if x_NTI.shape[:-1] != dy_NTO.shape[:-1]:
        raise ValueError(
            f"x_NTI has shape {tuple(x_NTI.shape)} but dy_NTO has {tuple(dy_NTO.shape)}: samples and tokens (and "
            "heads) must agree. Pass the input and the output gradient of the same layer and batch."
        )
    expected = (*dy_NTO.shape[1:-2], dy_NTO.shape[-1], x_NTI.shape[-1])
    if tuple(accumulator_OI.shape) != expected:
        raise ValueError(
            f"accumulator_OI has shape {tuple(accumulator_OI.shape)}; expected {expected} from dy_NTO and x_NTI, "
            "the shape of the layer's weight."
        )
    _check_tensors("accumulator_OI", [accumulator_OI], device, STATE_DTYPES, mutated=True)
    if bias_accumulator_O is not None:
        _check_tensors("bias_accumulator_O", [bias_accumulator_O], device, (accumulator_OI.dtype,), mutated=True)
        if tuple(bias_accumulator_O.shape) != expected[:-1]:
            raise ValueError(
                f"bias_accumulator_O has shape {tuple(bias_accumulator_O.shape)}; expected {expected[:-1]} from dy_NTO."
            )


def _run_per_sample_squared_grad_(
    accumulator_OI: Tensor,
    x_NTI: Tensor,
    dy_NTO: Tensor,
    weight: float = 1.0,
    bias_accumulator_O: Tensor | None = None,
) -> None:
    _check_per_sample_squared_grad_(accumulator_OI, x_NTI, dy_NTO, weight, bias_accumulator_O)
    _check_finite(weight=weight)
    module = _implementation("per_sample_squared_grad", [accumulator_OI, x_NTI, dy_NTO])
    bias = bias_accumulator_O
    if accumulator_OI.dim() == 3:
        heads = accumulator_OI, x_NTI, dy_NTO, bias
    else:  # a layer of one head
        heads = (
            accumulator_OI[None],
            x_NTI.unsqueeze(1),
            dy_NTO.unsqueeze(1),
            None if bias is None else bias[None],
        )
    module.per_sample_squared_grad_(heads[0], _dense_rows(heads[1]), _dense_rows(heads[2]), weight, heads[3])
    _mark_written([accumulator_OI] if bias is None else [accumulator_OI, bias])


_register(
    "per_sample_squared_grad_(Tensor(a!) accumulator_OI, Tensor x_NTI, Tensor dy_NTO, Scalar weight=1.0, "
    "Tensor(b!)? bias_accumulator_O=None) -> ()",
    _run_per_sample_squared_grad_,
    _check_per_sample_squared_grad_,
)


# per_sample_affine_squared_grad_ --------------------------------------------------------------------------------------


def _check_per_sample_affine_squared_grad_(
    weight_accumulator_C: Tensor | None,
    bias_accumulator_C: Tensor | None,
    x_NTC: Tensor | None,
    dy_NTC: Tensor,
    weight: float = 1.0,
    mean_NT: Tensor | None = None,
    rstd_NT: Tensor | None = None,
) -> None:
    device = dy_NTC.device
    _check_tensors("dy_NTC", [dy_NTC], device)
    if dy_NTC.dim() != 3:
        raise ValueError(
            f"dy_NTC has shape {tuple(dy_NTC.shape)}; expected (samples, tokens, channels). Without a token axis pass "
            "dy_NTC.unsqueeze(1); merge several token axes with .flatten(1, -2)."
        )
    accumulators = {"weight_accumulator_C": weight_accumulator_C, "bias_accumulator_C": bias_accumulator_C}
    given = {name: tensor for name, tensor in accumulators.items() if tensor is not None}
    if not given:
        raise ValueError("weight_accumulator_C and bias_accumulator_C are both None; pass the one to be updated.")
    for name, tensor in given.items():
        _check_tensors(name, [tensor], device, STATE_DTYPES, mutated=True)
        if tuple(tensor.shape) != tuple(dy_NTC.shape[2:]):
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; expected {tuple(dy_NTC.shape[2:])} from dy_NTC, one value a "
                "channel. Pass .view(-1) of a parameter with more dimensions."
            )
    if len({tensor.dtype for tensor in given.values()}) > 1:
        raise TypeError("weight_accumulator_C and bias_accumulator_C differ in dtype. Use one for both.")
    if (weight_accumulator_C is None) != (x_NTC is None):
        raise ValueError(
            "x_NTC and weight_accumulator_C belong together: the gradient of a weight is Σ dY·x, that of a bias needs "
            "no x. Pass both or neither."
        )
    if (mean_NT is None) != (rstd_NT is None) or (mean_NT is not None and x_NTC is None):
        raise ValueError("mean_NT and rstd_NT normalise x_NTC together. Pass both with x_NTC, or neither.")
    if x_NTC is not None:
        _check_tensors("x_NTC", [x_NTC], device)
        _check_shapes("dy_NTC", [dy_NTC], x_NTC=[x_NTC])
    for name, statistic in {"mean_NT": mean_NT, "rstd_NT": rstd_NT}.items():
        if statistic is not None:
            _check_tensors(name, [statistic], device)
            if tuple(statistic.shape) != tuple(dy_NTC.shape[:2]):
                raise ValueError(
                    f"{name} has shape {tuple(statistic.shape)}; expected {tuple(dy_NTC.shape[:2])} from dy_NTC, one "
                    "value a token. Pass .reshape(dy_NTC.shape[:2])."
                )


def _run_per_sample_affine_squared_grad_(
    weight_accumulator_C: Tensor | None,
    bias_accumulator_C: Tensor | None,
    x_NTC: Tensor | None,
    dy_NTC: Tensor,
    weight: float = 1.0,
    mean_NT: Tensor | None = None,
    rstd_NT: Tensor | None = None,
) -> None:
    _check_per_sample_affine_squared_grad_(
        weight_accumulator_C, bias_accumulator_C, x_NTC, dy_NTC, weight, mean_NT, rstd_NT
    )
    _check_finite(weight=weight)
    written = [tensor for tensor in (weight_accumulator_C, bias_accumulator_C) if tensor is not None]
    read = [None if tensor is None else tensor.contiguous() for tensor in (x_NTC, mean_NT, rstd_NT)]
    module = _implementation(
        "per_sample_affine_squared_grad", written, [dy_NTC], [tensor for tensor in read if tensor is not None]
    )
    module.per_sample_affine_squared_grad_(
        weight_accumulator_C, bias_accumulator_C, read[0], dy_NTC.contiguous(), weight, read[1], read[2]
    )
    _mark_written(written)


_register(
    "per_sample_affine_squared_grad_(Tensor(a!)? weight_accumulator_C, Tensor(b!)? bias_accumulator_C, Tensor? x_NTC, "
    "Tensor dy_NTC, Scalar weight=1.0, Tensor? mean_NT=None, Tensor? rstd_NT=None) -> ()",
    _run_per_sample_affine_squared_grad_,
    _check_per_sample_affine_squared_grad_,
)


# gaussian_perturb -----------------------------------------------------------------------------------------------------


def _fake_gaussian_perturb(
    params: list[Tensor],
    excess: list[Tensor],
    prior_precision: float,
    seed: int,
    step: int,
    offsets: list[int],
    sign: float = 1.0,
) -> list[Tensor]:
    _check_shapes("params", params, excess=excess)
    _check_lengths("params", params, offsets=offsets)
    if params:
        _check_tensors("params", params, params[0].device)
        _check_tensors("excess", excess, params[0].device, STATE_DTYPES)
    return [torch.empty_like(param, memory_format=torch.contiguous_format) for param in params]


def _run_gaussian_perturb(
    params: list[Tensor],
    excess: list[Tensor],
    prior_precision: float,
    seed: int,
    step: int,
    offsets: list[int],
    sign: float = 1.0,
) -> list[Tensor]:
    _check_shapes("params", params, excess=excess)
    _check_lengths("params", params, offsets=offsets)
    _check_range("prior_precision", prior_precision, 0, math.inf, open_low=True)
    _check_finite(sign=sign)
    check_seed(seed, step=step)
    _check_offsets(offsets)
    if not params:
        return []
    _check_tensors("params", params, params[0].device)
    _check_tensors("excess", excess, params[0].device, STATE_DTYPES)
    module = _implementation("gaussian_perturb", params, excess)
    perturbed: list[Tensor] = module.gaussian_perturb(
        _contiguous(params), _contiguous(excess), prior_precision, seed, step, offsets, sign
    )
    return perturbed


_register(
    "gaussian_perturb(Tensor[] params, Tensor[] excess, Scalar prior_precision, SymInt seed, SymInt step, "
    "SymInt[] offsets, Scalar sign=1.0) -> Tensor[]",
    _run_gaussian_perturb,
    _fake_gaussian_perturb,
)


# precision_update_ ----------------------------------------------------------------------------------------------------


def _check_precision_update_natural_(
    excess: list[Tensor], squared_grads: list[Tensor], beta: float, gamma: float
) -> None:
    _check_shapes("excess", excess, squared_grads=squared_grads)
    if excess:
        _check_tensors("excess", excess, excess[0].device, STATE_DTYPES, mutated=True)
        _check_tensors("squared_grads", squared_grads, excess[0].device)


def _run_precision_update_natural_(
    excess: list[Tensor], squared_grads: list[Tensor], beta: float, gamma: float
) -> None:
    _check_precision_update_natural_(excess, squared_grads, beta, gamma)
    if not 0 <= beta <= 1:
        raise ValueError(f"beta={beta} is out of range: it must be between 0 and 1.")
    _check_range("gamma", gamma, 0, math.inf, open_low=True)
    if excess:
        module = _implementation("precision_update", excess, squared_grads)
        module.precision_update_natural_(excess, _contiguous(squared_grads), beta, gamma)
        _mark_written(excess)


_register(
    "precision_update_natural_(Tensor(a!)[] excess, Tensor[] squared_grads, Scalar beta, Scalar gamma) -> ()",
    _run_precision_update_natural_,
    _check_precision_update_natural_,
)


def _check_precision_update_sgvb_(
    excess: list[Tensor],
    grads: list[Tensor],
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    gamma: float,
    prior_precision: float,
    seed: int,
    noise_step: int,
    step: int,
    offsets: list[int],
    sign: float = 1.0,
) -> None:
    _check_shapes("excess", excess, grads=grads, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    _check_lengths("excess", excess, offsets=offsets)
    if excess:
        device = excess[0].device
        _check_tensors("excess", excess, device, STATE_DTYPES, mutated=True)
        _check_tensors("grads", grads, device)
        _check_tensors("exp_avg", exp_avg, device, (excess[0].dtype,), mutated=True)
        _check_tensors("exp_avg_sq", exp_avg_sq, device, (excess[0].dtype,), mutated=True)


def _run_precision_update_sgvb_(
    excess: list[Tensor],
    grads: list[Tensor],
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    gamma: float,
    prior_precision: float,
    seed: int,
    noise_step: int,
    step: int,
    offsets: list[int],
    sign: float = 1.0,
) -> None:
    _check_precision_update_sgvb_(
        excess, grads, exp_avg, exp_avg_sq, lr, beta1, beta2, eps, gamma, prior_precision, seed, noise_step, step,
        offsets,
    )  # fmt: skip
    _check_adam(lr, beta1, beta2, eps, step)
    _check_range("gamma", gamma, 0, math.inf, open_low=True)
    _check_range("prior_precision", prior_precision, 0, math.inf, open_low=True)
    _check_finite(sign=sign)
    check_seed(seed, noise_step=noise_step)
    _check_offsets(offsets)
    if excess:
        module = _implementation("precision_update", excess, grads)
        module.precision_update_sgvb_(
            excess,
            _contiguous(grads),
            exp_avg,
            exp_avg_sq,
            lr=lr,
            betas=(beta1, beta2),
            eps=eps,
            gamma=gamma,
            prior_precision=prior_precision,
            seed=seed,
            noise_step=noise_step,
            step=step,
            offsets=offsets,
            sign=sign,
        )
        _mark_written(excess, exp_avg, exp_avg_sq)


def _check_adam(lr: float, beta1: float, beta2: float, eps: float, step: int) -> None:
    _check_range("lr", lr, 0, math.inf)
    _check_range("betas[0]", beta1, 0, 1)
    _check_range("betas[1]", beta2, 0, 1)
    _check_range("eps", eps, 0, math.inf)
    if step < 1:
        raise ValueError(
            f"step={step} is out of range: steps count from 1 (bias correction divides by 1 − beta**step)."
        )


_register(
    "precision_update_sgvb_(Tensor(a!)[] excess, Tensor[] grads, Tensor(b!)[] exp_avg, Tensor(c!)[] exp_avg_sq, "
    "Scalar lr, Scalar beta1, Scalar beta2, Scalar eps, Scalar gamma, Scalar prior_precision, SymInt seed, "
    "SymInt noise_step, SymInt step, SymInt[] offsets, Scalar sign=1.0) -> ()",
    _run_precision_update_sgvb_,
    _check_precision_update_sgvb_,
)


# dr_fim_score, dr_fim_score_ ------------------------------------------------------------------------------------------


def _fake_dr_fim_score(
    fisher: list[Tensor],
    shifted: list[Tensor],
    kind: str,
    c: float,
    gamma: float = 1.0,
    prior_precision: float = 0.0,
    eps: float = 1e-8,
) -> list[Tensor]:
    _check_score_inputs(fisher, shifted, kind)
    return [
        torch.empty(tensor.shape, dtype=torch.promote_types(tensor.dtype, torch.float32), device=tensor.device)
        for tensor in fisher
    ]


def _check_score_inputs(fisher: list[Tensor], shifted: list[Tensor], kind: str) -> None:
    if kind not in SCORE_KINDS:
        raise ValueError(f"kind={kind!r} is not a score. Use one of {', '.join(SCORE_KINDS)}.")
    _check_shapes("fisher", fisher, shifted=shifted)
    if fisher:
        _check_tensors("fisher", fisher, fisher[0].device)
        _check_tensors("shifted", shifted, fisher[0].device)


def _check_score_values(c: float, gamma: float, prior_precision: float, eps: float) -> None:
    _check_range("c", c, 0, math.inf)
    _check_range("gamma", gamma, 0, math.inf, open_low=True)
    _check_range("prior_precision", prior_precision, 0, math.inf)
    _check_range("eps", eps, 0, math.inf)


def _check_count(count: int) -> None:
    if count < 1:
        raise ValueError(f"count={count} is out of range: pass 1 for the first score, then 2, 3, …")


def _run_dr_fim_score(
    fisher: list[Tensor],
    shifted: list[Tensor],
    kind: str,
    c: float,
    gamma: float = 1.0,
    prior_precision: float = 0.0,
    eps: float = 1e-8,
) -> list[Tensor]:
    _check_score_inputs(fisher, shifted, kind)
    _check_score_values(c, gamma, prior_precision, eps)
    if not fisher:
        return []
    module = _implementation("dr_fim_score", fisher, shifted)
    scores: list[Tensor] = module.dr_fim_score(
        _contiguous(fisher), _contiguous(shifted), kind, c, gamma, prior_precision, eps
    )
    return scores


_register(
    "dr_fim_score(Tensor[] fisher, Tensor[] shifted, str kind, Scalar c, Scalar gamma=1.0, Scalar prior_precision=0.0, "
    "Scalar eps=1e-8) -> Tensor[]",
    _run_dr_fim_score,
    _fake_dr_fim_score,
)


def _check_dr_fim_score_(
    scores: list[Tensor],
    fisher: list[Tensor],
    shifted: list[Tensor],
    count: int,
    kind: str,
    c: float,
    gamma: float = 1.0,
    prior_precision: float = 0.0,
    eps: float = 1e-8,
) -> None:
    _check_score_inputs(fisher, shifted, kind)
    _check_shapes("fisher", fisher, scores=scores)
    if scores:
        _check_tensors("scores", scores, fisher[0].device, STATE_DTYPES, mutated=True)


def _run_dr_fim_score_(
    scores: list[Tensor],
    fisher: list[Tensor],
    shifted: list[Tensor],
    count: int,
    kind: str,
    c: float,
    gamma: float = 1.0,
    prior_precision: float = 0.0,
    eps: float = 1e-8,
) -> None:
    _check_dr_fim_score_(scores, fisher, shifted, count, kind, c)
    _check_score_values(c, gamma, prior_precision, eps)
    _check_count(count)
    if scores:
        module = _implementation("dr_fim_score", scores, fisher, shifted)
        module.dr_fim_score_(
            scores, _contiguous(fisher), _contiguous(shifted), count, kind, c, gamma, prior_precision, eps
        )
        _mark_written(scores)


_register(
    "dr_fim_score_(Tensor(a!)[] scores, Tensor[] fisher, Tensor[] shifted, SymInt count, str kind, Scalar c, "
    "Scalar gamma=1.0, Scalar prior_precision=0.0, Scalar eps=1e-8) -> ()",
    _run_dr_fim_score_,
    _check_dr_fim_score_,
)


# key_histogram, collect_bracket, select_threshold, compact ------------------------------------------------------------


def check_scores(scores: list[Tensor]) -> None:
    """What may be ranked: dense float tensors on one device.

    Raises:
        TypeError, ValueError: naming the tensor and the remedy.
    """
    if scores:
        _check_tensors("scores", scores, scores[0].device)


def checked_search(scores: list[Tensor], k: int, group: dist.ProcessGroup | None = None) -> Threshold:
    """The k-th largest score; a pass over the scores is a call of ``collect_bracket`` or ``key_histogram``.

    Raises:
        TypeError, ValueError: as :func:`fishertune_kernels.select_threshold`.
    """
    from .select_threshold.search import search  # its package imports this module

    check_scores(scores)
    _check_k(k)
    return search(_contiguous(scores), k, group)


def _check_k(k: int) -> None:
    if k < 0:
        raise ValueError(f"k={k} is negative. Choose k between 0 and the number of scores.")


def _check_key_histogram(scores: list[Tensor], shift: int, bits: int, prefix_mask: int, prefix: int) -> Tensor:
    check_scores(scores)
    if not scores:
        raise ValueError("scores is an empty list; there is no device to count on. Pass at least one tensor.")
    if len({tensor.dtype == torch.float64 for tensor in scores}) > 1:
        raise TypeError("scores mixes float64 with narrower types, whose keys differ. Convert all with .double().")
    width = 64 if scores[0].dtype == torch.float64 else 32
    if not (1 <= bits <= 16 and shift >= 0 and shift + bits <= width):
        raise ValueError(f"shift={shift}, bits={bits}: expected 1 to 16 bits within the key's {width}.")
    return torch.empty(2**bits + 1, dtype=torch.int64, device=scores[0].device)


def _run_key_histogram(scores: list[Tensor], shift: int, bits: int, prefix_mask: int, prefix: int) -> Tensor:
    _check_key_histogram(scores, shift, bits, prefix_mask, prefix)
    module = _implementation("select_threshold", scores)
    counts: Tensor = module.key_histogram(
        _contiguous(scores), shift=shift, bits=bits, prefix_mask=prefix_mask, prefix=prefix
    )
    return counts


_register(
    "key_histogram(Tensor[] scores, int shift, int bits, int prefix_mask, int prefix) -> Tensor",
    _run_key_histogram,
    _check_key_histogram,
)


def _check_collect_bracket(scores: list[Tensor], low: int, high: int, capacity: int) -> None:
    check_scores(scores)
    if not scores:
        raise ValueError("scores is an empty list; there is no device to count on. Pass at least one tensor.")
    for i, tensor in enumerate(scores):
        if tensor.dtype == torch.float64:
            raise TypeError(
                f"scores[{i}] is torch.float64; brackets are of 32-bit keys. Use .float() or key_histogram."
            )
    if not 0 <= low <= high < 1 << 32:
        raise ValueError(f"low={low}, high={high}: expected 0 ≤ low ≤ high < 2**32, keys of float32 scores.")
    if capacity < 0:
        raise ValueError(f"capacity={capacity} is negative. Pass how many candidates to return at most.")


def _run_collect_bracket(scores: list[Tensor], low: int, high: int, capacity: int) -> tuple[Tensor, Tensor]:
    _check_collect_bracket(scores, low, high, capacity)
    module = _implementation("select_threshold", scores)
    counts_L3, candidates = module.collect_bracket(_contiguous(scores), low, high, capacity)
    return counts_L3, candidates


def _fake_collect_bracket(scores: list[Tensor], low: int, high: int, capacity: int) -> tuple[Tensor, Tensor]:
    _check_collect_bracket(scores, low, high, capacity)
    found = torch.library.get_ctx().new_dynamic_size()
    device = scores[0].device
    return (
        torch.empty(len(scores), 3, dtype=torch.int64, device=device),
        torch.empty(found, dtype=torch.int64, device=device),
    )


_register(
    "collect_bracket(Tensor[] scores, int low, int high, int capacity) -> (Tensor, Tensor)",
    _run_collect_bracket,
    _fake_collect_bracket,
)


def _as_tensors(threshold: Threshold) -> tuple[Tensor, Tensor]:
    """Two tensors on the CPU, where their numbers are needed: the value, and (greater, ties kept) of each tensor."""
    counts = [threshold.greater_per_tensor, threshold.ties_kept_per_tensor]
    return torch.tensor(threshold.value, dtype=torch.float64), torch.tensor(counts, dtype=torch.int64)


def _run_select_threshold(scores: list[Tensor], k: int) -> tuple[Tensor, Tensor]:
    return _as_tensors(checked_search(scores, k))


def _fake_select_threshold(scores: list[Tensor], k: int) -> tuple[Tensor, Tensor]:
    check_scores(scores)
    return torch.empty((), dtype=torch.float64), torch.empty(2, len(scores), dtype=torch.int64)


_register(
    "select_threshold(Tensor[] scores, SymInt k) -> (Tensor, Tensor)", _run_select_threshold, _fake_select_threshold
)


def _check_compact_counts(scores: list[Tensor], greater: Sequence[int], ties_kept: Sequence[int]) -> None:
    check_scores(scores)
    counts = {"threshold.greater_per_tensor": greater, "threshold.ties_kept_per_tensor": ties_kept}
    _check_lengths("scores", scores, **counts)


def _run_compact(scores: list[Tensor], value: float, greater: list[int], ties_kept: list[int]) -> list[Tensor]:
    from .select_threshold.search import Threshold

    _check_compact_counts(scores, greater, ties_kept)
    for i, tensor in enumerate(scores):
        if greater[i] < 0 or ties_kept[i] < 0 or greater[i] + ties_kept[i] > tensor.numel():
            raise ValueError(
                f"The threshold selects {greater[i]} + {ties_kept[i]} elements of scores[{i}], which has "
                f"{tensor.numel()}: they are not the scores it was found for. Call select_threshold again."
            )
    if not scores:
        return []
    threshold = Threshold(value, tuple(greater), tuple(ties_kept))
    indices: list[Tensor] = _implementation("compact", scores).compact(_contiguous(scores), threshold)
    threshold.require([index.numel() for index in indices])
    return indices


def _fake_compact(scores: list[Tensor], value: float, greater: list[int], ties_kept: list[int]) -> list[Tensor]:
    _check_compact_counts(scores, greater, ties_kept)
    return [
        torch.empty(above + ties, dtype=torch.int32 if tensor.numel() <= 2**31 else torch.int64, device=tensor.device)
        for tensor, above, ties in zip(scores, greater, ties_kept, strict=True)
    ]


_register(
    "compact(Tensor[] scores, Scalar value, SymInt[] greater, SymInt[] ties_kept) -> Tensor[]",
    _run_compact,
    _fake_compact,
)


# dr_fim_threshold_ ----------------------------------------------------------------------------------------------------


def checked_score_and_search(
    scores: list[Tensor],
    fisher: list[Tensor],
    shifted: list[Tensor],
    k: int,
    count: int,
    kind: str,
    c: float,
    gamma: float = 1.0,
    prior_precision: float = 0.0,
    eps: float = 1e-8,
    group: dist.ProcessGroup | None = None,
) -> Threshold:
    """``dr_fim_score_``, then the k-th largest of the new scores.

    Raises:
        TypeError, ValueError: as :func:`fishertune_kernels.dr_fim_threshold_`.
    """
    from .dr_fim_score.fused import score_and_search  # its package imports this module
    from .select_threshold.search import search

    _check_dr_fim_score_(scores, fisher, shifted, count, kind, c)
    _check_score_values(c, gamma, prior_precision, eps)
    _check_count(count)
    _check_k(k)
    if not scores:
        return search(scores, k, group)
    module = _implementation("dr_fim_score", scores, fisher, shifted)
    options = (count, kind, c, gamma, prior_precision, eps)
    try:
        return score_and_search(module, scores, _contiguous(fisher), _contiguous(shifted), options, k, group)
    finally:
        _mark_written(scores)  # also where NaN among them are refused


def _run_dr_fim_threshold_(
    scores: list[Tensor],
    fisher: list[Tensor],
    shifted: list[Tensor],
    k: int,
    count: int,
    kind: str,
    c: float,
    gamma: float = 1.0,
    prior_precision: float = 0.0,
    eps: float = 1e-8,
) -> tuple[Tensor, Tensor]:
    return _as_tensors(
        checked_score_and_search(scores, fisher, shifted, k, count, kind, c, gamma, prior_precision, eps)
    )


def _fake_dr_fim_threshold_(
    scores: list[Tensor],
    fisher: list[Tensor],
    shifted: list[Tensor],
    k: int,
    count: int,
    kind: str,
    c: float,
    gamma: float = 1.0,
    prior_precision: float = 0.0,
    eps: float = 1e-8,
) -> tuple[Tensor, Tensor]:
    _check_dr_fim_score_(scores, fisher, shifted, count, kind, c)
    return _fake_select_threshold(scores, k)


_register(
    "dr_fim_threshold_(Tensor(a!)[] scores, Tensor[] fisher, Tensor[] shifted, SymInt k, SymInt count, str kind, "
    "Scalar c, Scalar gamma=1.0, Scalar prior_precision=0.0, Scalar eps=1e-8) -> (Tensor, Tensor)",
    _run_dr_fim_threshold_,
    _fake_dr_fim_threshold_,
)


# sparse_adamw_ --------------------------------------------------------------------------------------------------------


def _check_sparse_adamw_(
    params: list[Tensor],
    grads: list[Tensor],
    indices: list[Tensor],
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    scores: list[Tensor],
    master: list[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    active_threshold: float | None,
    grad_scale: float,
    grad_scale_tensor: Tensor | None = None,
    compact_grads: bool = False,
    stochastic: bool = False,
    seed: int = 0,
    offsets: Sequence[int] = (),
) -> None:
    _check_lengths("params", params, grads=grads, indices=indices)
    if not compact_grads:
        _check_shapes("params", params, grads=grads)
    if active_threshold is not None and params and not scores:
        raise ValueError(
            f"active_threshold={active_threshold} needs the scores it is compared with. Pass scores=, the selection's "
            "compact scores, or leave active_threshold out to move every selected element."
        )
    if not params:
        return
    device = params[0].device
    _check_tensors("params", params, device, mutated=True)
    _check_tensors("grads", grads, device)
    _check_tensors("indices", indices, device, INDEX_DTYPES)
    state = torch.float64 if params[0].dtype == torch.float64 else torch.float32
    optional = {
        name: tensors
        for name, tensors in (("scores", scores), ("master", master), ("grads", grads if compact_grads else []))
        if tensors
    }
    _check_compact(indices, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, **optional)
    _check_tensors("exp_avg", exp_avg, device, (state,), mutated=True)
    _check_tensors("exp_avg_sq", exp_avg_sq, device, (state,), mutated=True)
    _check_tensors("scores", scores, device, (state,))
    _check_tensors("master", master, device, (state,), mutated=True)
    if grad_scale_tensor is not None:
        _check_tensors("grad_scale", [grad_scale_tensor], device, (state,))
        if grad_scale_tensor.numel() != 1:
            raise ValueError(f"grad_scale has shape {tuple(grad_scale_tensor.shape)}; expected a single number.")
    if stochastic:
        _check_lengths("params", params, offsets=offsets)
        _check_stochastic(params, master)


def _check_stochastic(params: list[Tensor], master: list[Tensor]) -> None:
    for i, param in enumerate(params):
        if param.dtype == torch.float16:
            raise TypeError(
                f"params[{i}] is torch.float16 and rounding is 'stochastic', which is for bfloat16. The bits that "
                "float16 drops vary in number below 6e-5, and it overflows at 65504. Keep a master copy: pass master=."
            )
        if param.dtype != torch.bfloat16:
            raise TypeError(
                f"params[{i}] is {param.dtype} and rounding is 'stochastic', which is for bfloat16: at this precision "
                "small updates are kept anyway. Use rounding='nearest'."
            )
    if master:
        raise ValueError(
            "rounding is 'stochastic' and a master copy is given: the copy keeps what rounding drops, so nothing is "
            "left to chance. Leave one of them out."
        )


def _run_sparse_adamw_(
    params: list[Tensor],
    grads: list[Tensor],
    indices: list[Tensor],
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    scores: list[Tensor],
    master: list[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    active_threshold: float | None,
    grad_scale: float,
    grad_scale_tensor: Tensor | None = None,
    compact_grads: bool = False,
    stochastic: bool = False,
    seed: int = 0,
    offsets: Sequence[int] = (),
) -> None:
    _check_sparse_adamw_(
        params, grads, indices, exp_avg, exp_avg_sq, scores, master, lr, beta1, beta2, eps, weight_decay, step,
        active_threshold, grad_scale, grad_scale_tensor, compact_grads, stochastic, seed, offsets,
    )  # fmt: skip
    _check_adam(lr, beta1, beta2, eps, step)
    _check_range("weight_decay", weight_decay, 0, math.inf)
    _check_finite(grad_scale=grad_scale)
    if active_threshold is not None and math.isnan(active_threshold):
        raise ValueError("active_threshold is NaN. Pass None to move every selected element.")
    if stochastic:
        check_seed(seed)
        _check_offsets(offsets)
    if not params:
        return
    _check_indices("params", params, indices)
    module = _implementation("sparse_adamw", params, grads, exp_avg)
    module.sparse_adamw_(
        params,
        _contiguous(grads),
        _contiguous(indices),
        exp_avg,
        exp_avg_sq,
        lr=lr,
        betas=(beta1, beta2),
        eps=eps,
        weight_decay=weight_decay,
        step=step,
        scores=_contiguous(scores) if scores else None,
        active_threshold=active_threshold,
        grad_scale=grad_scale if grad_scale_tensor is None else grad_scale_tensor,
        master=master or None,
        compact_grads=compact_grads,
        seed=seed if stochastic else None,
        offsets=list(offsets) if stochastic else None,
    )
    _mark_written(params, exp_avg, exp_avg_sq, master)


# Empty lists stand for absent scores and master copies. A scale is a number or a tensor, two arguments in a schema.
_register(
    "sparse_adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor[] indices, Tensor(b!)[] exp_avg, "
    "Tensor(c!)[] exp_avg_sq, Tensor[] scores, Tensor(d!)[] master, Scalar lr, Scalar beta1, Scalar beta2, Scalar eps, "
    "Scalar weight_decay, SymInt step, Scalar? active_threshold, Scalar grad_scale, Tensor? grad_scale_tensor=None, "
    "bool compact_grads=False, bool stochastic=False, SymInt seed=0, SymInt[] offsets=[]) -> ()",
    _run_sparse_adamw_,
    _check_sparse_adamw_,
)


# selected_grad_norm ---------------------------------------------------------------------------------------------------


def _fake_selected_grad_norm(grads: list[Tensor], indices: list[Tensor] | None) -> Tensor:
    device = grads[0].device if grads else torch.device("cpu")
    _check_tensors("grads", grads, device)
    if indices is not None:
        _check_lengths("grads", grads, indices=indices)
        _check_tensors("indices", indices, device, INDEX_DTYPES)
        _check_compact(indices)
    wide = any(grad.dtype == torch.float64 for grad in grads)
    return torch.empty((), dtype=torch.float64 if wide else torch.float32, device=device)


def _run_selected_grad_norm(grads: list[Tensor], indices: list[Tensor] | None) -> Tensor:
    result = _fake_selected_grad_norm(grads, indices)
    if not grads:
        return result.zero_()
    if indices is not None:
        _check_indices("grads", grads, indices)
        indices = _contiguous(indices)
    norm: Tensor = _implementation("selected_grad_norm", grads).selected_grad_norm(_contiguous(grads), indices)
    return norm


# indices None counts every element.
_register(
    "selected_grad_norm(Tensor[] grads, Tensor[]? indices) -> Tensor", _run_selected_grad_norm, _fake_selected_grad_norm
)


# gather_values, scatter_values_ ---------------------------------------------------------------------------------------


def _fake_gather_values(tensors: list[Tensor], indices: list[Tensor]) -> list[Tensor]:
    _check_lengths("tensors", tensors, indices=indices)
    if tensors:
        _check_tensors("tensors", tensors, tensors[0].device, None)
        _check_tensors("indices", indices, tensors[0].device, INDEX_DTYPES)
        _check_compact(indices)
    return [
        torch.empty(index.shape, dtype=tensor.dtype, device=tensor.device)
        for tensor, index in zip(tensors, indices, strict=True)
    ]


def _run_gather_values(tensors: list[Tensor], indices: list[Tensor]) -> list[Tensor]:
    _check_lengths("tensors", tensors, indices=indices)
    if not tensors:
        return []
    _check_tensors("tensors", tensors, tensors[0].device, None)
    _check_tensors("indices", indices, tensors[0].device, INDEX_DTYPES)
    _check_compact(indices)
    _check_indices("tensors", tensors, indices)
    values: list[Tensor] = _implementation("values", tensors).gather_values(_contiguous(tensors), _contiguous(indices))
    return values


_register("gather_values(Tensor[] tensors, Tensor[] indices) -> Tensor[]", _run_gather_values, _fake_gather_values)


def _check_gather_values_into_(out: Tensor, tensors: list[Tensor], indices: list[Tensor]) -> None:
    _check_lengths("tensors", tensors, indices=indices)
    _check_tensors("tensors", tensors, out.device, (out.dtype,))
    _check_tensors("indices", indices, out.device, INDEX_DTYPES)
    _check_compact(indices)
    _check_tensors("out", [out], out.device, None, mutated=True)
    expected = sum(index.numel() for index in indices)
    if out.dim() != 1 or out.numel() != expected:
        raise ValueError(f"out has shape {tuple(out.shape)}; expected ({expected},), one value for every index.")


def _run_gather_values_into_(out: Tensor, tensors: list[Tensor], indices: list[Tensor]) -> None:
    _check_gather_values_into_(out, tensors, indices)
    if tensors:
        _check_indices("tensors", tensors, indices)
        _implementation("values", tensors).gather_values_into_(out, _contiguous(tensors), _contiguous(indices))
        _mark_written([out])


_register(
    "gather_values_into_(Tensor(a!) out, Tensor[] tensors, Tensor[] indices) -> ()",
    _run_gather_values_into_,
    _check_gather_values_into_,
)


def _check_scatter_values_(tensors: list[Tensor], indices: list[Tensor], values: list[Tensor]) -> None:
    _check_lengths("tensors", tensors, indices=indices, values=values)
    if not tensors:
        return
    device = tensors[0].device
    _check_tensors("tensors", tensors, device, None, mutated=True)
    _check_tensors("indices", indices, device, INDEX_DTYPES)
    _check_compact(indices, values=values)
    for i, (tensor, value) in enumerate(zip(tensors, values, strict=True)):
        _check_tensors(f"tensors[{i}]: values", [value], device, (tensor.dtype,))


def _run_scatter_values_(tensors: list[Tensor], indices: list[Tensor], values: list[Tensor]) -> None:
    _check_scatter_values_(tensors, indices, values)
    if tensors:
        _check_indices("tensors", tensors, indices)
        module = _implementation("values", tensors)
        module.scatter_values_(tensors, _contiguous(indices), _contiguous(values))
        _mark_written(tensors)


_register(
    "scatter_values_(Tensor(a!)[] tensors, Tensor[] indices, Tensor[] values) -> ()",
    _run_scatter_values_,
    _check_scatter_values_,
)
