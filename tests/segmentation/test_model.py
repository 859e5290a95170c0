"""Backbones from local files and the segmentation model around them."""

import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from fishertune import _torchvision  # noqa: F401 (must run before timm)
from fishertune.segmentation.heads import create_head, list_heads, register_head
from fishertune.segmentation.model import SegmentationModel, create_backbone, feature_channels, resolve_blocks
from fishertune.segmentation.transforms import IMAGENET_MEAN

TINY = "vit_tiny_patch16_224"
FAMILIES = {  # one small model each of the families: plain, DINOv2, CLIP, EVA, DINOv3
    "vit_tiny_patch16_224": 16,
    "vit_small_patch14_dinov2": 14,
    "vit_base_patch32_clip_224": 32,
    "eva02_tiny_patch14_224": 14,
    "vit_small_patch16_dinov3": 16,
}


def model_of(backbone, kind="linear", classes=5, blocks=(1, 3)):
    return SegmentationModel(backbone, create_head(kind, feature_channels(backbone, blocks), classes), blocks)


@pytest.fixture(scope="module")
def tiny():
    return create_backbone(TINY, image_size=(32, 48))


@pytest.mark.parametrize(("name", "patch"), FAMILIES.items())
def test_every_family_gives_logits_at_input_size(name, patch):
    backbone = create_backbone(name)
    model = model_of(backbone)
    height, width = 2 * patch + 3, 3 * patch  # a height that is no multiple of the patch
    images = torch.randn(2, 3, height, width)
    features = model.features(images)
    assert [tuple(f.shape) for f in features] == [(2, backbone.embed_dim, 3, 3)] * 2
    assert model(images).shape == (2, 5, height, width)


def test_features_are_the_blocks_outputs(tiny):
    images, outputs = torch.randn(2, 3, 32, 48), {}
    handles = [tiny.blocks[i].register_forward_hook(lambda m, x, y, i=i: outputs.update({i: y})) for i in range(12)]
    features = model_of(tiny, blocks=(3, 1)).features(images)
    for handle in handles:
        handle.remove()
    assert sorted(outputs) == [0, 1, 2, 3]  # nothing behind the last chosen block is computed
    for block, feature in zip((1, 3), features, strict=True):
        tokens = outputs[block][:, tiny.num_prefix_tokens :]
        assert torch.equal(feature, tokens.transpose(1, 2).reshape(2, tiny.embed_dim, 2, 3))


def test_blocks_behind_the_last_chosen_one_get_no_gradient(tiny):
    model = model_of(tiny, blocks=(0, 4))
    names = [name for name, _ in tiny.named_parameters()]
    gradients = torch.autograd.grad(
        model(torch.randn(1, 3, 32, 48)).square().sum(), tiny.parameters(), allow_unused=True
    )
    without = {name for name, gradient in zip(names, gradients, strict=True) if gradient is None}
    later = {name for name in names if name.startswith("blocks.") and int(name.split(".")[1]) > 4}
    assert without == later | {"norm.weight", "norm.bias"}


def test_linear_head_is_its_formula(tiny):
    model = model_of(tiny)
    images = torch.randn(2, 3, 32, 48)
    normed = []
    for feature in model.features(images):
        mean, variance = feature.mean(1, keepdim=True), feature.var(1, keepdim=True, unbiased=False)
        normed.append((feature - mean) / (variance + 1e-5).sqrt())
    scores = torch.einsum("kd,ndhw->nkhw", model.decode_head.classify.weight[:, :, 0, 0], torch.cat(normed, 1))
    expected = F.interpolate(scores, size=(32, 48), mode="bilinear", align_corners=False)
    # the head's bias starts at 0; fp32 sums of 384 terms of size 0.01 differ by order of summation
    torch.testing.assert_close(model(images), expected, atol=1e-5, rtol=1e-4)


