"""The exact Fisher pass of a whole ViT-L beside a plain forward and backward pass and beside other ways to get it."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..compare import Outputs, of_largest
from ..measure import Bench
from ..operator import Part
from ..race import Work, race
from ..records import Check, Record, finite

NAME = "Fisher pass"
PLAIN = "plain forward + backward"
CLASSES, BATCH = 19, 8
# Weights, their gradients and two Fishers of 1.2 GB; the saved activations of one image in fp32.
FIXED_BYTES, IMAGE_BYTES = 6 << 30, 4 << 30
# Batches of another size take other product kernels: sums of another order in fp32, and in bf16 other roundings of
# every activation (on a CPU 6e-3 of a tensor's largest square).
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}


class Dense(nn.Module):
    """A plain ViT's last features under a per-pixel head."""

    def __init__(self, image: int, width: int, depth: int, heads: int):
        super().__init__()
        from fishertune import _torchvision  # noqa: F401

        timm = importlib.import_module("timm")  # after _torchvision, which a sorted import would come before

        self.backbone = timm.create_model(
            "vit_large_patch16_224", img_size=image, embed_dim=width, depth=depth, num_heads=heads, num_classes=0
        )
        self.head = nn.Conv2d(width, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        [maps] = self.backbone.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)
        return F.interpolate(self.head(maps), size=x.shape[-2:], mode="bilinear")


@dataclass(frozen=True)
class Pass:
    model: nn.Module
    images: Tensor
    labels: Tensor
    dtype: torch.dtype
    """bfloat16: under autocast."""

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.images.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def losses(self, model: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> Tensor:
        with self.autocast():
            logits = model(images)
        return F.cross_entropy(logits.float(), labels, reduction="none").mean((1, 2))

    def collect(self, squares: dict[str, Tensor]) -> Outputs:
        """In the order of the parameters; what a rival does not cover is empty."""
        nothing = torch.empty(0, device=self.images.device)
        return [squares.get(name, nothing) for name, _ in self.model.named_parameters()]

    def take_grads(self) -> dict[str, Tensor]:
        grads = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        self.model.zero_grad(set_to_none=True)
        return grads


def make(bench: Bench, image: int, width: int, depth: int, heads: int, batch: int, dtype: torch.dtype) -> Pass:
    torch.manual_seed(bench.seed)
    model = Dense(image, width, depth, heads).to(bench.device).eval()
    labels = torch.randint(0, CLASSES, (batch, image, image), generator=bench.generator, device=bench.device)
    return Pass(model, bench.normal((batch, 3, image, image)), labels, dtype)


# Contenders -----------------------------------------------------------------------------------------------------------


def plain(problem: Pass) -> Callable[[], Outputs]:
    """One ordinary training pass; its result is a gradient, not a Fisher."""

    def call() -> Outputs:
        problem.losses(problem.model, problem.images, problem.labels).mean().backward()
        return problem.collect(problem.take_grads())

    return call


def ours(problem: Pass) -> Callable[[], Outputs]:
    from fishertune.fisher import PerSampleSquares

    def call() -> Outputs:
        with PerSampleSquares(problem.model) as squares:
            squares.backward(problem.losses(problem.model, problem.images, problem.labels))
        return problem.collect(squares.accumulators)

    return call


def one_by_one(problem: Pass) -> Callable[[], Outputs]:
    def call() -> Outputs:
        total = {name: torch.zeros_like(p) for name, p in problem.model.named_parameters()}
        for image, labels in zip(problem.images.split(1), problem.labels.split(1), strict=True):
            problem.losses(problem.model, image, labels).sum().backward()
            for name, grad in problem.take_grads().items():
                total[name].addcmul_(grad, grad)
        return problem.collect(total)

    return call


def vmap_grad(problem: Pass) -> Callable[[], Outputs]:
    parameters = {name: p.detach() for name, p in problem.model.named_parameters()}

    def loss(parameters: dict[str, Tensor], image: Tensor, labels: Tensor) -> Tensor:
        def model(images: Tensor) -> Tensor:
            logits: Tensor = torch.func.functional_call(problem.model, parameters, (images,))
            return logits

        return problem.losses(model, image[None], labels[None]).squeeze(0)

    def call() -> Outputs:
        grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, problem.images, problem.labels)
        # Not in place: gradients of a sum's two sides, such as the class token's, can share memory.
        return problem.collect({name: grads.pop(name).square().sum(0) for name in parameters})

    return call


def backpack(problem: Pass) -> Callable[[], Outputs]:
    import backpack as package
    from backpack.extensions import SumGradSquared

    for module in problem.model.modules():
        if type(module) in (nn.Linear, nn.Conv2d, nn.LayerNorm):  # the types it knows; timm's LayerNorm is a subclass
            package.extend(module)

    def call() -> Outputs:
        with package.backpack(SumGradSquared()):
            problem.losses(problem.model, problem.images, problem.labels).sum().backward()
        problem.take_grads()
        found = {}
        for name, p in problem.model.named_parameters():
            if hasattr(p, "sum_grad_squared"):
                found[name] = p.sum_grad_squared
                del p.sum_grad_squared
        return problem.collect(found)

    return call


# Parts ----------------------------------------------------------------------------------------------------------------


def work(bench: Bench, dtype: torch.dtype) -> Work[Pass]:
    small = {"image": 32, "width": 64, "depth": 2, "heads": 2, "batch": 2}
    batch = max(1, min(BATCH, int((bench.free_bytes() - FIXED_BYTES) / IMAGE_BYTES)))
    full = small if bench.quick else {"image": 512, "width": 1024, "depth": 24, "heads": 16, "batch": batch}
    name = {torch.float32: "fp32", torch.bfloat16: "bf16 autocast"}[dtype]
    reduced = "" if bench.quick or batch == BATCH else f"batch {batch}, all that fits into memory"

    def differs(actual: Outputs, expected: Outputs) -> float:
        covered = [(a, e) for a, e in zip(actual, expected, strict=True) if a.numel()]
        return of_largest(TOLERANCE[dtype])([a for a, _ in covered], [e for _, e in covered])

    return Work(
        NAME, name, f"ViT-L, 512 px, batch {batch}, {name}", lambda: make(bench, **small, dtype=dtype),
        lambda: make(bench, **full, dtype=dtype), ours, differs,
        {"one by one": one_by_one, "vmap(grad)": vmap_grad, "BackPACK": backpack}, {PLAIN: plain},
        reduced=reduced, seconds=2.5,
    )  # fmt: skip


def part(dtype: torch.dtype) -> Callable[[Bench], Iterator[Record]]:
    def run(bench: Bench) -> Iterator[Record]:
        work_ = work(bench, dtype)
        with warnings.catch_warnings():
            for rivals_own in ("There is a performance drop", "Full backward hook is firing"):
                warnings.filterwarnings("ignore", rivals_own)
            yield whole_check(bench, work_)
            yield from race(bench, work_)

    return run


def whole_check(bench: Bench, work_: Work[Pass]) -> Check:
    """Ours against one backward pass a sample, on the whole model."""
    problem = work_.large()
    expected = one_by_one(problem)()
    check = Check(NAME, work_.what, finite(work_.differs(ours(problem)(), expected)))
    del problem, expected
    bench.release()
    return check


PARTS = (
    Part("Fisher pass of ViT-L, bf16 autocast", 60, part(torch.bfloat16)),
    Part("Fisher pass of ViT-L, fp32", 75, part(torch.float32)),
)
