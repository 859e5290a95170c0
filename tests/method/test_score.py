"""Scores of Eq. 5, 7 and 15 against the literal formulas in numpy float64."""

import json
import math
import re

import numpy as np
import pytest
import torch

from fishertune.fisher.score import KINDS, ScoreAverage

GAMMA, TAU, EPS = 0.02, 0.5, 1e-8
BIAS = "blocks.0.mlp.fc1.bias"
SHAPES = {"blocks.0.attn.qkv.weight": (6, 4), BIAS: (7,)}


def make_fisher(seed, low=-12, high=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: 10 ** (torch.rand(shape, generator=generator, dtype=torch.float64) * (high - low) + low)
        for name, shape in SHAPES.items()
    }


def single(values):
    return {name: value.float() for name, value in values.items()}


def delta_f(f, g):
    return np.abs(f - g) / (np.minimum(f, g) + EPS)


def literal(kind, f, g, c):
    """The score of one step as the paper prints it; for Eq. 15 from Λ itself."""
    if kind == "f":
        return f
    if kind == "delta_f":
        return delta_f(f, g)
    if kind == "dr_fim":
        return f + c * delta_f(f, g)
    p, q = f / GAMMA + TAU**-2, g / GAMMA + TAU**-2  # Eq. 14
    return GAMMA * (p - TAU**-2 + c * np.abs(p - q) / (np.minimum(p, q) + EPS / GAMMA))


def settings(kind):
    return {"kind": kind, "gamma": GAMMA, "tau": TAU, "eps": EPS}


def measure(kind, fisher):
    """What a score of this kind takes: the excess for Eq. 15, else the Fisher."""
    return {name: value / GAMMA for name, value in fisher.items()} if kind == "dr_fim_variational" else fisher


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_the_mean_of_the_steps_each_with_its_own_c(kind):
    average = ScoreAverage(**settings(kind))
    total = dict.fromkeys(SHAPES, 0.0)
    for step, c in enumerate((0.1, 2.5, 1.0)):
        f, g = make_fisher(step, high=2), make_fisher(step + 100, high=2)
        average.update(single(measure(kind, f)), single(measure(kind, g)), c)
        for name in SHAPES:
            total[name] = total[name] + literal(kind, f[name].numpy(), g[name].numpy(), c) / 3
    assert average.count == 3
    for name, value in average.scores.items():
        assert value.dtype == torch.float32
        # Rounding the two inputs to fp32 (2⁻²⁴ each) is amplified by F/|F−F'| where they nearly agree, at most about
        # 10 for these draws; a handful of fp32 operations and three steps of a running mean do the rest.
        np.testing.assert_allclose(value.numpy(), total[name], rtol=3e-6)


def test_eq_15_after_substitution_is_eq_7_damped_by_the_prior_and_weighted_by_gamma():
    """Λ = F/γ + τ⁻² in Eq. 15 gives F + c·γ·|F−F'| / (min(F, F') + γτ⁻² + ε)."""
    c = 0.7
    f, g = make_fisher(1), make_fisher(2)
    average = ScoreAverage(**settings("dr_fim_variational"))
    average.update(measure("dr_fim_variational", f), measure("dr_fim_variational", g), c)
    for name in SHAPES:
        a, b = f[name].numpy(), g[name].numpy()
        damped = a + c * GAMMA * np.abs(a - b) / (np.minimum(a, b) + GAMMA * TAU**-2 + EPS)
        np.testing.assert_allclose(literal("dr_fim_variational", a, b, c), damped, rtol=1e-9, atol=1e-16)
        # the product computes in float64 here and keeps an fp32 mean: one rounding, 2⁻²⁴
        np.testing.assert_allclose(average.scores[name].numpy(), damped, rtol=1.2e-7)


def test_with_a_flat_prior_eq_15_is_eq_7():
    """γ = 1 and τ → ∞ take damping and weighting away."""
    f, g = single(make_fisher(3)), single(make_fisher(4))
    variational, plain = ScoreAverage("dr_fim_variational", gamma=1.0, tau=1e15), ScoreAverage("dr_fim")
    for average in (variational, plain):
        average.update(f, g, 0.3)
    for name in SHAPES:
        torch.testing.assert_close(variational.scores[name], plain.scores[name], rtol=1e-6, atol=0)


