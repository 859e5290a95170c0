"""Eq. 6 against its literal formula, on tokens and maps of either layout; draws, running spreads, several ranks."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from fishertune import _torchvision  # noqa: F401  (before timm)
from fishertune.domain import DomainStatistics, simulate_domain

timm = pytest.importorskip("timm")

# The literal formula in float64 against ours in float64, and ours in fp32: a few roundings of numbers of size ~1.
TIGHT = {"rtol": 1e-12, "atol": 1e-12}
SINGLE = {"rtol": 1e-5, "atol": 1e-5}


def literal(x_NTC: torch.Tensor, eps_mu: torch.Tensor, eps_sigma: torch.Tensor) -> torch.Tensor:
    """Eq. 6 sample by sample, channel by channel."""
    n, _, c = x_NTC.shape
    mu = [[x_NTC[i, :, j].mean() for j in range(c)] for i in range(n)]
    sigma = [[(x_NTC[i, :, j].var(correction=0) + 1e-6).sqrt() for j in range(c)] for i in range(n)]
    out = torch.empty_like(x_NTC)
    for j in range(c):
        spread_mu = torch.stack([mu[i][j] for i in range(n)]).std()
        spread_sigma = torch.stack([sigma[i][j] for i in range(n)]).std()
        for i in range(n):
            e_mu, e_sigma = (eps_mu, eps_sigma) if eps_mu.dim() == 0 else (eps_mu[i, j], eps_sigma[i, j])
            beta = max(sigma[i][j] + e_sigma * spread_sigma, 0.01 * sigma[i][j])
            alpha = mu[i][j] + e_mu * spread_mu
            out[i, :, j] = beta * (x_NTC[i, :, j] - mu[i][j]) / sigma[i][j] + alpha
    return out


class Holder(nn.Module):
    """A module with one named place and an embedding width."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.patch_embed = nn.Identity()
        self.embed_dim = width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.patch_embed(x)


def features(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(shape[0], *[1] * (len(shape) - 1), generator=generator) + 0.5
    return (torch.randn(shape, generator=generator) * scale + scale).double()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("draw", ["channel", "scalar"])
@pytest.mark.parametrize("layout", ["NTC", "NCHW", "NHWC"])
def test_formula(draw: str, layout: str) -> None:
    x_NTC = features(4, 20, 6)
    to_map = {
        "NTC": lambda x: x,
        "NHWC": lambda x: x.unflatten(1, (4, 5)),
        "NCHW": lambda x: x.unflatten(1, (4, 5)).permute(0, 3, 1, 2),
    }[layout]
    model = Holder()
    with simulate_domain(model, draw=draw, generator=seeded()) as shift:
        out = model(to_map(x_NTC))
        assert shift.eps_mu.shape == shift.eps_sigma.shape == ((4, 6) if draw == "channel" else ())
        torch.testing.assert_close(out, to_map(literal(x_NTC, shift.eps_mu, shift.eps_sigma)), **TIGHT)
        single = model(to_map(x_NTC).float())
        expected = literal(x_NTC, shift.eps_mu.double(), shift.eps_sigma.double())
        torch.testing.assert_close(single, to_map(expected).float(), **SINGLE)
    torch.testing.assert_close(model(x_NTC), x_NTC, rtol=0, atol=0)  # left: no trace


def test_layout_that_shapes_cannot_tell() -> None:
    model = Holder(6)
    with simulate_domain(model), pytest.raises(ValueError, match="channel_dim=1 for NCHW"):
        model(features(2, 6, 4, 6))
    x = features(2, 6, 4, 6)
    with simulate_domain(model, channel_dim=1, generator=seeded()) as shift:
        out = model(x)
    expected = literal(x.flatten(2).mT, shift.eps_mu, shift.eps_sigma)
    torch.testing.assert_close(out, expected.mT.unflatten(2, (4, 6)), **TIGHT)


def test_prefix_tokens_stay() -> None:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_small_patch14_reg4_dinov2", depth=2, embed_dim=48, num_heads=3, img_size=56, num_classes=0
    ).eval()
    outputs = {}
    for name in ("blocks.0", "blocks.1"):
        model.get_submodule(name).register_forward_hook(lambda _, i, o, name=name: outputs.__setitem__(name, o))
    images = torch.randn(3, 3, 56, 56)
    model(images)
    plain = dict(outputs)
    with simulate_domain(model, where=0, generator=seeded()) as shift:
        model(images)
    # the recording hook was registered first: it saw the block's own output, and block 1 what the shift made of it
    torch.testing.assert_close(outputs["blocks.0"], plain["blocks.0"], rtol=0, atol=0)
    x = plain["blocks.0"]
    expected = torch.cat([x[:, :5], literal(x[:, 5:].detach(), shift.eps_mu, shift.eps_sigma)], dim=1)
    torch.testing.assert_close(outputs["blocks.1"], model.blocks[1](expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "options", "size"),
    [
        ("vit_small_patch16_224", {"img_size": 64}, 64),
        ("vit_small_patch16_224", {"img_size": 64, "dynamic_img_size": True}, 64),
        ("samvit_base_patch16", {"img_size": 64, "window_size": 2, "global_attn_indexes": (1,)}, 64),
        ("eva02_tiny_patch14_224", {"img_size": 56}, 56),
    ],
)
def test_timm_models_shift_per_channel(name: str, options: dict, size: int) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, depth=1, embed_dim=48, num_heads=3, num_classes=0, **options).eval()
    with simulate_domain(model, generator=seeded()) as shift:
        model(torch.randn(2, 3, size, size))
    assert shift.eps_mu.shape == (2, 48)


