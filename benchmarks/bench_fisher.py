"""Exact per-sample Fisher of a dense ViT-S/14 on a CPU: time and memory beside one plain forward and backward pass.

    python -m pytest benchmarks/bench_fisher.py

Every contender does the same job, Σ_n (∂L_n/∂θ)² of one batch, in one process; each round is preceded by a plain pass,
and times are reported as the ratio of the fastest rounds, so that a busy machine disturbs both sides alike. Before it
is timed, a contender must agree with autograd taken one sample at a time. Memory is the growth of the peak resident set
over the pass in a fresh process. ``covered`` is the share of the model's parameters a contender can do.

Required of ours: ≤ 1.15 plain passes, ≤ 0.6 of the extra memory of vmap(grad), every parameter covered.
FISHERTUNE_BENCH_DEPTH, _BATCH and _ROUNDS make a smaller run.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from fishertune import _torchvision  # noqa: F401  (before timm)
from fishertune.fisher.per_sample import PerSampleSquares

timm = pytest.importorskip("timm")

DEPTH = int(os.environ.get("FISHERTUNE_BENCH_DEPTH", "12"))
BATCH = int(os.environ.get("FISHERTUNE_BENCH_BATCH", "8"))
ROUNDS = int(os.environ.get("FISHERTUNE_BENCH_ROUNDS", "7"))
CLASSES, IMAGE = 19, 224
RATIOS: dict[str, float] = {}
EXTRA_MIB: dict[str, float] = {}
COVERED: dict[str, float] = {}


class Dense(nn.Module):
    """The last features of a ViT-S (class and register tokens, LayerScale) under a per-pixel head."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = timm.create_model(
            "vit_small_patch14_reg4_dinov2", img_size=IMAGE, depth=DEPTH, num_classes=0, init_values=0.1
        )
        self.head = nn.Conv2d(384, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        [maps] = self.backbone.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)
        return F.interpolate(self.head(maps), size=x.shape[-2:], mode="bilinear")


Batch = tuple[Tensor, Tensor]
Squares = dict[str, Tensor]


def problem(batch: int = BATCH) -> tuple[nn.Module, Batch]:
    torch.manual_seed(0)
    model = Dense().eval()
    return model, (torch.randn(batch, 3, IMAGE, IMAGE), torch.randint(0, CLASSES, (batch, IMAGE, IMAGE)))


def losses(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none").mean((1, 2))


def take_grads(model: nn.Module) -> Squares:
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return grads


# The contenders: each returns a closure of no arguments that gives Σ_n (∂L_n/∂θ)² by parameter name -------------------


def plain(model: nn.Module, batch: Batch) -> Callable[[], Squares]:
    """One ordinary training pass; its result is a gradient, not a Fisher."""

    def work() -> Squares:
        losses(model, batch).mean().backward()
        return take_grads(model)

    return work


def ours(model: nn.Module, batch: Batch) -> Callable[[], Squares]:
    def work() -> Squares:
        with PerSampleSquares(model) as squares:
            squares.backward(losses(model, batch))
        return squares.accumulators

    return work


def batch_squared(model: nn.Module, batch: Batch) -> Callable[[], Squares]:
    """The square of the batch's gradient, which is another quantity; published baselines use it."""

    def work() -> Squares:
        losses(model, batch).mean().backward()
        return {name: g.square_() for name, g in take_grads(model).items()}

    return work


def one_by_one(model: nn.Module, batch: Batch) -> Callable[[], Squares]:
    def work() -> Squares:
        total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        for n in range(len(batch[0])):
            losses(model, (batch[0][n : n + 1], batch[1][n : n + 1])).sum().backward()
            for name, g in take_grads(model).items():
                total[name].addcmul_(g, g)
        return total

    return work


def vmap_grad(model: nn.Module, batch: Batch) -> Callable[[], Squares]:
    def loss(parameters: Squares, x: Tensor, labels: Tensor) -> Tensor:
        logits = functional_call(model, parameters, (x[None],))
        return F.cross_entropy(logits, labels[None])

    def work() -> Squares:
        parameters = {name: p.detach() for name, p in model.named_parameters()}
        grads = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, *batch)
        # Not in place: gradients of an expanded and of an added parameter may share memory.
        return {name: grads.pop(name).square().sum(0) for name in parameters}

    return work


