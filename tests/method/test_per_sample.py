"""Squared per-sample gradients equal those of autograd taken one sample at a time, for every parameter of every model.

Oracles: torch.func.vmap(grad), autograd on one loss at a time, and BackPACK. Errors are relative to the largest element
of each tensor: float64 leaves about 1e-15 and is held to 1e-10; fp32 leaves about 1e-6 and is held to 1e-5.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint

from fishertune import _torchvision  # noqa: F401  (before timm)
from fishertune.domain import simulate_domain
from fishertune.fisher.per_sample import PerSampleSquares, per_sample_fisher, require_information
from fishertune_kernels import per_sample_affine_squared_grad_, per_sample_squared_grad_

timm = pytest.importorskip("timm")

Losses = Callable[[nn.Module, Any], Tensor]
TINY = {"depth": 2, "embed_dim": 48, "num_heads": 3}


def one_at_a_time(model: nn.Module, losses: Tensor) -> dict[str, Tensor]:
    """The oracle: autograd on each loss alone."""
    parameters = dict(model.named_parameters())
    fisher = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for loss in losses:
        grads = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, allow_unused=True)
        for name, g in zip(parameters, grads, strict=True):
            if g is not None:
                fisher[name] += g.square() / len(losses)
    return fisher


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].shape == value.shape
        scale = value.abs().max().item()
        error = (got[name].double() - value.double()).abs().max().item()
        assert error <= tolerance * scale, f"{name}: {error:.2e} of {scale:.2e}"


def check(model: nn.Module, loss_fn: Losses, batch: Any, tolerance: float = 1e-10) -> dict[str, Tensor]:
    got = per_sample_fisher(model, loss_fn, [batch])
    assert not any(value.requires_grad for value in got.values())
    was = model.training
    model.eval()
    assert_same(got, one_at_a_time(model, loss_fn(model, batch)), tolerance)
    model.train(was)
    return got


def randomise(model: nn.Module) -> nn.Module:
    """Moves every parameter off its initial value: zeros and ones hide mistakes."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model.double()


def images(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def squares(model: nn.Module, x: Tensor) -> Tensor:
    """A smooth loss per sample that reaches every output."""
    y = model(x)
    y = y.reshape(len(x), -1)
    return (y.square() * torch.linspace(0.5, 1.5, y.shape[1], dtype=y.dtype)).mean(1) + y.sin().mean(1)


class Dense(nn.Module):
    """A backbone's last map, a per-pixel head, and logits at the size of the image."""

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, x: Tensor) -> Tensor:
        maps = self.backbone.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)
        return F.interpolate(self.head(maps[0]), size=x.shape[-2:], mode="bilinear")


def dense_model(head: nn.Module | None = None) -> nn.Module:
    """LayerScale, class and register tokens, and a position embedding that is resampled to 5×6 patches."""
    torch.manual_seed(0)
    backbone = timm.create_model(
        "vit_small_patch14_reg4_dinov2", img_size=56, dynamic_img_size=True, num_classes=0, **TINY
    )
    return randomise(Dense(backbone, head or nn.Conv2d(48, 5, 1))).eval()


def dense_batch(count: int = 3) -> tuple[Tensor, Tensor]:
    labels = torch.randint(0, 5, (count, 70, 84), generator=torch.Generator().manual_seed(2))
    labels[0, :30] = 255
    return images(count, 3, 70, 84), labels


def pixel_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, labels = batch
    losses = F.cross_entropy(model(x), labels, ignore_index=255, reduction="none")
    return losses.sum((1, 2)) / (labels != 255).sum((1, 2))


def vmapped(model: nn.Module, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor, labels: Tensor) -> Tensor:
        logits = functional_call(model, parameters, (x[None],))
        losses = F.cross_entropy(logits, labels[None], ignore_index=255, reduction="none")
        return losses.sum() / (labels != 255).sum()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # vmap notes where it loops
        grads = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, labels)
    return {name: g.square().mean(0) for name, g in grads.items()}


# Exactness ------------------------------------------------------------------------------------------------------------


