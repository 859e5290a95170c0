"""Registration: schemas that tell the truth, tracing without graph breaks, refusals before anything is written."""

import copy
import itertools
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import fishertune_kernels as fk
from fishertune_kernels import ops

ADAMW = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.05}


def sample_arguments(operator: str) -> tuple:
    """Arguments of every operator, over two tensors of different size and, where allowed, type."""
    g = torch.Generator().manual_seed(3)
    state = [torch.rand(3, 4, generator=g), torch.rand(7, generator=g)]
    more = [torch.rand(tensor.shape, generator=g) for tensor in state]
    half = [torch.randn(3, 4, generator=g), torch.randn(7, generator=g).bfloat16()]
    indices = [torch.tensor([0, 3, 11], dtype=torch.int32), torch.tensor([2, 6])]
    compact = [[torch.rand(len(index), generator=g) for index in indices] for _ in range(4)]
    moments = [torch.zeros_like(tensor) for tensor in state]
    return {
        "squared_grad_accumulate_": (state, half, 0.5),
        "per_sample_squared_grad_": (
            torch.zeros(4, 3),
            torch.randn(2, 5, 3, generator=g),
            torch.randn(2, 5, 4, generator=g),
            1.0,
            torch.zeros(4),
        ),
        "per_sample_affine_squared_grad_": (
            torch.zeros(3),
            torch.zeros(3),
            torch.randn(2, 5, 3, generator=g),
            torch.randn(2, 5, 3, generator=g).bfloat16(),
            0.5,
            torch.rand(2, 5, generator=g),
            torch.rand(2, 5, generator=g),
        ),
        "gaussian_perturb": (half, state, 0.5, 7, 2, [0, 12], 1.0),
        "precision_update_natural_": (state, more, 0.1, 0.5),
        "precision_update_sgvb_": (
            state,
            half,
            moments,
            copy.deepcopy(moments),
            0.1,
            0.9,
            0.99,
            1e-8,
            0.5,
            1.0,
            7,
            2,
            1,
            [0, 12],
            1.0,
        ),
        "dr_fim_score": (state, more, "dr_fim", 0.5),
        "dr_fim_score_": (moments, state, more, 2, "dr_fim_variational", 0.5, 0.1, 2.0, 1e-8),
        "dr_fim_threshold_": (moments, state, more, 5, 2, "dr_fim", 0.5),
        "key_histogram": (half, 21, 11, 0, 0),
        "select_threshold": (half, 5),
        "collect_bracket": (half, 0x3F800000, 0xC0000000, 19),
        "compact": (half, -math.inf, [12, 7], [0, 0]),
        "sparse_adamw_": (
            half,
            more,
            indices,
            compact[0],
            compact[1],
            compact[2],
            compact[3],
            0.1,
            0.9,
            0.99,
            1e-8,
            0.05,
            1,
            0.5,
            1.0,
            torch.tensor(0.25),
        ),
        "sparse_adamw_ stochastic": (
            [tensor.bfloat16() for tensor in half],
            compact[2],
            indices,
            compact[0],
            compact[1],
            [],
            [],
            0.1,
            0.9,
            0.99,
            1e-8,
            0.05,
            1,
            None,
            1.0,
            None,
            True,
            True,
            7,
            [0, 12],
        ),
        "selected_grad_norm": (half, indices),
        "gather_values": (half, indices),
        "gather_values_into_": (torch.zeros(5), state, indices),
        "scatter_values_": (state, indices, compact[0]),
    }[operator]


# precision_update_ only chooses between two of the others; gather_values with a buffer is an operator of its own
OPERATORS = sorted(set(fk.__all__) - {"Threshold", "precision_update_"} | {"gather_values_into_"})


@pytest.mark.parametrize("case", [*OPERATORS, "sparse_adamw_ stochastic"])
def test_opcheck(backend: str, case: str) -> None:
    operator = getattr(torch.ops.fishertune, case.split()[0])
    torch.library.opcheck(operator.default, sample_arguments(case))


