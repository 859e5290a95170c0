"""The backbone that ships with the project: its file, its recipe, and that it has learned something."""

import hashlib
import shutil

import pytest
import torch
import torch.nn.functional as F

from fishertune.files import load_json, load_tensors
from fishertune.segmentation import tiny
from fishertune.segmentation.classes import IGNORE_INDEX
from fishertune.segmentation.datasets.scenes import DOMAINS, SceneDataset
from fishertune.segmentation.tiny import RECIPE, WEIGHTS, create_tiny_backbone
from fishertune.segmentation.transforms import IMAGENET_MEAN, IMAGENET_STD, normalise


def test_the_file_is_small_and_is_the_one_of_its_recipe():
    recipe = load_json(RECIPE)
    assert WEIGHTS.stat().st_size <= 10 * 1000 * 1000
    assert hashlib.sha256(WEIGHTS.read_bytes()).hexdigest() == recipe["sha256"]
    tensors, metadata = load_tensors(WEIGHTS)
    assert sum(tensor.numel() for tensor in tensors.values()) == recipe["parameters"]
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert metadata["recipe"] == recipe["recipe"]


def test_it_loads_every_weight_and_takes_any_size():
    backbone = create_tiny_backbone()
    tensors, _ = load_tensors(WEIGHTS)
    state = backbone.state_dict()
    assert state.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert state[name].dtype == torch.float32
        assert torch.equal(state[name], tensor.float())
    for height, width in ((96, 160), (128, 192), (50, 70)):
        (features,) = backbone.forward_intermediates(
            torch.zeros(1, 3, height, width), indices=[5], intermediates_only=True
        )
        assert features.shape == (1, 192, -(-height // 8), -(-width // 8))


def test_random_weights_follow_the_seed_and_leave_the_global_state_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    one, same, other = (create_tiny_backbone(pretrained=False, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    weight = [model.blocks[0].attn.qkv.weight for model in (one, same, other)]
    assert torch.equal(weight[0], weight[1])
    assert not torch.equal(weight[0], weight[2])


def test_a_damaged_or_missing_file_is_refused(tmp_path, monkeypatch):
    damaged = tmp_path / "tiny_vit.safetensors"
    shutil.copy(WEIGHTS, damaged)
    with damaged.open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    monkeypatch.setattr(tiny, "WEIGHTS", damaged)
    with pytest.raises(RuntimeError, match="SHA-256"):
        create_tiny_backbone()
    damaged.unlink()
    with pytest.raises(RuntimeError, match=r"not at .*pretrain_tiny"):
        create_tiny_backbone()


def probe_accuracy(backbone: torch.nn.Module) -> float:
    """Pixel accuracy, averaged over classes, of ridge regression from one block's features to the patch's class."""

    def features_and_classes(seed: int, count: int):
        dataset = SceneDataset("clear", count, (96, 160), seed)
        samples = [dataset[index] for index in range(count)]
        images = normalise(torch.stack([s.image for s in samples]), IMAGENET_MEAN, IMAGENET_STD)
        with torch.no_grad():
            (maps,) = backbone.forward_intermediates(images, indices=[5], intermediates_only=True)
        x = F.layer_norm(maps.permute(0, 2, 3, 1), (192,)).reshape(-1, 192)
        y = torch.stack([s.label for s in samples])[:, 4::8, 4::8].reshape(-1).long()
        return torch.cat([x, torch.ones(len(x), 1)], 1)[y != IGNORE_INDEX], y[y != IGNORE_INDEX]

    x, y = features_and_classes(901, 40)
    target = F.one_hot(y, 19).float()
    target /= target.sum(0).clamp(min=1).sqrt()  # rare classes count too
    weights = torch.linalg.solve(x.T @ x + 1.0 * torch.eye(193), x.T @ target)
    x, y = features_and_classes(902, 16)
    predicted = (x @ weights).argmax(1)
    present = [c for c in range(19) if (y == c).sum() >= 20]
    return sum(float((predicted[y == c] == c).float().mean()) for c in present) / len(present)


def test_its_features_are_better_than_random_ones():
    pretrained = probe_accuracy(create_tiny_backbone())
    random = max(probe_accuracy(create_tiny_backbone(pretrained=False, seed=seed)) for seed in (0, 1))
    assert pretrained > random + 0.05


def test_the_recorded_probe_says_the_same_in_every_domain():
    probe = load_json(RECIPE)["linear_probe_miou"]
    for domain in DOMAINS:
        assert probe["pretrained"][domain] > 1.2 * probe["random_weights"][domain]
    for domain in set(DOMAINS) - {"clear"}:  # the probe saw clear streets only, and it shows
        assert probe["pretrained"][domain] < probe["pretrained"]["clear"]
