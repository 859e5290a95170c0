"""One run from configuration to report. A run that was stopped anywhere continues where it was, to the same bits."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fishertune.collect_env import versions
from fishertune.delta import Delta
from fishertune.files import load_json, load_tensors, save_json, save_tensors
from fishertune.methods import Method, get_method
from fishertune.partition import Partition, partition
from fishertune.segmentation.datasets import SegmentationDataset
from fishertune.segmentation.inference import evaluate, predict
from fishertune.segmentation.model import resolve_blocks
from fishertune.selection import Selection, select
from fishertune.train.config import ConfigError, RunConfig, load_domains
from fishertune.train.data import RunData
from fishertune.train.progress import Reporter
from fishertune.train.report import write_report
from fishertune.train.run_folder import RunFolder
from fishertune.train.seeds import derive_seed
from fishertune.train.setup import build_context, build_domain
from fishertune.train.stages import Context, StageResult, estimate, tune, warm_up
from fishertune.train.usage import Usage

_WARM_UP_DEPENDS_ON = (
    *("seed", "backbone", "head", "data", "augment", "warmup"),
    *("tune.betas", "tune.weight_decay", "tune.clip", "tune.poly_power"),
)
_SCORES_DEPEND_ON = (*_WARM_UP_DEPENDS_ON, "estimate", "select")
SOURCE = "source"
PICTURES_PER_DOMAIN = 2


def run(
    config: RunConfig,
    out: str | Path,
    *,
    resume: bool = False,
    reporter: Reporter | None = None,
    cache: str | Path | None = None,
    data: RunData | None = None,
) -> dict[str, Any]:
    """Algorithm 1: warm up, estimate, select, tune, evaluate; returns what ``metrics.json`` holds.

    Args:
        config: the resolved configuration.
        out: run folder; must be new or empty unless ``resume``.
        resume: continue the run in ``out``; a finished one is returned as it is.
        reporter: where progress goes.
        data: the data sets of ``config.data``, where several runs share them; default: opened anew.
        cache: folder of warm-up and estimation results that runs with the same settings share; default: none shared.

    Raises:
        ConfigError: for anything wrong with the configuration, before work starts.
        NonFiniteLossError: if training diverges; the last checkpoint stays.
    """
    reporter = reporter or Reporter()
    folder = RunFolder(out)
    method = get_method(config.method)
    context = build_context(config, reporter, data)  # every check of the input comes before the folder is touched
    folder.open(config, resume=resume)
    if folder.metrics.is_file():
        reporter.line(f"{folder.path} is finished.")
        return _finish(folder)
    shared = Path(cache) if cache is not None else folder.state
    stages: dict[str, StageResult] = {}

    stages["warm-up"] = warm_up(context, shared / f"warmup-{config.fingerprint(*_WARM_UP_DEPENDS_ON)}.safetensors")
    selection = _select_stage(context, folder, shared, method, stages)
    base = _touched(context, selection)
    stages["tuning"] = tune(context, folder.state / "tune.safetensors", method, selection)
    _save_result(context, folder, method, selection, base)
    with Usage() as usage:
        domains = _evaluate_stage(context, folder)
    stages["evaluation"] = StageResult(usage)

    metrics = _metrics(context, method, selection, stages, domains, folder)
    save_json(folder.metrics, metrics)
    return _finish(folder)


def _finish(folder: RunFolder) -> dict[str, Any]:
    """What is left once ``metrics.json`` stands; a run killed in here does it when resumed."""
    if not folder.report.is_file():
        write_report(folder.path)
    if folder.state.exists():
        shutil.rmtree(folder.state)  # only what resuming needed; every result lies beside it
    return load_json(folder.metrics)


def _select_stage(
    context: Context, folder: RunFolder, shared: Path, method: Method, stages: dict[str, StageResult]
) -> Selection | None:
    config, backbone = context.config, context.model.backbone
    candidates = candidate_partition(config, backbone)
    estimated = None
    if method.score_kind is not None:
        key = config.fingerprint(*_SCORES_DEPEND_ON)
        path = shared / f"scores-{method.score_kind}-{key}.safetensors"
        estimate(context, path, path.with_suffix(".partial"), candidates, method.score_kind)
        estimated, metadata = load_tensors(path)
        stages["estimation"] = StageResult(Usage(**metadata["usage"]))
        if not folder.scores.is_file():
            save_tensors(folder.scores, candidates.mask_scores(estimated), metadata)
    if folder.selection.is_file():
        return Selection.load(folder.selection)
    with Usage() as usage:
        scores = method.scores(candidates, backbone, estimated, derive_seed(config.seed, "selection"))
        if scores is None:
            return None
        base = (
            sum(p.numel() for p in backbone.parameters())
            if config.select.base == "backbone"
            else candidates.n_candidates
        )
        selection = select(scores, fraction=config.select.fraction, base=base)
        selection.save(folder.selection)
    stages["selection"] = StageResult(usage)
    return selection


def candidate_partition(config: RunConfig, backbone: torch.nn.Module) -> Partition:
    """The candidates of Eq. 3 in the blocks that run: later ones never see a gradient."""
    return partition(
        backbone, kinds=config.select.kinds, blocks=range(resolve_blocks(backbone, config.backbone.blocks)[-1] + 1)
    )


def _touched(context: Context, selection: Selection | None) -> dict[str, torch.Tensor]:
    """Pretrained values of the parameters a selection lies in."""
    if selection is None:
        return {}
    parameters = dict(context.model.backbone.named_parameters())
    return {name: parameters[name].detach().clone() for name, index in selection.indices.items() if index.numel()}


def _save_result(
    context: Context, folder: RunFolder, method: Method, selection: Selection | None, base: dict[str, torch.Tensor]
) -> None:
    backbone = context.model.backbone
    if selection is not None:
        metadata = {"backbone": context.config.backbone.name, "method": method.name}
        Delta.between(base, backbone, selection, metadata=metadata).save(folder.delta)
    elif method.trains_backbone:
        save_tensors(folder.backbone, backbone.state_dict(), {"backbone": context.config.backbone.name})
    save_tensors(folder.decoder, context.model.decode_head.state_dict(), {"head": context.config.head.kind})


def _evaluate_stage(context: Context, folder: RunFolder) -> dict[str, dict[str, Any]]:
    path = folder.state / "evaluated.json"
    results: dict[str, dict[str, Any]] = load_json(path) if path.is_file() else {}
    domains = {SOURCE: context.data.validation, **context.data.unseen}
    for name, dataset in domains.items():
        if name in results:
            continue
        results[name] = evaluate_domain(context, name, dataset)
        save_json(path, results)
    if not folder.pictures.is_file():
        pictures: dict[str, torch.Tensor] = {}
        for name, dataset in domains.items():
            for number in range(min(PICTURES_PER_DOMAIN, len(dataset))):
                # spread over the data set: neighbouring frames look alike
                sample = dataset[number * len(dataset) // PICTURES_PER_DOMAIN]
                image = context.normalised(sample.image[None])
                pictures[f"{name}/{number}/image"] = sample.image
                pictures[f"{name}/{number}/label"] = sample.label
                logits = predict(context.model, image, context.config.evaluate.window, context.config.evaluate.stride)
                pictures[f"{name}/{number}/prediction"] = logits[0].argmax(0).to(torch.uint8)
        save_tensors(folder.pictures, pictures, {"classes": list(context.data.classes)})
    return results


def evaluate_domain(context: Context, name: str, dataset: SegmentationDataset) -> dict[str, Any]:
    """mIoU of the context's model on one domain, as ``metrics.json`` holds it."""
    config = context.config.evaluate
    with context.reporter.bar(f"evaluating {name}", len(dataset)) as bar:
        result = evaluate(
            context.model,
            dataset,
            window=config.window,
            stride=config.stride,
            batch_size=config.batch_size,
            precision=context.config.tune.precision,
            progress=bar.move_to,
        )
    return result.to_dict()