def test_padding_to_whole_patches_does_not_stretch_the_logits(tiny):
    """Logits of the visible part are those of the padded image: the grid is cropped, not squeezed."""
    model = model_of(tiny)
    images = torch.randn(1, 3, 27, 40)
    padded = F.pad(images, (0, 8, 0, 5))
    torch.testing.assert_close(model(images), model(padded)[..., :27, :40], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", list_heads())
def test_samples_do_not_mix_in_any_mode(tiny, kind):
    model = model_of(tiny, kind).train()
    images = torch.randn(3, 3, 32, 48)
    with torch.no_grad():
        together, alone = model(images), model(images[1:2])
    # a batch of another size may pick another matrix kernel, so equal to rounding only
    torch.testing.assert_close(together[1:2], alone, atol=1e-5, rtol=1e-4)


def test_heads_are_seeded_without_touching_the_global_state():
    before = torch.get_rng_state()
    first, same, other = (create_head("conv", (8, 8), 3, seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.reduce.weight, same.reduce.weight)
    assert not torch.equal(first.reduce.weight, other.reduce.weight)


def test_head_registry(monkeypatch):
    from fishertune.segmentation import heads

    monkeypatch.setattr(heads, "_HEADS", dict(heads._HEADS))
    with pytest.raises(ValueError, match=r"no head 'mask2former'\. Known: linear, conv"):
        create_head("mask2former", (4,), 2)
    register_head("mask2former")(lambda channels, classes: nn.Conv2d(sum(channels), classes, 1))
    assert "mask2former" in list_heads() and create_head("mask2former", (4,), 2).out_channels == 2
    with pytest.raises(ValueError, match="'linear' exists already"):
        register_head("linear")(nn.Conv2d)


def test_blocks_are_checked(tiny):
    assert resolve_blocks(tiny, (-1, 2)) == (2, 11)
    for blocks, message in (
        ((12,), "no block 12"),
        ((-13,), "no block -13"),
        ((), "at least one"),
        ((1, -11), "only once"),
    ):
        with pytest.raises(ValueError, match=message):
            resolve_blocks(tiny, blocks)


def test_uint8_images_are_refused(tiny):
    with pytest.raises(TypeError, match=r"uint8: use transforms\.normalise"):
        model_of(tiny)(torch.zeros(1, 3, 32, 48, dtype=torch.uint8))


def test_normalisation_is_the_backbones_own(tiny):
    model = model_of(tiny)
    assert model.mean == (0.5, 0.5, 0.5)  # what timm states for this model, and not ImageNet's
    del tiny.__dict__["pretrained_cfg"]
    assert model_of(tiny).mean == IMAGENET_MEAN


# -------------------------------------------------------------------------------------------------------------- weights


def test_random_weights_follow_the_seed_and_leave_the_global_state():
    before = torch.get_rng_state()
    first, same, other = (
        create_backbone(TINY, image_size=(32, 32), seed=s).blocks[0].mlp.fc1.weight for s in (1, 1, 2)
    )
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_file_of_the_same_geometry_is_loaded_exactly(tmp_path, dtype):
    source = create_backbone(TINY, image_size=(32, 48), seed=7)
    state = {name: value.to(dtype) for name, value in source.state_dict().items()}
    save_file(
        state | {"head.weight": torch.zeros(1000, 192), "head.bias": torch.zeros(1000)}, tmp_path / "w.safetensors"
    )
    loaded = create_backbone(TINY, image_size=(32, 48), weights=tmp_path / "w.safetensors")
    assert not loaded.training
    for name, value in loaded.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, state[name].float()), name
    assert "state_dict" not in loaded.pretrained_cfg  # no second copy of the weights is kept


def test_position_table_and_patches_are_resampled(tmp_path):
    source = create_backbone(TINY, image_size=(64, 64), seed=7)
    with torch.no_grad():
        source.pos_embed.fill_(0.25)
        source.patch_embed.proj.weight.fill_(1.0)
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    loaded = create_backbone(TINY, image_size=(64, 96), patch_size=8, weights=tmp_path / "w.safetensors")
    assert loaded.pos_embed.shape == (1, 1 + 8 * 12, 192)
    # resampling a constant gives the constant
    torch.testing.assert_close(loaded.pos_embed, torch.full_like(loaded.pos_embed, 0.25))
    # a constant image gives the same token (256 ones become about 64 fours): the resampling is a least-squares fit to
    # images of the old size, whose smoothing at the borders leaves 0.9 %
    torch.testing.assert_close(
        loaded.patch_embed.proj.weight.sum((2, 3)), torch.full((192, 3), 256.0), rtol=0.02, atol=0
    )
    assert torch.equal(loaded.blocks[3].attn.qkv.weight, source.blocks[3].attn.qkv.weight)


def test_resampling_works_on_widened_values(tmp_path):
    state = {name: value.half() for name, value in create_backbone(TINY, image_size=(64, 64)).state_dict().items()}
    save_file(state, tmp_path / "half.safetensors")
    save_file({name: value.float() for name, value in state.items()}, tmp_path / "single.safetensors")
    half, single = (
        create_backbone(TINY, image_size=(48, 80), weights=tmp_path / f"{name}.safetensors")
        for name in ("half", "single")
    )
    assert torch.equal(half.pos_embed, single.pos_embed)


def test_a_file_of_another_architecture_is_one_clear_error(tmp_path):
    save_file(create_backbone(TINY, image_size=(32, 32)).state_dict(), tmp_path / "tiny.safetensors")
    with pytest.raises(ValueError, match="does not hold weights of vit_small_patch16_224") as wide:
        create_backbone("vit_small_patch16_224", weights=tmp_path / "tiny.safetensors")
    assert "of another shape: cls_token [1, 1, 192] instead of [1, 1, 384]" in str(wide.value)
    assert "backbone.name" in str(wide.value) and len(str(wide.value)) < 600
    state = create_backbone(TINY, image_size=(32, 32)).state_dict()
    state["blocks.12.norm1.weight"] = torch.zeros(192)
    del state["blocks.3.mlp.fc1.bias"]
    save_file(state, tmp_path / "deep.safetensors")
    with pytest.raises(
        ValueError, match=r"1 missing: blocks\.3\.mlp\.fc1\.bias; 1 unexpected: blocks\.12\.norm1\.weight\."
    ):
        create_backbone(TINY, image_size=(32, 32), weights=tmp_path / "deep.safetensors")


def test_files_that_are_not_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.safetensors does not exist"):
        create_backbone(TINY, weights=tmp_path / "nothing.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00\x00")
    with pytest.raises(ValueError, match=r"cut\.safetensors is not a readable safetensors file"):
        create_backbone(TINY, weights=tmp_path / "cut.safetensors")
    save_file({"foo": torch.zeros(2)}, tmp_path / "foo.safetensors")
    with pytest.raises(ValueError, match=r"missing: .*; 1 unexpected: foo\."):
        create_backbone(TINY, weights=tmp_path / "foo.safetensors")


def test_names_that_are_no_vit():
    with pytest.raises(ValueError, match=r"no model 'vit_smal_patch14_dinov2'.* Similar: vit_small_patch14_dinov2"):
        create_backbone("vit_smal_patch14_dinov2")
    with pytest.raises(ValueError, match=r"resnet18 .* is not a plain ViT"):
        create_backbone("resnet18")


def test_dinov2_large_has_the_papers_parameter_count():
    # 304,199,680 is the paper's count with mask token (1024 numbers), which timm leaves out
    with torch.device("meta"):
        backbone = create_backbone("vit_large_patch14_dinov2", image_size=(512, 512), patch_size=16)
    assert sum(math.prod(p.shape) for p in backbone.parameters()) == 304_199_680 - 1024
