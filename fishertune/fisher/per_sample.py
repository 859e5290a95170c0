"""Exact diagonal Fisher: the mean over samples of squared per-sample gradients (paper Eq. 4, 8, 9).

F_θ = (1/N) Σ_n (∂L_n/∂θ)², one gradient per sample n. The square of a batch's mean gradient is a different quantity.

One ordinary forward and backward pass gives all of it: where a weight meets data, the input X and the output gradient
dY of that call determine every sample's gradient, and a fused kernel sums their squares without writing them. The
ordinary weight gradient is not computed. See :mod:`fishertune.fisher.rules` for the calls that have a rule; whatever
has none is run again sample by sample, and what cannot be is left to autograd at one backward pass per sample, with a
warning.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from types import TracebackType
from typing import Any, Self
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.checkpoint import CheckpointError

from fishertune.fisher.recorder import CHECKPOINTING, Phase, Record, Recorder, graph_of
from fishertune.fisher.rules import Convolution, Layout, Linear, Rerun, Rule, Slot
from fishertune.fisher.sums import SquaredSums

LossFn = Callable[..., Tensor]
Shift = Callable[[], AbstractContextManager[Any]]

# Where the samples lie in calls whose shapes leave it open, measured once per model. None: nowhere in blocks.
_MEASURED: WeakKeyDictionary[nn.Module, dict[Any, int | None]] = WeakKeyDictionary()
_WARNED: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


class PerSampleSquares:
    """Sums squared per-sample gradients in a loop that is not ours.

    ::

        with PerSampleSquares(model, names) as squares:
            for images, labels in loader:
                losses = F.cross_entropy(model(images), labels, reduction="none")   # (N,)
                squares.backward(losses)
        fisher = {name: total / count for name, total in squares.accumulators.items()}

    Inside, the model is in eval mode (no dropout, no drop path) and every tracked parameter has ``requires_grad``; on
    leaving, also by an exception, both are what they were. ``.grad`` fields are never touched. Compiled models run
    eagerly inside.

    Samples must not influence one another, and must lie in equal blocks along the first dimension (or the second) of a
    layer's input, as in every ViT, windowed or not. Where shapes leave this open it is measured, once per model, at
    the price of one backward pass.

    Memory: that of a plain backward pass without its parameter gradients, plus the accumulators. Activation
    checkpointing must be off.

    Args:
        model: any module.
        params: names of the parameters to cover (of ``model.named_parameters()``); all of them if None.

    Attributes:
        accumulators: Σ weight·(per-sample gradient)² by parameter name; fp32, float64 for float64 parameters. Zero
            where a parameter took no part.

    Raises:
        ValueError: if a name is unknown or twice given, or there is no parameter to cover.
        TypeError: if a parameter is not a real floating-point tensor.
    """

    def __init__(self, model: nn.Module, params: Iterable[str] | None = None) -> None:
        self._model = model
        self._parameters = _choose(model, params)
        self.accumulators = {
            name: torch.zeros(p.shape, dtype=torch.promote_types(p.dtype, torch.float32), device=p.device)
            for name, p in self._parameters.items()
        }
        self._recorder: Recorder | None = None
        self._sums: SquaredSums | None = None
        self._layouts: dict[Record, Layout] = {}

    def __enter__(self) -> Self:
        if self._recorder is not None:
            raise RuntimeError("This PerSampleSquares is already active. Leave it before entering it again.")
        chosen = {id(parameter) for parameter in self._parameters.values()}
        others = [parameter for parameter in self._model.parameters() if id(parameter) not in chosen]
        recorder = Recorder(self._parameters, others, self._model.buffers(), self._on_gradient)
        with ExitStack() as stack:
            stack.callback(self._restore, [(m, m.training) for m in self._model.modules()])
            stack.callback(self._unfreeze, [(p, p.requires_grad) for p in self._parameters.values()])
            stack.callback(recorder.reset)
            self._model.eval()
            for parameter in self._parameters.values():
                parameter.requires_grad_()
            if "torch._dynamo" in sys.modules:  # a compiled model calls no torch functions we could see
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(recorder)
            self._stack = stack.pop_all()
        self._recorder = recorder
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._recorder = None
        self._layouts.clear()
        self._stack.__exit__(kind, error, trace)

    def backward(self, losses: Tensor, weight: float = 1.0) -> None:
        """Adds weight·Σ_n (∂losses[n]/∂θ)² to the accumulators and frees the graph of ``losses``.

        Args:
            losses: (N,), one per sample, computed inside this context from one forward pass or several.
            weight: 1/N gives the mean over the batch.

        Raises:
            ValueError: if ``losses`` is not (N,) or does not depend on any covered parameter.
            RuntimeError: if a loss is NaN or infinite (the accumulators are then unchanged), outside the context, or
                if an input was overwritten in place after use.
        """
        recorder = self._recorder
        if recorder is None:
            raise RuntimeError("backward was called outside the context. Use: with PerSampleSquares(model) as squares.")
        recorder.suspended = True
        try:
            self._backward(recorder, losses, weight)
        finally:
            recorder.reset()
            recorder.suspended = False
            recorder.phase = Phase.FORWARD
            self._layouts, self._sums = {}, None

    # ------------------------------------------------------------------------------------------------------------------

    def _backward(self, recorder: Recorder, losses: Tensor, weight: float) -> None:
        _check_losses(losses)
        with torch.no_grad():  # saved inputs carry a graph that the sums must not join
            nodes, leaves = graph_of(losses)
            records = [record for record in recorder.records if record.keep_used(nodes)]
            by_autograd = self._left_to_autograd(leaves)
            if not records and not by_autograd:
                raise ValueError(_NO_GRADIENT)
            samples = losses.numel()
            self._layouts = self._find_layouts(records, losses)
            apart = [record for record in records if record not in self._layouts]
            self._sums = self._new_sums(records, by_autograd, weight, samples)
            if samples > 1 and (apart or by_autograd):
                self._warn(apart, by_autograd, samples)
            if apart or by_autograd:
                self._one_by_one(losses, apart, by_autograd)
            self._run_engine(losses, leaves)
            self._sums.finish()

    @staticmethod
    def _restore(modes: list[tuple[nn.Module, bool]]) -> None:
        for module, training in modes:
            module.training = training

    @staticmethod
    def _unfreeze(flags: list[tuple[nn.Parameter, bool]]) -> None:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)

    def _left_to_autograd(self, leaves: list[Tensor]) -> dict[str, list[Tensor]]:
        """Leaves of the graph that stand for a parameter: uses we could not see, or could not take apart."""
        assert self._recorder is not None
        names = {id(parameter): name for name, parameter in self._parameters.items()}
        names.update({id(leaf): name for name, leaf in self._recorder.shadows.items()})
        found: dict[str, list[Tensor]] = {}
        for leaf in leaves:
            if id(leaf) in names:
                found.setdefault(names[id(leaf)], []).append(leaf)
        return found

    def _new_sums(
        self, records: list[Record], by_autograd: Mapping[str, list[Tensor]], weight: float, samples: int
    ) -> SquaredSums:
        assert self._recorder is not None
        uses: Counter[str] = Counter(name for record in records for name in record.names)
        uses.update({name: len(leaves) for name, leaves in by_autograd.items()})
        as_product: Counter[str] = Counter()
        for record in records:
            slot = _product_weight(record.live_rule())
            if record in self._layouts and slot is not None and slot.source is None:
                as_product.update(slot.names)
        products = {name for name, count in as_product.items() if count == uses[name]}
        return SquaredSums(self.accumulators, self._recorder.shadows, weight, samples, uses, products)

    # Where the samples are --------------------------------------------------------------------------------------------

    def _find_layouts(self, records: list[Record], losses: Tensor) -> dict[Record, Layout]:
        """The layout of every record that has one."""
        samples = losses.numel()
        if samples == 1:
            return {record: Layout(1) for record in records}
        measured = _MEASURED.setdefault(self._model, {})
        layouts: dict[Record, Layout] = {}
        unclear: dict[Record, list[Layout]] = {}
        for record in records:
            rule, key = record.live_rule(), _signature(record, samples)
            if key in measured:
                dim = measured[key]
                if dim is not None:
                    layouts[record] = Layout(samples, dim)
                continue
            candidates = [
                layout
                for layout in (Layout(samples, 0), Layout(samples, 1))
                if all(map(layout.fits, record.used_shapes)) and rule.check(layout) and _dry_run(record, layout)
            ]
            obvious = all(shape[:1] == (samples,) and shape[1:2] != (samples,) for shape in record.used_shapes)
            if candidates and candidates[0].dim == 0 and obvious:
                layouts[record] = candidates[0]
            elif candidates:
                unclear[record] = candidates
            else:
                measured[key] = None
            if isinstance(rule, Rerun) and record in layouts:
                measured[key] = 0
        if unclear:
            self._measure(unclear, losses, layouts, measured)
        return layouts

    def _measure(
        self,
        unclear: Mapping[Record, list[Layout]],
        losses: Tensor,
        layouts: dict[Record, Layout],
        measured: dict[Any, int | None],
    ) -> None:
        """Back-propagates one loss alone: its gradient must vanish outside its own sample's block."""
        assert self._recorder is not None
        sample = int(losses.detach().argmax())
        edges = [edge for record in unclear for edge in record.used_edges]
        self._recorder.phase = Phase.PROBE
        grads = iter(_grads_of_one(losses, sample, edges))
        for record, candidates in unclear.items():
            found = [grad for grad in record.shaped(grads) if grad is not None]
            if not any(bool(grad.any()) for grad in found):  # nothing to see this time: ask again next time
                layouts[record] = candidates[0]
                continue
            fitting = [
                layout
                for layout in candidates
                if all(bool((layout.part(grad, sample) != 0).sum() == (grad != 0).sum()) for grad in found)
            ]
            measured[_signature(record, losses.numel())] = fitting[0].dim if fitting else None
            if fitting:
                layouts[record] = fitting[0]

    # Backward passes --------------------------------------------------------------------------------------------------

    def _one_by_one(self, losses: Tensor, apart: list[Record], by_autograd: Mapping[str, list[Tensor]]) -> None:
        """One backward pass per sample, for what cannot be taken apart."""
        assert self._recorder is not None and self._sums is not None
        self._recorder.phase = Phase.PROBE
        leaves = [(name, leaf) for name, group in by_autograd.items() for leaf in group]
        edges = [edge for record in apart for edge in record.used_edges]
        edges += [get_gradient_edge(leaf) for _, leaf in leaves]
        for n in range(losses.numel()):
            grads = iter(_grads_of_one(losses, n, edges))
            for record in apart:
                shaped = record.shaped(grads)
                if any(grad is not None for grad in shaped):
                    rule = record.live_rule()
                    for chunk in rule.gradients(shaped, Layout(1)):
                        for slot, part in zip(rule.slots, chunk, strict=True):
                            self._sums.add(slot, n, part)
            for (name, _), grad in zip(leaves, grads, strict=True):
                if grad is not None:
                    self._sums.add_direct(name, n, grad)

    def _run_engine(self, losses: Tensor, leaves: list[Tensor]) -> None:
        """The one backward pass. Gradients of leaves are not wanted, but asking for them makes every node run."""
        assert self._recorder is not None
        self._recorder.phase = Phase.MAIN
        try:
            torch.autograd.grad(losses, leaves, torch.ones_like(losses), allow_unused=True)
        except CheckpointError as error:
            raise RuntimeError(CHECKPOINTING) from error

    def _on_gradient(self, record: Record, grads: tuple[Tensor | None, ...]) -> None:
        layout = self._layouts.get(record)
        if layout is None:
            return  # done one by one
        assert self._sums is not None
        try:
            rule = record.live_rule()
            weight = _product_weight(rule)
            if weight is not None and self._sums.takes_product(weight):
                assert isinstance(rule, (Linear, Convolution)) and grads[0] is not None
                self._sums.add_product(weight, rule.bias, *rule.factors(grads[0], layout))
                return
            if self._sums.takes_affine(rule.slots) and grads[0] is not None:
                affine = rule.affine(grads[0], layout)
                if affine is not None:
                    self._sums.add_affine(affine)
                    return
            start = 0
            for chunk in rule.gradients(grads, layout):
                for slot, grad in zip(rule.slots, chunk, strict=True):
                    self._sums.add(slot, start, grad)
                start += len(chunk[0])
        finally:
            record.release()

    def _warn(self, apart: list[Record], by_autograd: Mapping[str, list[Tensor]], samples: int) -> None:
        names = {*by_autograd, *(name for record in apart for name in record.names)}
        known = _WARNED.setdefault(self._model, set())
        if names <= known:
            return
        known |= names
        some = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        warnings.warn(
            f"The per-sample gradients of {some} cannot be told apart inside the layers that use them, so they are "
            f"computed by one backward pass per sample: about {samples} more passes for every batch. Leave them out "
            "with params=… if they are not needed.",
            stacklevel=3,
        )