@pytest.mark.parametrize("operator", [name for name in OPERATORS if name.endswith("_")])
def test_what_is_written_is_what_the_schema_says(backend: str, operator: str) -> None:
    """opcheck cannot see a write by ctypes to an argument the schema calls read-only; comparing copies can."""
    arguments = sample_arguments(operator)
    before = copy.deepcopy(arguments)
    overload = getattr(torch.ops.fishertune, operator).default
    overload(*arguments)
    for declared, new, old in zip(overload._schema.arguments, arguments, before, strict=False):
        pairs = zip(new, old, strict=True) if isinstance(new, list) else [(new, old)]
        changed = any(isinstance(a, torch.Tensor) and not torch.equal(a, b) for a, b in pairs)
        assert changed == (declared.alias_info is not None and declared.alias_info.is_write), declared.name


@pytest.mark.parametrize("operator", OPERATORS)
def test_autograd_sees_the_write_and_no_graph_is_built(backend: str, operator: str) -> None:
    arguments = sample_arguments(operator)
    overload = getattr(torch.ops.fishertune, operator).default
    written = [
        tensor
        for declared, value in zip(overload._schema.arguments, arguments, strict=False)
        if declared.alias_info is not None and declared.alias_info.is_write
        for tensor in (value if isinstance(value, list) else [value])
    ]
    versions = [tensor._version for tensor in written]
    overload(*arguments)
    assert all(tensor._version > version for tensor, version in zip(written, versions, strict=True))


def test_results_carry_no_gradient(backend: str) -> None:
    param = torch.ones(5, requires_grad=True)
    (perturbed,) = fk.gaussian_perturb(param, torch.ones(5), prior_precision=1.0, seed=0, step=0)
    assert not perturbed.requires_grad
    fk.sparse_adamw_(param, torch.ones(5), torch.arange(2), torch.zeros(2), torch.zeros(2), step=1, **ADAMW)
    assert param.grad_fn is None and param[0] != 1


@pytest.mark.parametrize("trace", ["eager", "aot_eager"])
def test_fullgraph_compile_gives_the_same_bits(backend: str, trace: str) -> None:
    def step(params, grads, indices, exp_avg, exp_avg_sq, accumulators):
        fk.squared_grad_accumulate_(accumulators, grads, 0.5)
        fk.sparse_adamw_(params, [grad * 2 for grad in grads], indices, exp_avg, exp_avg_sq, step=1, **ADAMW)
        draws = fk.gaussian_perturb(params, accumulators, prior_precision=1.0, seed=1, step=2)
        scores = fk.dr_fim_score(accumulators, None, kind="f", c=1.0)
        return [draw + score for draw, score in zip(draws, scores, strict=True)]

    params, grads, indices, exp_avg, exp_avg_sq = sample_arguments("sparse_adamw_")[:5]
    arguments = (params, grads, indices, exp_avg, exp_avg_sq, [torch.zeros(3, 4), torch.zeros(7)])
    traced = copy.deepcopy(arguments)
    expected = step(*arguments)
    torch._dynamo.reset()
    result = torch.compile(step, fullgraph=True, backend=trace)(*traced)
    for ours, theirs in zip(itertools.chain(result, *traced), itertools.chain(expected, *arguments), strict=True):
        assert torch.equal(ours, theirs)


