"""The per-sample squared gradient of a Linear layer."""

from dataclasses import replace

import pytest
import torch
from interpreter_inputs import FLOATS, Fenced, assert_close, normal

import fishertune_kernels as fk
from fishertune_kernels.per_sample_squared_grad import triton as operator
from fishertune_kernels.per_sample_squared_grad.tiles import Config

PLAIN = Config(32, 32, 16, 4, 2)
VARIANTS = {
    "nested": PLAIN,
    "flat": replace(PLAIN, flat=True),
    "tma": replace(PLAIN, tma=True),
    "tma flat": replace(PLAIN, flat=True, tma=True),
}


def expected_squares(x_NHTI, dy_NHTO):
    grads = torch.einsum("nhto,nhti->nhoi", dy_NHTO.double(), x_NHTI.double())
    return [grads.square().sum(0), dy_NHTO.double().sum(2).square().sum(0)]


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


@pytest.mark.parametrize("splits", [1, 2, 5])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_and_split(variant, splits):
    """Five samples in one group, in three and two, each alone; partial tiles on every side; two heads."""
    N, H, T, O, I = 5, 2, 17, 33, 8  # noqa: E741
    x = normal([(N, H, T, I)], torch.bfloat16, seed=1)[0]
    dy = normal([(N, H, T, 40)], torch.bfloat16, seed=2)[0][..., :O]  # rows of 16-byte steps, as descriptors want them
    fence = Fenced()
    F, b = fence(torch.rand(H, O, I)), fence(torch.rand(H, O))
    expected = [old.double() + 0.5 * new for old, new in zip((F, b), expected_squares(x, dy), strict=True)]
    operator.per_sample_squared_grad_(F, x, dy, 0.5, b, config=VARIANTS[variant], splits=splits)
    assert_close([F, b], expected, rtol=2e-6, atol=T * 2e-6)
    fence.check()


def test_variants_agree_to_the_bit_and_descriptors_are_used(monkeypatch):
    """The same products in the same order, with whole token blocks; and the descriptor path is not silently left."""
    x, dy = (normal([(3, 1, 48, c)], torch.bfloat16, seed=c)[0] for c in (40, 48))
    made = []
    plain = operator._descriptor
    monkeypatch.setattr(operator, "_descriptor", lambda *arguments: made.append(arguments) or plain(*arguments))
    results = []
    for config in VARIANTS.values():
        F = torch.zeros(1, 48, 40)
        operator.per_sample_squared_grad_(F, x, dy, config=config, splits=1)
        results.append(F)
    assert all(torch.equal(result, results[0]) for result in results)
    assert len(made) == 4


@pytest.mark.parametrize("why", ["odd rows", "odd address", "float32"])
def test_what_no_descriptor_can_describe_is_read_by_pointers(why, monkeypatch):
    monkeypatch.setattr(operator, "TensorDescriptor", None)  # using one would raise
    dtype = torch.float32 if why == "float32" else torch.bfloat16
    x, dy = (normal([(2, 1, 20, 44 if why == "odd rows" else 48)], dtype, seed=s)[0] for s in (1, 2))
    if why == "odd address":
        x = torch.cat([torch.zeros(1, dtype=dtype), x.flatten()])[1:].view_as(x)
    F = torch.zeros(1, dy.shape[3], x.shape[3])
    operator.per_sample_squared_grad_(F, x, dy, config=VARIANTS["tma"])
    assert_close([F], expected_squares(x, dy)[:1], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_heads_and_slices_are_read_where_they_lie(variant):
    """Heads transposed as attention cuts them, dY a slice of a fused projection's: no copy, whatever the strides."""
    x = normal([(3, 20, 2, 40)], torch.float16, seed=1)[0].transpose(1, 2)
    dy = normal([(3, 20, 3, 2, 24)], torch.float16, seed=2)[0][:, :, 1].transpose(1, 2)
    F, b = torch.zeros(2, 24, 40), torch.zeros(2, 24)
    assert not x.is_contiguous() and not dy.is_contiguous()
    operator.per_sample_squared_grad_(F, x, dy, bias_accumulator_HO=b, config=VARIANTS[variant], splits=2)
    assert_close([F, b], expected_squares(x, dy), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("splits", [2, 4])
def test_splits_repeat_to_the_bit(splits):
    x, dy = torch.randn(4, 1, 20, 40), torch.randn(4, 1, 20, 40)
    results = []
    for _ in range(2):
        F = torch.zeros(1, 40, 40)
        operator.per_sample_squared_grad_(F, x, dy, 0.3, splits=splits)
        results.append(F)
    assert torch.equal(*results)
