"""Watches a forward pass for calls that meet parameters, and hands their output gradients back with the call.

Works on torch functions, not on modules: it sees a weight wherever it is used (inside a fused projection, sliced,
resampled, shared by two layers), in models of any library, and nothing in the model is changed. Each parameter enters a
call detached, so that autograd never computes an ordinary weight gradient; what a call saves for us is the input the
plain backward would have kept for that gradient.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from fishertune.fisher.rules import Call, Linear, Rerun, Rule, Slot, float_tensors, map_tensors, rule_for

# Calls about a tensor rather than with it: they go to the parameter itself.
_ABOUT = frozenset(
    {"__set__", "__delete__", "requires_grad_", "register_hook", "retain_grad", "detach", "detach_", "backward", "grad"}
)
_EXPANDING = frozenset({"expand", "expand_as", "broadcast_to", "repeat", "tile"})
# Calls that look at a second tensor for its shape or dtype only.
_SHAPED_LIKE = frozenset({"to", "type_as", "expand_as", "view_as", "reshape_as"})
_RESHAPES = frozenset({"ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0"})

CHECKPOINTING = (
    "The model uses activation checkpointing, which runs its layers again where they cannot be watched. Switch it off "
    "for the estimate (timm: model.set_grad_checkpointing(False)); a smaller batch saves memory instead and gives the "
    "same Fisher."
)


class Phase(enum.Enum):
    """What a gradient that arrives at a recorded call means."""

    FORWARD = "forward"
    PROBE = "probe"  # asked for by us: to be ignored
    MAIN = "main"


@dataclass(eq=False)
class Record:
    """One call that met parameters, waiting for the gradients of its outputs.

    Attributes:
        rule: what the call contributes; None once its inputs are released.
        slots: the parameters it used.
        edges, shapes: where in the graph its outputs are, and their shapes; None for outputs the losses do not use.
        inputs: what the rule has saved, with version counters.
        what: the call's name.
    """

    rule: Rule | None
    slots: list[Slot]
    edges: list[GradientEdge | None]
    shapes: list[torch.Size | None]
    inputs: list[tuple[Tensor, int]] = field(default_factory=list)
    what: str = ""

    def keep_used(self, nodes: set[Any]) -> bool:
        """Forgets the outputs outside ``nodes``; whether any is left."""
        for i, edge in enumerate(self.edges):
            if edge is None or edge.node not in nodes:
                self.edges[i] = self.shapes[i] = None
        if isinstance(self.rule, Rerun):
            self.rule.expect(self.used_shapes)
        return bool(self.used_edges)

    @property
    def used_edges(self) -> list[GradientEdge]:
        return [edge for edge in self.edges if edge is not None]

    @property
    def used_shapes(self) -> list[torch.Size]:
        return [shape for shape in self.shapes if shape is not None]

    def shaped(self, grads: Iterator[Tensor | None]) -> tuple[Tensor | None, ...]:
        """The gradients of all outputs, from those of the used ones (which may come flattened)."""
        found = [None if shape is None else (shape, next(grads)) for shape in self.shapes]
        return tuple(None if pair is None or pair[1] is None else pair[1].reshape(pair[0]) for pair in found)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for slot in self.slots for name in slot.names)

    def live_rule(self) -> Rule:
        """The rule, while its inputs are what they were.

        Raises:
            RuntimeError: if an input was overwritten after the call.
        """
        assert self.rule is not None
        if any(tensor._version != version for tensor, version in self.inputs):
            raise RuntimeError(
                f"An input of {self.what} was changed in place after it was used, so the gradient of {self.names[0]} "
                "is lost. Write the operation that follows it out of place (x = x + y for x += y)."
            )
        return self.rule

    def release(self) -> None:
        """Frees the saved inputs."""
        self.rule = None
        self.inputs = []


class _Attach(torch.autograd.Function):
    """Gives a tensor without gradient a place in the graph, without a copy: otherwise no gradient would reach it."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, tensor: Tensor) -> Tensor:
        ctx.mark_dirty(tensor)
        return tensor

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        return None, None