def _metrics(
    context: Context,
    method: Method,
    selection: Selection | None,
    stages: dict[str, StageResult],
    domains: dict[str, dict[str, Any]],
    folder: RunFolder,
) -> dict[str, Any]:
    config, backbone = context.config, context.model.backbone
    n_backbone = sum(p.numel() for p in backbone.parameters())
    tuned = len(selection) if selection is not None else (n_backbone if method.trains_backbone else 0)
    return {
        "method": method.name,
        "seed": config.seed,
        "domains": domains,
        "unseen_mean": unseen_mean(domains),
        "backbone_parameters": n_backbone,
        "tuned_parameters": tuned,
        "decoder_parameters": sum(p.numel() for p in context.model.decode_head.parameters()),
        "selection": _selection_metrics(context, selection, folder),
        "stages": {name: result.usage.to_plain() for name, result in stages.items()},
        "curves": {name: result.curve.to_plain() for name, result in stages.items() if result.curve is not None},
        "versions": versions(),
        "device": str(context.device),
    }


def unseen_mean(domains: dict[str, dict[str, Any]]) -> float | None:
    """Mean mIoU over the unseen domains, the paper's ``Av.``; None without any."""
    values = [result["miou"] for name, result in domains.items() if name != SOURCE]
    return sum(values) / len(values) if values else None


