"""Per-sample squared gradients of what multiplies or shifts channels."""

import pytest
import torch
from interpreter_inputs import FLOATS, Fenced, assert_close, normal

import fishertune_kernels as fk
from fishertune_kernels.per_sample_affine_squared_grad import triton as operator


def expected_squares(x, dy, mean=None, rstd=None):
    x_hat = x.double()
    if mean is not None:
        x_hat = (x_hat - mean.double()[..., None]) * rstd.double()[..., None]
    return [(dy.double() * x_hat).sum(1).square().sum(0), dy.double().sum(1).square().sum(0)]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("shape", [(3, 33, 130), (1, 1, 1), (2, 300, 5), (5, 32, 128)])
def test_per_sample_affine(dtype, normalised, shape, monkeypatch):
    monkeypatch.setattr(operator, "SPLIT_TOKENS", 64)  # 300 tokens: four splits of 96, the last with 12
    fence = Fenced()
    n, t, c = shape
    x, dy = normal([shape, shape], dtype, seed=1)
    statistics = [torch.rand(n, t), torch.rand(n, t)] if normalised else []
    W, b = fence(torch.rand(c)), fence(torch.rand(c))
    expected = [old.double() + 0.5 * new for old, new in zip((W, b), expected_squares(x, dy, *statistics), strict=True)]
    fk.per_sample_affine_squared_grad_(W, b, x, dy, 0.5, *statistics)
    # A sum of t products of order one is right to √t·2⁻²⁴·√t; cancellation leaves that beside a result of order t.
    assert_close([W, b], expected, rtol=2e-6, atol=t * 2e-6)
    fence.check()


def test_either_accumulator_alone_and_mixed_strided_inputs():
    x, dy = torch.randn(3, 8, 12).bfloat16()[..., ::2], torch.randn(1, 1, 6).expand(3, 8, 6)
    W, b = torch.zeros(6), torch.zeros(6)
    fk.per_sample_affine_squared_grad_(W, None, x, dy)
    fk.per_sample_affine_squared_grad_(None, b, None, dy)
    assert_close([W, b], expected_squares(x, dy), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 0, 3), (2, 4, 0)])
def test_empty_inputs_leave_the_accumulators(shape):
    W, b = torch.full((shape[2],), 3.0), torch.full((shape[2],), 2.0)
    fk.per_sample_affine_squared_grad_(W, b, torch.ones(shape), torch.ones(shape))
    assert (W == 3).all() and (b == 2).all()


def test_a_repeated_call_gives_the_same_bits():
    x, dy = torch.randn(2, 300, 9), torch.randn(2, 300, 9)
    results = []
    for _ in range(2):
        W, b = torch.zeros(9), torch.zeros(9)
        fk.per_sample_affine_squared_grad_(W, b, x, dy, 0.3)
        results.append(torch.cat([W, b]))
    assert torch.equal(*results)
