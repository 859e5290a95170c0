"""The stages of Algorithm 1: warm up the decoder, estimate, select, tune, evaluate. Each resumes where it stopped."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fishertune.domain import DomainStatistics, simulate_domain
from fishertune.files import load_tensors, save_tensors
from fishertune.fisher.posterior import PosteriorEstimator, make_estimator
from fishertune.fisher.score import ScoreAverage
from fishertune.methods import Method, get_method
from fishertune.methods.base import TuneSettings
from fishertune.partition import Partition
from fishertune.segmentation.loss import SegmentationLoss
from fishertune.segmentation.model import SegmentationModel
from fishertune.segmentation.transforms import normalise
from fishertune.selection import Growth, PaperThreshold, Schedule, Selection
from fishertune.train.checkpoint import load_checkpoint, save_checkpoint
from fishertune.train.config import GrowthConfig, RunConfig
from fishertune.train.data import Batch, BatchStream, RunData
from fishertune.train.loop import Curve, LoopSettings, train
from fishertune.train.progress import Reporter
from fishertune.train.seeds import derive_seed, generator
from fishertune.train.usage import Usage

_BACKBONE = "backbone."
_TWO_TERMS = ("dr_fim", "dr_fim_variational")
_SWAMPED = 0.01


@dataclass
class Context:
    """What every stage works on."""

    config: RunConfig
    model: SegmentationModel
    data: RunData
    device: torch.device
    reporter: Reporter

    def normalised(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 images as the model takes them, on its device."""
        return normalise(images.to(self.device), self.model.mean, self.model.std)

    def stream(self, stage: str, batch_size: int) -> BatchStream:
        return BatchStream(self.data.train, batch_size, seed=self.config.seed, stage=stage, config=self.config.augment)


@dataclass(frozen=True)
class StageResult:
    """Cost and learning curve of a finished stage."""

    usage: Usage
    curve: Curve | None = None


def warm_up(context: Context, path: Path) -> StageResult:
    """T1: trains the decoder on the frozen backbone. ``path`` is checkpoint and result in one."""
    config = context.config
    settings = TuneSettings(
        lr=0.0, head_lr=config.warmup.lr, betas=config.tune.betas, weight_decay=config.tune.weight_decay
    )
    optimizer = get_method("freeze").optimizer(context.model.backbone, context.model.decode_head, None, settings)
    loop = LoopSettings("warm-up", config.warmup.steps, clip=config.tune.clip, poly_power=config.tune.poly_power)
    return _train_stage(context, path, optimizer, None, loop, config.warmup.batch_size)


def tune(context: Context, path: Path, method: Method, selection: Selection | None) -> StageResult:
    """T3: trains what ``method`` trains. ``path`` is checkpoint and result in one."""
    config = context.config.tune
    settings = TuneSettings(
        lr=config.lr,
        head_lr=config.head_lr,
        betas=config.betas,
        weight_decay=config.weight_decay,
        growth=growth_schedule(config.growth, context.config.select.fraction, config.steps),
    )
    optimizer = method.optimizer(context.model.backbone, context.model.decode_head, selection, settings)
    loop = LoopSettings("tuning", config.steps, config.accumulate, config.clip, config.poly_power, config.precision)
    return _train_stage(context, path, optimizer, selection, loop, config.batch_size)


def growth_schedule(config: GrowthConfig | None, fraction: float, steps: int) -> Schedule | None:
    """The schedule a configuration asks for (Eq. 16); None keeps the whole selection active."""
    if config is None:
        return None
    if config.shape == "paper":
        return PaperThreshold(config.delta_min, config.delta_max, steps)
    return Growth(config.start, fraction, steps, config.shape)


def _train_stage(
    context: Context,
    path: Path,
    optimizer: torch.optim.Optimizer,
    selection: Selection | None,
    loop: LoopSettings,
    batch_size: int,
) -> StageResult:
    curve, usage = Curve(), Usage()
    if path.is_file():
        earlier = load_checkpoint(path, context.model, optimizer, selection)
        curve = Curve(**earlier["curve"])
        usage = Usage(**earlier["usage"])
    name = loop.stage

    def checkpoint(step: int) -> None:
        usage.stamp()
        metadata = {"stage": name, "step": step, "curve": curve.to_plain(), "usage": usage.to_plain()}
        save_checkpoint(path, context.model, optimizer, selection, metadata)

    if len(curve.loss) < loop.steps or not path.is_file():
        with usage, context.reporter.bar(name, loop.steps, len(curve.loss)) as bar:
            train(
                context.model,
                optimizer,
                context.stream(name, batch_size),
                loop,
                curve=curve,
                bar=bar,
                checkpoint=checkpoint,
                checkpoint_every=context.config.checkpoint_every,
            )
            if loop.steps == 0:
                checkpoint(0)
    return StageResult(usage, curve)


# ----------------------------------------------------------------------------------------------------------------------