def top(values, share=0.05):
    values = torch.as_tensor(values).double().flatten()
    return set(values.topk(round(share * values.numel())).indices.tolist())


def test_keeping_the_excess_keeps_the_ranking_that_the_precision_swallows():
    """In fp32 Λ = F/γ + τ⁻² loses F below 6e-8·γτ⁻²; E = F/γ does not. Top 5 % against float64."""
    count, gamma, tau = 20_000, 1.0, 1.0
    generator = torch.Generator().manual_seed(0)
    # the Fisher of a pretrained ViT: log-normal, nearly all of it below the rounding of τ⁻² = 1
    fisher = torch.exp(torch.randn(count, generator=generator, dtype=torch.float64) * 1.5 + math.log(3e-9))
    exact = top(fisher)
    average = ScoreAverage("dr_fim_variational", gamma=gamma, tau=tau)
    excess = {"weight": (fisher / gamma).float()}
    average.update(excess, excess, 1.0)
    kept = len(exact & top(average.scores["weight"])) / len(exact)
    precision = (fisher / gamma).float() + tau**-2  # Λ as a program would store it
    swallowed = len(exact & top(gamma * (precision - tau**-2))) / len(exact)
    assert kept == 1.0
    assert swallowed < 0.8


class Handle:
    """Stands for what simulate_domain yields."""

    def c(self, mode="signed"):
        return {"signed": 0.25, "abs": 0.75}[mode]


def test_c_comes_from_the_handle_in_the_chosen_mode_or_is_a_constant():
    f, g = single(make_fisher(5)), single(make_fisher(6))

    def score(c, **options):
        average = ScoreAverage("dr_fim", **options)
        average.update(f, g, c)
        return average.scores[BIAS]

    assert torch.equal(score(Handle()), score(0.25))
    assert torch.equal(score(Handle(), c_mode="abs"), score(0.75))
    assert torch.equal(score(None, c_mode=0.5), score(0.5))
    assert torch.equal(score(Handle(), c_mode=0.5), score(0.5))
    assert not torch.equal(score(0.25), score(0.5))


@pytest.mark.parametrize("kind", KINDS)
def test_term_shares_are_those_of_the_summed_terms(kind):
    average = ScoreAverage(**settings(kind))
    task = domain = 0.0
    for step, c in enumerate((2.0, 10.0) if kind == "dr_fim_variational" else (0.002, 0.01)):  # both terms matter
        f = make_fisher(step, low=-3, high=0)
        g = {name: value * 1.5 for name, value in f.items()}
        average.update(single(measure(kind, f)), single(measure(kind, g)), c)
        for name in SHAPES:
            a, b = f[name].numpy(), g[name].numpy()
            own = 0.0 if kind == "delta_f" else a.sum()
            task += own
            domain += literal(kind, a, b, c).sum() - own
    shares = average.term_shares()
    assert shares["task"] + shares["domain"] == pytest.approx(1.0, abs=1e-12)
    assert shares["task"] == pytest.approx(task / (task + domain), abs=1e-6)  # fp32 scores, 31 elements
    if kind in ("dr_fim", "dr_fim_variational"):
        assert 0.01 < shares["task"] < 0.99
        only = average.term_shares([BIAS])
        assert only["task"] != shares["task"]


