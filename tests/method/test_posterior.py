"""Posterior precision estimators against known answers, literal formulas and torch.optim.Adam."""

import math
import re
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from fishertune.files import load_tensors, save_tensors
from fishertune.fisher.posterior import SGVB, ClosedForm, Local, Natural, make_estimator
from fishertune_kernels import gaussian_perturb

GAMMA, TAU = 0.02, 0.5


# A quadratic with a known answer --------------------------------------------------------------------------------------


class KnownQuadratic:
    """Linear regression with unit noise, where Hessian and Fisher are the same and diagonal.

    Sample (j, ±): x = √(d·h_j)·e_j, y = xᵀŵ ± 1, L = ½(xᵀw − y)². At ŵ the residual is ∓1, so the mean of the squared
    per-sample gradients is exactly h_j, the mean gradient 0 and the Hessian of the mean loss diag(h).
    """

    def __init__(self, h: torch.Tensor):
        self.h = h.double()
        d = len(h)
        generator = torch.Generator().manual_seed(0)
        self.model = nn.Linear(d, 1, bias=False).double()
        with torch.no_grad():
            self.model.weight.copy_(torch.randn(1, d, generator=generator))
        x = torch.diag((d * self.h).sqrt()).repeat_interleave(2, dim=0)
        noise = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(d)
        self.batch = (x, (x @ self.model.weight.detach().T).squeeze(1) + noise)

    def precision(self, gamma: float, tau: float) -> torch.Tensor:
        """Λ* = F/γ + τ⁻² (Eq. 14)."""
        return self.h / gamma + tau**-2


def half_square(model, batch):
    x, y = batch
    return 0.5 * (model(x).squeeze(1) - y) ** 2


def test_closed_form_finds_the_precision_of_a_known_quadratic():
    problem = KnownQuadratic(torch.logspace(-9, 1, 8))
    estimator = ClosedForm(GAMMA, TAU)
    x, y = problem.batch
    for part in (slice(0, 3), slice(3, 10), slice(10, 16)):  # uneven batches: every sample counts alike
        estimator.update(problem.model, half_square, (x[part], y[part]))
    # float64; the residual ±1 is the difference of two numbers near 10, good to 1e-15·10
    torch.testing.assert_close(estimator.fisher()["weight"][0], problem.h, rtol=1e-12, atol=0)
    torch.testing.assert_close(estimator.precision()["weight"][0], problem.precision(GAMMA, TAU), rtol=1e-12, atol=0)


def test_natural_finds_the_precision_of_a_known_quadratic():
    d, beta = 8, 0.01
    problem = KnownQuadratic(torch.logspace(-3, 1, d))
    estimator = Natural(GAMMA, TAU, beta)
    for _ in range(700):
        estimator.update(problem.model, half_square, problem.batch)
    precision = estimator.precision()["weight"][0]

    # At w = ŵ + δ the squares average to h(1 + x²δ²) with x² = d·h, so under q: γ(Λ − τ⁻²) = h + d·h²/Λ.
    h, prior = problem.h, TAU**-2
    b = h / GAMMA + prior
    under_q = (b + (b**2 + 4 * d * h**2 / GAMMA).sqrt()) / 2
    # One draw of δ² has relative variance 2; an average with weight β keeps β/(2−β) of it. Six standard deviations.
    noise = (d * h**2 / GAMMA) / under_q * math.sqrt(2 * beta / (2 - beta))
    assert ((precision - under_q).abs() < 6 * noise + 1e-9 * under_q).all()
    # and Λ* itself is off by no more than the width of q moves the Fisher: d·h²/(γΛ) ≤ d·h
    assert ((precision - problem.precision(GAMMA, TAU)).abs() <= d * h + 6 * noise).all()
    assert ((under_q - problem.precision(GAMMA, TAU)).abs() > 6 * noise)[-1], "the two answers would look alike"


