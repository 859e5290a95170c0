"""The real-data configuration, shortened: real DINOv2 weights on real driving frames, from file to delta and back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fishertune.delta import Delta
from fishertune.files import load_tensors
from fishertune.selection import Selection
from fishertune.train.config import load_config
from fishertune.train.pipeline import load_run, run
from fishertune.train.setup import build_backbone

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "camvid_dinov2_s.yaml"
DATA = ROOT.parent / "shared" / "data" / "camvid" / "manifest.json"
WEIGHTS = ROOT.parent / "shared" / "weights" / "dinov2_vits14.fp16.safetensors"

pytestmark = pytest.mark.skipif(
    not (DATA.exists() and WEIGHTS.exists()),
    reason="CamVid or the DINOv2-S weights are not beside this checkout; neither may be shipped with it",
)


def test_camvid_dinov2_from_public_weights_to_an_exact_delta(tmp_path, quiet):
    domain = (
        "kind: folder, images: images, labels: labels, manifest: manifest.json, label_map: camvid, size: [112, 140]"
    )
    config = load_config(
        CONFIG,
        [
            "backbone.image_size=[112, 140]",
            f"data.source={{{domain}, sequences: [0016E5, Seq05VD], limit: 12}}",
            f"data.unseen={{dusk: {{{domain}, sequences: [0001TP], limit: 4}},"
            f" fog: {{{domain}, sequences: [0016E5], part: val, limit: 4, corruption: {{name: fog}}}}}}",
            "augment.crop=[112, 140]",
            "warmup={steps: 12, batch_size: 2}",
            "estimate={steps: 2, batch_size: 2}",
            "tune={steps: 3, batch_size: 2, lr: 1e-4, weight_decay: 0.1}",
        ],
    )
    metrics = run(config, tmp_path / "run", reporter=quiet)
    public = build_backbone(config)
    assert metrics["tuned_parameters"] == round(0.05 * sum(p.numel() for p in public.parameters()))
    # twelve steps of a linear head on frozen DINOv2 features: far above the 1/11 of a constant guess's best class
    assert metrics["domains"]["source"]["iou"]["road"] > 0.4
    assert set(metrics["domains"]) == {"source", "dusk", "fog"}

    selection = Selection.load(tmp_path / "run" / "selection.safetensors")
    tuned = load_run(tmp_path / "run", quiet).model.backbone
    for name, before in public.named_parameters():
        after = tuned.get_parameter(name)
        unselected = ~selection.mask(name) if name in selection.indices else torch.ones_like(before, dtype=torch.bool)
        assert torch.equal(after[unselected], before[unselected]), name
    # the fp16 file itself takes the delta: widened exactly where it is touched
    weights = load_tensors(WEIGHTS)[0]
    Delta.load(tmp_path / "run" / "delta.safetensors").apply_(weights)
    for name in selection.indices:
        assert torch.equal(weights[name].float(), tuned.get_parameter(name)), name
