"""The C++ library against plain formulas, torch.optim and numpy, on every instruction set this machine has."""

from __future__ import annotations

import ctypes
import itertools
import math

import numpy as np
import pytest
import torch

from fishertune_kernels import native, select_threshold
from fishertune_kernels.compact import native as compaction
from fishertune_kernels.dr_fim_score import native as scoring
from fishertune_kernels.gaussian_perturb import native as perturbing
from fishertune_kernels.per_sample_affine_squared_grad import native as affine
from fishertune_kernels.per_sample_squared_grad import native as per_sample
from fishertune_kernels.precision_update import native as precision
from fishertune_kernels.select_threshold import native as threshold
from fishertune_kernels.select_threshold import reference, search
from fishertune_kernels.select_threshold.search import Threshold
from fishertune_kernels.selected_grad_norm import native as norms
from fishertune_kernels.sparse_adamw import native as adamw
from fishertune_kernels.squared_grad_accumulate import native as squares
from fishertune_kernels.values import native as values

pytestmark = pytest.mark.skipif(not native.available(), reason=native.why_not() or "")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (0, 1, 3, 15, 64, 65, 1000, 4097, 70_001)  # around vector widths, cache blocks and the chunk size of 65536
ULP = 2.0**-23  # spacing of fp32 at 1: one rounding is half of it
ADAMW = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