@pytest.mark.parametrize("antithetic", [False, True])
def test_sgvb_finds_the_precision_of_a_known_quadratic(antithetic):
    """SGVB estimates the Hessian's diagonal, the others the Fisher's; this model has one answer for both."""
    copies = 48  # each h 48 times: the mean of log Λ over the copies takes the noise down
    problem = KnownQuadratic(torch.tensor([0.05, 0.2, 0.5]).repeat_interleave(copies))
    x, y = problem.batch
    if antithetic:  # one sign of the noise only: the Hessian is the same, but the mean gradient is no longer zero at ŵ
        x, y = x[::2], y[::2]
    gamma, tau, lr, beta2 = 0.1, 1.0, 0.01, 0.99
    estimator = SGVB(gamma, tau, lr, antithetic, betas=(0.9, beta2), seed=3)
    total = torch.zeros(3 * copies, dtype=torch.float64)
    steps, settled = 1100, 500  # log Λ has up to ln 6 = 1.8 to go at about 0.01 a step
    for step in range(steps):
        estimator.update(problem.model, half_square, (x, y))
        if step >= settled:
            total += estimator.precision()["weight"][0].log()
    found = (total / (steps - settled)).view(3, copies).mean(1)
    expected = problem.precision(gamma, tau).log().view(3, copies)[:, 0]
    # Near the fixed point the gradient over Adam's √v is x/√2 + ξ with unit noise ξ = −(ε²−1)/√2, x the distance in
    # log Λ: an AR(1) of variance lr/√2 = 0.084² and memory √2/lr = 140 steps. 600 steps hold two independent values,
    # times 48 copies: standard deviation 0.084/√96 = 0.009. Two biases: ξ is skewed (E ξ³ = −√8) and part of its own v,
    # ½(1−β2)·√8·√2 = 0.02; and the curvature of the drift, of the order of the variance, 0.007.
    assert (found - expected).abs().max() < 6 * 0.009 + 0.02 + 0.007
    assert (expected - math.log(tau**-2)).min() > 0.4, "the answer must differ from where the estimator starts"


# One update against the literal formula -------------------------------------------------------------------------------


def make_model(dtype=torch.float64) -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Dropout(0.5), nn.GELU(), nn.Linear(6, 3)).to(dtype)


def make_batch(count=4, dtype=torch.float64, seed=11):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 5, generator=generator).to(dtype), torch.randint(3, (count,), generator=generator)


def cross_entropy(model, batch, labels="empirical"):
    x, y = batch
    return nn.functional.cross_entropy(model(x), y, reduction="none")


def loss_of_one(model, parameters, x, y):
    logits = functional_call(model, parameters, (x[None],))
    return nn.functional.cross_entropy(logits, y[None])


def oracle_squares(model, parameters, batch):
    """Mean of squared per-sample gradients by vmap, in eval mode."""
    model.eval()
    per_sample = vmap(grad(lambda p, x, y: loss_of_one(model, p, x, y)), in_dims=(None, 0, 0))
    return {name: value.square().mean(0) for name, value in per_sample(parameters, *batch).items()}


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def drawn_weights(model, excess, tau, seed, step, sign=1.0):
    names = list(excess)
    values = weights(model)
    draws = gaussian_perturb(
        [values[name] for name in names],
        list(excess.values()),
        prior_precision=tau**-2,
        seed=seed,
        step=step,
        sign=sign,
    )
    return dict(zip(names, draws, strict=True))


def test_closed_form_equals_vmap_over_batches_of_different_size():
    model, estimator = make_model(), ClosedForm(GAMMA, TAU)
    batches = [make_batch(count, seed=count) for count in (2, 5, 3)]
    for batch in batches:
        estimator.update(model, cross_entropy, batch)
    everything = tuple(torch.cat(parts) for parts in zip(*batches, strict=True))
    expected = oracle_squares(model, weights(model), everything)
    assert estimator.samples == 10 and estimator.steps == 3
    for name, value in expected.items():
        torch.testing.assert_close(estimator.excess[name], value / GAMMA, rtol=1e-10, atol=1e-14)


