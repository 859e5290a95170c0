"""Time and memory of every way to the estimates, beside one plain forward and backward pass of the same images.

The exact rivals are those of ``bench_fisher.py``; here they run on the study's model and image size.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench_fisher
import torch
from torch import Tensor, nn

from fishertune.fisher.posterior import make_estimator
from fishertune.partition import partition
from fishertune.segmentation.heads import create_head
from fishertune.segmentation.model import SegmentationModel, feature_channels
from fishertune.train.config import RunConfig
from fishertune.train.setup import build_backbone, class_names, resolve_device

Batch = tuple[Tensor, Tensor]
Squares = dict[str, Tensor]


def _posterior(kind: str, **options: Any) -> Callable[[nn.Module, Batch], Callable[[], Squares]]:
    def contender(model: nn.Module, batch: Batch) -> Callable[[], Squares]:
        names = ["backbone." + name for name in partition(model.backbone).names]

        def work() -> Squares:
            estimator = make_estimator(kind, gamma=1e-8, tau=0.01, params=names, **options)
            estimator.update(model, lambda model, batch: bench_fisher.losses(model, batch), batch)
            return estimator.excess

        return work

    return contender


# Label → contender. The first group computes one and the same quantity, the exact Fisher of the batch.
EXACT = {
    "ours": bench_fisher.ours,
    "one by one": bench_fisher.one_by_one,
    "vmap(grad)": bench_fisher.vmap_grad,
    "BackPACK": bench_fisher.backpack,
    "Opacus": bench_fisher.opacus,
}
OTHERS = {
    "batch-squared": bench_fisher.batch_squared,
    "natural": _posterior("natural"),
    "local": _posterior("local"),
    "local, antithetic": _posterior("local", antithetic=True),
    "sgvb": _posterior("sgvb"),
    "sgvb, antithetic": _posterior("sgvb", antithetic=True),
}
CONTENDERS = EXACT | OTHERS


def make_model(config: RunConfig) -> nn.Module:
    """The study's model with a fresh head and without the blocks that no feature depends on: what a pass costs does
    not depend on the weights, and some rivals cannot do parameters without a gradient."""
    torch.manual_seed(0)
    backbone = build_backbone(config)
    channels = feature_channels(backbone, config.backbone.blocks)
    head = create_head(config.head.kind, channels, len(class_names(config.data)))
    model = SegmentationModel(backbone, head, config.backbone.blocks)
    backbone.prune_intermediate_layers(list(model.blocks), prune_norm=True)
    return model.to(resolve_device(config.device)).eval()


def make_batch(config: RunConfig, count: int) -> Batch:
    height, width = config.augment.crop or config.data.source.size or (224, 224)
    device = resolve_device(config.device)
    labels = torch.randint(len(class_names(config.data)), (count, height, width))
    return torch.randn(count, 3, height, width).to(device), labels.to(device)


class Bench:
    """One batch, a plain pass over it to compare with, and the exact answer to hold contenders to.

    Args:
        count: images of the batch.
        rounds: the fastest one counts, of the contender and of the plain passes between.
        command: given, it is started with a contender's label behind it, in a process of its own, and prints the growth
            of the peak memory.
    """

    def __init__(self, config: RunConfig, count: int, rounds: int, command: list[str] | None) -> None:
        self._config, self._count, self._rounds, self._command = config, count, rounds, command
        self._batch = make_batch(config, count)
        self._plain = bench_fisher.plain(make_model(config), self._batch)
        self._plain()  # warms the caches up
        self._expected = bench_fisher.one_by_one(make_model(config), self._batch)()

    def measure(self, label: str) -> dict[str, Any]:
        """Ratio to the plain pass, seconds, share of the backbone covered, memory; or ``error``, what went wrong."""
        try:
            return self._time(label) | self.memory(label)
        except BaseException as error:  # pytest's Skipped, for a package that is not there, is no Exception
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            lines = str(error).strip().splitlines() or [type(error).__name__]
            return {"error": lines[-1][:200]}

    def memory(self, label: str) -> dict[str, float]:
        if self._command is None:
            return {}
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
        result = subprocess.run([*self._command, label], env=environment, check=True, capture_output=True, text=True)
        return {"extra_mib": round(float(result.stdout.split()[-1]), 1)}

    def _time(self, label: str) -> dict[str, Any]:
        model = make_model(self._config)
        work = CONTENDERS[label](model, self._batch)
        got = work()
        if label in EXACT:
            # the backbone is what is ranked; Opacus goes wrong in the head, whose input is not contiguous
            found = {name: value for name, value in got.items() if name.startswith("backbone.")}
            bench_fisher.gate(label, found, self._expected)
        parameters = {name: p.numel() for name, p in model.named_parameters() if name.startswith("backbone.")}
        covered = sum(parameters[name] for name in got if name in parameters) / sum(parameters.values())
        del got
        plain, own = [], []
        for _ in range(self._rounds):
            plain.append(_seconds(self._plain, self._batch[0].device))
            own.append(_seconds(work, self._batch[0].device))
        return {
            "ratio": round(min(own) / min(plain), 4),
            "seconds_per_image": round(min(own) / self._count, 5),
            "plain_seconds_per_image": round(min(plain) / self._count, 5),
            "covered": round(covered, 5),
            "batch": self._count,
            "rounds": self._rounds,
            "threads": torch.get_num_threads(),
        }


def _seconds(work: Callable[[], Squares], device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    kept = work()
    _wait(device)
    elapsed = time.perf_counter() - start
    del kept
    return elapsed


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def extra_memory(config: RunConfig, label: str, count: int) -> float:
    """Growth of the peak memory in MiB over one pass; call it in a fresh process."""
    contender = bench_fisher.plain if label == "plain" else CONTENDERS[label]
    contender(
        make_model(config), make_batch(config, 2)
    )()  # code, thread pools and caches, no pass is to blame for them
    work = contender(make_model(config), make_batch(config, count))
    if resolve_device(config.device).type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = work()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    if not Path("/proc/self/clear_refs").exists():
        sys.exit("The growth of the peak is only known on Linux.")
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = bench_fisher.resident("VmRSS")
    kept = work()
    peak = bench_fisher.resident("VmHWM")
    assert kept
    return (peak - before) / 2**20
