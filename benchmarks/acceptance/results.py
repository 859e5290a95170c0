"""The JSON file of a run: written whole after every part, and continued by the next run that is the same."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import pkgutil
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import fishertune_kernels
from fishertune_kernels import dispatch

from .parts import OPERATORS
from .records import Record, from_json, to_json

ROOT = Path(__file__).parents[2]
MEASURED = ("benchmarks/gpu_acceptance.py", "benchmarks/acceptance", "kernels", "csrc", "fishertune/fisher")
SETTLED = ("done", "failed")
"""States that another run does not try again."""


@dataclass
class Outcome:
    """Of one part."""

    state: str
    """``done``, ``failed``, ``not run``, ``cut`` (some of it ran) or ``running``."""
    seconds: float = 0.0
    records: list[Record] = field(default_factory=list)
    note: str = ""
    traceback: str = ""


class Results:
    """Parts and what they found. ``about`` says what was measured: equal ``KEY`` entries mean that it was the same."""

    KEY = ("device", "commit", "sources", "quick")

    def __init__(self, path: Path | None, about: dict[str, Any]):
        self.path, self.about = path, about
        self.parts: dict[str, Outcome] = {}
        self.goals: list[dict[str, Any]] = []

    @classmethod
    def read(cls, path: Path) -> Results:
        content = json.loads(path.read_text(encoding="utf-8"))
        results = cls(path, {name: value for name, value in content.items() if name not in ("parts", "goals")})
        results.goals = content["goals"]
        for name, part in content["parts"].items():
            records = [from_json(entry) for entry in part.pop("records")]
            results.parts[name] = Outcome(**part, records=records)
        return results

    @classmethod
    def open(cls, folder: Path | None, about: dict[str, Any], seed: int | None, fresh: bool) -> Results:
        """Those of the newest file in ``folder`` about the same thing (and of this seed, if one is given), or new."""
        if folder is None:
            return cls(None, about)
        for path in sorted(folder.glob(f"{about['device']}-*.json"), reverse=True) if not fresh else ():
            try:
                found = cls.read(path)
            except (ValueError, KeyError, TypeError):
                continue  # another format: not ours to go on with
            same = all(found.about.get(key) == about[key] for key in cls.KEY)
            if same and seed in (None, found.about["seed"]):
                return found
        return cls(folder / f"{about['device']}-{about['date'][:10]}-{about['commit']}.json", about)

    def settled(self, name: str) -> bool:
        return name in self.parts and self.parts[name].state in SETTLED

    def put(self, name: str, outcome: Outcome) -> None:
        self.parts[name] = outcome
        self.write()

    def records(self) -> Iterable[Record]:
        return (record for outcome in self.parts.values() for record in outcome.records)

    def in_state(self, *states: str) -> dict[str, Outcome]:
        return {name: outcome for name, outcome in self.parts.items() if outcome.state in states}

    def write(self) -> None:
        """Whole or absent: written beside, then renamed."""
        if self.path is None:
            return
        content = {
            **self.about,
            "goals": self.goals,
            "parts": {name: _part_to_json(outcome) for name, outcome in self.parts.items()},
        }
        text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        write_whole(self.path, text.encode())


def _part_to_json(outcome: Outcome) -> dict[str, Any]:
    part = {key: value for key, value in vars(outcome).items() if value}
    return {**part, "records": [to_json(record) for record in outcome.records]}


def write_whole(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    os.replace(partial, path)


def about(device: torch.device, quick: bool, seed: int) -> dict[str, Any]:
    """What is measured, where and when."""
    properties = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    name = properties.name.replace(" ", "_") if properties else f"cpu-{torch.get_num_threads()}-threads"
    return {
        "device": "cpu-quick" if quick else name,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "sources": sources(),
        "quick": quick,
        "seed": seed,
        "versions": versions(),
        "backends": backends(device),
        "operators": {operator.name: list(operator.functions) for operator in OPERATORS},
        "card": {
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "capability": f"{properties.major}.{properties.minor}",
            "l2_mib": properties.L2_cache_size >> 20,
        }
        if properties
        else None,
    }


def backends(device: torch.device) -> dict[str, str]:
    """Which implementation of every operator runs on this device."""
    folders = [module.name for module in pkgutil.iter_modules(fishertune_kernels.__path__) if module.ispkg]
    modules = {name: dispatch.implementation(name, device, {torch.float32}) for name in folders}
    return {name: module.__name__.rpartition(".")[2] for name, module in modules.items()}


def versions() -> dict[str, str | None]:
    """Of whatever is installed; None where it is not."""
    packages = {"triton": "triton", "timm": "timm", "backpack": "backpack-for-pytorch"}
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        **{name: _version(package) for name, package in packages.items()},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str:
    """Short hash of the checkout, ``unknown`` outside one, ``-dirty`` behind it where tracked files differ."""
    try:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def sources() -> str:
    """Hash of the code that is measured and that measures: a dirty checkout, or none, has no other name."""
    digest = hashlib.sha256()
    for place in MEASURED:
        top = ROOT / place
        files = [top] if top.is_file() else sorted(top.rglob("*"))
        for file in files:
            if file.suffix in (".py", ".cpp", ".cu", ".cuh", ".h", ".inl"):
                digest.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:12]