def test_equals_vmap_on_a_dense_vit_with_every_parameter() -> None:
    model, (x, labels) = dense_model(), dense_batch()
    expected = vmapped(model, x, labels)
    got = per_sample_fisher(model, pixel_loss, [(x, labels)])
    assert got["backbone.pos_embed"].dtype == torch.float64
    assert all(bool(value.any()) for value in expected.values()), "the oracle leaves a parameter out"
    assert_same(got, expected, 1e-10)
    single = per_sample_fisher(model.float(), pixel_loss, [(x.float(), labels)])
    assert single["backbone.pos_embed"].dtype == torch.float32
    assert_same(single, expected, 1e-5)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_equals_backpack_where_it_can() -> None:
    backpack = pytest.importorskip("backpack")
    extensions = pytest.importorskip("backpack.extensions")
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(6, 4, 2),
        nn.Sigmoid(),
        nn.Flatten(),
        nn.Linear(36, 7),
        nn.Tanh(),
        nn.Linear(7, 5),
    ).double()
    x, labels = images(6, 3, 8, 8), torch.arange(6) % 5
    got = per_sample_fisher(
        network, lambda model, batch: F.cross_entropy(model(batch[0]), batch[1], reduction="none"), [(x, labels)]
    )
    extended = backpack.extend(network)
    with backpack.backpack(extensions.SumGradSquared()):
        backpack.extend(nn.CrossEntropyLoss(reduction="sum"))(extended(x), labels).backward()
    assert_same(got, {name: p.sum_grad_squared / 6 for name, p in extended.named_parameters()}, 1e-10)


FAMILIES = {
    "clip": ("vit_base_patch16_clip_224", {"img_size": 64}, 64),
    "dinov2-g": ("vit_giant_patch14_dinov2", {"img_size": 56}, 56),
    "sam": ("samvit_base_patch16", {"img_size": 96, "window_size": 4, "global_attn_indexes": (1,)}, 96),
    "eva02-large": ("eva02_large_patch14_224", {"img_size": 56}, 56),
    "eva02-tiny": ("eva02_tiny_patch14_224", {"img_size": 56}, 56),
    "dinov3": ("vit_large_patch16_dinov3", {"img_size": 64}, 64),
    "dinov3-qkvb": ("vit_large_patch16_dinov3_qkvb", {"img_size": 64}, 64),
    "siglip": ("vit_base_patch16_siglip_224", {"img_size": 64}, 64),
}


def class_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


@pytest.mark.parametrize("family", FAMILIES)
def test_timm_classifiers(family: str) -> None:
    name, options, size = FAMILIES[family]
    torch.manual_seed(0)
    model = randomise(timm.create_model(name, num_classes=5, **TINY, **options))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing may be left to one backward pass per sample
        got = check(model, class_loss, (images(3, 3, size, size), torch.tensor([0, 3, 1])))
    assert all(bool(value.any()) for value in got.values())


@pytest.mark.parametrize(
    ("name", "options", "size"),
    [
        ("swin_tiny_patch4_window7_224", {"embed_dim": 24, "depths": (1, 1), "num_heads": (2, 3), "img_size": 56}, 56),
        ("convnext_tiny", {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}, 64),
        ("resnet18", {}, 32),
    ],
)
def test_other_timm_models(name: str, options: dict, size: int) -> None:
    torch.manual_seed(0)
    model = randomise(timm.create_model(name, num_classes=5, **options))
    check(model, class_loss, (images(3, 3, size, size), torch.tensor([0, 3, 1])))


def test_convolutional_head() -> None:
    head = nn.Sequential(
        nn.Conv2d(48, 8, 3, padding=1, groups=2, bias=False),
        nn.BatchNorm2d(8),
        nn.GELU(),
        nn.ConvTranspose2d(8, 6, 2, stride=2),
        nn.GroupNorm(2, 6),
        nn.Conv2d(6, 6, 3, padding="same", padding_mode="reflect"),
        nn.Conv2d(6, 5, 3, stride=2, dilation=2),
    )
    check(dense_model(head), pixel_loss, dense_batch())


@pytest.mark.parametrize("patch", [{"kernel_size": 4, "stride": 4}, {"kernel_size": 4, "stride": 3, "padding": 1}])
def test_patch_embedding_of_any_geometry(patch: dict) -> None:
    # 18 pixels are no multiple of the patch: the rest must not be seen
    model = randomise(nn.Sequential(nn.Conv2d(3, 5, **patch), nn.GELU(), nn.AdaptiveAvgPool2d(3), nn.Conv2d(5, 4, 1)))
    check(model, squares, images(4, 3, 18, 18))


