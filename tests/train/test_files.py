"""Files are whole or absent, whatever happens while they are written."""

from __future__ import annotations

import errno
import os

import pytest
import torch
from safetensors import SafetensorError

from fishertune.files import atomic_write, load_json, load_tensors, save_json, save_tensors


def test_an_error_while_writing_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.json"
    save_json(path, {"old": 1})
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert load_json(path) == {"old": 1}
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        # what safetensors 0.8 raises on a full file system, word for word
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_one_clear_error(tmp_path, monkeypatch, error):
    path = tmp_path / "a.safetensors"
    save_tensors(path, {"x": torch.ones(2)}, {"version": 1})

    def full(*_args, **_kwargs):
        raise error

    monkeypatch.setattr("fishertune.files.save_file", full)
    with pytest.raises(RuntimeError, match=r"No disk space left while writing .*a\.safetensors.*--resume"):
        save_tensors(path, {"x": torch.zeros(2)}, {"version": 2})
    assert load_tensors(path)[1] == {"version": 1}
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_tensors_and_metadata_survive_the_trip(tmp_path):
    tensors = {"a": torch.arange(6).reshape(2, 3).t(), "b": torch.tensor(1.5, dtype=torch.bfloat16)}
    save_tensors(tmp_path / "x.safetensors", tensors, {"nested": {"list": [1, None, "ü"]}})
    loaded, metadata = load_tensors(tmp_path / "x.safetensors")
    assert metadata == {"nested": {"list": [1, None, "ü"]}}
    assert all(
        torch.equal(loaded[name], tensors[name]) and loaded[name].dtype == tensors[name].dtype for name in tensors
    )


def test_unreadable_files_are_named(tmp_path):
    save_tensors(tmp_path / "x.safetensors", {"a": torch.ones(100)}, {})
    data = (tmp_path / "x.safetensors").read_bytes()
    (tmp_path / "x.safetensors").write_bytes(data[:-10])
    with pytest.raises(ValueError, match=r"x\.safetensors is not a readable safetensors file"):
        load_tensors(tmp_path / "x.safetensors")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_tensors(tmp_path / "y.safetensors")
    (tmp_path / "z.json").write_text("{")
    with pytest.raises(ValueError, match=r"z\.json is not valid JSON"):
        load_json(tmp_path / "z.json")
    with pytest.raises(ValueError, match=r"NaN|not JSON compliant"):
        save_json(tmp_path / "n.json", float("nan"))
    assert not (tmp_path / "n.json").exists()
