"""List operators that touch every element: accumulation, perturbation, precision, score."""

import logging

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from interpreter_inputs import FLOATS, SIZES, Fenced, assert_close, doubles, normal, positive

import fishertune_kernels as fk
from fishertune_kernels import dispatch
from fishertune_kernels.dr_fim_score import reference as score_reference
from fishertune_kernels.gaussian_perturb import reference as perturb_reference
from fishertune_kernels.philox import philox4x32
from fishertune_kernels.precision_update import reference as precision_reference
from fishertune_kernels.triton_common import expm1, ordered_key, rounded, standard_normal, words


def mixed(tensors, dtypes=FLOATS):
    """Neighbours of different dtypes, so that one call makes several groups."""
    return [tensor.to(dtypes[i % len(dtypes)]) for i, tensor in enumerate(tensors)]


def test_the_triton_backend_is_what_runs(caplog, monkeypatch):
    monkeypatch.setattr(dispatch, "_chosen", {})
    with caplog.at_level(logging.INFO, logger="fishertune_kernels"):
        fk.squared_grad_accumulate_(torch.zeros(3), torch.ones(3))
    assert "triton" in caplog.text


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("dtype", FLOATS)
def test_squared_grad_accumulate(dtype, shift):
    fence = Fenced(shift)
    grads = [fence(grad) for grad in normal(SIZES, dtype, seed=1)]
    accumulators = [fence(start) for start in positive(SIZES, seed=2)]
    expected = [a.double() + 0.3 * g.double() ** 2 for a, g in zip(accumulators, grads, strict=True)]
    fk.squared_grad_accumulate_(accumulators, grads, 0.3)
    assert_close(accumulators, expected)
    fence.check()


def test_squared_grad_accumulate_takes_mixed_dtypes_and_strided_gradients():
    grads = mixed([torch.randn(40, 30).T, torch.randn(1, 50).expand(20, 50), torch.randn(7, 6, 5).transpose(0, 2)])
    accumulators = [torch.zeros(grad.shape) for grad in grads]
    fk.squared_grad_accumulate_(accumulators, grads)
    assert_close(accumulators, [grad.double() ** 2 for grad in grads])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("seed", "step"), [(0, 0), (2**63 - 1, 2**40 + 3)])
def test_gaussian_perturb(dtype, seed, step):
    fence = Fenced()
    params, excess = [fence(p) for p in normal(SIZES, dtype, seed=3)], positive(SIZES, seed=4)
    offsets = [17, 2**35 + 2, 5, 2**34 - 4, 7, 1001]  # across the counter's second word, in every lane
    actual = fk.gaussian_perturb(params, excess, prior_precision=1e-3, seed=seed, step=step, offsets=offsets, sign=-1.0)
    expected = perturb_reference.gaussian_perturb(doubles(params), doubles(excess), 1e-3, seed, step, offsets, -1.0)
    # ε is right to 2e-6 (its logarithm near 1 cancels); the deviation is at most 1e-3**-0.5 = 32.
    assert_close(actual, expected, atol=1e-4)
    fence.check()


def test_nothing_outside_a_perturbed_tensor_is_written(monkeypatch):
    fence = Fenced()
    monkeypatch.setattr(torch, "empty_like", lambda tensor, **options: fence(tensor))
    params, offsets = normal(SIZES, seed=3), [17, 2, 5, 0, 7, 1001]
    fk.gaussian_perturb(params, positive(SIZES, seed=4), prior_precision=1.0, seed=1, step=2, offsets=offsets)
    fence.check()


def test_noise_is_a_function_of_the_global_index():
    whole = fk.gaussian_perturb(
        torch.zeros(5000), torch.zeros(5000), prior_precision=1.0, seed=9, step=2, offsets=[11]
    )[0]
    for start, end in ((0, 1), (1, 1026), (2, 7), (1023, 3000), (4997, 5000)):
        part = fk.gaussian_perturb(
            torch.zeros(end - start), torch.zeros(end - start), prior_precision=1.0, seed=9, step=2,
            offsets=[11 + start],
        )[0]  # fmt: skip
        assert torch.equal(part, whole[start:end])
    assert abs(whole.mean()) < 5 / 5000**0.5 and abs(whole.std() - 1) < 5 / 10000**0.5


@triton.jit
def _noise_kernel(out, first, seed_low, seed_high, step_low, step_high, BLOCK: tl.constexpr):
    epsilon = standard_normal(tl.cast(first, tl.int64), seed_low, seed_high, step_low, step_high, BLOCK)
    tl.store(out + tl.arange(0, BLOCK), epsilon)