def test_samples_stay_independent_and_spreads_are_constants() -> None:
    model, x = Holder(), features(3, 5, 6).requires_grad_()
    with simulate_domain(model, generator=seeded()) as shift:
        out = model(x)
    (grad,) = torch.autograd.grad(out[1].sin().sum(), x, retain_graph=True)
    assert grad[1].abs().max() > 0
    assert grad[0].eq(0).all() and grad[2].eq(0).all()
    # sum over tokens of x' is T·(μ + const): its gradient is one everywhere if Σ is a constant
    (grad,) = torch.autograd.grad(out[1].sum(), x)
    torch.testing.assert_close(grad[1], torch.ones_like(grad[1]), rtol=1e-9, atol=1e-9)
    assert shift.eps_mu.abs().max() > 0


def test_new_spread_is_positive_and_constant_channels_stay_finite() -> None:
    model, x = Holder(), features(2, 30, 6)
    x[0] = x[0] * 100  # Σ_σ far above the second sample's σ: negative draws would turn it inside out
    x[:, :, 3] = 1.0
    with simulate_domain(model, generator=seeded()) as shift:
        for _ in range(10):
            out = model(x)
            assert torch.isfinite(out).all()
            centred, moved = x - x.mean(1, keepdim=True), out - out.mean(1, keepdim=True)
            assert ((centred * moved).sum(1) >= 0).all()
            assert ((centred * moved).sum(1)[:, [0, 1, 2, 4, 5]] > 0).all()
            if (shift.eps_sigma[1] < -0.1).any():
                break
        else:
            pytest.fail("no draw was negative")


def test_draws_repeat_and_leave_the_global_generator_alone() -> None:
    model, x = Holder(), features(3, 5, 6)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    with simulate_domain(model, generator=seeded(5)) as shift:
        first, second = model(x), model(x)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(first, second)
    with simulate_domain(model, generator=seeded(5)):
        assert torch.equal(model(x), first)
    with shift:  # entered again: the draws go on
        third = model(x)
    assert not torch.equal(third, first) and not torch.equal(third, second)


def test_c() -> None:
    model, x = Holder(), features(3, 5, 6)
    shift = simulate_domain(model, generator=seeded())
    with pytest.raises(RuntimeError, match="none yet"):
        shift.c()
    with shift:
        model(x)
    mu, sigma = shift.eps_mu, shift.eps_sigma
    assert shift.c() == pytest.approx(math.exp(-(mu.mean() + sigma.mean())), rel=1e-9)
    assert shift.c("abs") == pytest.approx(math.exp(-(mu.abs().mean() + sigma.abs().mean())), rel=1e-9)
    assert shift.c(0.25) == 0.25
    with pytest.raises(ValueError, match="signed, abs"):
        shift.c("squared")
    with simulate_domain(model, draw="scalar", generator=seeded()) as scalar:
        model(x)
    assert scalar.c() == pytest.approx(math.exp(-(scalar.eps_mu + scalar.eps_sigma).item()), rel=1e-6)


