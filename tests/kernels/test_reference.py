"""Every operator against an oracle that is not ours: torch.optim, autograd, numpy, Random123's published vectors."""

import math

import numpy as np
import pytest
import torch

import fishertune_kernels as fk
from fishertune_kernels.philox import philox4x32, standard_normal

EPS = 2.0**-24  # half a unit in the last place of float32, relative


def exact_philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox-4x32-10 in Python's unbounded integers, after Random123's philox.h."""
    for _ in range(10):
        low0, high0 = (0xD2511F53 * counter[0]) % 2**32, (0xD2511F53 * counter[0]) // 2**32
        low1, high1 = (0xCD9E8D57 * counter[2]) % 2**32, (0xCD9E8D57 * counter[2]) // 2**32
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return counter


def exact_normal(index: int, seed: int, step: int) -> float:
    block, lane = divmod(index, 4)
    words = exact_philox([block % 2**32, block // 2**32, step % 2**32, step // 2**32], [seed % 2**32, seed // 2**32])
    u = [((word >> 8) + 0.5) / 2**24 for word in words]
    radius, angle = math.sqrt(-2 * math.log(u[lane & 2])), 2 * math.pi * u[(lane & 2) + 1]
    return radius * (math.sin(angle) if lane & 1 else math.cos(angle))


# Random123's kat_vectors, "philox4x32 10".
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_published_words(counter: list[int], key: list[int], expected: list[int]) -> None:
    words = philox4x32(tuple(torch.tensor([c]) for c in counter), tuple(key))
    assert [int(word) for word in words] == expected
    assert exact_philox(counter, key) == expected  # the oracle of the tests below


@pytest.mark.parametrize("offset", [0, 1, 6, 2**32 - 3, 2**34 - 2, 2**34 + 1, 2**40 + 3])
def test_normal_draws_belong_to_their_global_index(offset: int) -> None:
    seed, step = 0x1234_5678_9ABC_DEF0, 0x5_0000_0007  # both words of each are in use
    draws = standard_normal(9, seed=seed, step=step, offset=offset, dtype=torch.float64)
    expected = [exact_normal(offset + i, seed, step) for i in range(9)]
    torch.testing.assert_close(draws, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-13)


def test_normal_draws_are_normal() -> None:
    n = 200_000
    draws = standard_normal(n, seed=1, step=2, offset=0, dtype=torch.float64)
    # Five standard errors of the mean, variance, kurtosis and neighbour correlation of n normal draws.
    assert abs(draws.mean()) < 5 / math.sqrt(n)
    assert abs(draws.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs((draws**4).mean() - 3) < 5 * math.sqrt(96 / n)
    for lag in (1, 2, 3, 4):
        assert abs((draws[lag:] * draws[:-lag]).mean()) < 5 / math.sqrt(n)
    assert not torch.equal(draws, standard_normal(n, seed=1, step=3, offset=0, dtype=torch.float64))


def test_gaussian_perturb_is_the_formula(backend: str, generator: torch.Generator) -> None:
    params = [torch.randn(5, 7, generator=generator), torch.randn(11, generator=generator), torch.empty(0)]
    excess = [torch.rand(tensor.shape, generator=generator) * 3 for tensor in params]
    perturbed = fk.gaussian_perturb(params, excess, prior_precision=0.5, seed=9, step=3, sign=-1.0)
    index = 0
    for param, excess_i, result in zip(params, excess, perturbed, strict=True):
        epsilon = torch.tensor([exact_normal(index + i, 9, 3) for i in range(param.numel())], dtype=torch.float64)
        expected = param.double() - epsilon.view(param.shape) / (excess_i.double() + 0.5).sqrt()
        # The angle 2πu in float32 is off by up to 2π·EPS, at a radius of at most 5.9 and a deviation of at most √2.
        torch.testing.assert_close(result.double(), expected, rtol=4 * EPS, atol=8 * math.pi * 5.9 * math.sqrt(2) * EPS)
        assert result.dtype == param.dtype
        index += param.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_shards_draw_what_the_whole_draws(backend: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    whole = torch.randn(1003, generator=generator).to(dtype)
    excess = torch.rand(1003, generator=generator)
    expected = fk.gaussian_perturb(whole, excess, prior_precision=1.0, seed=4, step=5, offsets=[77])[0]
    for cuts in ([1, 1, 400, 999], [502], [3, 6, 9, 700]):  # at multiples of four and not, empty shards too
        sizes = np.diff([0, *cuts, 1003]).tolist()
        offsets = [77 + start for start in [0, *cuts]]
        shards = fk.gaussian_perturb(
            whole.split(sizes), excess.split(sizes), prior_precision=1.0, seed=4, step=5, offsets=offsets
        )
        assert torch.equal(torch.cat(shards), expected)


def test_antithetic_draws_mirror(backend: str) -> None:
    zero, excess = torch.zeros(100), torch.ones(100)
    plus, minus = (
        fk.gaussian_perturb(zero, excess, prior_precision=1.0, seed=1, step=1, sign=sign)[0] for sign in (1.0, -1.0)
    )
    assert torch.equal(plus, -minus)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_squared_grad_accumulate(backend: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    grads = [torch.randn(shape, generator=generator).to(dtype) for shape in [(3, 5), (0,), (65,), ()]]
    state = torch.float64 if dtype == torch.float64 else torch.float32
    accumulators = [torch.rand(grad.shape, generator=generator, dtype=state) for grad in grads]
    expected = [acc.double() + 0.25 * grad.double() ** 2 for acc, grad in zip(accumulators, grads, strict=True)]
    fk.squared_grad_accumulate_(accumulators, grads, 0.25)
    for accumulator, value in zip(accumulators, expected, strict=True):
        # three roundings: g², its product with the weight (exact here), the sum
        torch.testing.assert_close(accumulator.double(), value, rtol=3 * EPS, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_per_sample_squared_grad_equals_vmap(backend: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    n, t, i, o = 3, 7, 10, 5
    x = torch.randn(n, t, i, generator=generator).to(dtype)
    dy = torch.randn(n, t, o, generator=generator).to(dtype)
    weight = torch.zeros(o, i, dtype=torch.float64)
    bias = torch.zeros(o, dtype=torch.float64)

    def loss(weight: torch.Tensor, bias: torch.Tensor, x: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
        return (torch.nn.functional.linear(x, weight, bias) * dy).sum()

    per_sample = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=(None, None, 0, 0))
    expected_OI, expected_O = ((grad**2).sum(0) / n for grad in per_sample(weight, bias, x.double(), dy.double()))

    state = torch.float64 if dtype == torch.float64 else torch.float32
    accumulator_OI, accumulator_O = torch.ones(o, i, dtype=state), torch.ones(o, dtype=state)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # must not reach the product
        fk.per_sample_squared_grad_(accumulator_OI, x, dy, 1 / n, accumulator_O)
    # A dot product of t terms is off by t·EPS of the sum of their sizes (here below 25), the square doubles that.
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if state == torch.float64 else {"rtol": 0, "atol": 2 * 25 * 25 * t * EPS}
    torch.testing.assert_close(accumulator_OI.double(), expected_OI + 1, **tolerance)
    torch.testing.assert_close(accumulator_O.double(), expected_O + 1, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", ["layer norm", "scale", "bias", "position"])
def test_per_sample_affine_squared_grad_equals_vmap(
    backend: str, kind: str, dtype: torch.dtype, generator: torch.Generator
) -> None:
    n, t, c = 3, 70, 6
    x, dy = (torch.randn(n, t, c, generator=generator).to(dtype) for _ in range(2))
    if kind == "position":
        c = t * c

    def loss(weight: torch.Tensor, bias: torch.Tensor, x: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
        y = {
            "layer norm": lambda: torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, 1e-5),
            "scale": lambda: x * weight,
            "bias": lambda: x + bias,
            "position": lambda: x + bias.view_as(x),
        }[kind]()
        return (y * dy).sum()

    weight, bias = torch.ones(c if kind != "position" else 1, dtype=torch.float64), torch.zeros(c, dtype=torch.float64)
    grads = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=(None, None, 0, 0))
    expected = [grad.square().sum(0) / n + 1 for grad in grads(weight, bias, x.double(), dy.double())]
    state = torch.float64 if dtype == torch.float64 else torch.float32
    weight_sum, bias_sum = torch.ones(len(weight), dtype=state), torch.ones(c, dtype=state)
    # Not the framework's statistics of x, which it may round to half precision.
    mean = x.to(state).mean(-1)
    rstd = (x.to(state).var(-1, correction=0) + 1e-5).rsqrt()
    fk.per_sample_affine_squared_grad_(
        weight_sum if kind in ("layer norm", "scale") else None,
        bias_sum if kind != "scale" else None,
        x if kind in ("layer norm", "scale") else None,
        dy.reshape(n, 1, c) if kind == "position" else dy,
        1 / n,
        *((mean, rstd) if kind == "layer norm" else ()),
    )
    # A sum of t products |dY·x̂| < 16, twelve standard deviations of each, is off by t/2·EPS of the sum of their sizes
    # (t in all), x̂ by four roundings of its own; the square doubles that and multiplies by the sum, here below 60.
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if state == torch.float64 else {"rtol": 0, "atol": 2 * 60 * 40 * t * EPS}
    if kind in ("layer norm", "scale"):
        torch.testing.assert_close(weight_sum.double(), expected[0], **tolerance)
    if kind != "scale":
        torch.testing.assert_close(bias_sum.double(), expected[1], **tolerance)


def test_per_sample_affine_squared_grad_of_nothing(backend: str) -> None:
    for shape in ((0, 4, 3), (2, 0, 3), (2, 4, 0)):
        weight_sum, bias_sum = torch.ones(shape[2]), torch.ones(shape[2])
        fk.per_sample_affine_squared_grad_(weight_sum, bias_sum, torch.empty(shape), torch.empty(shape))
        assert bool((weight_sum == 1).all()) and bool((bias_sum == 1).all())


def test_heads_are_layers_of_their_own(backend: str, generator: torch.Generator) -> None:
    n, h, t, i, o = 3, 4, 7, 10, 5
    x = torch.randn(n, t, h, i, generator=generator).transpose(1, 2)  # as attention cuts them: no copy is needed
    dy = torch.randn(n, t, h * 3, o, generator=generator)[:, :, h : 2 * h].transpose(1, 2)
    together, bias = torch.ones(h, o, i), torch.ones(h, o)
    fk.per_sample_squared_grad_(together, x, dy, 0.5, bias)
    for head in range(h):
        alone, alone_bias = torch.ones(o, i), torch.ones(o)
        fk.per_sample_squared_grad_(alone, x[:, head].contiguous(), dy[:, head].contiguous(), 0.5, alone_bias)
        # the same sums, by another routine where the strides are others
        torch.testing.assert_close(together[head], alone, rtol=t * EPS * 8, atol=t * EPS * 8)
        torch.testing.assert_close(bias[head], alone_bias, rtol=t * EPS * 8, atol=t * EPS * 8)


def test_windows_are_summed_before_they_are_squared(backend: str, generator: torch.Generator) -> None:
    samples, windows, t, i, o = 2, 3, 5, 6, 4
    x, dy = (torch.randn(samples * windows, t, c, generator=generator, dtype=torch.float64) for c in (i, o))
    accumulator, bias = torch.zeros(o, i, dtype=torch.float64), torch.zeros(o, dtype=torch.float64)
    fk.per_sample_squared_grad_(accumulator, x, dy, bias_accumulator_O=bias, samples=samples)
    grads = torch.einsum("nwto,nwti->noi", dy.unflatten(0, (samples, -1)), x.unflatten(0, (samples, -1)))
    torch.testing.assert_close(accumulator, grads.square().sum(0), rtol=1e-12, atol=1e-12)
    sums = dy.unflatten(0, (samples, -1)).sum((1, 2))
    torch.testing.assert_close(bias, sums.square().sum(0), rtol=1e-12, atol=1e-12)


def test_per_sample_squared_grad_of_nothing(backend: str) -> None:
    accumulator = torch.ones(3, 2)
    fk.per_sample_squared_grad_(accumulator, torch.empty(0, 4, 2), torch.empty(0, 4, 3))
    fk.per_sample_squared_grad_(accumulator, torch.empty(2, 0, 2), torch.empty(2, 0, 3))
    assert torch.equal(accumulator, torch.ones(3, 2))


def literal_score(f: np.ndarray, s: np.ndarray, kind: str, c: float, eps: float) -> np.ndarray:
    gamma, prior = 0.5, 2.0
    delta = np.abs(f - s) / (np.minimum(f, s) + eps)
    if kind == "dr_fim_variational":
        precision, shifted = f + prior, s + prior  # Eq. 15 as printed, with Λ
        ratio = np.abs(precision - shifted) / (np.minimum(precision, shifted) + eps / gamma)
        return gamma * (precision - prior + c * ratio)
    return {"f": f, "delta_f": delta, "dr_fim": f + c * delta}[kind]


@pytest.mark.parametrize("eps", [1e-8, 0.3])  # as printed, and large enough to tell eps from eps/γ
@pytest.mark.parametrize("kind", ["f", "delta_f", "dr_fim", "dr_fim_variational"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_scores_are_the_papers_formulas(
    backend: str, kind: str, eps: float, dtype: torch.dtype, generator: torch.Generator
) -> None:
    fisher = [torch.rand(shape, generator=generator).to(dtype) for shape in [(4, 9), (0,), (33,)]]
    shifted = [torch.rand(tensor.shape, generator=generator).to(dtype) for tensor in fisher]
    fisher[0][0, 0] = shifted[0][0, 0] = 0.0  # a dead parameter: 0/(0 + eps)
    arguments = {"gamma": 0.5, "prior_precision": 2.0, "eps": eps}
    result = fk.dr_fim_score(fisher, shifted, kind=kind, c=0.7, **arguments)
    running = [torch.full(tensor.shape, math.nan, dtype=result[0].dtype) for tensor in fisher]
    fk.dr_fim_score_(running, fisher, shifted, count=1, kind=kind, c=0.7, **arguments)
    fk.dr_fim_score_(running, fisher, shifted, count=2, kind=kind, c=0.1, **arguments)
    for f, s, score, mean in zip(fisher, shifted, result, running, strict=True):
        assert score.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        expected, second = (literal_score(f.double().numpy(), s.double().numpy(), kind, c, eps) for c in (0.7, 0.1))
        # |f − s| is exact to EPS, and so is every following operation; ten of them at most
        np.testing.assert_allclose(score.double().numpy(), expected, rtol=10 * EPS)
        np.testing.assert_allclose(mean.double().numpy(), (expected + second) / 2, rtol=20 * EPS)


def test_natural_update(backend: str, generator: torch.Generator) -> None:
    excess = [torch.rand(31, generator=generator), torch.empty(0)]
    squares = [torch.rand(31, generator=generator), torch.empty(0)]
    expected = 0.9 * excess[0].double() + 0.1 * squares[0].double() / 0.25
    fk.precision_update_(excess, squares, method="natural", beta=0.1, gamma=0.25)
    torch.testing.assert_close(excess[0].double(), expected, rtol=4 * EPS, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_sgvb_update_is_adam_on_the_log_precision(
    backend: str, dtype: torch.dtype, sign: float, generator: torch.Generator
) -> None:
    """Autograd differentiates g·θ(log Λ) + γ·KL, torch.optim.Adam steps: neither knows our closed form."""
    n, prior, gamma, seed = 37, 0.8, 0.3, 21
    excess = torch.rand(n, generator=generator, dtype=dtype)
    log_precision = torch.log(excess.double() + prior).requires_grad_()
    optimizer = torch.optim.Adam([log_precision], lr=0.05, betas=(0.8, 0.95), eps=1e-6)
    exp_avg, exp_avg_sq = torch.zeros(n, dtype=dtype), torch.zeros(n, dtype=dtype)
    for step in range(1, 6):
        grad = torch.randn(n, generator=generator, dtype=dtype)
        epsilon = torch.tensor([exact_normal(i, seed, 100 + step) for i in range(n)], dtype=torch.float64)
        theta = sign * torch.exp(-0.5 * log_precision) * epsilon
        kl = 0.5 * (prior * torch.exp(-log_precision) - 1 + log_precision - math.log(prior)).sum()
        optimizer.zero_grad()
        ((grad.double() * theta).sum() + gamma * kl).backward()
        optimizer.step()
        fk.precision_update_(
            excess, grad, method="sgvb", exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, lr=0.05, betas=(0.8, 0.95), eps=1e-6,
            gamma=gamma, prior_precision=prior, seed=seed, noise_step=100 + step, step=step, sign=sign,
        )  # fmt: skip
    # In float32 ε, and with it the gradient of log Λ, is off by up to 4e-6 (see gaussian_perturb). Adam divides by √v,
    # which is above 1e-2 for these draws: five steps of lr·4e-6/1e-2, times Λ < 2.
    atol = 1e-12 if dtype == torch.float64 else 5 * 0.05 * 4e-6 / 1e-2 * 2
    assert exp_avg_sq.min() > 1e-2**2 * (1 - 0.95**5)
    torch.testing.assert_close(excess.double() + prior, log_precision.detach().exp(), rtol=0, atol=atol)


def test_sgvb_keeps_the_precision_positive(backend: str) -> None:
    """A huge pull towards Λ = 0 leaves an E whose Λ = E + τ⁻² is still positive in float32."""
    prior = 3.0
    excess, exp_avg, exp_avg_sq = torch.zeros(64), torch.zeros(64), torch.zeros(64)
    for step in range(1, 4):
        fk.precision_update_sgvb_(
            excess, 1e3 * torch.ones(64), exp_avg, exp_avg_sq, lr=50.0, betas=(0.9, 0.999), eps=1e-8, gamma=1e-3,
            prior_precision=prior, seed=1, noise_step=7, step=step,
        )  # fmt: skip
        assert bool((excess + torch.tensor(prior) > 0).all())
    assert bool((excess < -0.9 * prior).any())


def run_adamw(params: list[torch.Tensor], grads: list[list[torch.Tensor]], **options: float) -> list[torch.Tensor]:
    params = [param.clone().requires_grad_() for param in params]
    optimizer = torch.optim.AdamW(params, foreach=False, **options)
    for step_grads in grads:
        for param, grad in zip(params, step_grads, strict=True):
            param.grad = grad.clone()
        optimizer.step()
    return [param.detach() for param in params]


OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.05}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sparse_adamw_with_everything_selected_is_adamw(
    backend: str, dtype: torch.dtype, generator: torch.Generator
) -> None:
    shapes = [(6, 11), (0,), (130,)]
    start = [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]
    grads = [[torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes] for _ in range(100)]
    expected = run_adamw(start, grads, **OPTIONS)
    params = [param.clone() for param in start]
    indices = [torch.arange(param.numel(), dtype=torch.int32) for param in params]
    exp_avg, exp_avg_sq = ([torch.zeros(param.numel(), dtype=dtype) for param in params] for _ in range(2))
    for step, step_grads in enumerate(grads, start=1):
        halves = [grad * 2 for grad in step_grads]  # grad_scale undoes it exactly
        fk.sparse_adamw_(params, halves, indices, exp_avg, exp_avg_sq, step=step, grad_scale=0.5, **OPTIONS)
    unit = EPS if dtype == torch.float32 else 2.0**-53
    for param, value in zip(params, expected, strict=True):
        # Per step: two roundings of the parameter (|θ| < 5), and of an update of at most lr·(1−β₁)/√(1−β₂) = lr, eight.
        torch.testing.assert_close(param, value, rtol=0, atol=100 * (2 * 5 + 8 * 1e-2) * unit)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_sparse_adamw_moves_the_selected_and_nothing_else(
    backend: str, index_dtype: torch.dtype, generator: torch.Generator
) -> None:
    start = [torch.randn(40, 5, generator=generator), torch.randn(77, generator=generator)]
    grads = [[torch.randn(param.shape, generator=generator) for param in start] for _ in range(100)]
    expected = run_adamw(start, grads, **OPTIONS)
    params = [param.clone() for param in start]
    drawn = [torch.randperm(param.numel(), generator=generator)[:20] for param in params]
    indices = [index.sort().values.to(index_dtype) for index in drawn]
    exp_avg, exp_avg_sq = [torch.zeros(20), torch.zeros(20)], [torch.zeros(20), torch.zeros(20)]
    for step, step_grads in enumerate(grads, start=1):
        fk.sparse_adamw_(params, step_grads, indices, exp_avg, exp_avg_sq, step=step, **OPTIONS)
    for param, old, value, index in zip(params, start, expected, indices, strict=True):
        chosen = torch.zeros(param.numel(), dtype=torch.bool)
        chosen[index.long()] = True
        assert torch.equal(param.flatten()[~chosen], old.flatten()[~chosen])
        torch.testing.assert_close(
            param.flatten()[chosen], value.flatten()[chosen], rtol=0, atol=100 * (2 * 5 + 8 * 1e-2) * EPS
        )


@pytest.mark.parametrize("with_master", [False, True])
def test_elements_below_the_threshold_wait_with_their_moments_current(
    backend: str, with_master: bool, generator: torch.Generator
) -> None:
    """Until it is active an element behaves as under AdamW with learning rate 0, bias correction included."""
    start, n_wait = torch.randn(50, generator=generator), 10
    grads = [torch.randn(50, generator=generator) for _ in range(30)]
    scores = torch.rand(50, generator=generator)
    threshold = float(scores.median())
    expected = start.clone().requires_grad_()
    early, late = expected.detach()[scores >= threshold], expected.detach()[scores < threshold]
    groups = [{"params": [early.requires_grad_()]}, {"params": [late.requires_grad_()], "lr": 0.0}]
    optimizer = torch.optim.AdamW(groups, foreach=False, **OPTIONS)

    param, index = start.clone(), torch.arange(50)
    exp_avg, exp_avg_sq = torch.zeros(50), torch.zeros(50)
    master = [start.clone()] if with_master else None
    for step, grad in enumerate(grads, start=1):
        if step > n_wait:
            optimizer.param_groups[1]["lr"] = OPTIONS["lr"]
        early.grad, late.grad = grad[scores >= threshold], grad[scores < threshold]
        optimizer.step()
        fk.sparse_adamw_(
            param, grad, index, exp_avg, exp_avg_sq, step=step, scores=scores, master=master,
            active_threshold=threshold if step <= n_wait else -math.inf, **OPTIONS,
        )  # fmt: skip
        if step == n_wait:
            assert torch.equal(param[scores < threshold], start[scores < threshold])
    atol = 30 * (2 * 5 + 8 * 1e-2) * EPS
    torch.testing.assert_close(param[scores >= threshold], early.detach(), rtol=0, atol=atol)
    torch.testing.assert_close(param[scores < threshold], late.detach(), rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_master_copy_is_the_float32_run_and_the_parameter_its_rounding(
    backend: str, dtype: torch.dtype, generator: torch.Generator
) -> None:
    start = torch.randn(64, generator=generator).to(dtype)
    grads = [torch.randn(64, generator=generator).to(dtype) for _ in range(20)]
    index = torch.arange(0, 64, 3)
    narrow, wide, untouched = start.clone(), start.float(), torch.ones(64, dtype=torch.bool)
    untouched[index] = False
    master = start.float()[index]
    state = [torch.zeros(len(index)) for _ in range(4)]
    for step, grad in enumerate(grads, start=1):
        fk.sparse_adamw_(narrow, grad, index, state[0], state[1], step=step, master=master, **OPTIONS)
        fk.sparse_adamw_(wide, grad, index, state[2], state[3], step=step, **OPTIONS)
    assert torch.equal(master, wide[index])
    assert torch.equal(narrow[index], master.to(dtype))
    assert torch.equal(narrow[untouched], start[untouched])


def test_half_parameters_without_master_round_once_a_step(backend: str, generator: torch.Generator) -> None:
    start, grad = torch.randn(64, generator=generator).bfloat16(), torch.randn(64, generator=generator)
    (expected,) = run_adamw([start.float()], [[grad]], **OPTIONS)
    param = start.clone()
    fk.sparse_adamw_(param, grad, torch.arange(64), torch.zeros(64), torch.zeros(64), step=1, **OPTIONS)
    assert torch.equal(param, expected.bfloat16())


# With zero gradients and moments the result is θ·(1 − 2⁻⁹): 17 bits, exact in float32, so only the rounding counts.
DECAY = {"lr": 2.0**-5, "betas": (0.9, 0.99), "eps": 1.0, "weight_decay": 2.0**-4}


def decay_step(params: list[torch.Tensor], indices: list[torch.Tensor], **options: object) -> None:
    states = [[torch.zeros(len(index)) for index in indices] for _ in range(2)]
    grads = [torch.zeros(param.shape) for param in params]
    fk.sparse_adamw_(params, grads, indices, *states, rounding="stochastic", **DECAY, **options)


def exactly_rounded(value: float, element: int, seed: int, step: int) -> int:
    """The bfloat16 bits of a float32 value, in Python's integers."""
    word = int(np.float32(value).view(np.uint32))
    block = (element >> 2) + 2**63
    words = exact_philox([block % 2**32, block // 2**32, step % 2**32, step // 2**32], [seed % 2**32, seed // 2**32])
    return (word + words[element % 4] // 2**16) // 2**16


@pytest.mark.parametrize("offset", [0, 6, 2**32 - 3, 2**34 - 2, 2**40 + 3])
def test_stochastic_rounding_is_the_prescribed_carry(backend: str, offset: int, generator: torch.Generator) -> None:
    seed, step = 0x1234_5678_9ABC_DEF0, 0x5_0000_0007  # both words of each are in use
    start, index = torch.randn(40, generator=generator).bfloat16(), torch.tensor([0, 1, 2, 3, 5, 11, 30, 39])
    param = start.clone()
    decay_step([param], [index], step=step, seed=seed, offsets=[offset])
    expected = [exactly_rounded(float(start[i]) * (1 - 2.0**-9), offset + i, seed, step) for i in index.tolist()]
    assert (param[index].view(torch.int16).long() % 2**16).tolist() == expected


def test_stochastic_rounding_does_not_depend_on_sharding(backend: str, generator: torch.Generator) -> None:
    start = [torch.randn(50, 7, generator=generator).bfloat16(), torch.randn(33, generator=generator).bfloat16()]
    whole = [tensor.clone() for tensor in start]
    decay_step(whole, [torch.arange(350), torch.arange(33)], step=4, seed=9)
    shards = [*(tensor.clone() for tensor in start[0].flatten().split([13, 0, 200, 137])), start[1].clone()]
    decay_step(shards, [torch.arange(len(s)) for s in shards], step=4, seed=9, offsets=[0, 13, 13, 213, 350])
    assert torch.equal(torch.cat(shards), torch.cat([tensor.flatten() for tensor in whole]))
    selected = start[0].clone()  # nor on what else is selected
    decay_step([selected], [torch.arange(2, 350, 5)], step=4, seed=9)
    assert torch.equal(selected.flatten()[2::5], whole[0].flatten()[2::5])


def test_stochastic_rounding_draws_anew_every_step_and_seed(backend: str) -> None:
    results = []
    for step, seed in ((1, 0), (2, 0), (1, 1)):
        param = torch.ones(200, dtype=torch.bfloat16)
        decay_step([param], [torch.arange(200)], step=step, seed=seed)
        results.append(param)
    # 1 − 2⁻⁹ lies half way: two unrelated draws agree on about half of the elements
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert 60 < int((results[a] == results[b]).sum()) < 140


@pytest.mark.parametrize("value", [1.0, -1.0, 1.2578125, -776.0, 2.0**-120])
def test_stochastic_rounding_is_unbiased(backend: str, value: float) -> None:
    n = 100_000
    param = torch.full((n,), value, dtype=torch.bfloat16)
    decay_step([param], [torch.arange(n)], step=1, seed=3)
    exact = value * (1 - 2.0**-9)
    low, high = sorted(set(param.double().tolist()))  # the two neighbours and nothing else
    assert low < exact < high and high - low <= 2.0**-7 * abs(value)
    # Hoeffding: a mean of n draws from [low, high] is off by more than this with probability 1e-9.
    bound = (high - low) * math.sqrt(math.log(2e9) / (2 * n))
    assert abs(param.double().mean() - exact) < bound


def test_updates_below_half_a_unit_add_up_on_average(backend: str) -> None:
    """Steps of 2⁻¹² on weights whose unit in the last place is 2⁻⁸: rounding to nearest never moves them."""
    n, steps = 20_000, 64
    options = {"lr": 2.0**-12, "betas": (0.0, 0.0), "eps": 0.0, "weight_decay": 0.0}  # each step moves by lr exactly
    stuck, moving = (torch.ones(n, dtype=torch.bfloat16) for _ in range(2))
    index, grad = torch.arange(n), torch.ones(n)
    for step in range(1, steps + 1):
        fk.sparse_adamw_(stuck, grad, index, torch.zeros(n), torch.zeros(n), step=step, **options)
        fk.sparse_adamw_(
            moving, grad, index, torch.zeros(n), torch.zeros(n), step=step, rounding="stochastic", seed=1, **options
        )
    assert torch.equal(stuck, torch.ones_like(stuck))
    # Azuma: n·steps independent roundings, each off by less than 2⁻⁸; the bound is passed with probability 1e-9.
    bound = 2.0**-8 * math.sqrt(2 * math.log(2e9) * steps / n)
    assert bound < steps * 2.0**-12 / 4
    assert abs(moving.double().mean() - (1 - steps * 2.0**-12)) < bound


def test_stochastic_rounding_at_the_ends_of_the_range(backend: str) -> None:
    largest = float(torch.finfo(torch.bfloat16).max)
    start = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0, 1e-39, -1e-39], dtype=torch.bfloat16)
    param = start.repeat(100)
    decay_step([param], [torch.arange(700)], step=1)
    rows = param.view(100, 7)
    assert (rows[:, 0] == math.inf).all() and (rows[:, 1] == -math.inf).all() and rows[:, 2].isnan().all()
    assert torch.equal(rows[:, 3:5].view(torch.int16), start[3:5].view(torch.int16).expand(100, 2))
    assert (
        len(set(rows[:, 5].tolist())) == 2 and (rows[:, 5] > 0).all() and torch.equal(rows[:, 5:6] > 0, rows[:, 6:] < 0)
    )
    # A step of 2¹¹⁹ beyond the largest bfloat16, whose unit is 2¹²⁰, is finite in float32 and stays finite.
    param = torch.full((100,), largest, dtype=torch.bfloat16)
    fk.sparse_adamw_(
        param, -torch.ones(100), torch.arange(100), torch.zeros(100), torch.zeros(100), lr=2.0**118, betas=(0.0, 0.0),
        eps=0.0, weight_decay=0.0, step=1, rounding="stochastic",
    )  # fmt: skip
    assert (param == largest).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_compact_gradients_and_a_tensor_scale_give_the_same_bits(
    backend: str, dtype: torch.dtype, generator: torch.Generator
) -> None:
    start = [torch.randn(shape, generator=generator).to(dtype) for shape in [(8, 9), (0,), (100,)]]
    grads = [torch.randn(tensor.shape, generator=generator).to(dtype) for tensor in start]
    indices = [torch.tensor([0, 5, 71], dtype=torch.int32), torch.empty(0, dtype=torch.int64), torch.arange(0, 100, 7)]
    state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    flat = torch.empty(18, dtype=dtype)
    views = fk.gather_values(grads, indices, out=flat)
    assert [view.data_ptr() for view in views[::2]] == [flat.data_ptr(), flat[3:].data_ptr()]
    scale = torch.tensor([0.3], dtype=state_dtype)
    results = []
    for given, compact, factor in ((grads, False, float(scale)), (flat, True, scale), (views, True, scale.squeeze())):
        params = [tensor.clone() for tensor in start]
        states = [[torch.zeros(len(index), dtype=state_dtype) for index in indices] for _ in range(2)]
        fk.sparse_adamw_(params, given, indices, *states, step=3, grad_scale=factor, compact_grads=compact, **OPTIONS)
        results.append(torch.cat([tensor.flatten().double() for tensor in [*params, *states[0], *states[1]]]))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert bool((results[0][:72] != start[0].flatten().double()).any())


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_selected_grad_norm(backend: str, dtype: torch.dtype, whole: bool, generator: torch.Generator) -> None:
    grads = [torch.randn(shape, generator=generator).to(dtype) for shape in [(40, 9), (0,), (5000,)]]
    grads[0] = grads[0].t().contiguous().t()
    indices = [
        torch.tensor([0, 5, 359], dtype=torch.int32),
        torch.empty(0, dtype=torch.int64),
        torch.arange(0, 5000, 7),
    ]
    norm = fk.selected_grad_norm(grads, None if whole else indices)
    chosen = [g.double().numpy().ravel() if whole else g.double().numpy().ravel()[i.numpy()]
              for g, i in zip(grads, indices, strict=True)]  # fmt: skip
    expected = np.sqrt(np.square(np.concatenate(chosen)).sum())
    assert norm.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and norm.shape == ()
    # torch adds positive terms in a tree of 13 levels; quotient, square and product add three roundings
    np.testing.assert_allclose(float(norm), expected, rtol=16 * (2.0**-53 if dtype == torch.float64 else EPS))
    flat = torch.empty(3 + 715, dtype=dtype)
    fk.gather_values(grads, indices, out=flat)
    np.testing.assert_allclose(
        float(fk.selected_grad_norm(flat)), float(fk.selected_grad_norm(grads, indices)), rtol=1e-6
    )


@pytest.mark.parametrize("size", [1e-44, 1e-30, 1e30, 1e38])
def test_the_selected_norm_neither_overflows_nor_vanishes(backend: str, size: float) -> None:
    grads, index = [torch.full((7000,), 1e-3 * size), torch.zeros(3)], torch.arange(0, 7000, 7)
    grads[0][index[500]] = size
    norm = fk.selected_grad_norm(grads, [index, torch.arange(3)])
    expected = np.linalg.norm(grads[0][index].double().numpy())
    np.testing.assert_allclose(float(norm), expected, rtol=16 * EPS, atol=2.0**-150)  # half the smallest float32


@pytest.mark.parametrize(("values", "expected"), [
    ([math.inf, 1.0], math.inf), ([-math.inf, 1e38], math.inf), ([math.nan, 1.0], math.nan),
    ([math.nan, math.inf], math.nan), ([0.0, -0.0], 0.0),
])  # fmt: skip
def test_what_is_not_finite_comes_through_the_selected_norm(backend: str, values: list, expected: float) -> None:
    grad = torch.zeros(5000)
    grad[[17, 4100]] = torch.tensor(values)
    np.testing.assert_equal(float(fk.selected_grad_norm(grad, torch.arange(5000))), expected)
    assert fk.selected_grad_norm(grad, torch.arange(100, 200)) == 0  # what is not selected does not count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int16, torch.bool])
def test_gather_and_scatter(backend: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    tensors = [(10 * torch.randn(shape, generator=generator)).to(dtype) for shape in [(8, 9), (0,), (100,)]]
    indices = [torch.tensor([0, 5, 71], dtype=torch.int32), torch.empty(0, dtype=torch.int64), torch.arange(0, 100, 7)]
    values = fk.gather_values(tensors, indices)
    targets = [torch.zeros_like(tensor) for tensor in tensors]
    fk.scatter_values_(targets, indices, values)
    for tensor, index, value, target in zip(tensors, indices, values, targets, strict=True):
        flat = tensor.flatten().float().numpy()
        expected = np.zeros_like(flat)
        expected[index.numpy()] = flat[index.numpy()]
        assert value.dtype == dtype
        np.testing.assert_array_equal(value.float().numpy(), flat[index.numpy()])
        np.testing.assert_array_equal(target.flatten().float().numpy(), expected)


def test_gather_and_scatter_move_bits(backend: str) -> None:
    """NaN payloads and signed zeros survive: the sparse deltas are XORs of bit patterns."""
    bits = torch.tensor([0x7FC12345, -0x80000000, 1, -0x3EDCBB, 0x7F812345], dtype=torch.int64).to(torch.int32)
    source, target, index = bits.view(torch.float32), torch.zeros(5), torch.arange(5)
    fk.scatter_values_(target, index, fk.gather_values(source, index)[0])
    assert torch.equal(target.view(torch.int32), bits)