def test_noise_equals_a_float64_box_muller_of_philox():
    out, first, seed, step = torch.empty(4096), 2**34 - 2048, 0xFEDCBA9876543210, 0x123456789
    _noise_kernel[(1,)](out, first, *words(seed), *words(step), BLOCK=4096)
    blocks = torch.arange(first // 4, first // 4 + 1024)
    counter = (
        blocks & 0xFFFFFFFF, blocks >> 32,
        torch.full_like(blocks, step & 0xFFFFFFFF), torch.full_like(blocks, step >> 32),
    )  # fmt: skip
    u = [((word >> 8).numpy() + 0.5) * 2.0**-24 for word in philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32))]
    expected = np.stack(
        [np.sqrt(-2 * np.log(u[i])) * wave(2 * np.pi * u[i + 1]) for i in (0, 2) for wave in (np.cos, np.sin)],
        axis=1,
    ).ravel()
    # A few roundings of numbers up to 5.9, plus half a unit of u before the logarithm where u is near one.
    np.testing.assert_allclose(out.double().numpy(), expected, atol=2e-6, rtol=0)


@triton.jit
def _numbers_kernel(x, out_bf16, out_expm1, out_key, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    value = tl.load(x + offsets)
    tl.store(out_bf16 + offsets, rounded(value, tl.bfloat16))
    tl.store(out_expm1 + offsets, expm1(value))
    tl.store(out_key + offsets, ordered_key(value).to(tl.int64))


def test_rounding_expm1_and_keys():
    special = [0.0, -0.0, float("inf"), float("-inf"), 1e-45, -1e-45, 3.38e38, 1.00390625, 1.01171875, -87.0]
    small = torch.logspace(-30, 1.9, 500)
    x = torch.cat((torch.tensor(special), small, -small, torch.randn(1038 - len(special))))[:2048].contiguous()
    x = torch.nn.functional.pad(x, (0, 2048 - x.numel()), value=float("nan"))
    # NaN that a carry of rounding makes infinity or −0.
    x[-3:] = torch.tensor([0x7F800001, 0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    bf16, em1, key = torch.empty(2048, dtype=torch.bfloat16), torch.empty(2048), torch.empty(2048, dtype=torch.int64)
    _numbers_kernel[(1,)](x, bf16, em1, key, BLOCK=2048)
    finite = ~x.isnan()
    assert torch.equal(bf16[finite], x[finite].bfloat16()) and bf16[~finite].isnan().all()
    torch.testing.assert_close(em1[finite].double(), torch.expm1(x[finite].double()), rtol=1e-6, atol=0)
    ranks = np.argsort(np.argsort(key[finite].numpy(), kind="stable"), kind="stable")
    assert np.array_equal(ranks, np.argsort(np.argsort(x[finite].numpy(), kind="stable"), kind="stable"))
    assert key[0] == key[1]


@pytest.mark.parametrize("dtype", FLOATS)
def test_precision_update_natural(dtype):
    fence = Fenced()
    excess = [fence(e) for e in positive(SIZES, seed=5)]
    squared = positive(SIZES, dtype, seed=6)
    expected = [0.9 * e.double() + 0.1 * s.double() / 3 for e, s in zip(excess, squared, strict=True)]
    fk.precision_update_natural_(excess, squared, beta=0.1, gamma=3.0)
    assert_close(excess, expected)
    fence.check()


@pytest.mark.parametrize("dtype", FLOATS)
def test_precision_update_sgvb(dtype):
    fence = Fenced()
    excess = [fence(e) for e in positive(SIZES, seed=7)]
    mean, square = [fence(torch.zeros(s)) for s in SIZES], [fence(torch.zeros(s)) for s in SIZES]
    state = [doubles(tensors) for tensors in (excess, mean, square)]
    offsets = [0, 2, 7, 2**33, 5, 12]
    for step in (1, 2, 3):
        grads = normal(SIZES, dtype, seed=10 + step)
        arguments = {
            "lr": 0.05, "betas": (0.9, 0.999), "eps": 1e-3, "gamma": 0.7, "prior_precision": 0.01, "seed": 5,
            "noise_step": 100 + step, "step": step, "offsets": offsets, "sign": -1.0 if step == 2 else 1.0,
        }  # fmt: skip
        fk.precision_update_sgvb_(excess, grads, mean, square, **arguments)
        precision_reference.precision_update_sgvb_(state[0], doubles(grads), state[1], state[2], **arguments)
    # ε is right to 2e-6 absolute and Adam divides by its own size: δ is right to about lr·1e-5, E to Λ times that.
    assert_close(mean, state[1], rtol=1e-5, atol=1e-4)
    assert_close(square, state[2], rtol=1e-5, atol=1e-5)
    assert_close(excess, state[0], rtol=1e-5, atol=1e-6)
    fence.check()


def test_precision_moments_of_the_prior_term_are_exact():
    """Without a gradient the slope is ½γE/Λ, whatever was drawn; its square tells 1 − β₂ in double from float."""
    excess = positive(SIZES, seed=7)
    slope = [0.5 * 0.7 * e.double() / (e.double() + 0.01) for e in excess]
    mean, square = [torch.zeros(s) for s in SIZES], [torch.zeros(s) for s in SIZES]
    fk.precision_update_sgvb_(
        excess, [torch.zeros(s) for s in SIZES], mean, square, lr=0.05, betas=(0.9, 0.999), eps=1e-8, gamma=0.7,
        prior_precision=0.01, seed=5, noise_step=1, step=1,
    )  # fmt: skip
    assert_close(mean, [0.1 * s for s in slope])
    assert_close(square, [0.001 * s**2 for s in slope], atol=1e-37)  # smaller squares lose digits as subnormals


def test_precision_stays_positive_under_a_huge_step():
    excess = torch.full((100,), 1e-8)
    state = torch.zeros(100), torch.zeros(100)
    fk.precision_update_sgvb_(
        excess, torch.randn(100), *state, lr=50.0, betas=(0.9, 0.999), eps=1e-8, gamma=1.0, prior_precision=1.0,
        seed=1, noise_step=1, step=1,
    )  # fmt: skip
    assert (excess + 1.0 > 0).all() and (excess < 0).any()


@pytest.mark.parametrize("kind", ["f", "delta_f", "dr_fim", "dr_fim_variational"])
@pytest.mark.parametrize(("dtypes", "eps"), [(FLOATS, 1e-8), ((torch.float32,), 0.3)])  # 0.3: eps or eps/γ is seen
def test_dr_fim_score(kind, dtypes, eps):
    fisher, shifted = mixed(positive(SIZES, seed=8), dtypes), mixed(positive(SIZES, seed=9), dtypes)
    options = {"kind": kind, "c": 0.7, "gamma": 2.0, "prior_precision": 1e-3, "eps": eps}
    expected = score_reference.dr_fim_score(doubles(fisher), doubles(shifted), **options)
    # F − F' is exact to half a unit of the larger value; relative to the difference that can be 2⁻²⁴·F/|F − F'|,
    # and these random pairs differ by more than 1e-4 of themselves.
    assert_close(fk.dr_fim_score(fisher, shifted, **options), expected, rtol=2e-6)

    fence = Fenced()
    mean = [fence(torch.full(size, float("nan"))) for size in SIZES]
    fk.dr_fim_score_(mean, fisher, shifted, count=1, **options)
    assert_close(mean, expected, rtol=2e-6)
    fk.dr_fim_score_(mean, shifted, fisher, count=2, **options)
    second = score_reference.dr_fim_score(doubles(shifted), doubles(fisher), **options)
    assert_close(mean, [(a + b) / 2 for a, b in zip(expected, second, strict=True)], rtol=2e-6)
    fence.check()


def test_a_repeated_call_reuses_its_tables_and_a_new_size_does_not():
    from fishertune_kernels import triton_common

    triton_common._layout.cache_clear()
    accumulator, grad = torch.zeros(5000), torch.ones(5000)
    fk.squared_grad_accumulate_(accumulator, grad)
    fk.squared_grad_accumulate_(accumulator, grad)
    assert triton_common._layout.cache_info().misses == 1
    fk.squared_grad_accumulate_(accumulator[:100], grad[:100])  # the same addresses
    assert triton_common._layout.cache_info().misses == 2
    assert torch.equal(accumulator, torch.cat((torch.full((100,), 3.0), torch.full((4900,), 2.0))))


def test_alignment_is_claimed_where_it_holds():
    """A vector load from an address that is no multiple of its size is a fault on a GPU."""
    from fishertune_kernels import triton_common

    whole = torch.zeros(40)
    for shift in range(5):
        table = triton_common.list_table(1024, [whole[shift:]], [torch.zeros(40 - shift)])
        assert table.aligned == (whole[shift:].data_ptr() % 16 == 0)
