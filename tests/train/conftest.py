"""A run small enough to be repeated many times: tiny backbone, scenes of 32 × 64 pixels, a few steps a stage."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from fishertune.train.config import RunConfig, load_config
from fishertune.train.progress import Reporter

SMALL_RUN: dict[str, Any] = {
    "seed": 3,
    "backbone": {"name": "tiny", "blocks": [0, 1]},
    "data": {
        "source": {"kind": "scenes", "domain": "clear", "count": 8, "size": [32, 64], "seed": 1},
        "holdout": 0.25,
        "unseen": {"night": {"kind": "scenes", "domain": "night", "count": 3, "size": [32, 64], "seed": 2}},
    },
    "augment": {"crop": [32, 64]},
    "warmup": {"steps": 3, "batch_size": 2},
    "estimate": {"steps": 3, "batch_size": 2},
    "tune": {"steps": 4, "batch_size": 2, "lr": 1e-3, "weight_decay": 0.1, "growth": {"start": 0.01}},
    "checkpoint_every": 2,
}


@pytest.fixture
def plain_config() -> dict[str, Any]:
    return copy.deepcopy(SMALL_RUN)


@pytest.fixture
def small_config(tmp_path: Path) -> RunConfig:
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(SMALL_RUN), encoding="utf-8")
    return load_config(path)


@pytest.fixture
def quiet() -> Reporter:
    return Reporter(quiet=True)