def per_sample_fisher(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Any],
    *,
    labels: str = "empirical",
    params: Iterable[str] | None = None,
    shift: Shift | None = None,
) -> dict[str, Tensor]:
    """The exact diagonal Fisher F = (1/N) Σ_n (∂L_n/∂θ)² over all samples of all batches (paper Eq. 4, 9).

    Args:
        model: any module; evaluated in eval mode and left as it was.
        loss_fn: ``loss_fn(model, batch) -> losses (N,)``, each depending on its own sample alone. L_n is the negative
            log likelihood of sample n; for dense prediction the mean over its valid pixels.
        batches: an iterable of whatever ``loss_fn`` takes. Batches may differ in size.
        labels: ``"empirical"`` uses the ground truth (Eq. 5); ``"sampled"`` calls
            ``loss_fn(model, batch, labels="sampled")``, which draws labels from the model (Eq. 9).
        params: names of the parameters to cover; all of them if None.
        shift: makes a context manager for each batch, such as ``lambda: simulate_domain(model)``: the Fisher of x'.

    Returns:
        F by parameter name: fp32 (float64 for float64 parameters), shaped as the parameter, on its device. Parameters
        that took no part are zero.

    Raises:
        ValueError: if ``labels`` is unknown or not supported by ``loss_fn``, a name in ``params`` is unknown, there is
            no batch, or the losses are not one per sample.
        RuntimeError: if a loss is NaN or infinite, naming the batch.
    """
    arguments = _label_arguments(loss_fn, labels)
    count = 0
    with PerSampleSquares(model, params) as squares:
        for index, batch in enumerate(batches):
            with shift() if shift is not None else nullcontext():
                losses = loss_fn(model, batch, **arguments)
                _check_losses(losses, f" of batch {index}")
                squares.backward(losses)
            count += losses.numel()
    if count == 0:
        raise ValueError("There is no batch to estimate the Fisher from. Pass at least one; generators can be used up.")
    return {name: total.div_(count) for name, total in squares.accumulators.items()}


