"""The per-sample squared gradient of a Linear layer."""

import pytest
import torch
from interpreter_inputs import FLOATS, Fenced, assert_close, normal

import fishertune_kernels as fk


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("N", "T", "O", "I"), [(3, 20, 40, 70), (1, 1, 1, 1), (2, 33, 32, 64), (5, 16, 65, 31), (4, 17, 130, 7)]
)
def test_per_sample_squared_grad(dtype, N, T, O, I):  # noqa: E741
    fence = Fenced()
    x, dy = normal([(N, T, I)], dtype, seed=1)[0], normal([(N, T, O)], dtype, seed=2)[0]
    F, b = fence(torch.rand(O, I)), fence(torch.rand(O))
    grads = torch.einsum("nto,nti->noi", dy.double(), x.double())
    expected = F.double() + 0.5 * grads.square().sum(0), b.double() + 0.5 * dy.double().sum(1).square().sum(0)
    fk.per_sample_squared_grad_(F, x, dy, 0.5, b)
    # A sum of T products of order one is right to √T·2⁻²⁴·√T; cancellation leaves that beside a result of order T.
    assert_close([F, b], expected, rtol=2e-6, atol=T * 2e-6)
    fence.check()


def test_mixed_dtypes_and_strided_inputs():
    x, dy = torch.randn(3, 5, 12).bfloat16()[:, :, ::2], torch.randn(1, 1, 8).expand(3, 5, 8)
    F = torch.zeros(8, 6)
    fk.per_sample_squared_grad_(F, x, dy)
    expected = torch.einsum("nto,nti->noi", dy.double(), x.double()).square().sum(0)
    assert_close([F], [expected], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 4, 8, 6), (3, 0, 8, 6), (3, 4, 0, 6), (3, 4, 8, 0)])
def test_empty_inputs_leave_the_accumulator(shape):
    N, T, O, I = shape  # noqa: E741
    F, b = torch.full((O, I), 3.0), torch.full((O,), 2.0)
    fk.per_sample_squared_grad_(F, torch.ones(N, T, I), torch.zeros(N, T, O), bias_accumulator_O=b)
    assert (F == 3).all() and (b == 2).all()


def test_a_repeated_call_gives_the_same_bits():
    x, dy = torch.randn(3, 20, 40), torch.randn(3, 20, 40)
    results = []
    for _ in range(2):
        F, b = torch.zeros(40, 40), torch.zeros(40)
        fk.per_sample_squared_grad_(F, x, dy, 0.3, b)
        results.append((F, b))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
