"""Promises that every operator makes, whatever it computes: a table of the package's public functions, driven by its
own list of names. A new operator needs one entry here and is then held to all of them.

What an operator computes is tested elsewhere; its schema (opcheck, recompilation, refusals) in ``test_ops.py``.
"""

from __future__ import annotations

import copy
import functools
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import test_ops
import torch
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import fishertune_kernels as fk

Shape = tuple[int, ...]
Arguments = dict[str, Any]
ADAMW = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.05}
HALF, FLOAT = torch.bfloat16, torch.float32


class Draw:
    """Arguments for tensors of these shapes; ``dtype`` is that of gradients, parameters and whatever else may be half.

    Args:
        flat: make what is read constant along its first dimension, so that it could be an expanded tensor.
    """

    def __init__(self, shapes: Sequence[Shape], dtype: torch.dtype = FLOAT, *, flat: bool = False) -> None:
        self.shapes, self.dtype, self.flat = list(shapes), dtype, flat
        self.state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self._generator = torch.Generator().manual_seed(0)

    def _values(self, shape: Shape, dtype: torch.dtype) -> torch.Tensor:
        return torch.rand(shape, generator=self._generator).to(dtype)

    def read(self) -> list[torch.Tensor]:
        tensors = [self._values(shape, self.dtype) for shape in self.shapes]
        return [t[:1].expand_as(t).contiguous() if self.flat and t.dim() else t for t in tensors]

    def params(self) -> list[torch.Tensor]:
        return [self._values(shape, self.dtype) for shape in self.shapes]

    def state(self) -> list[torch.Tensor]:
        return [self._values(shape, self.state_dtype) for shape in self.shapes]

    def indices(self) -> list[torch.Tensor]:
        """Every third element, the first among them."""
        numels = [functools.reduce(int.__mul__, shape, 1) for shape in self.shapes]
        dtypes = (torch.int32, torch.int64)
        return [torch.arange(0, n, 3, dtype=dtypes[n > 2**31 or i % 2]) for i, n in enumerate(numels)]

    def compact(self, dtype: torch.dtype | None = None) -> list[torch.Tensor]:
        return [self._values((len(index),), dtype or self.state_dtype) for index in self.indices()]

    def layer(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Weight and bias sums, input and output gradient of a Linear layer with as many outputs as the first shape has
        elements, four inputs, three samples and two tokens each."""
        n_out = functools.reduce(int.__mul__, self.shapes[0], 1)
        x, dy = self._values((3, 2, 4), self.dtype), self._values((3, 2, n_out), self.dtype)
        if self.flat:
            x, dy = (t[:1].expand_as(t).contiguous() for t in (x, dy))
        return self._values((n_out, 4), self.state_dtype), self._values((n_out,), self.state_dtype), x, dy


@dataclass(frozen=True)
class Operator:
    arguments: Callable[[Draw], Arguments]
    written: tuple[str, ...] = ()
    results: Callable[[Arguments], list[tuple[Shape | None, torch.dtype]]] = lambda arguments: []
    """Shape (None: depends on values) and dtype of everything it returns."""
    steps: dict[str, Callable[[int], float]] = field(default_factory=dict)
    """Numbers that change from step to step, by the step's."""
    ordered: bool = True
    """Whether the order of what it returns has a meaning."""
    traced: Callable[..., Any] | None = None
    """What to call on tensors without values, where the public function reads values itself."""


def scored(draw: Draw) -> Arguments:
    scores = draw.read()
    k = sum(tensor.numel() for tensor in scores) // 3
    return {"scores": scores, "threshold": fk.select_threshold(scores, k)}


def like(name: str, dtype: torch.dtype | None = None) -> Callable[[Arguments], list[tuple[Shape | None, torch.dtype]]]:
    return lambda arguments: [(tuple(t.shape), dtype or t.dtype) for t in arguments[name]]


def wide(name: str) -> Callable[[Arguments], list[tuple[Shape | None, torch.dtype]]]:
    return lambda arguments: [(tuple(t.shape), torch.promote_types(t.dtype, FLOAT)) for t in arguments[name]]


SGVB = {
    "lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "gamma": 0.5, "prior_precision": 1.0, "seed": 7, "noise_step": 2,
    "step": 1,
}  # fmt: skip

TABLE = {
    "squared_grad_accumulate_": Operator(
        lambda d: {"accumulators": d.state(), "grads": d.read(), "weight": 0.5},
        ("accumulators",),
        steps={"weight": lambda i: 1 / i},
    ),
    "per_sample_squared_grad_": Operator(
        lambda d: dict(
            zip(("accumulator_OI", "bias_accumulator_O", "x_NTI", "dy_NTO"), d.layer(), strict=True), weight=0.5
        ),
        ("accumulator_OI", "bias_accumulator_O"),
        steps={"weight": lambda i: 1 / i},
    ),
    "per_sample_affine_squared_grad_": Operator(
        lambda d: {
            "weight_accumulator_C": (layer := d.layer())[1],
            "bias_accumulator_C": layer[1].clone(),
            "x_NTC": layer[3].clone(),
            "dy_NTC": layer[3],
            "weight": 0.5,
            "mean_NT": layer[2][..., 0].float(),
            "rstd_NT": layer[2][..., 1].float(),
        },
        ("weight_accumulator_C", "bias_accumulator_C"),
        steps={"weight": lambda i: 1 / i},
    ),
    "gaussian_perturb": Operator(
        lambda d: {"params": d.read(), "excess": d.state(), "prior_precision": 0.5, "seed": 7, "step": 2},
        results=like("params"),
        steps={"step": lambda i: i, "prior_precision": lambda i: 0.1 * i},
    ),
    "precision_update_": Operator(
        lambda d: {"excess": d.state(), "grads": d.read(), "method": "natural", "beta": 0.1, "gamma": 0.5},
        ("excess",),
        steps={"beta": lambda i: 0.9**i},
    ),
    "precision_update_natural_": Operator(
        lambda d: {"excess": d.state(), "squared_grads": d.read(), "beta": 0.1, "gamma": 0.5},
        ("excess",),
        steps={"beta": lambda i: 0.9**i},
    ),
    "precision_update_sgvb_": Operator(
        lambda d: {"excess": d.state(), "grads": d.read(), "exp_avg": d.state(), "exp_avg_sq": d.state(), **SGVB},
        ("excess", "exp_avg", "exp_avg_sq"),
        steps={"lr": lambda i: 0.1 / i, "noise_step": lambda i: i, "step": lambda i: i},
    ),
    "dr_fim_score": Operator(
        lambda d: {"fisher": d.read(), "shifted": d.read(), "kind": "dr_fim", "c": 0.5},
        results=wide("fisher"),
        steps={"c": lambda i: 0.9**i},
    ),
    "dr_fim_score_": Operator(
        lambda d: {
            "scores": d.state(),
            "fisher": d.read(),
            "shifted": d.read(),
            "count": 2,
            "kind": "dr_fim",
            "c": 0.5,
        },
        ("scores",),
        steps={"c": lambda i: 0.9**i, "count": lambda i: i},
    ),
    "dr_fim_threshold_": Operator(
        lambda d: {
            "scores": (scores := d.state()),
            "fisher": d.read(),
            "shifted": d.read(),
            "k": sum(tensor.numel() for tensor in scores) // 3,
            "count": 2,
            "kind": "dr_fim",
            "c": 0.5,
        },
        ("scores",),
        traced=torch.ops.fishertune.dr_fim_threshold_,
        results=lambda a: [((), torch.float64), ((2, len(a["scores"])), torch.int64)],
    ),
    "key_histogram": Operator(
        lambda d: {"scores": d.read(), "shift": 21, "bits": 11}, results=lambda a: [((2049,), torch.int64)]
    ),
    "select_threshold": Operator(
        lambda d: {"scores": (scores := d.read()), "k": sum(tensor.numel() for tensor in scores) // 3},
        traced=torch.ops.fishertune.select_threshold,
        results=lambda a: [((), torch.float64), ((2, len(a["scores"])), torch.int64)],
    ),
    "collect_bracket": Operator(  # scores of at least ½
        lambda d: {
            "scores": (scores := [tensor.float() for tensor in d.read()]),
            "low": 0xBF000000,
            "high": 0xFF000000,
            "capacity": sum(tensor.numel() for tensor in scores),
        },
        results=lambda a: [((len(a["scores"]), 3), torch.int64), (None, torch.int64)],
        ordered=False,
    ),
    "compact": Operator(
        scored,
        results=lambda a: [(None, torch.int32 if t.numel() <= 2**31 else torch.int64) for t in a["scores"]],
    ),
    "sparse_adamw_": Operator(
        lambda d: {
            "params": d.params(),
            "grads": d.read(),
            "indices": d.indices(),
            "exp_avg": d.compact(),
            "exp_avg_sq": d.compact(),
            "master": d.compact(),
            "scores": d.compact(),
            "active_threshold": 0.5,
            "step": 3,
            "grad_scale": 0.5,
            **ADAMW,
        },
        ("params", "exp_avg", "exp_avg_sq", "master"),
        steps={
            "lr": lambda i: 0.1 / i,
            "step": lambda i: i,
            "active_threshold": lambda i: 1 / i,
            "grad_scale": lambda i: 0.5 / i,
        },
    ),
    "selected_grad_norm": Operator(
        lambda d: {"grads": d.read(), "indices": d.indices()},
        results=lambda a: [((), torch.promote_types(a["grads"][0].dtype, FLOAT))],
    ),
    "gather_values": Operator(
        lambda d: {"tensors": d.read(), "indices": d.indices()},
        results=lambda a: [((len(i),), t.dtype) for t, i in zip(a["tensors"], a["indices"], strict=True)],
    ),
    "scatter_values_": Operator(
        lambda d: {"tensors": d.params(), "indices": d.indices(), "values": d.compact(d.dtype)}, ("tensors",)
    ),
}

NAMES = sorted(TABLE)


def tensors_of(value: object) -> list[torch.Tensor]:
    """The tensors in an argument or a result, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in tensors_of(item)]
    return []


def run(name: str, arguments: Arguments) -> list[torch.Tensor]:
    """Everything the operator returns and writes, as tensors; Thresholds become numbers."""
    result = getattr(fk, name)(**arguments)
    if isinstance(result, fk.Threshold):
        numbers = [result.value, *result.greater_per_tensor, *result.ties_kept_per_tensor]
        result = torch.tensor(numbers, dtype=torch.float64)
    returned = tensors_of(result)
    if not TABLE[name].ordered:
        returned = [tensor.sort(dim=0).values for tensor in returned]
    return [*returned, *(t for key in TABLE[name].written for t in tensors_of(arguments[key]))]


def equal_bits(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> bool:
    return all(
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)
    )


def test_the_table_has_every_operator() -> None:
    """One that is missing here would be held to nothing."""
    assert set(TABLE) == set(fk.__all__) - {"Threshold"}
    registered = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if "fishertune::" in name}
    assert set(test_ops.OPERATORS) == registered  # what opcheck is run on


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_any_size_and_dtype_leaves_nothing_unwritten(backend: str, name: str, dtype: torch.dtype) -> None:
    """Four dimensions, none, one element, no element, several chunks. Inputs are between 0 and 1; memory that a kernel
    forgets holds NaN or the largest integer (see ``backend``)."""
    draw = Draw([(2, 3, 5, 7), (), (1,), (0,), (3, 0, 2), (9, 7801)], dtype)
    for tensor in run(name, TABLE[name].arguments(draw)):
        if tensor.dtype in (torch.int32, torch.int64):
            assert (tensor < torch.iinfo(tensor.dtype).max).all()
        else:
            assert tensor.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_results_are_those_of_the_table(backend: str, name: str) -> None:
    for dtype in (FLOAT, HALF):
        arguments = TABLE[name].arguments(Draw([(4, 5), (70,)], dtype))
        returned = getattr(fk, name)(**arguments)
        if isinstance(returned, fk.Threshold):
            continue
        found = tensors_of(returned)
        for tensor, (shape, expected) in zip(found, TABLE[name].results(arguments), strict=True):
            assert tensor.dtype == expected and shape in (None, tuple(tensor.shape)) and tensor.is_contiguous()


def with_gaps(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, every second element of memory."""
    return torch.stack((tensor, tensor), dim=-1)[..., 0]


def transposed(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.transpose(0, -1).contiguous().transpose(0, -1) if tensor.dim() > 1 else tensor


def expanded(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[:1].expand_as(tensor) if tensor.dim() > 1 else tensor


@pytest.mark.parametrize("layout", [with_gaps, transposed, expanded])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_read_may_have_any_strides(backend: str, name: str, layout: Callable) -> None:
    operator = TABLE[name]
    for dtype in (FLOAT, HALF):
        draw = functools.partial(Draw, [(2, 3, 4, 5), (6, 9), (17,)], dtype, flat=layout is expanded)
        expected = run(name, operator.arguments(draw()))
        arguments = operator.arguments(draw())
        for key, value in arguments.items():
            tensors = tensors_of(value)
            # what is expanded must have been drawn for it: states were not
            drawn_flat = layout is not expanded or all(torch.equal(expanded(t), t) for t in tensors)
            if key not in operator.written and tensors and drawn_flat:
                changed = [layout(tensor) for tensor in tensors]
                arguments[key] = changed if isinstance(value, list) else changed[0]
        assert equal_bits(run(name, arguments), expected)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_read_keeps_its_bits(backend: str, name: str) -> None:
    operator = TABLE[name]
    for dtype in (FLOAT, HALF):
        arguments = operator.arguments(Draw([(5, 7), (300,)], dtype))
        before = copy.deepcopy(arguments)
        run(name, arguments)
        for key in arguments.keys() - set(operator.written):
            assert equal_bits(tensors_of(arguments[key]), tensors_of(before[key])), key


@pytest.mark.parametrize("name", NAMES)
def test_the_same_call_gives_the_same_bits(backend: str, name: str) -> None:
    """On any number of threads too, but for the reference, whose sums are torch's."""
    draw = functools.partial(Draw, [(70_001,), (40, 1000), (3,)], HALF)
    expected = run(name, TABLE[name].arguments(draw()))
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 2) if backend == "native" else (threads, threads):
            torch.set_num_threads(count)
            assert equal_bits(run(name, TABLE[name].arguments(draw())), expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [HALF, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_shapes_and_dtypes_beyond_two_to_the_31_elements(name: str, dtype: torch.dtype) -> None:
    """On tensors without memory: what ``torch.compile`` would believe of a tensor this large."""
    operator = TABLE[name]
    small = fk.Threshold(0.5, (1, 0), (1, 0))
    with FakeTensorMode(shape_env=ShapeEnv()):
        draw = Draw([(2**16, 2**15 + 1), (3,)], dtype)
        arguments = {"scores": draw.read(), "threshold": small} if name == "compact" else operator.arguments(draw)
        returned = tensors_of((operator.traced or getattr(fk, name))(**arguments))
        for tensor, (shape, expected) in zip(returned, operator.results(arguments), strict=True):
            assert tensor.dtype == expected
            assert shape is None or tuple(tensor.shape) == shape


@pytest.mark.parametrize("name", [name for name in NAMES if TABLE[name].steps])
def test_one_graph_serves_every_step(name: str) -> None:
    """``torch.compile(fullgraph=True)``: the second graph has symbols for what changed, and there is no third."""
    operator, draw = TABLE[name], functools.partial(Draw, [(4, 5), (70,)])
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(getattr(fk, name), fullgraph=True, backend=counter)
    traced, eager = operator.arguments(draw()), operator.arguments(draw())
    for i in range(2, 8):
        changed = {key: number(i) for key, number in operator.steps.items()}
        result = compiled(**(traced | changed))
        assert equal_bits(tensors_of(result), tensors_of(getattr(fk, name)(**(eager | changed))))
    assert counter.frame_count <= 2
    for key in operator.written:
        assert equal_bits(tensors_of(traced[key]), tensors_of(eager[key]))


def test_every_operator_runs_without_triton_the_library_and_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a process where triton cannot be imported and the library's path leads nowhere, to the reference's bits."""
    program = """
import sys
sys.modules["triton"] = None  # importing it now raises ImportError
import torch
import test_contract
from fishertune_kernels import native
assert not native.available() and not torch.cuda.is_available()
torch.save(test_contract.small_run_of_everything(), sys.argv[1])
"""
    places = [str(Path(__file__).parent), *(entry for entry in sys.path if entry)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places), "CUDA_VISIBLE_DEVICES": ""}
    environment["FISHERTUNE_NATIVE_LIBRARY"] = "/nowhere/library.so"
    environment.pop("FISHERTUNE_BACKEND", None)
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "results.pt")],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "results.pt")
    monkeypatch.setenv("FISHERTUNE_BACKEND", "reference")
    for name, expected in small_run_of_everything().items():
        assert equal_bits(found[name], expected), name


def small_run_of_everything() -> dict[str, list[torch.Tensor]]:
    return {name: run(name, operator.arguments(Draw([(3, 4), (50,)], HALF))) for name, operator in TABLE.items()}