def test_the_estimators_own_outputs_fit():
    """γE from an estimator and E give the same Eq. 15 as the literal formula."""
    from fishertune.fisher.posterior import ClosedForm

    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3).double()

    def loss_fn(model, batch):
        return model(batch).square().sum(1)

    source, shifted = ClosedForm(GAMMA, TAU), ClosedForm(GAMMA, TAU)
    x = torch.randn(5, 4, dtype=torch.float64)
    source.update(model, loss_fn, x)
    shifted.update(model, loss_fn, 1.3 * x + 0.2)
    average = ScoreAverage(**settings("dr_fim_variational"))
    average.update(source.excess, shifted.excess, 0.4)
    for name, value in average.scores.items():
        expected = literal("dr_fim_variational", source.fisher()[name].numpy(), shifted.fisher()[name].numpy(), 0.4)
        np.testing.assert_allclose(value.numpy(), expected, rtol=1.2e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_score_ends_with_the_same_bits(kind):
    steps = [(single(make_fisher(i)), single(make_fisher(i + 50)), 0.1 * (i + 1)) for i in range(4)]
    straight, first, second = (ScoreAverage(**settings(kind)) for _ in range(3))
    for step in steps:
        straight.update(*step)
    for step in steps[:2]:
        first.update(*step)
    state = first.state_dict()
    rest = json.loads(json.dumps({key: value for key, value in state.items() if key != "tensors"}))
    second.load_state_dict({"tensors": state["tensors"], **rest})
    for step in steps[2:]:
        second.update(*step)
    assert second.count == straight.count
    assert second.term_shares() == straight.term_shares()
    for name, value in straight.scores.items():
        assert torch.equal(second.scores[name], value)


# Bad input ------------------------------------------------------------------------------------------------------------


def snapshot(average):
    counters = json.dumps(average.state_dict()["counters"])
    return counters, {name: value.clone() for name, value in average.scores.items()}


@pytest.mark.parametrize("domain", ["x", "x'"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda values: values[BIAS].__setitem__(3, math.nan), f"'{BIAS}' on {{}} holds NaN"),
        (lambda values: values[BIAS].__setitem__(3, math.inf), f"'{BIAS}' on {{}} holds infinite"),
        (lambda values: [value.zero_() for value in values.values()], "on {} is zero for every parameter"),
    ],
)
def test_a_fisher_that_cannot_rank_is_refused_and_nothing_changes(domain, spoil, message):
    average = ScoreAverage(**settings("dr_fim_variational"))
    average.update(single(make_fisher(0)), single(make_fisher(1)), 1.0)
    before = snapshot(average)
    f, g = single(make_fisher(2)), single(make_fisher(3))
    spoil(f if domain == "x" else g)
    with pytest.raises(RuntimeError, match=re.escape(message.format(domain))):
        average.update(f, g, 1.0)
    after = snapshot(average)
    assert after[0] == before[0]
    assert all(torch.equal(after[1][name], value) for name, value in before[1].items())


def test_a_parameter_with_zero_fisher_among_others_is_legal():
    f = single(make_fisher(0))
    f[BIAS].zero_()
    average = ScoreAverage("f")
    average.update(f)
    assert not average.scores[BIAS].any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ScoreAverage("fisher"), "choose one of f, delta_f, dr_fim, dr_fim_variational"),
        (lambda: ScoreAverage("dr_fim_variational", gamma=1.0), "needs tau"),
        (lambda: ScoreAverage("dr_fim_variational", gamma=-1.0, tau=1.0), "gamma=-1.0 is out of range"),
        (lambda: ScoreAverage("f", eps=0.0), "eps=0.0 is out of range"),
        (lambda: ScoreAverage("dr_fim", c_mode="mean"), "choose 'signed', 'abs' or a number"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda f: (f,), "give the Fisher on x' as shifted"),
        (lambda f: (f, f), "give this step's c"),
        (lambda f: (f, f, math.nan), "c=nan is out of range"),
        (lambda f: (f, {"other": f[BIAS]}, 1.0), "is only in one of them"),
        (lambda f: (f, {**f, BIAS: torch.ones(2)}, 1.0), "has shape (2,); expected (7,)"),
        (lambda f: ({}, {}, 1.0), "holds no parameter"),
    ],
)
def test_an_incomplete_step_is_refused(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ScoreAverage("dr_fim").update(*arguments(single(make_fisher(0))))


def test_the_two_domains_may_list_their_parameters_in_any_order():
    f, g = single(make_fisher(0)), single(make_fisher(1))
    one, other = ScoreAverage("dr_fim"), ScoreAverage("dr_fim")
    one.update(f, g, 1.0)
    other.update(f, dict(reversed(g.items())), 1.0)
    assert all(torch.equal(one.scores[name], other.scores[name]) for name in SHAPES)


def test_shares_before_the_first_step_and_states_of_other_settings_are_refused():
    with pytest.raises(RuntimeError, match="call update first"):
        ScoreAverage("f").term_shares()
    with pytest.raises(ValueError, match=re.escape("eps=1e-08, this one eps=0.001")):
        ScoreAverage("f", eps=1e-3).load_state_dict(ScoreAverage("f").state_dict())