def test_changing_hyper_parameters_do_not_recompile(backend: str) -> None:
    """Learning rate, step, seed step and threshold change every step; one recompile makes them symbols for good."""
    torch._dynamo.reset()
    counter = CompileCounter()

    @torch.compile(fullgraph=True, backend=counter)
    def step(param, grad, index, exp_avg, exp_avg_sq, scores, half, lr, number, threshold):
        options = {**ADAMW, "lr": lr}
        fk.sparse_adamw_(
            param, grad, index, exp_avg, exp_avg_sq, step=number, scores=scores, active_threshold=threshold, **options
        )
        scale = 1 / fk.selected_grad_norm(grad, index)
        fk.sparse_adamw_(
            half,
            grad,
            index,
            exp_avg,
            exp_avg_sq,
            step=number,
            grad_scale=scale,
            rounding="stochastic",
            seed=3 * number,
            **options,
        )
        return fk.gaussian_perturb(param, torch.ones_like(param), prior_precision=lr, seed=5, step=number)

    tensors = torch.randn(9), torch.randn(9), torch.arange(4), torch.zeros(4), torch.zeros(4), torch.rand(4)
    tensors = *tensors, torch.randn(9).bfloat16()
    eager = copy.deepcopy(tensors)
    for number in range(1, 11):
        step(*tensors, 1e-2 / number, number, 0.1 * number)
        options = {**ADAMW, "lr": 1e-2 / number, "step": number}
        fk.sparse_adamw_(*eager[:5], scores=eager[5], active_threshold=0.1 * number, **options)
        scale = 1 / fk.selected_grad_norm(eager[1], eager[2])
        fk.sparse_adamw_(eager[6], *eager[1:5], grad_scale=scale, rounding="stochastic", seed=3 * number, **options)
    assert counter.frame_count <= 2
    assert torch.equal(tensors[0], eager[0]) and torch.equal(tensors[6], eager[6])


@pytest.mark.parametrize("operator", OPERATORS)
def test_empty_lists_and_inference_tensors(backend: str, operator: str) -> None:
    with torch.inference_mode():
        getattr(torch.ops.fishertune, operator).default(*sample_arguments(operator))
    if operator in (
        "per_sample_squared_grad_", "per_sample_affine_squared_grad_", "key_histogram", "collect_bracket",
        "select_threshold", "dr_fim_threshold_",
    ):  # fmt: skip
        return
    if operator == "selected_grad_norm":
        assert fk.selected_grad_norm([], []) == fk.selected_grad_norm([]) == 0
        return
    if operator == "gather_values_into_":
        assert fk.gather_values([], [], out=torch.empty(0)) == []
        return
    arguments = [[] if isinstance(a, list) else a for a in sample_arguments(operator)]
    assert getattr(torch.ops.fishertune, operator).default(*arguments) in (None, [])


def test_read_only_inputs_may_have_any_strides(backend: str) -> None:
    grad = torch.randn(6, 4).T
    accumulator, expected = torch.zeros(4, 6), torch.zeros(4, 6)
    fk.squared_grad_accumulate_(accumulator, grad)
    fk.squared_grad_accumulate_(expected, grad.contiguous())
    assert torch.equal(accumulator, expected)
    x, dy = torch.randn(5, 2, 3).transpose(0, 1), torch.randn(2, 5, 1).expand(2, 5, 4)
    accumulator, expected = torch.zeros(4, 3), torch.zeros(4, 3)
    fk.per_sample_squared_grad_(accumulator, x, dy)
    fk.per_sample_squared_grad_(expected, x.contiguous(), dy.contiguous())
    assert torch.equal(accumulator, expected)
    (values,) = fk.gather_values(torch.arange(12.0).view(3, 4).T, torch.tensor([1, 2]))
    assert values.tolist() == [4.0, 8.0]


def adamw(**changes: object) -> Callable[[], None]:
    arguments: dict = {
        "params": [torch.zeros(2, 3)], "grads": [torch.ones(2, 3)], "indices": [torch.arange(2)],
        "exp_avg": [torch.zeros(2)], "exp_avg_sq": [torch.zeros(2)], "step": 1, **ADAMW, **changes,
    }  # fmt: skip
    return lambda: fk.sparse_adamw_(**arguments)


def score(**changes: object) -> Callable[[], object]:
    arguments: dict = {"fisher": torch.ones(2), "shifted": torch.ones(2), "kind": "f", "c": 1.0, **changes}
    return lambda: fk.dr_fim_score(**arguments)


def perturb(**changes: object) -> Callable[[], object]:
    arguments: dict = {
        "params": torch.ones(2), "excess": torch.ones(2), "prior_precision": 1.0, "seed": 0, "step": 0, **changes,
    }  # fmt: skip
    return lambda: fk.gaussian_perturb(**arguments)