def _selection_metrics(context: Context, selection: Selection | None, folder: RunFolder) -> dict[str, Any] | None:
    if selection is None:
        return None
    candidates = candidate_partition(context.config, context.model.backbone)
    result: dict[str, Any] = {
        "candidates": candidates.n_candidates,
        "selected": len(selection),
        "threshold": selection.threshold,
        "share_by_block_and_kind": {
            f"{block}.{kind}": count / len(selection)
            for (block, kind), count in candidates.share(selection.indices).items()
        },
    }
    if folder.scores.is_file():
        scores, metadata = load_tensors(folder.scores)
        result["term_shares"] = metadata["term_shares"]
        result["sensitivity_by_block_and_kind"] = {
            f"{block}.{kind}": mean for (block, kind), mean in candidates.by_block_and_kind(scores).items()
        }
    return result


def load_run(path: str | Path, reporter: Reporter) -> Context:
    """The tuned model of a finished run, rebuilt from the public weights, the delta and the decoder.

    Raises:
        ConfigError: if the folder holds no finished run.
    """
    folder = RunFolder(path)
    config = folder.load_config()
    if not folder.decoder.is_file():
        raise ConfigError(
            f"The run in {folder.path} is not finished: it has no decoder yet. Continue it with --resume."
        )
    context = build_context(config, reporter)
    if folder.delta.is_file():
        Delta.load(folder.delta).apply_(context.model.backbone)
    elif folder.backbone.is_file():
        context.model.backbone.load_state_dict(load_tensors(folder.backbone)[0])
    context.model.decode_head.load_state_dict(load_tensors(folder.decoder)[0])
    return context


def evaluate_folder(
    path: str | Path, data: Sequence[str] | None, *, reporter: Reporter | None = None
) -> dict[str, Any]:
    """Evaluates a finished run on its own domains, on some of them by name, or on those of a YAML file.

    Raises:
        ConfigError: for an unknown domain name, with those there are.
    """
    reporter = reporter or Reporter()
    context = load_run(path, reporter)
    known: dict[str, SegmentationDataset] = {SOURCE: context.data.validation, **context.data.unseen}
    chosen: dict[str, SegmentationDataset] = {}
    for item in data or known:
        if item in known:
            chosen[item] = known[item]
        elif item.endswith((".yaml", ".yml")):
            for name, domain in load_domains(item).items():
                chosen[name] = build_domain(domain, context.data.classes)
        else:
            raise ConfigError(
                f"--data {item}: the run has no such domain. Domains: {', '.join(known)}; or a .yaml file."
            )
    results = {name: evaluate_domain(context, name, dataset) for name, dataset in chosen.items()}
    metrics = load_json(RunFolder(path).metrics)
    return {
        **metrics,
        "domains": results,
        "unseen_mean": unseen_mean(results),
    }