def test_natural_takes_the_squares_at_the_drawn_weights():
    model, batch, seed = make_model(), make_batch(), 5
    estimator = Natural(GAMMA, TAU, beta=0.5, seed=seed)
    excess = {name: torch.zeros_like(value) for name, value in weights(model).items()}
    for step, beta in enumerate([1.0, 0.5, 0.5]):  # 1/t until it has come down to beta
        squares = oracle_squares(model, drawn_weights(model, excess, TAU, seed, step), batch)
        excess = {name: (1 - beta) * value + beta * squares[name] / GAMMA for name, value in excess.items()}
        estimator.update(model, cross_entropy, batch)
    for name, value in excess.items():
        torch.testing.assert_close(estimator.excess[name], value, rtol=1e-9, atol=1e-12)
    at_the_mean = oracle_squares(model, weights(model), batch)["0.weight"]
    assert (estimator.fisher()["0.weight"] - at_the_mean).abs().max() > 1e-3


@pytest.mark.parametrize("antithetic", [False, True])
def test_sgvb_is_adam_on_the_log_precision(antithetic):
    model, batch, seed, lr = make_model(), make_batch(), 9, 0.1
    estimator = SGVB(GAMMA, TAU, lr, antithetic, betas=(0.8, 0.95), seed=seed)
    log_precision = {
        name: torch.full_like(value, math.log(TAU**-2)).requires_grad_() for name, value in weights(model).items()
    }
    adam = torch.optim.Adam(log_precision.values(), lr=lr, betas=(0.8, 0.95), eps=1e-8)
    for step in range(4):
        adam.zero_grad()
        zeros = [torch.zeros_like(value) for value in weights(model).values()]
        epsilon = gaussian_perturb(zeros, zeros, prior_precision=1.0, seed=seed, step=step)
        objective = 0.0
        for sign in (1.0, -1.0) if antithetic else (1.0,):
            theta = {  # the reparameterisation: autograd goes through Λ
                name: value + sign * (-log_precision[name] / 2).exp() * e
                for (name, value), e in zip(weights(model).items(), epsilon, strict=True)
            }
            model.eval()
            logits = functional_call(model, theta, (batch[0],))
            objective = objective + nn.functional.cross_entropy(logits, batch[1]) / (2 if antithetic else 1)
        kl = sum(0.5 * (TAU**-2 * (-value).exp() + value).sum() for value in log_precision.values())
        (objective + GAMMA * kl).backward()
        adam.step()
        estimator.update(model, cross_entropy, batch)
    for name, value in log_precision.items():
        torch.testing.assert_close(estimator.precision()[name].log(), value.detach(), rtol=1e-8, atol=1e-10)


# Local reparameterisation ---------------------------------------------------------------------------------------------

OUTPUTS = torch.tensor([0.05, 0.5, 2.0], dtype=torch.float64)  # curvature of the loss in each output


def seen_by_linear(x_NTI):
    return x_NTI.square().sum((1, 2)).mean() * OUTPUTS