def test_simulated_domain() -> None:
    model, batch = dense_model(), dense_batch()

    def shift(seed: int) -> Any:
        return simulate_domain(model.backbone, generator=torch.Generator().manual_seed(seed))

    got = per_sample_fisher(model, pixel_loss, [batch], shift=lambda: shift(3))
    with shift(3):
        losses = pixel_loss(model, batch)
    expected = one_at_a_time(model, losses)
    assert_same(got, expected)
    plain = per_sample_fisher(model, pixel_loss, [batch])
    assert (plain["head.weight"] - got["head.weight"]).abs().max() > 1e-3 * expected["head.weight"].max()


def test_mean_over_all_samples_of_uneven_batches() -> None:
    model, (x, labels) = dense_model(), dense_batch(5)
    whole = per_sample_fisher(model, pixel_loss, [(x, labels)])
    parts = per_sample_fisher(model, pixel_loss, ((x[i], labels[i]) for i in (slice(0, 3), slice(3, 4), slice(4, 5))))
    assert_same(parts, whole)


def test_subset_of_parameters() -> None:
    model, batch = dense_model(), dense_batch()
    names = ["backbone.cls_token", "backbone.blocks.1.mlp.fc1.weight", "backbone.blocks.0.norm1.bias", "head.bias"]
    everything = per_sample_fisher(model, pixel_loss, [batch])
    assert_same(per_sample_fisher(model, pixel_loss, [batch], params=names), {n: everything[n] for n in names})


def test_matrices_go_to_the_fused_kernel() -> None:
    """Whatever else looks at a weight: a gradient per sample would cost as many copies of the model as samples."""

    class Casting(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.float().type_as(self.weight))

    model = dense_model(nn.Sequential(nn.Conv2d(48, 5, 1), nn.Flatten(2), Casting(30, 30), nn.Unflatten(2, (5, 6))))
    matrices = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    matrices.append(model.backbone.patch_embed.proj.weight)
    with mock.patch("fishertune.fisher.sums.per_sample_squared_grad_", wraps=per_sample_squared_grad_) as kernel:
        per_sample_fisher(model, pixel_loss, [dense_batch()])
    sizes = sorted(call.args[0].numel() for call in kernel.call_args_list)
    assert sizes == sorted(weight.numel() for weight in matrices)


def test_what_scales_and_shifts_goes_to_the_affine_kernel() -> None:
    """In one pass each, also over several dimensions, with a factor, or where the bias alone is covered."""

    class Affine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.planes = nn.LayerNorm(6), nn.LayerNorm((5, 6))
            self.scale, self.position, self.table = (nn.Parameter(torch.rand(s)) for s in [(6,), (1, 5, 6), (5, 1)])
            self.linear = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.sub(self.norm(x) * self.scale, self.position, alpha=3)
            return self.linear(self.planes(y.cos()) * self.table).sin()

    model, x = randomise(Affine()), images(4, 5, 6)
    names = [name for name, _ in model.named_parameters() if name != "linear.weight"]
    expected = one_at_a_time(model, squares(model, x))
    with mock.patch(
        "fishertune.fisher.sums.per_sample_affine_squared_grad_", wraps=per_sample_affine_squared_grad_
    ) as kernel:
        got = per_sample_fisher(model, squares, [x], params=names)
    assert_same(got, {name: expected[name] for name in names})
    # norm, planes, scale, position, the Linear bias; the table is broadcast over the last dimension
    assert kernel.call_count == 5


def test_loop_that_is_not_ours() -> None:
    model, (x, labels) = dense_model(), dense_batch(4)
    with PerSampleSquares(model, ["head.weight"]) as total:
        for rows in (slice(0, 2), slice(2, 4)):
            total.backward(pixel_loss(model, (x[rows], labels[rows])), weight=0.25)
    expected = one_at_a_time(model, pixel_loss(model, (x, labels)))
    assert_same(total.accumulators, {"head.weight": expected["head.weight"]})


# Unusual uses of parameters -------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """A layer called twice, a weight used transposed, a norm shared, a scalar that also regularises."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.norm = nn.Linear(3, 6), nn.Linear(6, 6), nn.LayerNorm(6)
        self.gate = nn.Parameter(torch.rand(()))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.mix(self.embed(x)).relu())
        y = self.norm(self.mix(y) * self.gate + y)
        return (1 - self.gate) * (y @ self.embed.weight)