def backpack(model: nn.Module, batch: Batch) -> Callable[[], Squares]:
    package = pytest.importorskip("backpack")
    extension = pytest.importorskip("backpack.extensions").SumGradSquared
    for module in model.modules():
        if type(module) in (nn.Linear, nn.Conv2d, nn.LayerNorm):  # the types it knows; timm's LayerNorm is a subclass
            package.extend(module)

    def work() -> Squares:
        with package.backpack(extension()):
            losses(model, batch).sum().backward()
        take_grads(model)
        found = {}
        for name, p in model.named_parameters():
            if hasattr(p, "sum_grad_squared"):
                found[name] = p.sum_grad_squared
                del p.sum_grad_squared
        return found

    return work


def opacus(model: nn.Module, batch: Batch) -> Callable[[], Squares]:
    package = pytest.importorskip("opacus")
    for name, p in model.named_parameters():  # it gives up on a whole module that owns parameters directly
        p.requires_grad_(not name.endswith(("cls_token", "reg_token", "pos_embed")))
    wrapped = package.GradSampleModule(model, strict=False, loss_reduction="sum")
    wrapped.train()  # it records nothing in eval mode; this model has no dropout

    def work() -> Squares:
        losses(wrapped, batch).sum().backward()
        found = {}
        for name, p in model.named_parameters():
            if getattr(p, "grad_sample", None) is not None:
                found[name] = p.grad_sample.square_().sum(0)
                p.grad_sample = None
        take_grads(model)
        return found

    return work


CONTENDERS = {f.__name__: f for f in (plain, ours, batch_squared, one_by_one, vmap_grad, backpack, opacus)}
NOT_A_FISHER = ("plain", "batch_squared")


# Measuring ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def expected() -> Squares:
    model, batch = problem()
    return one_by_one(model, batch)()


def gate(name: str, got: Squares, expected: Squares) -> None:
    """fp32 sums of other order: 1e-6 of a tensor's largest element per pass, held to 1e-4."""
    for key, value in got.items():
        error = (value - expected[key]).abs().max() / expected[key].abs().max()
        assert error < 1e-4, f"{name} is wrong about {key}: {error:.1e}"


def extra_memory(name: str) -> float | None:
    """Growth of the peak resident set in MiB over one pass in a process of its own; None where unknown (not Linux)."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    # Large blocks are mapped one by one and given back at once: the peak is what was alive together.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, name]
    result = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return float(result.stdout.split()[-1])


def measure_memory(name: str) -> float:
    torch.set_num_threads(2)
    warnings.simplefilter("ignore")
    small = problem(batch=2)
    CONTENDERS[name](*small)()  # code, thread pools and caches, which no pass is to blame for
    del small
    work = CONTENDERS[name](*problem())
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = resident("VmRSS")
    kept = work()
    peak = resident("VmHWM")
    assert kept
    return (peak - before) / 2**20


def resident(field: str) -> int:
    return 1024 * int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text()).group(1))


@pytest.mark.benchmark(group="fisher")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CONTENDERS)
def test_contender(benchmark, name: str, expected: Squares) -> None:
    model, batch = problem()
    work = CONTENDERS[name](model, batch)
    got = work()
    if name not in NOT_A_FISHER:
        gate(name, got, expected)
    total = sum(value.numel() for value in expected.values())
    COVERED[name] = benchmark.extra_info["covered"] = sum(value.numel() for value in got.values()) / total
    del got
    reference = plain(*problem())
    reference()
    seconds: list[float] = []

    def plain_pass() -> None:
        start = time.perf_counter()
        reference()
        seconds.append(time.perf_counter() - start)

    benchmark.pedantic(work, setup=plain_pass, rounds=ROUNDS)
    RATIOS[name] = benchmark.extra_info["ratio_to_plain"] = benchmark.stats.stats.min / min(seconds)
    memory = extra_memory(name)
    if memory is not None:
        EXTRA_MIB[name] = benchmark.extra_info["extra_MiB"] = memory
    benchmark.extra_info |= {"threads": torch.get_num_threads(), "batch": BATCH, "depth": DEPTH}


def test_goals() -> None:
    if not {"ours", "vmap_grad"} <= RATIOS.keys():
        pytest.skip("needs the whole file in one run")
    print()
    for name, ratio in RATIOS.items():
        memory = EXTRA_MIB.get(name, float("nan"))
        print(f"{name:14s} {ratio:5.2f} x plain {memory:6.0f} MiB {COVERED[name]:7.2%} covered")
    assert COVERED["ours"] == 1
    if EXTRA_MIB:
        assert EXTRA_MIB["ours"] <= 0.6 * EXTRA_MIB["vmap_grad"]
    assert RATIOS["ours"] <= 1.15


if __name__ == "__main__":
    print(measure_memory(sys.argv[1]))