def seen_by_grouped_convolution(x_NCHW):
    """Mean over samples of Σ over positions of ‖patch‖², by torch's own unfold, for each of the two groups."""
    halves = [nn.functional.unfold(half, 3, padding=1, stride=2).square().sum((1, 2)) for half in x_NCHW.chunk(2, 1)]
    return torch.stack([halves[0], halves[1]]).mean(1).repeat_interleave(2) * torch.tensor([0.1, 0.5, 0.1, 1.0])


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_local_finds_the_row_precisions_of_a_linear_gaussian_layer(kind, antithetic):
    """L = ½Σ_o h_o Σ_t (y_ot − target)²: E_q[L] is L(θ̂) + ½Σ_o h_o Σ_t ‖x_t‖²/Λ_o exactly, so the answer is known."""
    generator = torch.Generator().manual_seed(1)
    if kind == "linear":
        layer = nn.Linear(4, 3, bias=False).double()
        x = torch.randn(64, 32, 4, generator=generator, dtype=torch.float64)
        weights_of_outputs, row = OUTPUTS, 4
        trace = seen_by_linear(x)
    else:
        layer = nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=2, bias=False).double()
        x = torch.randn(40, 4, 14, 14, generator=generator, dtype=torch.float64)
        x[:, 2:] *= 0.5  # the groups differ
        weights_of_outputs, row = torch.tensor([0.1, 0.5, 0.1, 1.0], dtype=torch.float64).view(4, 1, 1), 18
        trace = seen_by_grouped_convolution(x)
    target = layer(x).detach()

    def loss_fn(model, batch):
        return 0.5 * (weights_of_outputs * (model(batch) - target) ** 2).flatten(1).sum(1)

    gamma, tau, lr = 1.0, 1.0, 0.03
    estimator = Local(gamma, tau, lr, antithetic, betas=(0.9, 0.9))  # √v must fall as fast as the gradient does
    steps, settled, total = 350, 250, 0.0  # log Λ has up to ln 65 = 4.2 to go at about 0.03 a step
    for step in range(steps):
        estimator.update(layer, loss_fn, x)
        if step >= settled:
            total = total + estimator.precision()["weight"].flatten(1).log()
    found = total / (steps - settled)
    expected = (trace / (gamma * row) + tau**-2).log()
    assert torch.equal(found, found[:, :1].expand_as(found)), "one precision per row"
    # At θ̂ the first-order term is zero with and without the mirrored pass. −½Σdy·z is a sum of at least 1,960 squares
    # of normals: relative noise r = √(2/1960) = 0.03. Over Adam's √v that is an AR(1) in log Λ of variance lr·r/2 =
    # 0.021² and a memory of 2r/lr = 2 steps, or Adam's own of about 10 for m and v: the mean of 100 steps has a
    # standard deviation of at most 0.007. Six of them.
    assert (found[:, 0] - expected).abs().max() < 0.042
    assert (expected - math.log(tau**-2)).min() > 0.2, "the answer must differ from where the estimator starts"
    assert expected.diff().abs().min() > 0.1, "rows that look alike would hide a permutation"


def test_one_local_update_follows_the_noise_it_added():
    """∂L/∂log Λ = −½Σ dy·z with z the noise that arrived at the outputs, whoever drew it: seen through hooks."""
    model, batch, beta1 = make_model(), make_batch(6), 0.5
    estimator = Local(GAMMA, TAU, 0.1, betas=(beta1, 0.9), seed=4)
    estimator.update(model, cross_entropy, make_batch(seed=3))  # away from the prior: rows differ
    precision = estimator.precision()
    before = {name: value.clone() for name, value in estimator.state_dict()["tensors"].items()}
    seen = {}

    def watch(name):
        def hook(module, inputs, output):
            seen[name] = [inputs[0].detach(), output.detach()]
            output.register_hook(lambda grad: seen[name].append(grad))

        return hook

    handles = [model[i].register_forward_hook(watch(str(i))) for i in (0, 1, 4)]
    estimator.update(model, cross_entropy, batch)
    for handle in handles:
        handle.remove()
    expected, noise = {}, []
    for layer in ("0", "4"):
        x, y, dy = seen[layer]
        module = model[int(layer)]
        z = y - module(x).detach()
        of_weight = x.square().sum(1, keepdim=True) / precision[f"{layer}.weight"][:, 0]
        share = of_weight / (of_weight + 1 / precision[f"{layer}.bias"])
        noise.append((z / (of_weight + 1 / precision[f"{layer}.bias"]).sqrt()).flatten())
        expected[f"{layer}.weight"] = -0.5 * (dy * z * share).sum(0) / x.shape[1]  # per element of the row
        expected[f"{layer}.bias"] = -0.5 * (dy * z * (1 - share)).sum(0)
    x, y, dy = seen["1"]  # a norm has no output to draw: its parameters are drawn
    excess = {name: value - TAU**-2 for name, value in precision.items()}
    drawn = drawn_weights(model, excess, TAU, seed=4, step=1)
    normalised = nn.functional.layer_norm(x, (6,))
    torch.testing.assert_close(y, normalised * drawn["1.weight"] + drawn["1.bias"])
    for name, gradient in (("1.weight", (dy * normalised).sum(0)), ("1.bias", dy.sum(0))):
        expected[name] = -0.5 * gradient * (drawn[name] - weights(model)[name])
        noise.append((drawn[name] - weights(model)[name]) * precision[name].sqrt())
    everything = torch.cat(noise).sort().values
    assert everything.diff().min() > 1e-6, "no two layers, and no layer and a drawn parameter, share an ε"
    after = estimator.state_dict()["tensors"]
    for name, gradient in expected.items():
        rows = precision[name].flatten(1)[:, 0] if precision[name].dim() > 1 else precision[name]
        full = gradient + 0.5 * GAMMA * (1 - TAU**-2 / rows)
        moved = beta1 * before[f"exp_avg/{name}"] + (1 - beta1) * full
        torch.testing.assert_close(after[f"exp_avg/{name}"], moved, rtol=1e-8, atol=1e-12, msg=name)
        second = 0.9 * before[f"exp_avg_sq/{name}"] + 0.1 * full**2
        change = -0.1 * (moved / (1 - beta1**2)) / ((second / (1 - 0.9**2)).sqrt() + 1e-8)
        found = estimator.precision()[name].log().flatten(1) if precision[name].dim() > 1 else None
        if found is not None:  # Adam's step, the same for all elements of the row
            torch.testing.assert_close(found, (rows.log() + change)[:, None].expand_as(found), rtol=1e-8, atol=1e-10)