def test_a_parameter_used_twice_is_summed_before_it_is_squared() -> None:
    check(randomise(Tied()), squares, images(4, 5, 3))

    def regularised(model: nn.Module, x: Tensor) -> Tensor:
        return squares(model, x) + 0.1 * sum(p.square().sum() for p in model.parameters())

    check(randomise(Tied()), regularised, images(4, 5, 3))


def test_shared_layers_over_several_scales() -> None:
    class Scales(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 6), nn.Conv2d(4, 3, 2, stride=2)

        def forward(self, x: Tensor) -> Tensor:
            maps = [x, F.avg_pool2d(x, 2), x.flip(-1)]
            rows = [self.one(m.flatten(2).mT).sum(1) for m in maps[:2]]
            return torch.cat([*rows, *(self.two(m).sum((2, 3)) for m in maps)], dim=1)

    check(randomise(Scales()), squares, images(3, 4, 8, 8))


def test_weights_behind_a_computation() -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    nn.utils.parametrizations.weight_norm(model[0])
    check(randomise(model), squares, images(4, 7, 5))


def test_arithmetic_with_parameters() -> None:
    class Arithmetic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.both = nn.Linear(5, 6), nn.Parameter(torch.rand(6))
            self.token, self.table = nn.Parameter(torch.rand(1, 1, 6)), nn.Parameter(torch.rand(7, 1))

        def forward(self, x: Tensor) -> Tensor:
            y = self.one(x.type_as(self.one.weight))
            y = torch.sub(y, self.both, alpha=2) * self.both + torch.sub(self.both, y, alpha=3)
            tokens = self.token.expand(len(x), -1, -1)
            return (y + tokens) * self.table + (y * tokens).cos() / self.both

    model, x = randomise(Arithmetic()), images(3, 7, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(model, squares, x)
    assert not x.requires_grad


class InPlace(nn.Module):
    """In-place operations after, between and on what the layers return."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(5, 6), nn.Linear(6, 6, bias=False), nn.Linear(6, 6)
        self.scale, self.shift, self.token = (nn.Parameter(torch.rand(6)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        y += 1.0
        y.relu_()
        z = self.two(y)
        z += self.shift
        z.mul_(self.scale)
        z[:, :2] *= 2
        z = z.clone()
        z[:, 0] += self.token
        z[:, 1] = self.token * 3
        w = self.three(z)  # a view of a product of matrices: what follows changes the product
        w += z
        return w.tanh_()


@pytest.mark.filterwarnings("ignore:The per-sample gradients of")
def test_in_place_operations() -> None:
    check(randomise(InPlace()), squares, images(4, 7, 5))


def test_overwritten_input_is_an_error() -> None:
    class Overwrites(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(5, 5), nn.Linear(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            y = self.one(x)
            z = self.two(y)
            y += 1.0
            return z + y

    with pytest.raises(RuntimeError, match=r"two\.weight.*out of place"):
        per_sample_fisher(Overwrites(), squares, [images(4, 7, 5).float()])


@pytest.mark.parametrize("batch_first", [True, False])
def test_samples_along_the_second_dimension(batch_first: bool) -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn, self.out = nn.MultiheadAttention(6, 2, batch_first=batch_first), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            x = x if batch_first else x.transpose(0, 1)
            y = self.out(self.attn(x, x, x)[0] + x)
            return y if batch_first else y.transpose(0, 1)

    model = randomise(Attends())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(model, squares, images(3, 6, 6))  # twice as many tokens as samples: blocks along either dimension fit
        check(model, squares, images(3, 3, 6))  # as many tokens as samples


def test_leading_dimension_that_is_no_multiple_of_the_batch() -> None:
    class Packed(nn.Module):
        """Drops tokens, a different number in each sample, and runs the rest as one list."""

        def __init__(self) -> None:
            super().__init__()
            self.one, self.norm = nn.Linear(5, 6), nn.LayerNorm(6)

        def forward(self, x: Tensor) -> Tensor:
            keep = x[..., 0] > 0.2
            out = x.new_zeros(*x.shape[:2], 6)
            out[keep] = self.norm(self.one(x[keep]))
            return out

    model, x = randomise(Packed()), images(3, 7, 5)
    assert (x[..., 0] > 0.2).sum() % 3
    with pytest.warns(UserWarning, match=r"one backward pass per sample: about 3 more"):
        check(model, squares, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(model, squares, x)  # said once


@pytest.mark.filterwarnings("ignore:The per-sample gradients of")
def test_parameter_hidden_in_an_autograd_function() -> None:
    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
            ctx.save_for_backward(x, weight)
            return x * weight

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
            x, weight = ctx.saved_tensors
            return dy * weight, (dy * x).sum((0, 1))

    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.scale = nn.Linear(5, 6), nn.Parameter(torch.rand(6))

        def forward(self, x: Tensor) -> Tensor:
            return Product.apply(self.one(x), self.scale) + self.scale

    check(randomise(Hidden()), squares, images(3, 7, 5))


def test_frozen_inputs_and_detached_parts() -> None:
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frozen, self.one, self.unused = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                y = self.frozen(x)
            self.unused(y)
            return self.one(y) + self.frozen(x).detach()

    got = check(randomise(Parts()), squares, images(3, 7, 5))
    assert not got["frozen.weight"].any() and not got["unused.bias"].any() and got["one.bias"].any()


# Precision and side effects -------------------------------------------------------------------------------------------


def test_half_precision_models_accumulate_in_fp32() -> None:
    model, (x, labels) = dense_model(), dense_batch()
    expected = per_sample_fisher(model, pixel_loss, [(x, labels)])
    model.float()

    def autocast_loss(model: nn.Module, batch: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return pixel_loss(model, batch)

    mixed = per_sample_fisher(model, autocast_loss, [(x.float(), labels)])
    low = per_sample_fisher(model.bfloat16(), pixel_loss, [(x.bfloat16(), labels)])
    for got in (mixed, low):
        assert all(value.dtype == torch.float32 for value in got.values())
        a = torch.cat([got[n].flatten().double() for n in expected])
        b = torch.cat([expected[n].flatten() for n in expected])
        # bf16 rounds to 2⁻⁹; a dozen layers of it, doubled by the square
        assert (a - b).norm() / b.norm() < 12 * 2 * 2**-9 * 2


def test_nothing_is_left_behind() -> None:
    model = dense_model(nn.Sequential(nn.Conv2d(48, 5, 1), nn.BatchNorm2d(5), nn.Dropout(0.5)))
    model.train()
    model.backbone.eval()
    model.backbone.cls_token.requires_grad_(False)
    model.head[0].weight.grad = marker = torch.ones_like(model.head[0].weight)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    modes = [m.training for m in model.modules()]

    def exploding(model: nn.Module, batch: Any) -> Tensor:
        assert not any(m.training for m in model.modules())
        model(batch[0])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        per_sample_fisher(model, exploding, [dense_batch()])
    first = per_sample_fisher(model, pixel_loss, [dense_batch()])
    assert_same(per_sample_fisher(model, pixel_loss, [dense_batch()]), first, 0.0)  # no dropout
    assert first["backbone.cls_token"].any()  # frozen by the user, still measured
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [m.training for m in model.modules()] == modes
    assert model.head[0].weight.grad is marker and bool((marker == 1).all())
    assert all(p.grad is None for n, p in model.named_parameters() if n != "head.0.weight")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._backward_hooks for m in model.modules())


@pytest.mark.parametrize("loss_fails", [False, True])
def test_no_batch_stays_in_memory(loss_fails: bool) -> None:
    """Hooks on graph nodes can tie a graph to itself through C++, where no collector looks."""
    model = dense_model(nn.Conv2d(48, 5, 1))

    def failing(model: nn.Module, batch: Any) -> Tensor:
        pixel_loss(model, batch)
        raise KeyboardInterrupt

    def live_tensors() -> int:
        if loss_fails:
            with pytest.raises(KeyboardInterrupt):
                per_sample_fisher(model, failing, [dense_batch()])
        else:
            per_sample_fisher(model, pixel_loss, [dense_batch()])
        gc.collect()
        return sum(type(item) in (Tensor, nn.Parameter) for item in gc.get_objects())

    live_tensors()  # the first call fills caches
    assert live_tensors() == live_tensors()


@pytest.mark.slow
def test_compiled_models_are_seen_through() -> None:
    model = randomise(nn.Sequential(nn.Linear(5, 6), nn.GELU(), nn.Linear(6, 3)))
    compiled = torch.compile(model, backend="eager")
    x = images(4, 5)
    compiled(x)
    got = per_sample_fisher(compiled, squares, [x])
    expected = one_at_a_time(model, squares(model, x))
    assert_same(got, {f"_orig_mod.{name}": value for name, value in expected.items()})


# Bad input ------------------------------------------------------------------------------------------------------------


def linear_loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().sum(-1)


@pytest.fixture
def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(5, 3)


def test_nan_loss_names_batch_and_sample(linear: nn.Module) -> None:
    good, bad = torch.randn(4, 5), torch.randn(4, 5)
    bad[2, 0] = torch.inf
    with pytest.raises(RuntimeError, match=r"sample 2 of batch 1 is (nan|inf)"):
        per_sample_fisher(linear, linear_loss, [good, bad])


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (lambda m, x: m(x).square().mean(), r"shape \(\); expected shape \(N,\)"),
        (lambda m, x: m(x), r"shape \(4, 3\); expected shape \(N,\)"),
        (lambda m, x: 1.0, "a float; expected shape"),
        (lambda m, x: linear_loss(m, x).detach(), "without detaching"),
        (lambda m, x: x.clone().requires_grad_().sum(1), "do not depend on any parameter"),
    ],
)
def test_bad_losses(linear: nn.Module, loss_fn: Losses, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        per_sample_fisher(linear, loss_fn, [torch.randn(4, 5)])


def test_label_modes(linear: nn.Module) -> None:
    seen = []

    def sampling(model: nn.Module, batch: Tensor, labels: str = "empirical") -> Tensor:
        seen.append(labels)
        return linear_loss(model, batch)

    per_sample_fisher(linear, sampling, [torch.randn(4, 5)], labels="sampled")
    per_sample_fisher(linear, sampling, [torch.randn(4, 5)])
    assert seen == ["sampled", "empirical"]
    with pytest.raises(ValueError, match="takes no argument named labels"):
        per_sample_fisher(linear, linear_loss, [torch.randn(4, 5)], labels="sampled")
    with pytest.raises(ValueError, match="'empirical' or 'sampled'"):
        per_sample_fisher(linear, sampling, [torch.randn(4, 5)], labels="true")


def test_bad_requests(linear: nn.Module) -> None:
    with pytest.raises(ValueError, match="'weigth' is not a parameter"):
        per_sample_fisher(linear, linear_loss, [torch.randn(4, 5)], params=["weigth"])
    with pytest.raises(TypeError, match=r"Pass \['weight'\]"):
        PerSampleSquares(linear, "weight")
    with pytest.raises(ValueError, match="given twice"):
        PerSampleSquares(linear, ["weight", "weight"])
    with pytest.raises(ValueError, match="no batch"):
        per_sample_fisher(linear, linear_loss, [])
    with pytest.raises(RuntimeError, match="outside the context"):
        PerSampleSquares(linear).backward(linear_loss(linear, torch.randn(4, 5)))


def test_losses_of_two_passes(linear: nn.Module) -> None:
    x = torch.randn(4, 5)
    with PerSampleSquares(linear) as total:
        first, second = linear_loss(linear, x), linear_loss(linear, x)
        total.backward(first)
        with pytest.raises((RuntimeError, ValueError), match=r"one forward pass|do not depend"):
            total.backward(second)
    with PerSampleSquares(linear) as total:
        total.backward(linear_loss(linear, x) + linear_loss(linear, x.flip(1)), weight=1 / 4)
    expected = one_at_a_time(linear, linear_loss(linear, x) + linear_loss(linear, x.flip(1)))
    assert_same(total.accumulators, expected, 1e-5)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_is_refused(linear: nn.Module, use_reentrant: bool) -> None:
    def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        y = checkpoint(lambda x: model(x).tanh(), x, use_reentrant=use_reentrant)
        return y.square().sum(1)

    with pytest.raises(RuntimeError, match="activation checkpointing"):
        per_sample_fisher(linear, loss_fn, [torch.randn(4, 5)])


def test_normalisation_by_batch_statistics_is_refused() -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6, track_running_stats=False))
    with pytest.raises(ValueError, match=r"1\.weight.*not independent"):
        per_sample_fisher(model, squares, [torch.randn(4, 5)])


def test_zero_fisher_is_refused_where_it_would_rank(linear: nn.Module) -> None:
    zero = per_sample_fisher(linear, lambda m, x: 0 * linear_loss(m, x), [torch.randn(4, 5)])
    with pytest.raises(ValueError, match="zero in all 18 elements"):
        require_information(zero)
    require_information(per_sample_fisher(linear, linear_loss, [torch.randn(4, 5)]))
