"""The folder a run lives in: what is in it, when it may be used, and what a resumed run finds there."""

from __future__ import annotations

from pathlib import Path

from fishertune.train.config import ConfigError, RunConfig, load_config, save_config, to_plain


class RunFolder:
    """Paths of one run. Every file is written whole or not at all, so its presence says that its stage is done."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.scores = self.path / "scores.safetensors"
        self.selection = self.path / "selection.safetensors"
        self.delta = self.path / "delta.safetensors"
        self.backbone = self.path / "backbone.safetensors"  # methods that tune everything have no sparse delta
        self.decoder = self.path / "decoder.safetensors"
        self.metrics = self.path / "metrics.json"
        self.pictures = self.path / "pictures.safetensors"
        self.report = self.path / "report.html"
        self.state = self.path / "state"

    def open(self, config: RunConfig, *, resume: bool) -> None:
        """Makes the folder, or checks that it holds the same run.

        Raises:
            ConfigError: if it is in use and ``resume`` is not set, or holds a run of another configuration.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"--out {self.path} is a file; name a folder.")
        used = self.path.exists() and any(self.path.iterdir())
        if used and not resume:
            raise ConfigError(
                f"--out {self.path} is not empty. Add --resume to continue the run in it, or name another folder."
            )
        if used and self.config.exists():
            earlier = load_config(self.config)
            if earlier != config:
                raise ConfigError(
                    f"{self.path} holds a run of another configuration ({_first_difference(earlier, config)}). "
                    "Resume it with its own configuration, or name another folder."
                )
            return
        self.state.mkdir(parents=True, exist_ok=True)
        save_config(self.config, config)

    def load_config(self) -> RunConfig:
        """The configuration of a folder that holds a run.

        Raises:
            ConfigError: if the folder holds none.
        """
        if not self.config.is_file():
            raise ConfigError(f"{self.path} is no run folder: it has no config.yaml.")
        return load_config(self.config)


def _first_difference(earlier: RunConfig, now: RunConfig) -> str:
    def walk(a: object, b: object, where: str) -> str | None:
        if isinstance(a, dict) and isinstance(b, dict):
            for key in [*a, *(key for key in b if key not in a)]:
                found = walk(a.get(key), b.get(key), f"{where}.{key}" if where else str(key))
                if found:
                    return found
            return None
        return None if a == b else f"{where} was {a!r}, now {b!r}"

    return walk(to_plain(earlier), to_plain(now), "") or "no difference"
