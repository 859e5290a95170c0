"""The state of a training stage as one safetensors file: what trains, and the optimizer's memory of it.

Of a sparsely tuned backbone only the selected values are stored; the rest is the public checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fishertune.files import load_tensors, save_tensors
from fishertune.selection import Selection
from fishertune_kernels import gather_values, scatter_values_

_OPTIMIZER = "optimizer/"
_DENSE = "dense/"
_SPARSE = "sparse/"


def trained_parameters(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, nn.Parameter]:
    """The parameters of ``model`` that ``optimizer`` holds, by name."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in held}


def save_checkpoint(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    selection: Selection | None,
    metadata: Mapping[str, Any],
) -> None:
    """Writes the trained values, the optimizer state and ``metadata`` (JSON-able), atomically.

    Names in ``selection`` are those of ``model.backbone``.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in trained_parameters(model, optimizer).items():
        indices = _selected(selection, name)
        if indices is None:
            tensors[_DENSE + name] = parameter.detach()
        else:
            tensors[_SPARSE + name] = gather_values([parameter.detach()], [indices.to(parameter.device)])[0]
    state = optimizer.state_dict()
    scalars: dict[str, dict[str, Any]] = {}
    for key, values in state["state"].items():
        scalars[str(key)] = {}
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{_OPTIMIZER}{key}/{name}"] = value
            else:
                scalars[str(key)][name] = value
    save_tensors(path, tensors, {**metadata, "optimizer": {"scalars": scalars, "param_groups": state["param_groups"]}})


@torch.no_grad()
def load_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, selection: Selection | None
) -> dict[str, Any]:
    """Puts a file of :func:`save_checkpoint` back and returns its metadata."""
    tensors, metadata = load_tensors(path)
    state: dict[int, dict[str, Any]] = {
        int(key): dict(values) for key, values in metadata["optimizer"]["scalars"].items()
    }
    trained = trained_parameters(model, optimizer)
    for key, tensor in tensors.items():
        if key.startswith(_DENSE):
            trained[key.removeprefix(_DENSE)].copy_(tensor)
        elif key.startswith(_SPARSE):
            parameter = trained[key.removeprefix(_SPARSE)]
            indices = _selected(selection, key.removeprefix(_SPARSE))
            assert indices is not None
            scatter_values_([parameter.data], [indices.to(parameter.device)], [tensor.to(parameter.device)])
        else:
            number, name = key.removeprefix(_OPTIMIZER).split("/", 1)
            state.setdefault(int(number), {})[name] = tensor
    groups = [
        {key: tuple(value) if key == "betas" else value for key, value in group.items()}
        for group in metadata["optimizer"]["param_groups"]
    ]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    return metadata


def _selected(selection: Selection | None, name: str) -> torch.Tensor | None:
    if selection is None:
        return None
    return selection.indices.get(name.removeprefix("backbone."))
