"""Posterior precision Λ of the weights: estimators of the Fisher diagonal with a prior (paper Eq. 10–14).

q(θ) = N(θ̂, Λ⁻¹) is fitted around the current weights θ̂ under the prior N(θ_pt, τ²I) with loss E_q[L] + γ·KL(q‖p).
Its fixed point is F = γ(Λ − τ⁻²) (Eq. 14), F being the diagonal Fisher of Eq. 9.

Every estimator keeps the *excess* E = Λ − τ⁻² = F/γ and never Λ itself: in fp32 the sum F/γ + τ⁻² swallows every F
below 6·10⁻⁸·γτ⁻², and most weights of a pretrained ViT lie there.

| class | what an update does | cost in plain backward passes |
|---|---|---|
| :class:`ClosedForm` | averages exact per-sample squares at θ̂; E = F/γ is then the exact minimiser | about 1.1 |
| :class:`Natural` | the same squares at a draw θ ~ q; natural-gradient step on Λ | about 1.1 |
| :class:`SGVB` | Adam on log Λ through θ = θ̂ + Λ^-½ε, the wording of the paper | 1, antithetic 2 |
| :class:`Local` | the same with one Λ per output row, drawn at the row's output, as Task2Vec | 1, antithetic 2 |
"""

from __future__ import annotations

import difflib
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fishertune.fisher.per_sample import LossFn, PerSampleSquares, Shift
from fishertune.fisher.rules import map_tensors
from fishertune_kernels import gaussian_perturb, precision_update_natural_, precision_update_sgvb_

_LABELS = ("empirical", "sampled")