def noise_at_the_output(estimator, layer, x, **keywords):
    """What an update of ``estimator`` adds to the output of ``layer``, in units of its standard deviation."""
    seen = []

    def loss_fn(model, batch):
        seen.append(model(batch, **keywords))
        return seen[-1].flatten(1).sum(1)

    plain = layer(x, **keywords).detach()
    rows = {name: value.clone() for name, value in estimator.precision().items()}
    estimator.update(layer, loss_fn, x)
    variance = x.square().sum(-1, keepdim=True) / (rows["weight"][:, 0] if rows else TAU**-2) + (
        1 / rows["bias"] if rows else TAU**2
    )
    return [(y.detach() - plain) / variance.sqrt() for y in seen]


def test_the_noise_is_standard_normal_for_every_sample_and_position():
    torch.manual_seed(0)
    layer, x = nn.Linear(7, 16).double(), torch.randn(8, 30, 7, dtype=torch.float64)
    estimator = Local(GAMMA, TAU, antithetic=True, seed=2)
    first, mirrored = noise_at_the_output(estimator, layer, x)
    again, _ = noise_at_the_output(estimator, layer, x)
    partner, _ = noise_at_the_output(Local(GAMMA, TAU, antithetic=True, seed=2), layer, x)
    other, _ = noise_at_the_output(Local(GAMMA, TAU, antithetic=True, seed=3), layer, x)
    torch.testing.assert_close(mirrored, -first)
    torch.testing.assert_close(partner, first, msg="one seed, one draw: x and x' share it")
    count = first.numel()
    for noise in (first, again, other):  # five standard errors of a mean and of a variance
        assert abs(noise.mean()) < 5 / math.sqrt(count) and abs(noise.var() - 1) < 5 * math.sqrt(2 / count)
        assert noise.unique().numel() == count, "no two outputs share an ε"
    for one, two in ((first, again), (first, other), (first[:, 1:], first[:, :-1])):
        assert abs((one * two).mean()) < 5 / math.sqrt(one.numel())