class Recorder(TorchFunctionMode):
    """Records the calls of a forward pass that use ``tracked`` parameters.

    Args:
        tracked: parameters by name.
        others: the model's remaining parameters; they take part as constants.
        buffers: the model's constants.
        on_gradient: called with a record and the gradients of its outputs when they are known (phase MAIN).
    """

    def __init__(
        self,
        tracked: Mapping[str, nn.Parameter],
        others: Iterable[nn.Parameter],
        buffers: Iterable[Tensor],
        on_gradient: Callable[[Record, tuple[Tensor | None, ...]], None],
    ) -> None:
        super().__init__()
        self.tracked = dict(tracked)
        self._on_gradient = on_gradient
        self._others = list(others)
        self._buffers = list(buffers)  # held, so that an id stays theirs
        self._names = {id(parameter): name for name, parameter in self.tracked.items()}
        self._other_ids = {id(parameter) for parameter in self._others}
        self._constants = {id(buffer) for buffer in self._buffers} | self._other_ids
        self.phase = Phase.FORWARD
        self.suspended = False
        self.reset()

    def reset(self) -> None:
        """Forgets everything recorded; gradients that still arrive at it are an error."""
        for record in getattr(self, "records", []):
            record.release()
            record.edges.clear()  # see _watch
        self.records: list[Record] = []
        self.shadows: dict[str, Tensor] = {}  # leaves that stand for parameters in computations of parameters alone
        self._derived: dict[int, Slot] = {}  # results of such computations, by id; the slot keeps them alive
        self._known = {*self._names, *self._other_ids}
        self.anchor = torch.zeros((), requires_grad=True)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.suspended or not torch.is_grad_enabled() or not self._meets(args, kwargs):
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name in _ABOUT:
            return func(*args, **kwargs)
        if name == "__get__":  # an attribute; only some (p.T) are tensors with a gradient
            value = func(*args, **kwargs)
            if not isinstance(value, Tensor) or not value.requires_grad:
                return value
        slots, data = self._sort(args, kwargs)
        if not slots or (name in _SHAPED_LIKE and id(args[0]) not in slots):
            return func(*map_tensors(self._constant, args), **map_tensors(self._constant, kwargs))
        if not data:
            return self._derive(func, name, args, kwargs, slots)
        return self._record(func, args, kwargs, slots, data)

    # What a call's arguments are --------------------------------------------------------------------------------------

    def _meets(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        known = self._known
        for value in (*args, *kwargs.values()) if kwargs else args:
            if isinstance(value, Tensor):
                if id(value) in known:
                    return True
            elif isinstance(value, (list, tuple)) and any(id(item) in known for item in value):
                return True
        return False

    def _sort(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[dict[int, Slot], list[Tensor]]:
        """The parameters among the arguments (by id) and the tensors that may differ between samples."""
        slots: dict[int, Slot] = {}
        data: list[Tensor] = []

        def sort(tensor: Tensor) -> None:
            key = id(tensor)
            if key in slots:
                return
            if key in self._names:
                slots[key] = Slot(tensor.detach(), (self._names[key],))
            elif key in self._derived:
                known = self._derived[key]
                raw = len(known.names) == 1 and tensor is self.shadows[known.names[0]]
                slots[key] = Slot(tensor.detach(), known.names, None if raw else tensor, known.expanded)
            elif tensor.requires_grad and key not in self._other_ids:
                data.append(tensor)
            elif tensor.is_floating_point() and tensor.dim() > 0 and key not in self._constants:
                data.append(tensor)  # integers (gather tables) and the model's buffers are the same for every sample

        map_tensors(sort, (args, kwargs))
        return slots, data

    def _constant(self, tensor: Tensor) -> Tensor:
        return tensor.detach() if id(tensor) in self._other_ids else tensor

    def _shadow(self, tensor: Tensor) -> Tensor:
        """The tensor that stands for ``tensor`` in a computation of parameters alone."""
        name = self._names.get(id(tensor))
        if name is None:
            return self._constant(tensor)
        if name not in self.shadows:
            leaf = tensor.detach().requires_grad_()
            self.shadows[name] = leaf
            self._remember(leaf, Slot(leaf, (name,)))
        return self.shadows[name]

    def _remember(self, tensor: Tensor, slot: Slot) -> None:
        self._derived[id(tensor)] = slot
        self._known.add(id(tensor))

    # What happens to a call -------------------------------------------------------------------------------------------

    def _derive(
        self, func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any], slots: dict[int, Slot]
    ) -> Any:
        """A computation on parameters alone (resampling a position embedding): runs with a small graph of its own."""
        result = func(*map_tensors(self._shadow, args), **map_tensors(self._shadow, kwargs))
        names = tuple(dict.fromkeys(name for slot in slots.values() for name in slot.names))
        sizes = {slot.value.shape[0] for slot in slots.values() if slot.expanded}

        def remember(tensor: Tensor) -> None:
            if tensor.requires_grad and id(tensor) not in self._derived:
                expanded = tensor.dim() > 0 and tensor.shape[0] > 1 and (name in _EXPANDING or tensor.shape[0] in sizes)
                self._remember(tensor, Slot(tensor, names, expanded=expanded))

        map_tensors(remember, result)
        return result

    def _record(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        slots: dict[int, Slot],
        data: list[Tensor],
    ) -> Any:
        def value(tensor: Tensor) -> Tensor:
            return slots[id(tensor)].value if id(tensor) in slots else self._constant(tensor)

        call = Call(func, map_tensors(value, args), map_tensors(value, kwargs), list(slots.values()), data)
        if call.in_place and args[0]._is_view():
            return self._give_up(call, slots, args, kwargs)
        rule = self._rule(call)
        result = rule.run(call)
        if not call.in_place:
            # A view (F.linear returns one of its product) cannot join the graph. Only the first layer that is covered
            # has an output without gradient, so there is one small copy.
            result = map_tensors(lambda out: out.clone() if out._is_view() and not out.requires_grad else out, result)
        outputs = [out for out in float_tensors(result) if call.in_place or all(out is not tensor for tensor in data)]
        if not outputs:
            return self._give_up(call, slots, args, kwargs)
        for out in outputs:
            if not out.requires_grad:
                _Attach.apply(self.anchor, out)
        self._watch(rule, call, outputs)
        return result

    @staticmethod
    def _rule(call: Call) -> Rule:
        rule = rule_for(call)
        if call.in_place and any(tensor is call.args[0] for tensor in rule.saved):
            old = call.args[0]
            kept = old.detach().clone().requires_grad_(old.requires_grad)
            data = [kept if tensor is old else tensor for tensor in call.data]
            rule = rule_for(Call(call.function, (kept, *call.args[1:]), call.kwargs, call.slots, data))
        return rule

    def _watch(self, rule: Rule, call: Call, outputs: list[Tensor]) -> None:
        edges = [self._edge(rule, out) for out in outputs]
        record = Record(
            rule,
            rule.slots,
            list(edges),
            [out.shape for out in outputs],
            [(tensor, tensor._version) for tensor in rule.saved],
            call.name,
        )
        self.records.append(record)
        if len(outputs) == 1:
            # The node holds the hook and the hook the record. If either held the node in turn, that would be a cycle
            # through C++, which no collector finds: the whole graph of every batch would stay.
            node, number = edges[0].node, edges[0].output_nr
            node.register_prehook(lambda grads: self._arrived(record, (grads[number],)))
            del node
        else:
            torch.autograd.graph.register_multi_grad_hook(outputs, lambda grads: self._arrived(record, tuple(grads)))

    @staticmethod
    def _edge(rule: Rule, out: Tensor) -> GradientEdge:
        edge = get_gradient_edge(out)
        # F.linear may return a view of its product. Changing the view in place would bypass its own node.
        while isinstance(rule, Linear) and out._is_view() and edge.node.name() in _RESHAPES:
            edge = GradientEdge(*edge.node.next_functions[0])  # type: ignore[arg-type]
        return edge

    def _arrived(self, record: Record, grads: tuple[Tensor | None, ...]) -> None:
        if self.phase is not Phase.MAIN or all(grad is None for grad in grads):
            return
        if record.rule is None:
            raise RuntimeError(
                f"A gradient reached {record.what} of {record.names[0]} after its batch was finished. Call backward on "
                "the losses of one forward pass before the next begins, and only once."
            )
        used = (grad for grad, shape in zip(grads, record.shapes, strict=True) if shape is not None)
        self._on_gradient(record, record.shaped(used))

    def _give_up(self, call: Call, slots: dict[int, Slot], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Leaves the parameters of a call to autograd, which takes one backward pass for every sample."""

        def original(tensor: Tensor) -> Tensor:
            return self._shadow(tensor) if id(tensor) in slots else self._constant(tensor)

        return call.function(*map_tensors(original, args), **map_tensors(original, kwargs))


def graph_of(losses: Tensor) -> tuple[set[Any], list[Tensor]]:
    """The autograd nodes a tensor depends on, and the leaves among them.

    Raises:
        RuntimeError: if a part of the graph is hidden in a checkpoint.
    """
    stack = [losses.grad_fn]
    nodes: set[Any] = set(stack)
    leaves: list[Tensor] = []
    while stack:
        node = stack.pop()
        assert node is not None
        if node.name() == "CheckpointFunctionBackward":
            raise RuntimeError(CHECKPOINTING)
        variable = getattr(node, "variable", None)
        if variable is not None:
            leaves.append(variable)
        for successor, _ in node.next_functions:
            if successor is not None and successor not in nodes:
                nodes.add(successor)
                stack.append(successor)
    return nodes, leaves