class PosteriorEstimator(ABC):
    """What the estimators share: the excess E per parameter, one ``update`` per batch, exact resume.

    Args:
        gamma: weight γ of the KL term (Eq. 11), > 0.
        tau: standard deviation τ of the prior in units of the weights (Eq. 10), > 0.
        params: names (of ``model.named_parameters()``) to estimate; all parameters if None. The others stay at θ̂.
        labels: ``"empirical"`` calls ``loss_fn(model, batch)``; ``"sampled"`` calls
            ``loss_fn(model, batch, labels="sampled")``, which draws the labels from the model (Eq. 9).
        seed: key of the draws ε. They depend on (seed, update number, flat index of the element in the whole model)
            and on nothing else, so a restricted ``params`` sees the same draw, and two estimators of one seed (one on
            x, one on x') share it, which keeps the draw out of the difference |Λ − Λ'|. No global generator is used.

    Raises:
        ValueError: if a hyper-parameter is out of range.
    """

    name: ClassVar[str]

    def __init__(
        self,
        gamma: float,
        tau: float,
        *,
        params: Iterable[str] | None = None,
        labels: str = "empirical",
        seed: int = 0,
    ) -> None:
        _require_positive("gamma", gamma)
        _require_positive("tau", tau)
        if labels not in _LABELS:
            raise ValueError(f"labels={labels!r} is not a label mode; choose one of {', '.join(_LABELS)}.")
        self.gamma = float(gamma)
        self.tau = float(tau)
        self.labels = labels
        self.seed = int(seed)
        self.params = None if params is None else tuple(params)
        self.steps = 0
        self.samples = 0
        self.excess: dict[str, Tensor] = {}

    @property
    def prior_precision(self) -> float:
        """τ⁻²."""
        return self.tau**-2

    def precision(self) -> dict[str, Tensor]:
        """Λ = E + τ⁻² by parameter name, new tensors. Rank by :attr:`excess` instead: Λ loses its small elements."""
        return {name: excess + self.prior_precision for name, excess in self.excess.items()}

    def fisher(self) -> dict[str, Tensor]:
        """F = γE by parameter name (Eq. 14), new tensors."""
        return {name: excess * self.gamma for name, excess in self.excess.items()}

    def update(self, model: nn.Module, loss_fn: LossFn, batch: Any, *, shift: Shift | None = None) -> Any:
        """Takes one batch into account; the model is left as it was, bit for bit, also if the loss raises.

        The model is evaluated in eval mode (no dropout, no drop path) and gets its mode back afterwards.

        Args:
            model: any module; its current weights are θ̂.
            loss_fn: ``loss_fn(model, batch) -> losses (N,)``, one per sample, each depending on its sample alone.
            batch: handed to ``loss_fn`` untouched.
            shift: makes a context manager to run the passes in, such as ``lambda: simulate_domain(model)`` for x'.

        Returns:
            What the context manager of ``shift`` yields (for ``simulate_domain`` the handle that knows c), else None.

        Raises:
            ValueError: if ``params`` names no parameter of the model, the model is not the one seen before, or the
                losses are not one per sample.
            RuntimeError: if a loss is NaN or infinite. The estimate is then what it was before the call.
        """
        targets = self._targets(model)
        with shift() if shift is not None else nullcontext() as handle:
            samples = self._estimate(model, loss_fn, batch, targets)
        self.steps += 1
        self.samples += samples
        return handle

    def state_dict(self) -> dict[str, Any]:
        """What an exact resume needs: ``tensors`` by flat name (references), JSON-able ``counters`` and ``config``."""
        tensors = {f"{kind}/{name}": value for kind, group in self._groups().items() for name, value in group.items()}
        return {
            "tensors": tensors,
            "counters": {"steps": self.steps, "samples": self.samples},
            "config": self._config(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over a state of :meth:`state_dict`; tensors are copied.

        Raises:
            ValueError: if the state is of an estimator with other settings: mixing them would give a Λ of neither.
        """
        mine, theirs = self._config(), dict(state["config"])
        differing = sorted(key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key))
        if differing:
            key = differing[0]
            raise ValueError(
                f"The saved posterior estimate has {key}={theirs.get(key)!r}, this estimator {key}={mine.get(key)!r}. "
                "Resume with the settings of the saved run or start a new one."
            )
        groups = self._groups()
        for group in groups.values():
            group.clear()
        for key, value in state["tensors"].items():
            kind, _, name = key.partition("/")
            groups[kind][name] = value.clone()
        self.steps = int(state["counters"]["steps"])
        self.samples = int(state["counters"]["samples"])

    @abstractmethod
    def _estimate(self, model: nn.Module, loss_fn: LossFn, batch: Any, targets: _Targets) -> int:
        """One update of the excess; returns the number of samples. Must not change any state before the loss is in."""

    def _groups(self) -> dict[str, dict[str, Tensor]]:
        return {"excess": self.excess}

    def _new_state(self, kind: str, parameter: Tensor) -> Tensor:
        """Where a group of :meth:`_groups` starts for one parameter."""
        return _zeros_like(parameter)

    def _config(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "gamma": self.gamma,
            "tau": self.tau,
            "labels": self.labels,
            "seed": self.seed,
            "params": None if self.params is None else list(self.params),
        }

    def _targets(self, model: nn.Module) -> _Targets:
        """The parameters to estimate with their global offsets; allocates the state at the first call."""
        targets = _Targets(model, self.params)
        if not self.excess:
            for kind, group in self._groups().items():
                group.update({name: self._new_state(kind, value) for name, value in targets.parameters.items()})
            return targets
        for name, parameter in targets.parameters.items():
            known = self.excess.get(name)
            if known is None or known.shape != parameter.shape:
                raise ValueError(
                    f"This estimate was built on another model: parameter {name!r} has shape {tuple(parameter.shape)} "
                    f"here and {None if known is None else tuple(known.shape)} there. Use a new estimator per model."
                )
        missing = self.excess.keys() - targets.parameters.keys()
        if missing:
            raise ValueError(
                f"This estimate was built on another model: it holds {min(missing)!r}, which this model has not. "
                "Use a new estimator per model."
            )
        for group in self._groups().values():  # a resumed state may have been read on another device
            for name, parameter in targets.parameters.items():
                group[name] = group[name].to(parameter.device)
        return targets

    def _losses(self, model: nn.Module, loss_fn: LossFn, batch: Any) -> Tensor:
        losses = loss_fn(model, batch) if self.labels == "empirical" else loss_fn(model, batch, labels=self.labels)
        if losses.ndim != 1 or losses.numel() == 0:
            raise ValueError(
                f"The loss function returned shape {tuple(losses.shape)}; expected (N,), one loss per sample. Average "
                "over pixels or tokens of a sample, not over the batch."
            )
        if not losses.requires_grad:
            raise ValueError(
                "The losses do not depend on any parameter that is estimated, so there is no gradient. Call the model "
                "inside the loss function, without torch.no_grad and without detaching."
            )
        finite = torch.isfinite(losses)
        if not bool(finite.all()):
            bad = int((~finite).nonzero()[0])
            raise RuntimeError(
                f"The loss of sample {bad} of the batch is {losses[bad].item()} in update {self.steps + 1} of the "
                f"{self.name} estimator. Check that image and its labels; if the draw of the weights is to blame, use "
                f"a smaller tau than {self.tau:g}."
            )
        return losses

    def _mean_squares(
        self, model: nn.Module, loss_fn: LossFn, batch: Any, targets: _Targets
    ) -> tuple[list[Tensor], int]:
        """Mean over the batch of the squared per-sample gradients at the model's present weights (Eq. 9)."""
        with PerSampleSquares(model, targets.names) as squares:
            losses = self._losses(model, loss_fn, batch)
            squares.backward(losses, 1.0 / losses.numel())
        return [squares.accumulators[name] for name in targets.names], losses.numel()

    @contextmanager
    def _perturbed(self, targets: _Targets, sign: float = 1.0) -> Iterator[None]:
        """Inside, the weights are θ̂ + sign·Λ^-½ε with the ε of this update."""
        parameters = list(targets.parameters.values())
        with torch.no_grad():
            drawn = gaussian_perturb(
                [parameter.detach() for parameter in parameters],
                [self.excess[name] for name in targets.names],
                prior_precision=self.prior_precision,
                seed=self.seed,
                step=self.steps,
                offsets=targets.offsets,
                sign=sign,
            )
        # The originals are set aside, not copied: whatever happens inside, their bits are never written.
        originals = [parameter.data for parameter in parameters]
        try:
            for parameter, value in zip(parameters, drawn, strict=True):
                parameter.data = value
            yield
        finally:
            for parameter, original in zip(parameters, originals, strict=True):
                parameter.data = original


class ClosedForm(PosteriorEstimator):
    """Λ* = F/γ + τ⁻², the exact minimiser of Eq. 11 under the expansion of Eq. 12; F averaged over all samples seen.

    The default: one pass over the samples gives the exact answer, and nothing is drawn.
    Arguments as in :class:`PosteriorEstimator`.
    """

    name = "closed_form"

    def _estimate(self, model: nn.Module, loss_fn: LossFn, batch: Any, targets: _Targets) -> int:
        squares, samples = self._mean_squares(model, loss_fn, batch, targets)
        # The natural step with β = share of the new samples is the running mean over all samples.
        share = samples / (self.samples + samples)
        precision_update_natural_([self.excess[name] for name in targets.names], squares, beta=share, gamma=self.gamma)
        return samples


class Natural(PosteriorEstimator):
    """Λ ← (1−β)Λ + β(F̂(θ)/γ + τ⁻²) with F̂ the per-sample squares at a fresh draw θ ~ q (natural gradient of Eq. 11).

    Same fixed point as the closed form with F averaged under q instead of taken at θ̂; no learning rate, and Λ cannot
    become negative. The first 1/β updates use 1/t in place of a smaller β: they average evenly, so that the start
    at the prior (E = 0) leaves no trace.

    Args:
        beta: weight of a new batch, in (0, 1].
        gamma, tau, params, labels, seed: as in :class:`PosteriorEstimator`.
    """

    name = "natural"

    def __init__(self, gamma: float, tau: float, beta: float = 0.05, **common: Any) -> None:
        super().__init__(gamma, tau, **common)
        if not 0.0 < beta <= 1.0:
            raise ValueError(f"beta={beta} is not a weight; expected 0 < beta <= 1, such as 0.05.")
        self.beta = float(beta)

    def _estimate(self, model: nn.Module, loss_fn: LossFn, batch: Any, targets: _Targets) -> int:
        with self._perturbed(targets):
            squares, samples = self._mean_squares(model, loss_fn, batch, targets)
        precision_update_natural_(
            [self.excess[name] for name in targets.names],
            squares,
            beta=max(self.beta, 1.0 / (self.steps + 1)),
            gamma=self.gamma,
        )
        return samples

    def _config(self) -> dict[str, Any]:
        return {**super()._config(), "beta": self.beta}


class SGVB(PosteriorEstimator):
    """Adam on log Λ with the gradient of Eq. 11 through θ = θ̂ + Λ^-½ε, as the paper words it (SGVB, [27], [1]).

    d/dlogΛ = −½·ε·Λ^-½·g + ½γ(1 − τ⁻²/Λ), g the gradient of the mean loss at the draw. Its fixed point holds the
    diagonal of the *Hessian* where the other estimators hold the Fisher; Eq. 12 takes the two as equal.
    It starts at the prior (E = 0) and moves log Λ by at most about ``lr`` an update, and one ε must tell all weights
    apart: ranking a large model takes orders of magnitude more updates than the other estimators.

    Args:
        lr, betas, eps: Adam's, on log Λ.
        antithetic: also evaluates −ε and takes half the difference of the gradients: twice the cost, and the part of
            the gradient that does not depend on the draw cancels.
        gamma, tau, params, seed: as in :class:`PosteriorEstimator`.
        labels: only ``"empirical"``: labels drawn from the *perturbed* model make the mean gradient zero at every
            draw (E_y∇log p = 0), so that Λ would fall back to the prior whatever the Fisher is.
    """

    name = "sgvb"

    def __init__(
        self,
        gamma: float,
        tau: float,
        lr: float = 0.05,
        antithetic: bool = False,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        **common: Any,
    ) -> None:
        super().__init__(gamma, tau, **common)
        if self.labels != "empirical":
            raise ValueError(
                f"labels={self.labels!r} does not work with {self.name}: the gradient of labels drawn from the "
                "perturbed model is zero on average. Use labels='empirical', or the closed_form or natural estimator."
            )
        _require_positive("lr", lr)
        _require_positive("eps", eps)
        if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"betas={betas} are not Adam's decay rates; expected two numbers in [0, 1).")
        self.lr = float(lr)
        self.antithetic = bool(antithetic)
        self.betas = (float(betas[0]), float(betas[1]))
        self.eps = float(eps)
        self._exp_avg: dict[str, Tensor] = {}
        self._exp_avg_sq: dict[str, Tensor] = {}

    def _estimate(self, model: nn.Module, loss_fn: LossFn, batch: Any, targets: _Targets) -> int:
        with self._perturbed(targets):
            grads, samples = self._mean_gradient(model, loss_fn, batch, targets)
        if self.antithetic:
            with self._perturbed(targets, sign=-1.0):
                mirrored, _ = self._mean_gradient(model, loss_fn, batch, targets)
            # −½εΛ^-½ is odd in ε: the mean of the pair is the step of +ε with half the difference of the gradients.
            grads = [(plus - minus) / 2 for plus, minus in zip(grads, mirrored, strict=True)]
        precision_update_sgvb_(
            [self.excess[name] for name in targets.names],
            grads,
            [self._exp_avg[name] for name in targets.names],
            [self._exp_avg_sq[name] for name in targets.names],
            lr=self.lr,
            betas=self.betas,
            eps=self.eps,
            gamma=self.gamma,
            prior_precision=self.prior_precision,
            seed=self.seed,
            noise_step=self.steps,
            step=self.steps + 1,
            offsets=targets.offsets,
        )
        return samples

    def _mean_gradient(
        self, model: nn.Module, loss_fn: LossFn, batch: Any, targets: _Targets
    ) -> tuple[list[Tensor], int]:
        parameters = list(targets.parameters.values())
        with _differentiable(model, parameters):
            losses = self._losses(model, loss_fn, batch)
            # autograd.grad, not backward: nobody's .grad is touched. Parameters that do not take part get zeros.
            grads = torch.autograd.grad(losses.mean(), parameters, allow_unused=True, materialize_grads=True)
        return list(grads), losses.numel()

    def _groups(self) -> dict[str, dict[str, Tensor]]:
        return {**super()._groups(), "exp_avg": self._exp_avg, "exp_avg_sq": self._exp_avg_sq}

    def _config(self) -> dict[str, Any]:
        own = {"lr": self.lr, "antithetic": self.antithetic, "betas": list(self.betas), "eps": self.eps}
        return {**super()._config(), **own}


class Local(SGVB):
    """One precision per output row (or filter), by local reparameterisation: the estimator of Task2Vec.

    All weights of a row share Λ_o, so the row's output y_o = x·W_o + b_o is Gaussian under q and is drawn itself:
    its mean plus ε·(‖x‖²/Λ_o + 1/Λ_b)^½ with an ε of its own for every sample and position, instead of one draw of the
    weights for all of them. That is far less noise per pass, and there are as many unknowns as rows.
    The answer is coarser too: at the fixed point E_o = mean of the row's Hessian diagonal / γ, the same for every
    element of the row, and the curvature between different positions of one sample is left out, as in Task2Vec.

    A row is a slice along dimension 0; each element of a bias or a norm is one. Linear layers and convolutions are
    drawn at their output. Every other use of a parameter (norms, LayerScale, embeddings, a weight that is reshaped
    first) sees one draw of the parameter, as in :class:`SGVB`.

    Method: Achille et al., "Task2Vec: Task Embedding for Meta-Learning" (ICCV 2019), with the local reparameterisation
    of Kingma, Salimans and Welling, "Variational Dropout and the Local Reparameterization Trick" (NeurIPS 2015).
    Arguments as in :class:`SGVB`.
    """

    name = "local"

    def _estimate(self, model: nn.Module, loss_fn: LossFn, batch: Any, targets: _Targets) -> int:
        precisions = {name: _row_values(self.excess[name]) + self.prior_precision for name in targets.names}
        grads, samples = self._row_gradients(model, loss_fn, batch, targets, precisions, 1.0)
        if self.antithetic:
            mirrored, _ = self._row_gradients(model, loss_fn, batch, targets, precisions, -1.0)
            grads = [(plus + minus) / 2 for plus, minus in zip(grads, mirrored, strict=True)]
        for name, grad in zip(targets.names, grads, strict=True):
            self._adam(name, grad, precisions[name])
        return samples

    def _row_gradients(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        batch: Any,
        targets: _Targets,
        precisions: Mapping[str, Tensor],
        sign: float,
    ) -> tuple[list[Tensor], int]:
        """∂(mean loss)/∂log Λ of every row at this update's draw."""
        logs = {name: precision.log().requires_grad_() for name, precision in precisions.items()}
        with ExitStack() as stack:
            stack.enter_context(_differentiable(model, []))
            if "torch._dynamo" in sys.modules:  # a compiled model calls no torch functions we could see
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            with _RowDraws(targets, logs, self.seed, self.steps, sign):
                losses = self._losses(model, loss_fn, batch)
            grads = torch.autograd.grad(losses.mean(), list(logs.values()), allow_unused=True, materialize_grads=True)
        return list(grads), losses.numel()

    def _adam(self, name: str, grad: Tensor, precision: Tensor) -> None:
        excess, mean, square = self.excess[name], self._exp_avg[name], self._exp_avg_sq[name]
        rows = _row_values(excess)
        # per element of the row, so that Adam's eps means the same for rows of any length
        full = grad * (rows.numel() / max(excess.numel(), 1)) + 0.5 * self.gamma * rows / precision
        beta1, beta2 = self.betas
        mean.lerp_(full, 1 - beta1)
        square.mul_(beta2).addcmul_(full, full, value=1 - beta2)
        step = self.steps + 1
        deviation = (square / (1 - beta2**step)).sqrt_().add_(self.eps)
        change = torch.expm1(-self.lr / (1 - beta1**step) * mean / deviation)
        # E + τ⁻² must stay positive: two roundings above zero, as in the kernel of the other estimators
        rows = (rows + precision * change).clamp_(min=-self.prior_precision * (1 - 2.0**-23))
        excess.copy_(_along_rows(rows, excess))

    def _new_state(self, kind: str, parameter: Tensor) -> Tensor:
        return _zeros_like(parameter if kind == "excess" else _row_values(parameter))


ESTIMATORS: dict[str, type[PosteriorEstimator]] = {cls.name: cls for cls in (ClosedForm, Natural, SGVB, Local)}


def make_estimator(name: str, **settings: Any) -> PosteriorEstimator:
    """The estimator of that name (``closed_form``, ``natural``, ``sgvb``, ``local``) with ``settings`` as arguments.

    Raises:
        ValueError: if there is no such estimator; the message lists those there are.
    """
    if name not in ESTIMATORS:
        raise ValueError(f"There is no posterior estimator {name!r}; choose one of {', '.join(ESTIMATORS)}.")
    return ESTIMATORS[name](**settings)


class _Targets:
    """The estimated parameters of a model, in its own order, with each one's first flat index in the whole model."""

    def __init__(self, model: nn.Module, wanted: tuple[str, ...] | None) -> None:
        everything = dict(model.named_parameters())
        for name in wanted or ():
            if name not in everything:
                near = difflib.get_close_matches(name, everything, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else " Names are those of model.named_parameters()."
                raise ValueError(f"The model has no parameter {name!r}.{hint}")
        chosen = everything.keys() if wanted is None else set(wanted)
        if not chosen:
            raise ValueError("There is no parameter to estimate: params is empty or the model has none.")
        self.parameters: dict[str, nn.Parameter] = {}
        self.offsets: list[int] = []
        self.numbers: list[int] = []
        offset = 0
        for number, (name, parameter) in enumerate(everything.items()):
            if name in chosen:
                self.parameters[name] = parameter
                self.offsets.append(offset)
                self.numbers.append(number)
            offset += parameter.numel()
        self.names = list(self.parameters)


# Local reparameterisation ---------------------------------------------------------------------------------------------

_CONVOLUTIONS = (torch.conv1d, torch.conv2d, torch.conv3d)


class _RowDraws(TorchFunctionMode):
    """Inside, every torch call that uses an estimated parameter sees q: its output, or else the parameter, is drawn.

    Args:
        targets: the estimated parameters.
        log_precisions: log Λ per row by name; the graph of what is drawn leads back to them.
        seed, step, sign: the draw. Noise is a function of them, of the parameter's place in the model and of the
            element, so it does not depend on what else is estimated.
    """

    def __init__(
        self, targets: _Targets, log_precisions: Mapping[str, Tensor], seed: int, step: int, sign: float
    ) -> None:
        super().__init__()
        self._seed, self._step, self._sign = seed, step, sign
        self._logs = {id(value): log_precisions[name] for name, value in targets.parameters.items()}
        self._parameters = {id(value): value for value in targets.parameters.values()}
        self._offsets = dict(zip(self._parameters, targets.offsets, strict=True))
        # Outputs get their noise from beyond the model's elements: 2⁴⁰ indices for every parameter.
        self._outputs = {key: (number + 1) << 40 for key, number in zip(self._parameters, targets.numbers, strict=True)}
        self._drawn: dict[int, Tensor] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        used: list[int] = []
        map_tensors(lambda tensor: used.append(id(tensor)) if id(tensor) in self._logs else None, (args, kwargs))
        if not used:
            return func(*args, **kwargs)
        if getattr(func, "__name__", "") == "__get__":  # an attribute; only some (p.T) are values
            value = func(*args, **kwargs)
            if not isinstance(value, Tensor) or not value.is_floating_point():
                return value
        if func is F.linear or func in _CONVOLUTIONS:
            operands = dict(zip(("input", "weight", "bias"), args)) | kwargs
            if id(operands["input"]) not in self._logs:
                return self._draw_output(func, args, kwargs, operands)
        return func(*map_tensors(self._draw, args), **map_tensors(self._draw, kwargs))

    def _draw(self, tensor: Tensor) -> Tensor:
        """The parameter under q, one draw an update."""
        key = id(tensor)
        if key not in self._logs:
            return tensor
        if key not in self._drawn:
            noise = self._noise(tensor.shape, self._offsets[key], tensor)
            deviation = torch.exp(-0.5 * _along_rows(self._logs[key], tensor))
            self._drawn[key] = (tensor.detach() + self._sign * deviation * noise).to(tensor.dtype)
        return self._drawn[key]

    def _draw_output(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], operands: dict[str, Any]
    ) -> Tensor:
        mean = func(*map_tensors(self._mean, args), **map_tensors(self._mean, kwargs))
        x, weight, bias = operands["input"], operands["weight"], operands.get("bias")
        channel_first = func in _CONVOLUTIONS
        shape = (-1, *[1] * (weight.dim() - 2)) if channel_first else (-1,)
        variance: Tensor | float = 0.0
        if id(weight) in self._logs:
            energy = _filter_energy(func, x, args, kwargs, weight) if channel_first else _energy(x)
            variance = energy * torch.exp(-self._logs[id(weight)]).view(shape)
        if id(bias) in self._logs:
            variance = variance + torch.exp(-self._logs[id(bias)]).view(shape)
        assert isinstance(variance, Tensor)
        # a zero input has no noise: kept off the root's infinite slope
        deviation = variance.clamp_min(torch.finfo(variance.dtype).tiny).sqrt()
        key = id(weight) if id(weight) in self._logs else id(bias)
        noise = self._noise(mean.shape, self._outputs[key], deviation)
        self._outputs[key] += noise.numel()  # a layer used twice gets fresh noise
        return mean + (self._sign * deviation * noise).to(mean.dtype)

    def _mean(self, tensor: Tensor) -> Tensor:
        return tensor.detach() if id(tensor) in self._logs else tensor

    def _noise(self, shape: torch.Size, offset: int, like: Tensor) -> Tensor:
        zeros = torch.zeros(shape, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
        [noise] = gaussian_perturb(
            [zeros], [zeros], prior_precision=1.0, seed=self._seed, step=self._step, offsets=[offset]
        )
        return noise


def _energy(x: Tensor) -> Tensor:
    """‖x‖² over the last dimension, which stays with size one."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).square().sum(-1, keepdim=True)


def _filter_energy(
    convolution: Callable[..., Any], x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], weight: Tensor
) -> Tensor:
    """‖·‖² of the patch that each output of a convolution sees, for every filter."""
    geometry = {key: value for key, value in kwargs.items() if key not in ("input", "weight", "bias")}
    geometry |= dict(zip(("stride", "padding", "dilation", "groups"), args[3:]))
    groups = geometry.get("groups", 1)
    wide = torch.promote_types(x.dtype, torch.float32)
    ones = torch.ones(groups, *weight.shape[1:], dtype=wide, device=x.device)
    energy: Tensor = convolution(x.to(wide).square(), ones, None, **geometry)
    channels = energy.dim() - weight.dim() + 1
    return energy.repeat_interleave(weight.shape[0] // groups, channels) if groups > 1 else energy


def _row_values(tensor: Tensor) -> Tensor:
    """The first element of every slice along dimension 0, (rows,)."""
    return tensor.detach().reshape(tensor.shape[0] if tensor.dim() else 1, -1)[:, 0].clone()


def _along_rows(values: Tensor, like: Tensor) -> Tensor:
    """(rows,) as a view that broadcasts to ``like``."""
    return values.view(-1, *[1] * (like.dim() - 1)) if like.dim() else values.view(())


def _zeros_like(parameter: Tensor) -> Tensor:
    # at least fp32 whatever the weights are: accumulated in bf16 the Fisher gives another selection
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    return torch.zeros(parameter.shape, dtype=dtype, device=parameter.device)


def _require_positive(name: str, value: float) -> None:
    if not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
        raise ValueError(f"{name}={value!r} is out of range; expected a finite number > 0.")


@contextmanager
def _differentiable(model: nn.Module, parameters: list[nn.Parameter]) -> Iterator[None]:
    """Inside, the model is in eval mode and the parameters have gradients; both are put back one by one."""
    training = [module for module in model.modules() if module.training]
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    try:
        model.eval()
        for parameter in frozen:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for module in training:
            module.training = True
        for parameter in frozen:
            parameter.requires_grad_(False)