def estimate(context: Context, path: Path, checkpoint: Path, partition: Partition, kind: str) -> None:
    """T2: scores of every candidate, averaged over the steps (Eq. 5, 7, 15), into ``path``.

    The file's metadata holds the shares of the score's two terms and the cost of the stage.
    """
    if path.is_file():
        return
    estimation = Estimation(context, partition, kind)
    steps = context.config.estimate.steps
    done = estimation.restore(checkpoint) if checkpoint.is_file() else 0
    context.model.eval()
    stream = context.stream("estimation", context.config.estimate.batch_size)
    if done == 0 and context.config.estimate.batch_size == 1:
        estimation.prime([stream.batch(step)[0][0] for step in range(2)])
    with estimation.usage, context.reporter.bar("estimation", steps, done) as bar:
        for step, (images, labels), _ in stream.iterate(done, steps):
            estimation.update(step, (context.normalised(images), labels.to(context.device)))
            bar.advance()
            if (step + 1) % context.config.checkpoint_every == 0 and step + 1 < steps:
                estimation.save(checkpoint, step + 1)
    scores = {name.removeprefix(_BACKBONE): value for name, value in estimation.average.scores.items()}
    shares = estimation.average.term_shares()
    _say_shares(context.reporter, shares, kind)
    metadata = {
        "kind": kind,
        "steps": steps,
        "term_shares": shares,
        "usage": estimation.usage.to_plain(),
    }
    save_tensors(path, scores, metadata)
    checkpoint.unlink(missing_ok=True)


def _say_shares(reporter: Reporter, shares: dict[str, float], kind: str) -> None:
    if kind not in _TWO_TERMS:
        return
    text = f"the task term makes up {shares['task']:.1%} of the score, the domain term {shares['domain']:.1%}"
    if min(shares.values()) < _SWAMPED:
        reporter.warn(f"{text}: one of them decides alone. Change estimate.gamma and estimate.tau, or the method.")
    else:
        reporter.line(text)


class Estimation:
    """The running state of the estimation stage: the posterior on the source, on its shift, and their score."""

    def __init__(self, context: Context, partition: Partition, kind: str) -> None:
        config = context.config.estimate
        self._context, self._config = context, config
        self._statistics = DomainStatistics()
        params = [_BACKBONE + name for name in dict.fromkeys(item.name for item in partition)]

        def estimator() -> PosteriorEstimator:
            # One seed: the same draw of the weights on x and x', so that their difference is the domain's alone.
            return make_estimator(
                config.estimator,
                gamma=config.gamma,
                tau=config.tau,
                params=params,
                labels=config.labels,
                seed=derive_seed(context.config.seed, "posterior"),
                **config.options,
            )

        self._source = estimator()
        self._shifted = estimator() if kind != "f" else None
        self.average = ScoreAverage(kind, gamma=config.gamma, tau=config.tau, eps=config.eps, c_mode=config.c)
        self.usage = Usage()

    def prime(self, images: list[torch.Tensor]) -> None:
        """Lets batches of one start: the running spread over samples (Eq. 6) needs two before the first step."""
        if self._shifted is None:
            return
        backbone = self._context.model.backbone
        with torch.no_grad(), simulate_domain(backbone, where=self._config.where, statistics=self._statistics):
            self._context.model.features(self._context.normalised(torch.cat(images)))

    def update(self, step: int, batch: Batch) -> None:
        """One of the T2 steps: the batch as it is, then under a fresh simulated shift (Eq. 6), then the score."""
        model = self._context.model
        self._source.update(model, self._loss(step), batch)
        if self._shifted is None:
            self.average.update(self._measure(self._source))
            return
        draw = generator(self._context.config.seed, "shift", step)
        handle = self._shifted.update(
            model,
            self._loss(step),
            batch,
            shift=lambda: simulate_domain(
                model.backbone,
                where=self._config.where,
                draw=self._config.draw,
                generator=draw,
                statistics=self._statistics,
            ),
        )
        self.average.update(self._measure(self._source), self._measure(self._shifted), handle)

    def save(self, path: Path, step: int) -> None:
        """Everything :meth:`restore` needs to go on after ``step`` steps."""
        self.usage.stamp()
        tensors: dict[str, torch.Tensor] = {}
        metadata: dict[str, Any] = {"step": step, "usage": self.usage.to_plain()}
        for part, owner in self._parts().items():
            state = owner.state_dict()
            tensors |= {f"{part}/{name}": value for name, value in state.pop("tensors").items()}
            metadata[part] = state
        save_tensors(path, tensors, metadata)

    def restore(self, path: Path) -> int:
        """Goes on from a file of :meth:`save`; returns how many steps are done."""
        tensors, metadata = load_tensors(path)
        for part, owner in self._parts().items():
            mine = {
                name.removeprefix(f"{part}/"): value for name, value in tensors.items() if name.startswith(f"{part}/")
            }
            owner.load_state_dict({"tensors": mine, **metadata[part]})
        self.usage = Usage(**metadata["usage"])
        return int(metadata["step"])

    def _measure(self, estimator: PosteriorEstimator) -> dict[str, torch.Tensor]:
        return estimator.excess if self.average.kind == "dr_fim_variational" else estimator.fisher()

    def _loss(self, step: int) -> SegmentationLoss:
        # x and x' draw the same labels where labels are sampled
        return SegmentationLoss(seed=derive_seed(self._context.config.seed, "labels", step))

    def _parts(self) -> dict[str, Any]:
        parts = {"source": self._source, "shifted": self._shifted, "average": self.average, "domain": self._statistics}
        return {name: part for name, part in parts.items() if part is not None}