def test_several_places_share_a_scalar_and_join_channels() -> None:
    class Two(Holder):
        def __init__(self) -> None:
            super().__init__()
            self.second = nn.Identity()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(super().forward(x))

    model, x = Two(), features(3, 5, 6)
    with simulate_domain(model, where=["patch_embed", "second"], draw="scalar", generator=seeded()) as shift:
        out = model(x)
        once = literal(x, shift.eps_mu, shift.eps_sigma)
        torch.testing.assert_close(out, literal(once, shift.eps_mu, shift.eps_sigma), **TIGHT)
    with simulate_domain(model, where=["patch_embed", "second"], generator=seeded()) as shift:
        model(x)
        assert shift.eps_mu.shape == (3, 12)


def test_batch_of_one_uses_the_running_spread_and_says_so_once() -> None:
    model, x = Holder(), features(6, 5, 6)
    with simulate_domain(model), pytest.raises(RuntimeError, match="batch of one and has seen 1"):
        model(x[:1])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with simulate_domain(model, generator=seeded(), statistics=DomainStatistics()):
            model(x[:3])
            model(x[3:5])
            assert not caught
            out = model(x[5:])
            model(x[5:])
    assert len(caught) == 1 and "batch of one" in str(caught[0].message)
    # at the first batch of one, the spread over all six samples
    mu, sigma = x.mean(1), (x.var(1, correction=0) + 1e-6).sqrt()
    replay = seeded()
    for rows in (3, 2):
        torch.randn(rows, 6, generator=replay), torch.randn(rows, 6, generator=replay)
    eps_mu, eps_sigma = torch.randn(1, 6, generator=replay), torch.randn(1, 6, generator=replay)
    beta = sigma[5] + eps_sigma * sigma.std(0)
    alpha = mu[5] + eps_mu * mu.std(0)
    assert (beta > 0.01 * sigma[5]).all()
    torch.testing.assert_close(out[0], beta * (x[5] - mu[5]) / sigma[5] + alpha, rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:The simulated domain was given a batch of one")
def test_statistics_resume_exactly() -> None:
    model, x = Holder(), features(6, 5, 6)
    kept, resumed = DomainStatistics(), DomainStatistics()
    with simulate_domain(model, statistics=kept):
        model(x)
    resumed.load_state_dict(kept.state_dict())
    before = kept.spread("patch_embed")
    assert torch.equal(resumed.spread("patch_embed"), before)
    with simulate_domain(model, statistics=kept):
        model(x + 1)
    assert not torch.equal(kept.spread("patch_embed"), before)
    assert torch.equal(resumed.spread("patch_embed"), before)


def test_bad_input_is_named() -> None:
    model = Holder()
    with pytest.raises(ValueError, match=r"'patch_embd' is not a module.*patch_embed"):
        simulate_domain(model, where="patch_embd")
    with pytest.raises(ValueError, match="channel, scalar"):
        simulate_domain(model, draw="token")
    with simulate_domain(model), pytest.raises(ValueError, match=r"tensor of shape \(4, 6\)"):
        model(features(4, 6))
    with simulate_domain(model) as shift, pytest.raises(RuntimeError, match="already active"):
        shift.__enter__()
    assert not model.patch_embed._forward_hooks


def _rank(rank: int, file: str, x: torch.Tensor, results: object) -> None:
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    model = Holder()
    with simulate_domain(model, generator=seeded(rank), group=dist.group.WORLD) as shift:
        mine = x[:3] if rank == 0 else x[3:]  # uneven: three samples and one
        results[rank] = (model(mine), shift.eps_mu, shift.eps_sigma, shift.c())
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_form_one_batch(tmp_path: object) -> None:
    x = features(4, 5, 6)
    with mp.get_context("spawn").Manager() as manager:
        results = manager.dict()
        mp.spawn(_rank, (str(tmp_path / "rendezvous"), x, results), nprocs=2)
        (out_0, mu_0, sigma_0, c_0), (out_1, mu_1, sigma_1, c_1) = results[0], results[1]
    mu, sigma = torch.cat([mu_0, mu_1]), torch.cat([sigma_0, sigma_1])
    torch.testing.assert_close(torch.cat([out_0, out_1]), literal(x, mu, sigma), **TIGHT)
    assert c_0 == c_1 == pytest.approx(math.exp(-(mu.mean() + sigma.mean())), rel=1e-6)