def require_information(fisher: Mapping[str, Tensor]) -> None:
    """Refuses a Fisher that is zero everywhere: ranking by it would be ranking by position.

    Raises:
        ValueError: if no element differs from zero.
    """
    if not any(bool(value.any()) for value in fisher.values()):
        raise ValueError(
            f"The Fisher is zero in all {sum(value.numel() for value in fisher.values())} elements: it ranks nothing. "
            "Check that the labels are not all ignored, that the decoder is not at a point without gradient, and that "
            "the loss depends on the parameters asked for."
        )


# ----------------------------------------------------------------------------------------------------------------------

_NO_GRADIENT = (
    "The losses do not depend on any parameter that is covered, so there is no gradient. Compute them inside the "
    "context, by the model itself, without torch.no_grad and without detaching."
)


def _choose(model: nn.Module, params: Iterable[str] | None) -> dict[str, nn.Parameter]:
    everything = dict(model.named_parameters())
    if isinstance(params, str):
        raise TypeError(f"params={params!r} is one string; expected names. Pass [{params!r}].")
    names = list(everything) if params is None else list(params)
    unknown = [name for name in names if name not in everything]
    if unknown:
        raise ValueError(
            f"{unknown[0]!r} is not a parameter of this {type(model).__name__}. Use names of model.named_parameters(), "
            f"such as {next(iter(everything), None)!r}."
        )
    if not names or len(set(names)) < len(names):
        raise ValueError(
            "There is no parameter to cover." if not names else "A name in params is given twice. Pass each once."
        )
    for name in names:
        if not everything[name].is_floating_point():
            raise TypeError(f"Parameter {name} is {everything[name].dtype}; a Fisher needs real floating-point values.")
    return {name: everything[name] for name in names}