class Twice(nn.Module):
    """One layer used twice, on an input that is zero in places."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3, bias=False).double()
        self.outputs = []

    def forward(self, x):
        self.outputs = [self.layer(x), self.layer(x)]
        return self.outputs[0] + self.outputs[1]


def test_a_layer_used_twice_gets_fresh_noise_and_a_zero_input_none():
    model, x = Twice(), torch.randn(4, 3, dtype=torch.float64)
    x[1] = 0
    estimator = Local(GAMMA, TAU)
    estimator.update(model, lambda model, batch: model(batch).square().sum(1), x)
    one, two = model.outputs
    assert not torch.isclose(one[0], two[0]).any()
    assert max(one[1].abs().max(), two[1].abs().max()) < 1e-150  # the root of the smallest float64, kept off zero
    assert bool(estimator.excess["layer.weight"].isfinite().all())


def test_local_noise_of_a_layer_does_not_depend_on_what_else_is_estimated():
    model, batch, outputs = make_model(), make_batch(), []
    handle = model[0].register_forward_hook(lambda module, inputs, output: outputs.append(output.detach()))
    for params in (None, ["4.weight", "0.weight", "0.bias"]):
        Local(GAMMA, TAU, params=params).update(model, cross_entropy, batch)
    handle.remove()
    assert torch.equal(outputs[0], outputs[1])


# What an update leaves alone ------------------------------------------------------------------------------------------

ALL = [
    ("closed_form", {}),
    ("natural", {"beta": 0.3}),
    ("sgvb", {"antithetic": True}),
    ("local", {"antithetic": True}),
]


@pytest.mark.parametrize(("name", "options"), ALL)
@pytest.mark.parametrize("raises", [False, True])
def test_the_model_is_left_bit_for_bit_as_it_was(name, options, raises):
    model = make_model(torch.float32)
    model.train()
    model[1].eval()  # a part that was in eval mode before stays so
    model[4].weight.requires_grad_(False)
    with torch.no_grad():
        model[0].weight[0, 0] = -0.0
        model[0].weight[0, 1] = float("nan")  # a payload that arithmetic would not bring back
        model[0].weight.view(torch.int32)[0, 1] = 0x7FC12345
    bits = {key: value.view(torch.int32).clone() for key, value in weights(model).items()}
    addresses = {key: value.data_ptr() for key, value in model.named_parameters()}
    random_state = torch.get_rng_state()
    names = ["0.bias", "1.weight", "4.weight", "0.weight"]
    estimator = make_estimator(name, gamma=GAMMA, tau=TAU, params=names, **options)
    calls = []

    def loss_fn(model, batch):
        calls.append(None)
        if raises and len(calls) == (2 if "antithetic" in options else 1):  # inside the mirrored pass
            raise KeyError("loss")
        x, _ = batch
        return model[4](model[3](x @ torch.nan_to_num(model[0].weight).T + model[0].bias)).square().sum(1)

    if raises:
        with pytest.raises(KeyError):
            estimator.update(model, loss_fn, make_batch(dtype=torch.float32))
        assert estimator.steps == estimator.samples == 0
        assert not any(bool(value.any()) for value in estimator.excess.values())
    else:
        estimator.update(model, loss_fn, make_batch(dtype=torch.float32))
        assert estimator.excess["4.weight"].any(), "a frozen parameter can be estimated"
    for key, value in model.named_parameters():
        assert torch.equal(value.detach().view(torch.int32), bits[key]), key
        assert value.data_ptr() == addresses[key] and value.grad is None
        assert value.requires_grad == (key != "4.weight")
    assert [module.training for module in model] == [True, False, True, True, True] and model.training
    assert torch.equal(torch.get_rng_state(), random_state)


def spy_on(seen):
    def loss_fn(model, batch):
        seen.append(weights(model))
        return cross_entropy(model, batch)

    return loss_fn


def test_draws_depend_on_the_element_and_the_update_not_on_what_else_is_estimated():
    model, batch = make_model(), make_batch()
    everything, restricted, partner, other_seed = [], [], [], []
    for seen, options in (
        (everything, {}),
        (restricted, {"params": ["4.bias", "1.weight"]}),
        (partner, {}),
        (other_seed, {"seed": 1}),
    ):
        estimator = Natural(GAMMA, TAU, **options)
        for _ in range(2):
            estimator.excess.clear()  # back to the prior, so that only ε decides
            estimator.update(model, spy_on(seen), batch)
    plain = weights(model)
    for name in ("4.bias", "1.weight"):
        assert torch.equal(restricted[0][name], everything[0][name])
    assert torch.equal(restricted[0]["0.weight"], plain["0.weight"]), "what is not estimated stays at θ̂"
    assert not torch.equal(everything[0]["0.weight"], everything[1]["0.weight"]), "a fresh draw each update"
    assert torch.equal(partner[1]["0.weight"], everything[1]["0.weight"]), "one seed, one draw: x and x' share it"
    assert not torch.equal(other_seed[0]["0.weight"], everything[0]["0.weight"])
    moved = torch.cat([(everything[0][name] - value).flatten() for name, value in plain.items()]) / TAU
    assert moved.unique().numel() == moved.numel(), "no two elements share an ε"
    assert abs(moved.std().item() - 1) < 5 / math.sqrt(2 * moved.numel())  # five standard errors of a deviation


@pytest.mark.parametrize(("name", "options"), ALL)
def test_the_passes_run_inside_the_shift_and_its_handle_comes_back(name, options):
    model, batch = make_model(), make_batch()
    inside = []

    @contextmanager
    def shift():
        hook = model[0].register_forward_pre_hook(lambda module, args: (args[0] * 2 + 1,))
        try:
            yield "handle"
        finally:
            hook.remove()

    def loss_fn(model, batch):
        inside.append(len(model[0]._forward_pre_hooks))
        return cross_entropy(model, batch)

    shifted, plain = (make_estimator(name, gamma=GAMMA, tau=TAU, **options) for _ in range(2))
    assert shifted.update(model, loss_fn, batch, shift=shift) == "handle"
    assert inside and all(inside)
    assert plain.update(model, cross_entropy, (batch[0] * 2 + 1, batch[1])) is None
    for key, value in plain.excess.items():
        torch.testing.assert_close(shifted.excess[key], value, rtol=1e-10, atol=1e-14)


def test_sampled_labels_are_asked_of_the_loss_function():
    asked = []

    def loss_fn(model, batch, labels="empirical"):
        asked.append(labels)
        return cross_entropy(model, batch)

    for labels in ("empirical", "sampled"):
        ClosedForm(GAMMA, TAU, labels=labels).update(make_model(), loss_fn, make_batch())
    assert asked == ["empirical", "sampled"]


def test_weights_in_half_precision_are_estimated_in_fp32():
    model = make_model(torch.bfloat16)
    estimator = Natural(GAMMA, TAU)
    before = {name: value.view(torch.int16) for name, value in weights(model).items()}
    estimator.update(model, cross_entropy, make_batch(dtype=torch.bfloat16))
    assert {value.dtype for value in estimator.excess.values()} == {torch.float32}
    assert all(torch.equal(value.view(torch.int16), before[name]) for name, value in weights(model).items())


# Resume ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "options"), ALL)
def test_a_resumed_estimate_ends_with_the_same_bits(name, options, tmp_path):
    model = make_model(torch.float32)

    def new():
        return make_estimator(name, gamma=GAMMA, tau=TAU, params=["0.weight", "4.bias"], seed=2, **options)

    batches = [make_batch(count, torch.float32, seed=count) for count in (3, 4, 2, 5)]
    straight, first, second = new(), new(), new()
    for batch in batches:
        straight.update(model, cross_entropy, batch)
    for batch in batches[:2]:
        first.update(model, cross_entropy, batch)
    state = first.state_dict()
    save_tensors(tmp_path / "state.safetensors", state.pop("tensors"), state)
    tensors, metadata = load_tensors(tmp_path / "state.safetensors")
    second.load_state_dict({"tensors": tensors, **metadata})
    for batch in batches[2:]:
        second.update(model, cross_entropy, batch)
    assert (second.steps, second.samples) == (straight.steps, straight.samples) == (4, 14)
    for key, value in straight.state_dict()["tensors"].items():
        assert torch.equal(second.state_dict()["tensors"][key], value), key


def test_a_loaded_state_does_not_share_memory_with_its_source():
    model, first, second = make_model(), ClosedForm(GAMMA, TAU), ClosedForm(GAMMA, TAU)
    first.update(model, cross_entropy, make_batch())
    second.load_state_dict(first.state_dict())
    kept = first.excess["0.weight"].clone()
    second.update(model, cross_entropy, make_batch(seed=1))
    assert torch.equal(first.excess["0.weight"], kept)


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ClosedForm(0.0, TAU), "gamma=0.0 is out of range"),
        (lambda: ClosedForm(GAMMA, float("nan")), "tau=nan is out of range"),
        (lambda: ClosedForm(GAMMA, TAU, labels="guessed"), "choose one of empirical, sampled"),
        (lambda: Natural(GAMMA, TAU, beta=1.5), "0 < beta <= 1"),
        (lambda: SGVB(GAMMA, TAU, lr=-1.0), "lr=-1.0 is out of range"),
        (lambda: SGVB(GAMMA, TAU, betas=(0.9, 1.0)), "two numbers in [0, 1)"),
        (lambda: SGVB(GAMMA, TAU, labels="sampled"), "does not work with sgvb: the gradient of labels drawn"),
        (lambda: Local(GAMMA, TAU, labels="sampled"), "does not work with local: the gradient of labels drawn"),
        (lambda: make_estimator("closedform", gamma=1.0, tau=1.0), "choose one of closed_form, natural, sgvb, local"),
    ],
)
def test_bad_settings_are_refused_with_the_remedy(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_an_unknown_parameter_name_gets_the_nearest_one():
    with pytest.raises(ValueError, match=re.escape("Did you mean '0.weight'?")):
        ClosedForm(GAMMA, TAU, params=["0.weigth"]).update(make_model(), cross_entropy, make_batch())


@pytest.mark.parametrize(("name", "options"), ALL)
def test_a_loss_that_is_nan_names_the_sample_and_changes_nothing(name, options):
    model, estimator = make_model(), make_estimator(name, gamma=GAMMA, tau=TAU, **options)
    estimator.update(model, cross_entropy, make_batch())
    before = {key: value.clone() for key, value in estimator.state_dict()["tensors"].items()}
    x, y = make_batch()
    x[2] = float("nan")
    with pytest.raises(RuntimeError, match="loss of sample 2 of the batch is nan in update 2"):
        estimator.update(model, cross_entropy, (x, y))
    assert estimator.steps == 1
    assert all(torch.equal(value, before[key]) for key, value in estimator.state_dict()["tensors"].items())


@pytest.mark.parametrize(("name", "options"), ALL)
@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (lambda model, batch: cross_entropy(model, batch).mean(), "one loss per sample"),
        (lambda model, batch: cross_entropy(model, batch).detach(), "no gradient"),
    ],
)
def test_a_loss_of_the_wrong_kind_is_refused(name, options, loss_fn, message):
    with pytest.raises(ValueError, match=message):
        make_estimator(name, gamma=GAMMA, tau=TAU, **options).update(make_model(), loss_fn, make_batch())


def test_another_model_or_other_settings_are_not_mixed_in():
    estimator = ClosedForm(GAMMA, TAU)
    estimator.update(make_model(), cross_entropy, make_batch())
    with pytest.raises(ValueError, match="built on another model"):
        estimator.update(nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)).double(), cross_entropy, make_batch())
    with pytest.raises(ValueError, match="built on another model"):
        estimator.update(nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6)).double(), cross_entropy, make_batch())
    with pytest.raises(ValueError, match=re.escape(f"gamma={GAMMA!r}, this estimator gamma=1.0")):
        ClosedForm(1.0, TAU).load_state_dict(estimator.state_dict())
