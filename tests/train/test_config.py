"""Configuration files: what is refused, and that what is accepted means what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from fishertune.train.config import ConfigError, load_config, load_domains, save_config


def write(path: Path, content: Any) -> Path:
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def test_a_saved_configuration_reads_back_equal(tmp_path, plain_config):
    config = load_config(write(tmp_path / "a.yaml", plain_config))
    save_config(tmp_path / "b.yaml", config)
    assert load_config(tmp_path / "b.yaml") == config


def test_overrides_reach_nested_settings_and_are_typed(tmp_path, plain_config):
    path = write(tmp_path / "a.yaml", plain_config)
    config = load_config(
        path, ["tune.lr=3e-5", "method=full", "evaluate.window=[16, 32]", "estimate.options={beta: 0.2}"]
    )
    assert config.tune.lr == 3e-5  # YAML 1.1 reads 3e-5 as text; it must arrive as a number
    assert config.method == "full"
    assert config.evaluate.window == (16, 32)
    assert config.estimate.options == {"beta": 0.2}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("tune.learning_rate=1", "Unknown setting tune.learning_rate"),
        ("tune.weigth_decay=1", "Did you mean weight_decay?"),
        ("tuen.lr=1", "Did you mean tune?"),
        ("tune.steps=many", "tune.steps='many': expected int"),
        ("tune.steps=true", "expected int"),
        ("tune.precision=fp8", "not one of fp32, bf16"),
        ("data.source.kind=scene", "Did you mean scenes?"),
        ("estimate.estimator=natrual", "Did you mean natural?"),
        ("augment.crop=[1, 2, 3]", "expected a list of 2"),
        ("augment.crop=5", "expected a list"),
        ("seed.x=1", "has no x"),
        ("seed", "not of the form key=value"),
        ("select.fraction=5", "5 % is 0.05"),
        ("data.holdout=0", "between 0 and 1"),
        ("estimate.gamma=0", "must be greater than 0"),
        ("tune.steps=-1", "must not be negative"),
        ("backbone.blocks=[]", "names at least one block|name at least one block"),
        ("augment.scale=[2, 1]", "augment.scale"),
    ],
)
def test_a_bad_setting_is_named_with_its_remedy(tmp_path, plain_config, override, expected):
    path = write(tmp_path / "a.yaml", plain_config)
    with pytest.raises(ValueError, match=expected):
        load_config(path, [override])


def test_missing_sections_and_files_are_named(tmp_path):
    with pytest.raises(ConfigError, match="data is missing"):
        load_config(write(tmp_path / "a.yaml", {"seed": 1}))
    with pytest.raises(ConfigError, match=r"nothing\.yaml does not exist"):
        load_config(tmp_path / "nothing.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1,", encoding="utf-8")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(tmp_path / "broken.yaml")


def test_relative_paths_start_from_root_or_from_the_file(tmp_path, plain_config):
    for folder in ("beside/images", "beside/labels", "elsewhere/images", "elsewhere/labels"):
        (tmp_path / folder).mkdir(parents=True)
    plain_config["data"]["source"] = {"kind": "folder", "images": "images", "labels": "labels"}
    path = write(tmp_path / "beside" / "a.yaml", plain_config)
    assert load_config(path).data.source.images == str(tmp_path / "beside" / "images")
    moved = load_config(path, [f"data.root={tmp_path / 'elsewhere'}"])
    assert moved.data.source.labels == str(tmp_path / "elsewhere" / "labels")


def test_domain_files_are_checked_like_the_unseen_section(tmp_path):
    path = write(tmp_path / "more.yaml", {"storm": {"kind": "scenes", "domain": "rain", "count": 2}})
    assert load_domains(path)["storm"].domain == "rain"
    with pytest.raises(ConfigError, match="Did you mean count"):
        load_domains(write(tmp_path / "bad.yaml", {"storm": {"kind": "scenes", "cuont": 2}}))


def test_fingerprint_changes_with_its_sections_only(tmp_path, plain_config):
    path = write(tmp_path / "a.yaml", plain_config)
    one, other = load_config(path), load_config(path, ["tune.lr=0.5"])
    assert one.fingerprint("seed", "warmup") == other.fingerprint("seed", "warmup")
    assert one.fingerprint("tune") != other.fingerprint("tune")
    assert one.fingerprint("tune.clip") == other.fingerprint("tune.clip")
    assert one.fingerprint("tune.lr") != other.fingerprint("tune.lr")