def _label_arguments(loss_fn: LossFn, labels: str) -> dict[str, str]:
    if labels == "empirical":
        return {}
    if labels != "sampled":
        raise ValueError(f"labels={labels!r} is not a label mode; choose 'empirical' or 'sampled'.")
    parameters = inspect.signature(loss_fn).parameters
    if "labels" not in parameters and all(p.kind is not p.VAR_KEYWORD for p in parameters.values()):
        raise ValueError(
            "labels='sampled' needs a loss function that draws labels from the model: loss_fn(model, batch, "
            "labels='sampled'). This one takes no argument named labels; use labels='empirical' or add it."
        )
    return {"labels": labels}


def _check_losses(losses: Any, where: str = "") -> None:
    if not isinstance(losses, Tensor) or losses.dim() != 1 or losses.numel() == 0:
        got = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else f"a {type(losses).__name__}"
        raise ValueError(
            f"The losses{where} are {got}; expected shape (N,), one loss per sample. Average over the pixels or tokens "
            "of a sample, not over the batch (reduction='none')."
        )
    if not losses.requires_grad:
        raise ValueError(_NO_GRADIENT)
    finite = torch.isfinite(losses.detach())
    if not bool(finite.all()):
        bad = int((~finite).nonzero()[0])
        raise RuntimeError(
            f"The loss of sample {bad}{where} is {losses[bad].item()}, so the Fisher would be NaN everywhere. Check "
            "that sample and its labels (are all of them ignored?) and that the model has finite weights."
        )


def _grads_of_one(losses: Tensor, sample: int, edges: list[GradientEdge]) -> tuple[Tensor | None, ...]:
    """The gradients of one sample's loss; the graph stays."""
    only = torch.zeros_like(losses)
    only[sample] = 1
    return torch.autograd.grad(losses, edges, only, retain_graph=True, allow_unused=True)


def _product_weight(rule: Rule) -> Slot | None:
    """The weight whose gradient a rule can give as two factors."""
    if isinstance(rule, Linear) or (isinstance(rule, Convolution) and rule.tiles):
        return rule.weight
    return None


def _signature(record: Record, samples: int) -> Any:
    return samples, record.what, record.names, tuple(record.shapes)


def _dry_run(record: Record, layout: Layout) -> bool:
    """Whether a call without a rule can run on one sample's share of its inputs at all."""
    rule = record.live_rule()
    if not isinstance(rule, Rerun):
        return True
    zero = rule.slots[0].value.new_zeros(())
    grads = tuple(None if shape is None else zero.expand(shape) for shape in record.shapes)
    try:
        next(rule.gradients(grads, layout))
    except (RuntimeError, ValueError, TypeError, IndexError):
        return False
    return True