@pytest.fixture(params=["portable", "avx2", "avx512"])
def isa(request):
    before = native.isa()
    try:
        native.set_isa(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield request.param
    native.set_isa(before)


@pytest.fixture(params=[1, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def awkward(n: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Ordinary values between zeros of both signs, subnormals, infinities and repeats."""
    x = torch.randn(n, generator=torch.Generator().manual_seed(n))
    special = torch.tensor([0.0, -0.0, 1e-40, -1e-40, math.inf, -math.inf, 1.0, 1.0, 5e-8, 65504.0])
    x[: len(special)] = special[:n]
    x[n // 2 :: 7] = 1.0
    return x.to(dtype)


def ulps(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest error in units of the last place of fp32, against an expectation in float64."""
    if actual.numel() == 0:
        return 0.0
    spacing = torch.from_numpy(np.spacing(expected.abs().float().clamp_min(2.0**-126).numpy())).double()
    error = (actual.double() - expected.double()).abs() / spacing
    # Equal infinities are no error; any other NaN is one that max() of several tensors would pass over.
    return float(torch.where(actual.double() == expected.double(), 0.0, error.nan_to_num(nan=math.inf)).max())


def normals(seed: int, step: int, first: int, count: int) -> np.ndarray:
    """Philox-4x32-10 as in the paper, one counter at a time in Python integers, and Box-Muller in float64."""
    mask, out = 0xFFFFFFFF, []
    for g in range(first // 4, (first + count + 3) // 4):
        c = [g & mask, g >> 32, step & mask, step >> 32]
        k = [seed & mask, seed >> 32]
        for _ in range(10):
            p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
            c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & mask, (p0 >> 32) ^ c[3] ^ k[1], p0 & mask]
            k = [(k[0] + 0x9E3779B9) & mask, (k[1] + 0xBB67AE85) & mask]
        # u is an fp32 number; what follows is exact
        u = [float(np.float32(np.float32(r >> 8) + np.float32(0.5)) * np.float32(2.0**-24)) for r in c]
        for a, b in ((u[0], u[1]), (u[2], u[3])):
            radius = math.sqrt(-2 * math.log(a))
            out += [radius * math.cos(2 * math.pi * b), radius * math.sin(2 * math.pi * b)]
    return np.array(out[first % 4 : first % 4 + count])


@pytest.mark.parametrize("dtype", DTYPES)
def test_squares_accumulate(isa, threads, dtype):
    grads = [awkward(n, dtype).clamp(-1e4, 1e4) for n in SIZES]
    sums = [torch.rand(n) for n in SIZES]
    expected = [s.double() + 0.3 * g.double().square() for s, g in zip(sums, grads, strict=True)]
    squares.squared_grad_accumulate_(sums, grads, 0.3)
    # The weight, g² and their product are each off by half a spacing, up to one of the result's; the sum by half.
    assert max(ulps(s, e) for s, e in zip(sums, expected, strict=True)) <= 3.5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [(3, 1, 17, 40, 24), (1, 1, 1, 1, 1), (2, 2, 5, 0, 7), (0, 1, 5, 3, 4), (4, 1, 33, 700, 9), (2, 3, 9, 70, 31)],
)
def test_per_sample_squares(isa, monkeypatch, dtype, shape):
    n, h, t, o, i = shape
    monkeypatch.setattr(per_sample, "TILE_ELEMENTS", 1000)  # several tiles, the last one ragged
    generator = torch.Generator().manual_seed(1)
    x, dy = (torch.randn(n, h, t, c, generator=generator).to(dtype) for c in (i, o))
    weight_sum, bias_sum = torch.rand(h, o, i), torch.rand(h, o)
    grads = torch.einsum("nhto,nhti->nhoi", dy.double(), x.double())
    expected = weight_sum.double() + 0.5 * grads.square().sum(0)
    expected_bias = bias_sum.double() + 0.5 * dy.double().sum(2).square().sum(0)
    per_sample.per_sample_squared_grad_(weight_sum, x, dy, 0.5, bias_sum)
    # A dot product of t terms errs by at most t/2 ulp of Σ|terms|; squares of cancelling sums need an absolute scale.
    scale = torch.einsum("nhto,nhti->nhoi", dy.double().abs(), x.double().abs()).square().sum(0) + 1
    assert ((weight_sum - expected).abs() <= 2 * t * ULP * scale).all()
    bias_scale = dy.double().abs().sum(2).square().sum(0) + 1
    assert ((bias_sum - expected_bias).abs() <= 2 * t * ULP * bias_scale).all()


@pytest.mark.parametrize("dtypes", [*itertools.product(DTYPES, DTYPES)])
@pytest.mark.parametrize("shape", [(3, 130, 70), (1, 1, 1), (2, 64, 513), (2, 65, 1100)])
def test_per_sample_affine_squares(isa, threads, dtypes, shape):
    """Around the 64 tokens of a partial sum, the 512 channels of a chunk, and shares of three threads."""
    n, t, c = shape
    generator = torch.Generator().manual_seed(2)
    x, dy = (torch.randn(shape, generator=generator).to(dtype) for dtype in dtypes)
    mean, rstd = (torch.rand(n, t, generator=generator) for _ in range(2))
    sums = [torch.rand(c), torch.rand(c)]
    normalised = (x.double() - mean[..., None].double()) * rstd[..., None].double()
    terms = [dy.double() * normalised, dy.double()]
    expected = [s.double() + 0.5 * term.sum(1).square().sum(0) for s, term in zip(sums, terms, strict=True)]
    affine.per_sample_affine_squared_grad_(*sums, x, dy, 0.5, mean, rstd)
    # Three roundings in a term and at most t in a sum, each half a spacing of the sizes added; the square doubles them.
    for actual, wanted, term in zip(sums, expected, terms, strict=True):
        assert ((actual - wanted).abs() <= (t + 4) * ULP * (term.abs().sum(1).square().sum(0) + 1)).all()


def test_per_sample_affine_sums_of_many_tokens_stay_accurate(isa):
    """One running sum of 2²⁰ tenths is off by 4 %; 2¹⁴ partial sums of 64 by at most 2¹⁴ half spacings, 5e-4."""
    tokens, total = 1 << 20, torch.zeros(1)
    affine.per_sample_affine_squared_grad_(None, total, None, torch.full((1, tokens, 1), 0.1))
    exact = (tokens * torch.tensor(0.1).double()) ** 2
    assert abs(total.double() - exact) / exact < 2 * 5e-4  # of the square


def test_per_sample_squares_ignore_autocast():
    x, dy = torch.randn(2, 1, 9, 5), torch.randn(2, 1, 9, 6)
    plain, cast = torch.zeros(1, 6, 5), torch.zeros(1, 6, 5)
    per_sample.per_sample_squared_grad_(plain, x, dy)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        per_sample.per_sample_squared_grad_(cast, x, dy)
    assert torch.equal(plain, cast)


@pytest.mark.parametrize(("seed", "step", "offset"), [(0, 0, 0), (7, 3, 2), (2**63 - 5, 2**40 + 1, 2**35 + 3)])
def test_perturbation_is_the_prescribed_draw(isa, threads, seed, step, offset):
    count = 1029
    noise = torch.zeros(count)
    [noise] = perturbing.gaussian_perturb([noise], [torch.ones(count)], 0.0, seed, step, [offset])
    # Radius up to 5.8 with relative error of 2 ulp, cosine with an absolute error of 1 ulp of 1.
    np.testing.assert_allclose(noise.numpy(), normals(seed, step, offset, count), rtol=4 * ULP, atol=8 * ULP)


def test_perturbation_does_not_depend_on_how_a_vector_is_cut(isa):
    n = 9_001
    theta, excess = torch.randn(n), torch.rand(n)
    [whole] = perturbing.gaussian_perturb([theta], [excess], 0.5, 11, 4, [0])
    cuts = [0, 1, 7, 300, 4096, n]
    parts = perturbing.gaussian_perturb(
        [theta[a:b] for a, b in itertools.pairwise(cuts)],
        [excess[a:b] for a, b in itertools.pairwise(cuts)],
        0.5,
        11,
        4,
        cuts[:-1],
    )
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("dtype", DTYPES)
def test_perturbation_scale_and_sign(isa, dtype):
    theta = awkward(5000, dtype).clamp(-100, 100)
    excess = torch.rand(5000) * 10
    noise = torch.from_numpy(normals(5, 6, 8, 5000))
    [plus] = perturbing.gaussian_perturb([theta], [excess], 2.0, 5, 6, [8])
    [minus] = perturbing.gaussian_perturb([theta], [excess], 2.0, 5, 6, [8], -1.0)
    assert plus.dtype == dtype
    deviation = noise / (excess.double() + 2.0).sqrt()
    half_ulp = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    for actual, expected in ((plus, theta.double() + deviation), (minus, theta.double() - deviation)):
        # One rounding to the storage type (a boundary can go either way: a little slack), and the draw's own error.
        assert ((actual.double() - expected).abs() <= 1.01 * half_ulp * expected.abs() + 16 * ULP).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_natural_update(isa, threads, dtype):
    excess = [torch.rand(n) for n in SIZES]
    fisher = [torch.rand(n).to(dtype) for n in SIZES]
    expected = [0.7 * e.double() + 0.3 / 0.2 * f.double() for e, f in zip(excess, fisher, strict=True)]
    precision.precision_update_natural_(excess, fisher, 0.3, 0.2)
    assert max(ulps(e, x) for e, x in zip(excess, expected, strict=True)) <= 3  # 2 constants, 2 products, 1 sum


@pytest.mark.parametrize("dtype", DTYPES)
def test_sgvb_update_is_adam_on_the_logarithm_of_the_precision(isa, threads, dtype):
    """Against torch.optim.Adam in float64 on log Λ with the gradient written as in the paper."""
    n, offset, gamma, prior, seed = 5003, 3, 0.7, 2.0, 9
    excess, grad = torch.rand(n) * 4 - 0.5, torch.randn(n).to(dtype)
    log_precision = torch.nn.Parameter((excess.double() + prior).log())
    oracle = torch.optim.Adam([log_precision], lr=0.05, betas=(0.8, 0.95), eps=1e-6)
    mean, square = torch.zeros(n), torch.zeros(n)
    for step in (1, 2, 3):
        sign = -1.0 if step == 2 else 1.0
        noise = torch.from_numpy(normals(seed, 40 + step, offset, n))
        wide = log_precision.detach().exp()
        log_precision.grad = -0.5 * sign * noise * wide.rsqrt() * grad.double() + 0.5 * gamma * (1 - prior / wide)
        oracle.step()
        precision.precision_update_sgvb_(
            [excess],
            [grad],
            [mean],
            [square],
            0.05,
            (0.8, 0.95),
            1e-6,
            gamma,
            prior,
            seed,
            40 + step,
            step,
            [offset],
            sign,
        )
    # Adam divides slopes by their size: an element whose slope cancels to 1e-4 has it with three digits.
    error = (excess.double() + prior - log_precision.detach().exp()).abs()
    assert error.max() < 2e-3
    assert error.median() < 1e-6


def test_sgvb_update_keeps_the_precision_positive(isa):
    excess = torch.full((100,), -0.999)
    state = torch.zeros(100), torch.zeros(100)
    for step in range(1, 60):
        precision.precision_update_sgvb_(
            [excess], [torch.zeros(100)], [state[0]], [state[1]], 50.0, (0.0, 0.0), 1e-8, -1.0, 1.0, 1, 1, step, [0]
        )
        assert (excess + 1.0 > 0).all()


@pytest.mark.parametrize("lr", [1e-6, 1e-3, 0.4, 0.6, 3.0])
def test_small_steps_of_the_precision_do_not_cancel(isa, lr):
    """With β = 0 and eps = 0 Adam's step is ±lr exactly, and from E = 0 with τ⁻² = 1 the result is e^±lr − 1."""
    n = 300
    excess, state = torch.zeros(n), (torch.zeros(n), torch.zeros(n))
    precision.precision_update_sgvb_(
        [excess], [torch.ones(n)], [state[0]], [state[1]], lr, (0.0, 0.0), 0.0, 1.0, 1.0, 3, 4, 1, [0]
    )
    up, down = (float(torch.tensor(sign * lr, dtype=torch.float64).expm1()) for sign in (1, -1))
    expected = torch.where(excess > 0, up, down).double()
    assert (excess > 0).any() and (excess < 0).any()
    # Half a unit each in lr, the step and the sum, times lr where the exponential grows, and 2 of the function itself.
    torch.testing.assert_close(excess.double(), expected, rtol=(4 + 2 * lr) * ULP, atol=0)


@pytest.mark.parametrize("kind", ["f", "delta_f", "dr_fim", "dr_fim_variational"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scores(isa, threads, kind, dtype):
    fisher, shifted = ([(torch.rand(n) ** 4).to(dtype) for n in SIZES] for _ in range(2))
    c, gamma, prior, eps = 0.4, 0.3, 1.5, 1e-2

    def formula(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        a, b = a.double(), b.double()
        damping = prior + eps / gamma if kind == "dr_fim_variational" else eps
        ratio = (a - b).abs() / (torch.minimum(a, b) + damping)
        return {"f": a, "delta_f": ratio, "dr_fim": a + c * ratio, "dr_fim_variational": gamma * (a + c * ratio)}[kind]

    now = [formula(a, b) for a, b in zip(fisher, shifted, strict=True)]
    first = scoring.dr_fim_score(fisher, shifted, kind, c, gamma, prior, eps)
    assert all(s.dtype == torch.float32 for s in first)
    # Difference, sum, quotient, two products and two constants: one spacing each at most; the last sum half.
    assert max(ulps(s, e) for s, e in zip(first, now, strict=True)) <= 7.5
    mean = [torch.full((n,), 0.25) for n in SIZES]
    scoring.dr_fim_score_(mean, fisher, shifted, 3, kind, c, gamma, prior, eps)
    assert all(torch.allclose(m.double(), 0.25 + (e - 0.25) / 3, rtol=1e-6) for m, e in zip(mean, now, strict=True))
    poisoned = [torch.full((n,), math.nan) for n in SIZES]
    scoring.dr_fim_score_(poisoned, fisher, shifted, 1, kind, c, gamma, prior, eps)
    assert all(torch.equal(p, s) for p, s in zip(poisoned, first, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shift", "bits", "depth"), [(21, 11, 0), (10, 11, 11), (0, 10, 22), (16, 16, 0), (31, 1, 0)])
def test_histogram_counts_keys(isa, threads, dtype, shift, bits, depth):
    scores = [awkward(n, dtype) for n in SIZES]
    scores[-1][5::101] = math.nan
    scores[-1][6::97] = -math.nan
    x = np.concatenate([s.float().numpy() for s in scores])
    keys = np.where(x == 0, np.float32(0), x)[~np.isnan(x)].view(np.uint32).astype(np.uint64)
    keys = np.where(keys >> 31 == 1, ~keys & 0xFFFFFFFF, keys | 0x80000000)
    prefix_mask = (0xFFFFFFFF << (32 - depth)) & 0xFFFFFFFF
    prefix = int(keys[len(keys) // 3]) & prefix_mask
    under = keys[(keys & prefix_mask) == prefix]
    counts = threshold.key_histogram(scores, shift, bits, prefix_mask, prefix)
    expected = np.bincount(((under >> shift) & (2**bits - 1)).astype(np.int64), minlength=2**bits)
    np.testing.assert_array_equal(counts[:-1].numpy(), expected)
    assert counts[-1] == np.isnan(x).sum()


def test_no_scores_give_an_empty_histogram(isa):
    assert threshold.key_histogram([torch.empty(0)], 21, 11, 0, 0).sum() == 0


def test_counters_are_flushed_before_they_wrap():
    """More than 2³² equal scores in one bin: the same half a million, listed often enough."""
    scores = [torch.zeros(1 << 19)] * 8200
    counts = threshold.key_histogram(scores, 31, 1, 0, 0)
    assert counts.tolist() == [0, 8200 << 19, 0]


def stable_top_k(scores: list[torch.Tensor], k: int) -> list[np.ndarray]:
    """Indices of the k largest by a stable sort: ties in order of the flat index over the list."""
    x = np.concatenate([s.float().numpy() for s in scores])
    chosen = np.sort(np.argsort(-x.astype(np.float64), kind="stable")[:k])
    bounds = np.cumsum([0] + [s.numel() for s in scores])
    return [chosen[(chosen >= a) & (chosen < b)] - a for a, b in itertools.pairwise(bounds)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fill", ["awkward", "equal", "subnormal"])
@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.5, 1.0])
def test_threshold_and_compaction_are_exact(isa, threads, monkeypatch, dtype, fill, fraction):
    monkeypatch.setattr(search, "SMALL", 1)  # by a sample first
    make = {
        "awkward": awkward,
        "equal": lambda n, dtype: torch.full((n,), -2.0, dtype=dtype),
        "subnormal": lambda n, dtype: (torch.arange(n) % 50 * 1e-42).to(dtype),
    }[fill]
    scores = [make(n, dtype) for n in (*SIZES, 140_000)]
    n = sum(s.numel() for s in scores)
    k = round(fraction * n)
    found = select_threshold(scores, k)  # on CPU tensors its passes are the library's
    if k:
        x = np.concatenate([s.float().numpy() for s in scores])
        assert found.value == np.partition(x, n - k)[n - k]
    indices = compaction.compact(scores, found)
    assert all(index.dtype == torch.int32 for index in indices)
    for index, expected in zip(indices, stable_top_k(scores, k), strict=True):
        np.testing.assert_array_equal(index.numpy(), expected)


def test_compaction_leaves_out_nan_and_what_is_beyond_the_quota(isa):
    scores = [torch.tensor([math.nan, 1.0, 2.0, 1.0, 3.0, 1.0]), torch.ones(200), torch.tensor([math.nan] * 130)]
    indices = compaction.compact(scores, Threshold(1.0, (2, 0, 0), (2, 1, 0)))
    assert [index.tolist() for index in indices] == [[1, 2, 3, 4], [0], []]


@pytest.mark.parametrize("extra", [1, -1])
def test_compaction_refuses_a_wrong_count(isa, threads, extra):
    scores = [awkward(n) for n in (70_001, 200_000)]
    right = select_threshold(scores, 40_000)
    wrong = right._replace(greater_per_tensor=(right.greater_per_tensor[0], right.greater_per_tensor[1] + extra))
    message = rf"stands for {40_000 + extra} elements but the scores hold 40000.*scores\[1\]"
    with pytest.raises(ValueError, match=message):
        compaction.compact(scores, wrong)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("short", [0, 1, 20_000])
def test_compaction_stays_within_its_memory(isa, threads, dtype, short):
    """Fences behind the indices; int64 is what a tensor of more than 2³¹ elements needs."""
    scores = [awkward(300_000), awkward(1000)]
    found = select_threshold(scores, 30_000)
    indices, selected = [], torch.empty(2, dtype=torch.int64)
    rows = native.Rows()
    for score, above, ties in zip(scores, found.greater_per_tensor, found.ties_kept_per_tensor, strict=True):
        room = max(above + ties - short, 0)
        index = torch.full((room + 64,), -7, dtype=dtype)
        indices.append(index)
        rows.add(score.data_ptr(), score.numel(), 0, ties, index.data_ptr(), native.INDEX_DTYPES[dtype], room)
    native.call("ft_compact", rows, found.value, selected.data_ptr())
    for index, count, expected in zip(indices, selected.tolist(), stable_top_k(scores, 30_000), strict=True):
        assert count == len(expected)
        assert (index[-64:] == -7).all()
        if not short:
            np.testing.assert_array_equal(index[:-64].numpy(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stride", [1, 2, 7, 64, 1000])
def test_sample_is_the_references(isa, threads, dtype, stride):
    scores = [awkward(n, dtype) for n in SIZES]
    ours, theirs = threshold.sample_scores(scores, stride), reference.sample_scores(scores, stride)
    assert ours.dtype == torch.float32
    assert torch.equal(ours.nan_to_num(nan=-9.0), theirs.nan_to_num(nan=-9.0))


BRACKETS = {"everything": (0, 2**32 - 1), "one key": (0xBF800000, 0xBF800000), "zero": (0x80000000, 0x80000000),
            "positive": (0x80000001, 0xFF7FFFFF), "across zero": (0x7F000000, 0x80010000), "none": (1, 2)}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", BRACKETS)
def test_bracket_is_the_references(isa, threads, dtype, name):
    scores = [awkward(n, dtype) for n in (*SIZES, 150_000)]
    scores[-1][5::101] = math.nan
    scores[-1][6::97] = -math.nan
    low, high = BRACKETS[name]
    counts, expected = reference.collect_bracket(scores, low, high, 10**6)
    for capacity in {10**6, len(expected), max(len(expected) - 1, 0), 0}:
        ours, candidates = threshold.collect_bracket(scores, low, high, capacity)
        assert torch.equal(ours, counts)
        fits = capacity >= len(expected)
        assert torch.equal(candidates.sort().values, expected.sort().values if fits else expected[:0])


@pytest.mark.parametrize("kind", ["f", "dr_fim_variational"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_and_their_bracket_in_one_pass(isa, threads, kind, dtype):
    fisher, shifted = ([(torch.rand(n) ** 4).to(dtype) for n in SIZES] for _ in range(2))
    options = (2, kind, 0.4, 0.3, 1.5, 1e-2)
    scores = [torch.rand(n, generator=torch.Generator().manual_seed(n)) for n in SIZES]
    apart = [score.clone() for score in scores]
    bracket = (0xBE000000, 0xBF000000, 70_000)
    counts, candidates = scoring.dr_fim_score_collect_(scores, fisher, shifted, *options, *bracket)
    scoring.dr_fim_score_(apart, fisher, shifted, *options)
    assert all(torch.equal(a, b) for a, b in zip(scores, apart, strict=True))
    expected_counts, expected = reference.collect_bracket(apart, *bracket)
    assert torch.equal(counts, expected_counts)
    assert torch.equal(candidates.sort().values, expected.sort().values)
    assert 0 < len(expected) < sum(SIZES)


def test_what_the_library_refuses(isa):
    score = torch.rand(10)
    rows = native.Rows()
    rows.add(score.data_ptr(), 10, 0)
    for low, high, capacity in ((-1, 5, 1), (0, 2**32, 1), (6, 5, 1), (0, 5, -1)):
        bracket = threshold.Bracket(1, 0, 0, 1)
        bracket.low, bracket.high, bracket.capacity = low, high, capacity
        with pytest.raises(ValueError, match=f"bracket from {low} to {high} with room for {capacity}"):
            native.call("ft_collect_bracket", rows, ctypes.addressof(bracket))
    with pytest.raises(ValueError, match="stride is 0"):
        native.call("ft_sample_scores", rows, 0, score.data_ptr())


@pytest.fixture
def fenced(monkeypatch):
    """Makes tensors amid memory that must not change, those the backend allocates included; checks it at the end."""
    margin, canary, buffers = 70_000, 113, []  # wider than any chunk

    def make(n: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        buffer = torch.full((n + 2 * margin,), canary, dtype=dtype)
        buffers.append((buffer, n))
        return buffer[margin : margin + n]

    def empty(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
        return make(math.prod(shape), dtype).view(shape)

    monkeypatch.setattr(torch, "empty", empty)
    yield make
    for buffer, n in buffers:
        assert (buffer[:margin] == canary).all() and (buffer[margin + n :] == canary).all()


def test_compaction_writes_nothing_behind_an_index(isa, fenced):
    generator = torch.Generator().manual_seed(5)
    scores = [torch.randn(n, generator=generator) for n in SIZES]
    indices = compaction.compact(scores, select_threshold(scores, 20_000))
    assert sum(len(index) for index in indices) == 20_000


def test_nothing_behind_a_tensor_is_written(isa, fenced):
    sizes = [n for n in SIZES if n]
    make = lambda dtype=torch.float32: [fenced(n, dtype).copy_(torch.rand(n)) for n in sizes]  # noqa: E731
    for dtype in DTYPES:
        a, b, c, half = make(), make(), make(), make(dtype)
        squares.squared_grad_accumulate_(a, half, 0.5)
        precision.precision_update_natural_(a, half, 0.1, 1.0)
        offsets = [3] * len(sizes)
        precision.precision_update_sgvb_(a, half, b, c, 0.1, (0.9, 0.99), 1e-8, 0.5, 1.0, 1, 2, 3, offsets)
        scoring.dr_fim_score_(a, half, half, 2, "dr_fim", 0.5)
        indices = [torch.arange(0, n, 2) for n in sizes]
        state = [[fenced(len(index)).fill_(0.5) for index in indices] for _ in range(3)]
        adamw.sparse_adamw_(half, half, indices, state[0], state[1], **ADAMW, step=1, master=state[2])
        values.scatter_values_(half, indices, values.gather_values(half, indices))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 5, 128, 129, 255, 5000])
def test_neighbours_step_as_scattered_elements_do(isa, threads, dtype, count):
    """Rising indices without a gap take a path of their own, whole blocks of them and those with one gap."""
    generator = torch.Generator().manual_seed(count)
    for gap in (0, count // 2):  # elements left out after the gap-th selected one
        near = torch.arange(count, dtype=torch.int32) + 3
        near[gap:] += min(gap, 1)
        far = torch.arange(1, 2 * count, 2, dtype=torch.int32)
        weights, slopes, mean, square = torch.rand(4, count, generator=generator)
        found = []
        for index in (near, far):
            param, grad = (torch.full((int(index[-1]) + 200,), 7.0, dtype=dtype) for _ in range(2))
            param[index.long()], grad[index.long()] = weights.to(dtype), slopes.to(dtype)
            before, state = param.clone(), [mean.clone(), square.clone()]
            adamw.sparse_adamw_([param], [grad], [index], [state[0]], [state[1]], **ADAMW, step=2)
            if index is far:  # and so do gradients that hold the selected elements alone
                compact, again = before.clone(), [mean.clone(), square.clone()]
                lists = [compact], [grad[index.long()]], [index], [again[0]], [again[1]]
                adamw.sparse_adamw_(*lists, **ADAMW, step=2, compact_grads=True)
                assert torch.equal(compact, param) and torch.equal(again[0], state[0])
            norm = norms.selected_grad_norm([grad], [index])
            found.append([param[index.long()], *state, norm])
            before[index.long()] = param[index.long()]
            assert torch.equal(before, param)
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def selections(n: int, fraction: float, dtype: torch.dtype) -> torch.Tensor:
    return (torch.rand(n, generator=torch.Generator().manual_seed(n)) < fraction).nonzero().squeeze(1).to(dtype)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("fraction", [0.05, 1.0])
def test_step_follows_torch_adamw(isa, threads, index_dtype, fraction):
    start = [torch.randn(n) for n in SIZES]
    params = [s.clone() for s in start]
    indices = [selections(n, fraction, index_dtype) for n in SIZES]
    moments = [[torch.zeros(len(i)) for i in indices] for _ in range(2)]
    dense = [torch.nn.Parameter(s.double()) for s in start]
    oracle = torch.optim.AdamW(dense, **ADAMW)
    for step in range(1, 8):
        grads = [torch.randn(n, generator=torch.Generator().manual_seed(step)) for n in SIZES]
        for p, g in zip(dense, grads, strict=True):
            p.grad = g.double()
        oracle.step()
        doubled = [2 * g for g in grads]
        adamw.sparse_adamw_(params, doubled, indices, *moments, **ADAMW, step=step, grad_scale=0.5)
    for p, s, i, d in zip(params, start, indices, dense, strict=True):
        chosen = torch.zeros(p.shape, dtype=torch.bool)
        chosen[i.long()] = True
        assert torch.equal(p[~chosen], s[~chosen])
        # Seven steps, each with a relative error of some ulp of a move of about lr, and one rounding of the parameter.
        assert ((p - d)[chosen].abs() <= 7 * (8 * ULP * 1e-2 + ULP * d.abs()[chosen].clamp_min(0.1))).all()


@pytest.mark.parametrize("param_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grad_dtype", DTYPES)
@pytest.mark.parametrize("with_master", [False, True])
def test_step_in_half_precision(isa, param_dtype, grad_dtype, with_master):
    n = 5001
    start, grad = torch.randn(n).to(param_dtype), torch.randn(n).to(grad_dtype)
    index = selections(n, 0.3, torch.int32)
    rows = index.long()
    param = start.clone()
    wide = torch.nn.Parameter(start[rows].double())
    oracle = torch.optim.AdamW([wide], **ADAMW)
    mean, square, master = torch.zeros(len(rows)), torch.zeros(len(rows)), start[rows].float()
    for step in (1, 2, 3):
        wide.grad = grad[rows].double()
        oracle.step()
        adamw.sparse_adamw_(
            [param], [grad], [index], [mean], [square], **ADAMW, step=step, master=[master] if with_master else None
        )
        if not with_master:
            # The stored value is the rounded one, and the next step starts from it.
            step_error = 2.0**-8 if param_dtype == torch.bfloat16 else 2.0**-11
            assert ((param[rows].double() - wide).abs() <= 1.01 * step_error * wide.abs() + 8 * ULP).all()
            wide.data.copy_(param[rows])
    if with_master:
        assert (master - wide).abs().max() <= 16 * ULP
        assert torch.equal(param[rows], master.to(param_dtype))
    untouched = torch.ones(n, dtype=torch.bool)
    untouched[rows] = False
    assert torch.equal(param[untouched], start[untouched])


def test_inactive_elements_gather_momentum_but_do_not_move(isa):
    n = 1000
    start, grad = torch.randn(n), torch.randn(n)
    index, scores = torch.arange(n, dtype=torch.int32), torch.rand(n)
    scores[3] = 0.5
    gated, free = start.clone(), start.clone()
    gated_state, free_state = ([torch.zeros(n), torch.zeros(n)] for _ in range(2))
    master = start.clone()
    for state, param, extra in (
        (gated_state, gated, {"scores": [scores], "active_threshold": 0.5, "master": [master]}),
        (free_state, free, {}),
    ):
        adamw.sparse_adamw_([param], [grad], [index], [state[0]], [state[1]], **ADAMW, step=1, **extra)
    assert all(torch.equal(a, b) for a, b in zip(gated_state, free_state, strict=True))
    active = scores >= 0.5
    assert torch.equal(gated[active], free[active])
    assert torch.equal(gated[~active], start[~active])
    assert torch.equal(master, gated)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8, torch.int32])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_gather_and_scatter(isa, threads, dtype, index_dtype):
    tensors = [(torch.randn(n) * 100).to(dtype) for n in SIZES]
    indices = [selections(n, 0.4, index_dtype) for n in SIZES]
    gathered = values.gather_values(tensors, indices)
    assert all(torch.equal(v, t[i.long()]) for v, t, i in zip(gathered, tensors, indices, strict=True))
    targets = [torch.zeros_like(t) for t in tensors]
    values.scatter_values_(targets, indices, gathered)
    for target, tensor, index in zip(targets, tensors, indices, strict=True):
        expected = torch.zeros_like(tensor)
        expected[index.long()] = tensor[index.long()]
        assert torch.equal(target, expected)


def every_operator() -> list[torch.Tensor]:
    """One run of all operators on fixed inputs."""
    n = 66_000
    generator = torch.Generator().manual_seed(3)
    a, b, c = (torch.randn(n, generator=generator) for _ in range(3))
    out = []
    for dtype in DTYPES:
        x, state, m, v = a.to(dtype), b.square(), c * 0.1, c.square()
        squares.squared_grad_accumulate_([state], [x], 0.3)
        tokens, channels = x.view(3, 20, 1100), [torch.zeros(1100), torch.zeros(1100)]
        affine.per_sample_affine_squared_grad_(*channels, tokens, tokens, 0.5)
        out += channels
        out += perturbing.gaussian_perturb([x], [state], 0.5, 1, 2, [5])
        precision.precision_update_natural_([state], [x.square()], 0.1, 0.2)
        precision.precision_update_sgvb_([state], [x], [m], [v], 0.1, (0.9, 0.99), 1e-8, 0.5, 1.0, 1, 2, 3, [5])
        out += [state, m, v, *scoring.dr_fim_score([x.square()], [(x + 1).square()], "dr_fim", 0.3)]
        param, index = x.clone(), selections(n, 0.1, torch.int32)
        m, v = (s[: len(index)].clone() for s in (m, v))
        adamw.sparse_adamw_([param], [x], [index], [m], [v], **ADAMW, step=4)
        out += [param, m, v]
        out.append(norms.selected_grad_norm([x, a], [index, index]))
        out.append(norms.selected_grad_norm([x], None))
        if dtype == torch.bfloat16:
            adamw.sparse_adamw_([param], [x[index]], [index], [m], [v], **ADAMW, step=5, compact_grads=True, seed=7,
                                offsets=[2**33 + 1])  # fmt: skip
            out.append(param)
    return out


def test_results_do_not_depend_on_instruction_set_or_threads(isa):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        actual = every_operator()
        torch.set_num_threads(1)
        native.set_isa("portable")
        expected = every_operator()
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))


@pytest.mark.parametrize("whole", [False, True])
def test_the_norms_sum_is_the_same_to_the_last_bit(isa, whole):
    """In float64, of which the float32 result would hide the last bits."""
    tensors = [torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in SIZES]
    indices = [selections(n, 0.5, torch.int64) for n in SIZES]

    def squares(threads: int) -> float:
        rows, norm = native.Rows(), ctypes.c_double()
        for t, i in zip(tensors, indices, strict=True):
            index, count = (0, t.numel()) if whole else (i.data_ptr(), i.numel())
            rows.add(t.data_ptr(), index, t.numel(), count, 0, 1)
        assert native.lib().ft_selected_grad_norm(*rows.arguments, ctypes.addressof(norm), threads) == 0
        return norm.value

    found = squares(3)
    chosen = tensors if whole else [t[i] for t, i in zip(tensors, indices, strict=True)]
    # Sums of positive terms in float64: 256 to a lane of a chunk, then 25 chunks.
    assert abs(found / float(torch.cat(chosen).double().norm()) - 1) < 300 * 2.0**-53
    assert squares(1) == found
    native.set_isa("portable")
    assert squares(2) == found


def test_half_conversions_agree_with_torch_on_every_bit_pattern(isa):
    patterns = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    edges = torch.tensor(
        [65519.9, 65520.0, 65536.0, 1e10, 2.0**-25, 1.5 * 2.0**-25, -(2.0**-24), 3.4e38, math.inf, math.nan]
    )
    # The carry of rounding would make these infinity or −0.
    odd_nan = torch.tensor([0x7F800001, 0x7FFFFFFF, -0x7FFFFF, -1], dtype=torch.int32).view(torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        half = patterns.view(dtype)
        widened = [torch.zeros(2**16)]
        scoring.dr_fim_score_(widened, [half], [half], 1, "f", 0.0)
        assert torch.equal(widened[0].isnan(), half.isnan())
        finite = ~half.isnan()
        assert torch.equal(widened[0][finite], half.float()[finite])
        # A step of size zero stores its fp32 master value, rounded.
        ordered = half[half.isfinite()].float().sort().values
        ties = ordered[1:] / 2 + ordered[:-1] / 2  # halfway between neighbours, exactly
        for wide in (half.float() * 1.0003, edges, ties, odd_nan):
            stored, zeros = torch.zeros(len(wide), dtype=dtype), torch.zeros(len(wide))
            adamw.sparse_adamw_(
                [stored], [zeros], [torch.arange(len(wide), dtype=torch.int32)], [zeros.clone()], [zeros.clone()],
                lr=0.0, betas=(0.9, 0.9), eps=1.0, weight_decay=0.0, step=1, master=[wide.clone()],
            )  # fmt: skip
            expected = wide.to(dtype)
            assert torch.equal(stored.isnan(), expected.isnan())
            assert torch.equal(stored.nan_to_num(), expected.nan_to_num())


def test_index_out_of_range_is_refused_before_anything_is_written():
    param, state = torch.zeros(10), torch.zeros(2)
    for bad in ([3, 10], [-1, 3], [4, 3]):
        index = torch.tensor(bad, dtype=torch.int32)
        with pytest.raises(ValueError, match=f"indices run from {bad[0]} to {bad[1]} in a tensor of 10 elements"):
            adamw.sparse_adamw_([param], [torch.ones(10)], [index], [state], [state.clone()], **ADAMW, step=1)
    assert not param.any()
    assert not state.any()


def test_memory_that_cannot_be_written_in_place_is_refused():
    with pytest.raises(ValueError, match="contiguous"):
        squares.squared_grad_accumulate_([torch.zeros(4, 4).T[:, :2]], [torch.zeros(4, 2)])
    with pytest.raises(TypeError, match=r"expected torch\.float32"):
        squares.squared_grad_accumulate_([torch.zeros(4, dtype=torch.float64)], [torch.zeros(4)])


def test_unknown_instruction_set_names_the_known_ones():
    with pytest.raises(ValueError, match="avx512, avx2 or portable"):
        native.set_isa("sse9")


@pytest.mark.parametrize(
    ("content", "explanation"), [(None, "names no file; correct it"), (b"not a library", "cannot be used")]
)
def test_missing_and_foreign_libraries_are_explained(tmp_path, monkeypatch, content, explanation):
    path = tmp_path / "other.so"
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setenv("FISHERTUNE_NATIVE_LIBRARY", str(path))
    native._load.cache_clear()
    try:
        assert not native.available()
        assert str(path) in native.why_not()
        assert explanation in native.why_not()
    finally:
        native._load.cache_clear()


def test_a_library_of_another_interface_version_is_refused(tmp_path, monkeypatch):
    native._load.cache_clear()
    monkeypatch.setattr(native, "ABI_VERSION", 999)
    try:
        assert not native.available()
        with pytest.raises(RuntimeError, match=r"has interface version \d+, this package needs 999.*build_native"):
            native.lib()
    finally:
        native._load.cache_clear()


def test_header_and_loader_agree_on_the_interface_version():
    assert native.lib().ft_abi_version() == native.ABI_VERSION


def test_structures_have_the_size_the_header_gives_them():
    assert ctypes.sizeof(adamw._AdamW) == 11 * 8
    assert ctypes.sizeof(precision._Sgvb) == 10 * 8