def per_sample(**changes: object) -> Callable[[], None]:
    arguments: dict = {
        "accumulator_OI": torch.zeros(4, 3), "x_NTI": torch.ones(2, 5, 3), "dy_NTO": torch.ones(2, 5, 4), **changes,
    }  # fmt: skip
    return lambda: fk.per_sample_squared_grad_(**arguments)


def affine(**changes: object) -> Callable[[], None]:
    arguments: dict = {
        "weight_accumulator_C": torch.zeros(3), "bias_accumulator_C": torch.zeros(3), "x_NTC": torch.ones(2, 5, 3),
        "dy_NTC": torch.ones(2, 5, 3), **changes,
    }  # fmt: skip
    return lambda: fk.per_sample_affine_squared_grad_(**arguments)


REFUSALS = {
    "generator": (lambda: fk.squared_grad_accumulate_(iter([]), []), TypeError, r"list_iterator.*list\(g\)"),
    "no gradient": (
        lambda: fk.squared_grad_accumulate_([torch.ones(1)], [None]),
        TypeError,
        r"grads\[0\] is a NoneType",
    ),
    "list lengths": (
        lambda: fk.squared_grad_accumulate_([torch.ones(1)], []),
        ValueError,
        r"grads has 0 entries but accumulators has 1",
    ),
    "shapes": (
        lambda: fk.squared_grad_accumulate_(torch.ones(2, 3), torch.ones(3, 2)),
        ValueError,
        r"grads\[0\] has shape \(3, 2\) but accumulators\[0\] has \(2, 3\)",
    ),
    "half accumulator": (
        lambda: fk.squared_grad_accumulate_(torch.ones(2).half(), torch.ones(2)),
        TypeError,
        r"accumulators\[0\] is torch.float16; expected one of float32, float64",
    ),
    "integer gradient": (
        lambda: fk.squared_grad_accumulate_(torch.ones(2), torch.arange(2)),
        TypeError,
        r"grads\[0\] is torch.int64",
    ),
    "sparse gradient": (
        lambda: fk.squared_grad_accumulate_(torch.ones(2), torch.ones(2).to_sparse()),
        TypeError,
        r"torch.sparse_coo.*to_dense",
    ),
    "device": (
        lambda: fk.squared_grad_accumulate_(torch.ones(2), torch.ones(2, device="meta")),
        ValueError,
        r"on meta, others are on cpu",
    ),
    "strided accumulator": (
        lambda: fk.squared_grad_accumulate_(torch.ones(3, 2).T, torch.ones(2, 3)),
        ValueError,
        r"accumulators\[0\] \(shape \(2, 3\), strides \(1, 2\)\) is not contiguous.*t.contiguous\(\)",
    ),
    "weight": (
        lambda: fk.squared_grad_accumulate_(torch.ones(2), torch.ones(2), math.nan),
        ValueError,
        r"weight=nan is not finite",
    ),
    "no token axis": (per_sample(x_NTI=torch.ones(2, 3)), ValueError, r"x_NTI has shape \(2, 3\).*unsqueeze\(-2\)"),
    "other tokens": (per_sample(x_NTI=torch.ones(2, 6, 3)), ValueError, r"samples and tokens.*must agree"),
    "other layer": (per_sample(accumulator_OI=torch.zeros(3, 4)), ValueError, r"expected \(4, 3\)"),
    "other bias": (per_sample(bias_accumulator_O=torch.zeros(3)), ValueError, r"expected \(4,\)"),
    "heads without heads": (
        per_sample(accumulator_OI=torch.zeros(2, 4, 3)),
        ValueError,
        r"x_NTI has shape \(2, 5, 3\); expected \(samples, heads, tokens, features\)",
    ),
    "uneven windows": (per_sample(samples=3), ValueError, r"x_NTI has shape \(2, 5, 3\) and samples=3"),
    "no samples": (per_sample(samples=0), ValueError, r"samples=0"),
    "affine without tokens": (affine(dy_NTC=torch.ones(2, 3)), ValueError, r"dy_NTC has shape \(2, 3\).*unsqueeze"),
    "no affine accumulator": (
        affine(weight_accumulator_C=None, bias_accumulator_C=None, x_NTC=None),
        ValueError,
        r"both None",
    ),
    "affine of another width": (
        affine(bias_accumulator_C=torch.zeros(1, 3)),
        ValueError,
        r"bias_accumulator_C has shape \(1, 3\); expected \(3,\)",
    ),
    "half affine accumulator": (
        affine(weight_accumulator_C=torch.zeros(3).half()),
        TypeError,
        r"weight_accumulator_C\[0\] is torch.float16",
    ),
    "two affine precisions": (affine(bias_accumulator_C=torch.zeros(3).double()), TypeError, r"differ in dtype"),
    "weight without input": (affine(x_NTC=None), ValueError, r"belong together"),
    "input without weight": (affine(weight_accumulator_C=None), ValueError, r"belong together"),
    "mean alone": (affine(mean_NT=torch.zeros(2, 5)), ValueError, r"Pass both with x_NTC, or neither"),
    "other input": (affine(x_NTC=torch.ones(2, 4, 3)), ValueError, r"x_NTC\[0\] has shape \(2, 4, 3\)"),
    "statistics with a channel axis": (
        affine(mean_NT=torch.zeros(2, 5), rstd_NT=torch.zeros(2, 5, 1)),
        ValueError,
        r"rstd_NT has shape \(2, 5, 1\); expected \(2, 5\)",
    ),
    "flat prior": (perturb(prior_precision=0.0), ValueError, r"prior_precision=0.0.*above 0"),
    "seed": (perturb(seed=-1), ValueError, r"seed=-1 is out of range.*2\*\*63"),
    "large seed": (perturb(seed=2**63), ValueError, r"seed=9223372036854775808"),
    "offsets": (perturb(offsets=[0, 2]), ValueError, r"offsets has 2 entries but params has 1"),
    "negative offset": (perturb(offsets=[-4]), ValueError, r"offsets\[0\]=-4 is negative"),
    "beta": (
        lambda: fk.precision_update_(torch.ones(1), torch.ones(1), method="natural", beta=1.5, gamma=1.0),
        ValueError,
        r"beta=1.5",
    ),
    "gamma": (
        lambda: fk.precision_update_(torch.ones(1), torch.ones(1), method="natural", beta=0.5, gamma=0.0),
        ValueError,
        r"gamma=0.0.*above 0",
    ),
    "method": (
        lambda: fk.precision_update_(torch.ones(1), torch.ones(1), method="adam"),
        ValueError,
        r"'adam'.*'natural' or 'sgvb'",
    ),
    "kind": (
        score(kind="fisher"),
        ValueError,
        r"kind='fisher' is not a score. Use one of f, delta_f, dr_fim, dr_fim_variational",
    ),
    "nothing to compare": (score(kind="dr_fim", shifted=None), ValueError, r"shifted is None"),
    "c": (score(c=math.nan), ValueError, r"c=nan"),
    "count": (
        lambda: fk.dr_fim_score_(torch.ones(1), torch.ones(1), None, count=0, kind="f", c=1.0),
        ValueError,
        r"count=0.*pass 1",
    ),
    "learning rate": (adamw(lr=-1.0), ValueError, r"lr=-1.0 is out of range"),
    "infinite learning rate": (adamw(lr=math.inf), ValueError, r"lr=inf"),
    "betas": (adamw(betas=(0.9, 1.0)), ValueError, r"betas\[1\]=1.0.*below 1"),
    "step": (adamw(step=0), ValueError, r"step=0.*count from 1"),
    "gradient scale": (adamw(grad_scale=math.inf), ValueError, r"grad_scale=inf is not finite"),
    "threshold without scores": (adamw(active_threshold=0.5), ValueError, r"active_threshold=0.5 needs the scores"),
    "NaN threshold": (adamw(active_threshold=math.nan, scores=[torch.ones(2)]), ValueError, r"active_threshold is NaN"),
    "index type": (
        adamw(indices=[torch.ones(2)]),
        TypeError,
        r"indices\[0\] is torch.float32; expected one of int32, int64",
    ),
    "index shape": (
        adamw(indices=[torch.zeros(2, 1).long()]),
        ValueError,
        r"indices\[0\] has shape \(2, 1\).*one dimension",
    ),
    "index range": (
        adamw(indices=[torch.tensor([2, 6])]),
        ValueError,
        r"runs from 2 to 6, but params\[0\] has 6 elements",
    ),
    "negative index": (adamw(indices=[torch.tensor([-1, 2])]), ValueError, r"runs from -1 to 2"),
    "falling index": (
        adamw(indices=[torch.tensor([1, 4, 3, 5])], exp_avg=[torch.zeros(4)], exp_avg_sq=[torch.zeros(4)]),
        ValueError,
        r"not rising",
    ),
    "repeated index": (adamw(indices=[torch.tensor([3, 3])]), ValueError, r"repeats an entry.*torch.unique"),
    "state length": (
        adamw(exp_avg=[torch.zeros(3)]),
        ValueError,
        r"exp_avg\[0\] has shape \(3,\) but indices\[0\] has \(2,\)",
    ),
    "state type": (
        adamw(exp_avg=[torch.zeros(2).half()]),
        TypeError,
        r"exp_avg\[0\] is torch.float16; expected one of float32",
    ),
    "rounding": (adamw(rounding="up"), ValueError, r"rounding='up' is unknown. Use 'nearest' or 'stochastic'"),
    "stochastic float32": (
        adamw(rounding="stochastic"),
        TypeError,
        r"params\[0\] is torch.float32.*rounding='nearest'",
    ),
    "stochastic float16": (
        adamw(rounding="stochastic", params=[torch.zeros(2, 3).half()]),
        TypeError,
        r"params\[0\] is torch.float16.*Keep a master copy",
    ),
    "stochastic with master": (
        adamw(rounding="stochastic", params=[torch.zeros(2, 3).bfloat16()], master=[torch.zeros(2)]),
        ValueError,
        r"master copy is given.*Leave one of them out",
    ),
    "rounding seed": (
        adamw(rounding="stochastic", params=[torch.zeros(2, 3).bfloat16()], seed=-1),
        ValueError,
        r"seed=-1 is out of range",
    ),
    "rounding offsets": (
        adamw(rounding="stochastic", params=[torch.zeros(2, 3).bfloat16()], offsets=[0, 6]),
        ValueError,
        r"offsets has 2 entries but params has 1",
    ),
    "scale of several": (adamw(grad_scale=torch.ones(2)), ValueError, r"grad_scale has shape \(2,\).*single number"),
    "scale type": (
        adamw(grad_scale=torch.tensor(1.0).double()),
        TypeError,
        r"grad_scale\[0\] is torch.float64; expected one of float32",
    ),
    "scale elsewhere": (
        adamw(grad_scale=torch.ones((), device="meta")),
        ValueError,
        r"grad_scale\[0\] is on meta, others are on cpu",
    ),
    "compact gradients": (
        adamw(compact_grads=True),
        ValueError,
        r"grads\[0\] has shape \(2, 3\) but indices\[0\] has \(2,\)",
    ),
    "compact buffer": (
        adamw(compact_grads=True, grads=torch.ones(3)),
        ValueError,
        r"grads has shape \(3,\); expected \(2,\), one value for every index",
    ),
    "norm list": (
        lambda: fk.selected_grad_norm([torch.ones(2)] * 2, [torch.arange(1)]),
        ValueError,
        r"indices has 1 entries but grads has 2",
    ),
    "norm range": (
        lambda: fk.selected_grad_norm(torch.ones(2), torch.tensor([2])),
        ValueError,
        r"runs from 2 to 2, but grads\[0\] has 2 elements",
    ),
    "gather buffer": (
        lambda: fk.gather_values(torch.ones(3), torch.arange(2), out=torch.ones(3)),
        ValueError,
        r"out has shape \(3,\); expected \(2,\)",
    ),
    "gather buffer type": (
        lambda: fk.gather_values([torch.ones(3), torch.ones(3).half()], [torch.arange(1)] * 2, out=torch.ones(2)),
        TypeError,
        r"tensors\[1\] is torch.float16; expected one of float32",
    ),
    "gather buffer strides": (
        lambda: fk.gather_values(torch.ones(3), torch.arange(2), out=torch.ones(4)[::2]),
        ValueError,
        r"out\[0\].*is not contiguous",
    ),
    "scatter buffer": (
        lambda: fk.scatter_values_([torch.zeros(3)] * 2, [torch.arange(1)] * 2, torch.ones(3)),
        ValueError,
        r"values has shape \(3,\); expected \(2,\)",
    ),
    "scatter type": (
        lambda: fk.scatter_values_(torch.zeros(3), torch.arange(1), torch.ones(1).double()),
        TypeError,
        r"values.*torch.float64.*float32",
    ),
    "histogram bits": (lambda: fk.key_histogram(torch.ones(1), shift=24, bits=11), ValueError, r"shift=24, bits=11"),
    "histogram of nothing": (lambda: fk.key_histogram([], shift=0, bits=8), ValueError, r"empty list"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_name_the_value_and_the_remedy(backend: str, name: str) -> None:
    call, error, message = REFUSALS[name]
    with pytest.raises(error, match=message):
        call()


def test_nothing_is_written_when_a_later_tensor_is_refused(backend: str) -> None:
    params = [torch.zeros(4), torch.zeros(4)]
    state = [torch.zeros(1), torch.zeros(1)], [torch.zeros(1), torch.zeros(1)]
    with pytest.raises(ValueError, match=r"params\[1\] has 4 elements"):
        fk.sparse_adamw_(params, [torch.ones(4)] * 2, [torch.tensor([0]), torch.tensor([9])], *state, step=1, **ADAMW)
    assert all(not tensor.any() for tensor in [*params, *state[0], *state[1]])


def test_an_index_that_changed_is_checked_again(backend: str) -> None:
    """Index tensors are read once; writing to one must not open a hole to memory outside the parameter."""
    index, target = torch.tensor([0, 2]), torch.zeros(3)
    fk.scatter_values_(target, index, torch.ones(2))
    with pytest.raises(ValueError, match="runs from 0 to 2, but tensors"):
        fk.scatter_values_(torch.zeros(2), index, torch.ones(2))
    index[1] = 3
    with pytest.raises(ValueError, match="runs from 0 to 3"):
        fk.scatter_values_(target, index, torch.ones(2))


def test_indices_are_forgotten_with_their_tensor(backend: str) -> None:
    before = len(ops._known_indices)
    for _ in range(5):
        fk.gather_values(torch.ones(4), torch.tensor([1, 2]))
    assert len(ops._known_indices) == before


def test_import_is_lean() -> None:
    """Neither triton nor the native library is touched by the import, nor by the reference."""
    program = (
        "import sys, os; os.environ['FISHERTUNE_BACKEND'] = 'reference'\n"
        "sys.modules['triton'] = None\n"  # an import of it raises
        "import torch, fishertune_kernels as fk\n"
        "assert fk.select_threshold(torch.ones(3), 1).value == 1\n"
        "loaded = [m for m in sys.modules if m.startswith('fishertune_kernels') and m.endswith(('native', 'triton'))]\n"
        "assert not loaded, loaded\n"
        "assert 'fishertune' not in sys.modules and 'numpy' not in str(fk.__file__)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_the_readme_example_runs() -> None:
    readme = Path(fk.__file__).with_name("README.md").read_text(encoding="utf-8")
    code = readme.split("```python\n")[1].split("```")[0]
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert sum(len(index) for index in names["indices"]) == 36_864
