"""The named slices are the parameters that attention and feed-forward really use, whatever the model calls them."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fishertune import _torchvision  # noqa: F401  (before timm)
from fishertune.partition import Slice, find_blocks, partition

timm = pytest.importorskip("timm")

SMALL = {"depth": 2, "embed_dim": 48, "num_heads": 3}
FAMILIES = {
    "plain": ("vit_base_patch16_224", {"img_size": 64}, 64),
    "clip": ("vit_base_patch16_clip_224", {"img_size": 64}, 64),
    "dinov2": ("vit_small_patch14_dinov2", {"img_size": 56}, 56),
    "dinov2-g": ("vit_giant_patch14_dinov2", {"img_size": 56}, 56),
    "dinov2-reg4": ("vit_small_patch14_reg4_dinov2", {"img_size": 56}, 56),
    "sam": ("samvit_base_patch16", {"img_size": 64, "window_size": 2, "global_attn_indexes": (1,)}, 64),
    "eva02-large": ("eva02_large_patch14_224", {"img_size": 56}, 56),
    "eva02-tiny": ("eva02_tiny_patch14_224", {"img_size": 56}, 56),
    "dinov3": ("vit_large_patch16_dinov3", {"img_size": 64}, 64),
    "dinov3-qkvb": ("vit_large_patch16_dinov3_qkvb", {"img_size": 64}, 64),
    "siglip": ("vit_base_patch16_siglip_224", {"img_size": 64}, 64),
}
ROTARY = {"eva02-large", "eva02-tiny", "dinov3", "dinov3-qkvb"}


def build(family: str) -> tuple[nn.Module, torch.Tensor]:
    name, options, size = FAMILIES[family]
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0, **SMALL, **options).eval().double()
    with torch.no_grad():
        for parameter in model.parameters():  # zero biases would hide their rows
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model, torch.randn(1, 3, size, size, dtype=torch.float64)


def rows_in_use(value: torch.Tensor, parameters: dict[str, torch.Tensor]) -> dict[str, set[int]]:
    """For each parameter the rows that ``value`` depends on."""
    grads = torch.autograd.grad(
        (value * torch.randn_like(value)).sum(), list(parameters.values()), retain_graph=True, allow_unused=True
    )
    used = {}
    for name, grad in zip(parameters, grads, strict=True):
        if grad is not None and bool((rows := grad.flatten(1).abs().sum(1) if grad.dim() > 1 else grad).any()):
            used[name] = set(rows.nonzero().flatten().tolist())
    return used


def named_rows(slices: list[Slice]) -> dict[str, set[int]]:
    rows: dict[str, set[int]] = {}
    for item in slices:
        mine = set(range(item.rows.start, item.rows.stop))
        assert not rows.get(item.name, set()) & mine, "a row is named twice"
        rows.setdefault(item.name, set()).update(mine)
    return rows


@pytest.mark.parametrize("family", FAMILIES)
def test_slices_are_what_attention_and_ffn_depend_on(family: str) -> None:
    model, images = build(family)
    candidates = partition(model)
    blocks = find_blocks(model)
    captured: list[tuple[torch.Tensor, ...]] = []
    ffn_outputs: list[torch.Tensor] = []
    attend = F.scaled_dot_product_attention

    def capture(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        captured.append((q, k, v))
        return attend(q, k, v, *args, **kwargs)

    for _, block in blocks:  # each block sees constants, so that what q depends on lies inside it
        block.register_forward_pre_hook(
            lambda _, inputs: tuple(t.detach() if torch.is_tensor(t) else t for t in inputs)
        )
        block.mlp.register_forward_pre_hook(lambda _, inputs: tuple(t.detach() for t in inputs))
        block.mlp.register_forward_hook(lambda _, inputs, output: ffn_outputs.append(output))
    with mock.patch.object(F, "scaled_dot_product_attention", capture):
        model(images)

    assert len(captured) >= len(ffn_outputs) == len(blocks) == 2  # SigLIP's pooling attends once more, last
    for number, (name, _) in enumerate(blocks):
        parameters = {
            key: p
            for key, p in model.named_parameters()
            if key.startswith(f"{name}.") and "norm" not in key and "rel_pos" not in key
        }
        for kind, value in [*zip("QKV", captured[number]), ("FFN", ffn_outputs[number])]:
            used = rows_in_use(value, parameters)
            named = named_rows([s for s in candidates if s.block == number and s.kind == kind])
            if kind == "K" and family not in ROTARY:
                used = {key: rows for key, rows in used.items() if not key.endswith("bias")}
            assert named == used, (family, kind)


@pytest.mark.parametrize("family", ["plain", "sam", "siglip"])
def test_the_k_bias_left_out_changes_no_output(family: str) -> None:
    model, images = build(family)
    with torch.no_grad():
        before = model(images)
        for _, block in find_blocks(model):
            width = block.attn.qkv.bias.numel() // 3
            block.attn.qkv.bias[width : 2 * width] += 1.0
        after = model(images)
    # float64 rounding through two blocks; the same step on the Q bias changes the output by far more
    torch.testing.assert_close(after, before, rtol=1e-11, atol=1e-11)
    with torch.no_grad():
        model.blocks[0].attn.qkv.bias[:width] += 1.0
        assert (model(images) - after).abs().max() > 1e-6


@pytest.mark.parametrize(
    ("name", "options", "candidates", "total"),
    [
        # a ViT-L block: 3·1024² (Q, K, V) + 8·1024² (FFN) weights, 2·1024 + 5·1024 biases; timm has no mask token
        (
            "vit_large_patch14_dinov2",
            {"img_size": 512, "patch_size": 16},
            24 * (11 * 1024**2 + 7 * 1024),
            304_199_680 - 1024,
        ),
        ("samvit_huge_patch16", {"img_size": 512, "neck_chans": 0}, 32 * (11 * 1280**2 + 7 * 1280), 632_136_960),
        # SwiGLU of width 4096 with a packed first layer: 3·1536·4096 weights, 8192 + 1536 biases
        (
            "vit_giant_patch14_dinov2",
            {},
            40 * (3 * 1536**2 + 2 * 1536 + 3 * 1536 * 4096 + 8192 + 1536),
            1_136_479_232,
        ),
    ],
)
def test_published_counts(name: str, options: dict, candidates: int, total: int) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0, **options)
    assert partition(model).n_candidates == candidates
    assert round(candidates / 1e6, 1) in (277.0, 577.0, 1038.6)
    assert sum(p.numel() for p in model.parameters()) == total


def test_kinds_and_blocks_restrict() -> None:
    model, _ = build("plain")
    everything = partition(model, kinds=("Q", "K", "V", "FFN", "PROJ"))
    assert {s.kind for s in everything} == {"Q", "K", "V", "FFN", "PROJ"}
    some = partition(model, kinds=["V"], blocks=[1])
    assert [(s.block, s.kind, s.name, s.rows) for s in some] == [
        (1, "V", "blocks.1.attn.qkv.weight", slice(96, 144)),
        (1, "V", "blocks.1.attn.qkv.bias", slice(96, 144)),
    ]
    assert some.n_candidates == 48 * 48 + 48


def test_finds_the_backbone_inside_a_larger_model() -> None:
    backbone, _ = build("plain")
    whole = nn.ModuleDict({"backbone": backbone, "head": nn.Conv2d(48, 5, 1)})
    assert [s.name for s in partition(whole)] == [f"backbone.{s.name}" for s in partition(backbone)]


def test_torch_multihead_attention() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(8, 2)
            self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    slices = partition(nn.Sequential(Block(), Block()))
    named = named_rows([s for s in slices if s.block == 0 and s.kind != "FFN"])
    assert named == {
        "0.attn.in_proj_weight": set(range(24)),
        "0.attn.in_proj_bias": {*range(8), *range(16, 24)},  # no K bias
    }
    assert sum(1 for s in slices if s.block == 1 and s.kind == "FFN") == 4


def test_mask_scores_marks_everything_else() -> None:
    model, _ = build("plain")
    candidates = partition(model, kinds=("Q", "FFN"))
    scores = {name: torch.rand_like(p.detach()) for name, p in model.named_parameters()}
    before = {name: values.clone() for name, values in scores.items()}
    masked = candidates.mask_scores(scores)
    assert masked.keys() == scores.keys()
    assert sum(int(torch.isfinite(values).sum()) for values in masked.values()) == candidates.n_candidates
    for item in candidates:
        torch.testing.assert_close(item.view(masked[item.name]), item.view(before[item.name]), rtol=0, atol=0)
    assert all(torch.equal(scores[name], before[name]) for name in scores)
    assert masked["blocks.0.attn.qkv.weight"][48:].eq(-math.inf).all()
    assert masked["norm.weight"].eq(-math.inf).all()


def test_share_counts_every_selected_element_once() -> None:
    model, _ = build("eva02-large")
    candidates = partition(model)
    generator = torch.Generator().manual_seed(0)
    masks = {name: torch.rand(p.shape, generator=generator) < 0.1 for name, p in model.named_parameters()}
    indices = {name: mask.flatten().nonzero().flatten() for name, mask in masks.items()}
    share = candidates.share(indices)
    assert share == {
        key: sum(int(s.view(masks[s.name]).sum()) for s in candidates if (s.block, s.kind) == key) for key in share
    }
    assert set(share) == {(block, kind) for block in (0, 1) for kind in ("Q", "K", "V", "FFN")}
    assert sum(candidates.share({}).values()) == 0


def test_by_block_and_kind_is_a_plain_mean() -> None:
    model, _ = build("plain")
    candidates = partition(model)
    values = {name: torch.rand(p.shape) for name, p in model.named_parameters()}
    means = candidates.by_block_and_kind(values)
    qkv = values["blocks.1.attn.qkv.weight"][:48], values["blocks.1.attn.qkv.bias"][:48]
    expected = torch.cat([part.flatten() for part in qkv]).double().mean().item()
    assert means[1, "Q"] == pytest.approx(expected, rel=1e-12)  # both sums run in float64


def test_bad_input_is_named() -> None:
    model, _ = build("plain")
    with pytest.raises(ValueError, match=r"nn\.ModuleList or nn\.Sequential.*qkv.*mlp"):
        partition(nn.Sequential(nn.Linear(3, 3), nn.ReLU()))
    with pytest.raises(ValueError, match="must name at least one of Q, K, V, FFN, PROJ"):
        partition(model, kinds=("Q", "MLP"))
    with pytest.raises(ValueError, match="blocks 0 to 1"):
        partition(model, blocks=[0, 2])
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.qkv\.weight.*expected a tensor of shape \(144, 48\)"):
        partition(model).mask_scores({})
    model.blocks[0].attn.head_first = True  # how timm's MaxViT marks it
    with pytest.raises(ValueError, match="each head together"):
        partition(model)
