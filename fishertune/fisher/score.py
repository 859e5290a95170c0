"""Sensitivity scores of the weights: Fisher, its change under a domain shift, and both (paper Eq. 5, 7, 15)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from fishertune_kernels import dr_fim_score_

KINDS = ("f", "delta_f", "dr_fim", "dr_fim_variational")


class ShiftStrength(Protocol):
    """What ``simulate_domain`` yields, as far as a score needs it."""

    def c(self, mode: Any = "signed") -> float:
        """exp(−(ε_μ + ε_σ)) of the last draw."""


class ScoreAverage:
    """Mean over the T2 estimation steps of a score, each step with its own c; kept in place, never one copy per step.

    | kind | score of a step | takes |
    |---|---|---|
    | ``f`` | F | Fisher |
    | ``delta_f`` (Eq. 5) | \\|F−F'\\| / (min(F, F') + eps) | Fisher |
    | ``dr_fim`` (Eq. 7) | F + c·delta_f | Fisher |
    | ``dr_fim_variational`` (Eq. 15) | γ(E + c·\\|E−E'\\| / (min(E, E') + τ⁻² + eps/γ)) | excess |

    Eq. 15 is written in E = Λ − τ⁻², exact where Λ − τ⁻² would cancel. With E = F/γ it equals
    F + c·γ·|F−F'| / (min(F, F') + γτ⁻² + eps): Eq. 7 with the ratio damped by γτ⁻² and weighted by γ.

    Args:
        kind: one of the table.
        gamma, tau: as in the estimator; only ``dr_fim_variational`` reads them, and there they are required.
        eps: guards the division, 1e-8 as printed.
        c_mode: how c is taken from a ``simulate_domain`` handle (``"signed"``, ``"abs"``), or a number, then c is that
            constant at every step.

    Attributes:
        scores: the running mean by parameter name, fp32.
        count: steps averaged.

    Raises:
        ValueError: if ``kind`` is unknown or a hyper-parameter is missing or out of range.
    """

    def __init__(
        self,
        kind: str = "dr_fim_variational",
        gamma: float | None = None,
        tau: float | None = None,
        eps: float = 1e-8,
        c_mode: str | float = "signed",
    ) -> None:
        if kind not in KINDS:
            raise ValueError(f"There is no score {kind!r}; choose one of {', '.join(KINDS)}.")
        for name, value in (("gamma", gamma), ("tau", tau)):
            if value is None and kind == "dr_fim_variational":
                raise ValueError(f"The score dr_fim_variational needs {name}: give the one of the estimator.")
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}={value!r} is out of range; expected a finite number > 0.")
        if not (math.isfinite(eps) and eps > 0):
            raise ValueError(f"eps={eps!r} is out of range; expected a finite number > 0, such as 1e-8.")
        if isinstance(c_mode, str) and c_mode not in ("signed", "abs"):
            raise ValueError(f"c_mode={c_mode!r} is unknown; choose 'signed', 'abs' or a number.")
        self.kind = kind
        self.gamma = None if gamma is None else float(gamma)
        self.tau = None if tau is None else float(tau)
        self.eps = float(eps)
        self.c_mode = c_mode
        self.count = 0
        self.scores: dict[str, Tensor] = {}
        self._task: dict[str, float] = {}  # mean over the steps of Σ|task term|, and of the signed sum
        self._signed_task: dict[str, float] = {}

    def update(
        self,
        fisher: Mapping[str, Tensor],
        shifted: Mapping[str, Tensor] | None = None,
        c: float | ShiftStrength | None = None,
    ) -> None:
        """Takes one step into the mean. Nothing changes if it raises.

        Args:
            fisher: by parameter name, the Fisher (``estimator.fisher()``) or excess (``estimator.excess``) on x.
            shifted: the same on x'; not needed by ``f``.
            c: the number exp(−(ε_μ+ε_σ)) of this step, or the handle of ``simulate_domain``, read with ``c_mode``.
                Not needed by ``f`` and ``delta_f`` or with a constant ``c_mode``.

        Raises:
            ValueError: if names or shapes differ, or ``shifted`` or ``c`` is missing.
            RuntimeError: if a Fisher is NaN, infinite, or zero everywhere.
        """
        if shifted is None and self.kind != "f":
            raise ValueError(f"The score {self.kind} compares two domains: give the Fisher on x' as shifted.")
        weight = self._weight(c)
        names = self._check_names(fisher, "fisher")
        if not self.scores:
            scores = {
                name: torch.zeros(fisher[name].shape, dtype=torch.float32, device=fisher[name].device) for name in names
            }
        else:
            scores = {name: self.scores[name].to(fisher[name].device) for name in names}
        values = [fisher[name] for name in names]
        mass = _checked_mass(names, values, "x")
        other = values
        if shifted is not None and self.kind != "f":
            self._check_names(shifted, "shifted", fisher)
            other = [shifted[name] for name in names]
            _checked_mass(names, other, "x'")
        signed = torch.stack([value.sum(dtype=torch.float64) for value in values]).tolist()

        count = self.count + 1
        dr_fim_score_(
            [scores[name] for name in names],
            values,
            other,
            count=count,
            kind=self.kind,
            c=weight,
            gamma=1.0 if self.gamma is None else self.gamma,
            prior_precision=0.0 if self.tau is None else self.tau**-2,
            eps=self.eps,
        )
        self.scores, self.count = scores, count
        scale = self._task_scale()
        for name, absolute, total in zip(names, mass, signed, strict=True):
            for running, value in ((self._task, absolute), (self._signed_task, total)):
                before = running.get(name, 0.0)
                running[name] = before + (scale * value - before) / count

    def term_shares(self, names: Iterable[str] | None = None) -> dict[str, float]:
        """Share of the task term and of the domain term in the score mass summed over all (or the named) parameters.

        Returns:
            ``{"task": a, "domain": b}`` with a + b = 1. A share near 0 or 1 says that one term swamps the other: then
            change γ and τ (Eq. 15), or the kind.

        Raises:
            RuntimeError: before the first update.
        """
        if self.count == 0:
            raise RuntimeError("There is no score yet: call update first.")
        chosen = list(self.scores) if names is None else list(names)
        totals = torch.stack([self.scores[name].sum(dtype=torch.float64) for name in chosen]).tolist()
        task = math.fsum(self._task[name] for name in chosen)
        # The domain term is never negative; where it drowns in the task term's rounding its share is 0.
        domain = max(0.0, math.fsum(totals) - math.fsum(self._signed_task[name] for name in chosen))
        if task + domain == 0.0:
            return {"task": 0.0, "domain": 0.0}
        return {"task": task / (task + domain), "domain": domain / (task + domain)}

    def state_dict(self) -> dict[str, Any]:
        """Everything an exact resume needs: ``tensors`` (references) and JSON-able ``counters`` and ``config``."""
        return {
            "tensors": dict(self.scores),
            "counters": {"count": self.count, "task": dict(self._task), "signed_task": dict(self._signed_task)},
            "config": self._config(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over a state of :meth:`state_dict`; tensors are copied.

        Raises:
            ValueError: if the state is of a score with other settings.
        """
        mine, theirs = self._config(), dict(state["config"])
        differing = sorted(key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key))
        if differing:
            key = differing[0]
            raise ValueError(
                f"The saved score has {key}={theirs.get(key)!r}, this one {key}={mine.get(key)!r}. Resume with the "
                "settings of the saved run or start a new one."
            )
        self.scores = {name: value.clone() for name, value in state["tensors"].items()}
        counters = state["counters"]
        self.count = int(counters["count"])
        self._task = dict(counters["task"])
        self._signed_task = dict(counters["signed_task"])

    def _config(self) -> dict[str, Any]:
        return {"kind": self.kind, "gamma": self.gamma, "tau": self.tau, "eps": self.eps, "c_mode": self.c_mode}

    def _weight(self, c: float | ShiftStrength | None) -> float:
        if self.kind in ("f", "delta_f"):
            return 1.0
        if not isinstance(self.c_mode, str):
            return float(self.c_mode)
        if c is None:
            raise ValueError(f"The score {self.kind} weighs its domain term by c: give this step's c.")
        value = float(c) if isinstance(c, (int, float)) else float(c.c(self.c_mode))
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"c={value!r} is out of range; expected exp(−(ε_μ+ε_σ)), a finite number >= 0.")
        return value

    def _task_scale(self) -> float:
        if self.kind == "delta_f":
            return 0.0
        return self.gamma if self.kind == "dr_fim_variational" and self.gamma is not None else 1.0

    def _check_names(
        self, values: Mapping[str, Tensor], role: str, like: Mapping[str, Tensor] | None = None
    ) -> list[str]:
        reference = like if like is not None else (self.scores or values)
        if not values:
            raise ValueError(f"{role} holds no parameter.")
        differing = sorted(values.keys() ^ reference.keys())
        if differing:
            raise ValueError(
                f"{role} does not cover the parameters of the score so far: {differing[0]!r} is only in one of them."
            )
        for name, value in values.items():
            if value.shape != reference[name].shape:
                raise ValueError(
                    f"{role}[{name!r}] has shape {tuple(value.shape)}; expected {tuple(reference[name].shape)}."
                )
        return list(reference)


def _checked_mass(names: list[str], values: list[Tensor], domain: str) -> list[float]:
    """Σ|value| of each tensor, after refusing NaN, infinity and a Fisher that is zero everywhere."""
    mass: list[float] = torch.stack(
        [torch.linalg.vector_norm(value, 1, dtype=torch.float64) for value in values]
    ).tolist()
    for name, total in zip(names, mass, strict=True):
        if not math.isfinite(total):
            raise RuntimeError(
                f"The Fisher of {name!r} on {domain} holds {'NaN' if math.isnan(total) else 'infinite values'}: a "
                "gradient overflowed. Estimate in fp32 or scale the loss down; with natural or sgvb use a smaller tau."
            )
    if not any(mass):
        raise RuntimeError(
            f"The Fisher on {domain} is zero for every parameter, so nothing can be ranked: no gradient arrives. Check "
            "that the labels hold valid (not ignored) pixels, that the head's last layer is not zero (warm it up "
            "first) and that neither the loss nor the model detaches."
        )
    return mass
