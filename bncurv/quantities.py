"""What each quantity makes of V, block by block. One class per quantity.

A quantity is a specification (and, by `BackpropExtension`, something that BackPACK's context manager accepts) and keeps
nothing of a run:

    sources(batch)          the columns it wants pulled back
    start(batch) → state    empty, for one mini-batch
    add(state, key, rows)   what it does with a block of V
    finish(state) → part    what is left of a mini-batch
    merge(parts, shares)    how mini-batches combine, in any order of brackets: the loss is Σ_b share_b L_b
    fields(part)            what the user gets, by field name

Scales: what the loss' reduction puts into the gradient and into S (``engine.py``).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from backpack.extensions.backprop_extension import BackpropExtension
from torch import Tensor, nn

from bncurv.blocks import Batch, Rows, Source, Squares, WholeBatch
from bncurv.ranks import Ranks

Result = dict[str, Tensor]
Parameters = Mapping[str, Tensor]


class Quantity(BackpropExtension):
    """Base class of all quantities.

    Attributes:
        field: attribute of parameters and of `Results` that receives the result.
        wants: the columns that it needs, of ``"gradient"`` (∂L/∂F, one per sample) and ``"factor"`` (S).
        per_component: whether the result's leading axis is the sample; mini-batches are then concatenated.
        degree: power of the loss' scale in the result; mini-batches combine with shares to this power.
        coupled_only: whether the coupled way must be taken.
        squares_only: whether `add` asks a block for ``sum_squares()`` alone; blocks may then be `Squares`, which are
            cheaper.
    """

    field: ClassVar[str]
    wants: ClassVar[tuple[str, ...]] = ("factor",)
    per_component: ClassVar[bool] = False
    degree: ClassVar[float] = 1
    coupled_only: ClassVar[bool] = False
    squares_only: ClassVar[bool] = False

    @property
    def grows(self) -> bool:
        """Whether mini-batches are concatenated, so that the result grows with their number."""
        return self.per_component

    def numbers(self, batch: Batch) -> int:
        """How many numbers it holds of one mini-batch; with ``memory=`` they count, default: those of `start`."""
        return entries(batch) * (batch.samples if self.per_component else 1)

    def __init__(self) -> None:
        super().__init__(self.field, {}, fail_mode="SILENT")

    def __repr__(self) -> str:
        options = inspect.signature(type(self)).parameters.items()
        given = {name: getattr(self, name, option.default) for name, option in options}
        told = [f"{name}={value!r}" for (name, option), value in zip(options, given.values(), strict=True)
                if not (value is option.default or isinstance(value, torch.Generator | Mapping))]  # fmt: skip
        return f"{type(self).__name__}({', '.join(told)})"

    def expects_backpropagation_quantities(self) -> bool:
        """BackPACK need not propagate anything for us."""
        return False

    def __call__(self, module: nn.Module, g_inp: Any, g_out: Any) -> None:
        """BackPACK runs this on each of its extended modules; our work happens at the loss (``extension.py``)."""

    @property
    def draws(self) -> bool:
        """Whether it draws random numbers without a generator of its own."""
        return False

    def sources(self, batch: Batch) -> dict[str, Source | WholeBatch]:
        """The columns to pull back, by a key; what several quantities share has one key and is pulled once."""
        return {key: batch.loss if key == "gradient" else self._factor(batch) for key in self.wants}

    def _factor(self, batch: Batch) -> Source | WholeBatch:
        """S; of a loss that compares samples as columns of the whole batch, for who asks for no samples' rows."""
        if batch.loss.whole is None:
            return batch.loss.factor
        if batch.ranks.everybody.size > 1:
            why = (
                "Its columns are not divided over processes: leave process_group out."
                if batch.ranks.divides
                else "Over several processes, each compares its own samples only, and their Hessian's factor is not "
                "known to bncurv. Compute on one process."
            )
            raise ValueError(f"{type(self).__name__}: {batch.loss.compares} {why}")
        if not self.squares_only:
            raise ValueError(f"{type(self).__name__} goes by samples, but {batch.loss.compares}")
        return WholeBatch(batch.loss.whole.columns)

    def start(self, batch: Batch) -> Any:
        """Empty state for one mini-batch: zeros ``[*p]``, or ``[N, *p]`` per component."""
        return zeros(batch.parameters, *((batch.samples,) if self.per_component else ()))

    def add(self, state: Any, key: str, rows: Any) -> None:
        """Put one block of V (`Rows`; with ``squares_only`` also `Squares`), of the source ``key``, into the state."""
        raise NotImplementedError

    def finish(self, state: Any) -> Any:
        """What is left of one mini-batch: the state itself, ``{parameter name: tensor}``."""
        return state

    def reduce(self, part: Any, ranks: Ranks, sharing: int) -> Any:
        """The part of one mini-batch over all ranks: sums add up, what is per component stays with its samples.

        Args:
            part: this rank's.
            ranks: all ranks.
            sharing: how many of them share batch statistics: columns of the whole batch are pulled back together, and
                so counted by each of these.
        """
        return part if ranks.size == 1 or self.per_component else ranks.sums(part, "results")

    def merge(self, parts: Sequence[Any], shares: Sequence[float]) -> Any:
        """Sum of several mini-batches' parts, or their concatenation per component, each times its share."""
        return combine(parts, [share**self.degree for share in shares], 0 if self.per_component else None)

    def fields(self, part: Any) -> dict[str, Any]:
        """Field name → result."""
        return {self.field: part}

    def deliver(self, fields: dict[str, Any], parameters: Parameters) -> None:
        """Store the results where BackPACK's users look for them: ``parameter.<field>``."""
        for field, result in fields.items():
            for name, p in parameters.items():
                setattr(p, field, result[name])

    def withdraw(self, parameters: Parameters) -> None:
        """Take back what `deliver` stored."""
        for p in parameters.values():
            for field in [f for f in p.__dict__ if f.startswith(self.field)]:
                delattr(p, field)


def entries(batch: Batch) -> int:
    """D."""
    return sum(p.numel() for p in batch.parameters.values())


def zeros(parameters: Parameters, *lead: int) -> Result:
    """Zeros ``[*lead, *p]`` for every parameter."""
    return {name: torch.zeros((*lead, *p.shape), dtype=p.dtype, device=p.device) for name, p in parameters.items()}


def combine(parts: Sequence[Result], factors: Sequence[float], axis: int | None = None) -> Result:
    """Weighted sum of results, or their concatenation along an axis, by parameter name."""
    if len(parts) == 1 and factors[0] == 1:
        return parts[0]
    found = {}
    for name in parts[0]:
        ts = [part[name] if f == 1 else f * part[name] for f, part in zip(factors, parts, strict=True)]
        found[name] = sum(ts[1:], ts[0]) if axis is None else torch.cat(ts, axis)
    return found


def _squares(values: Tensor, axes: int | tuple[int, ...]) -> Tensor:
    """Sum of squares over axes."""
    return values.square().sum(axes)


class ComponentGrad(Quantity):
    """Per-component gradients ``grad_component [N, *p]``: g_n = (∂F_n/∂θ)ᵀ ∂L/∂F_n, F_n = F_n(whole batch, θ).

    They sum to the gradient of the loss as reduced (a mean's 1/N is inside), whatever function of the outputs the loss
    is. With BatchNorm in training mode g_n is not the gradient of a loss of sample n alone, since F_n depends on the
    whole batch. Definition: Dangel (2021), "Structural implications of batch normalization".

    Example:
        >>> import torch, bncurv
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2))
        >>> batch, loss_fn = (torch.randn(8, 4), torch.randint(2, (8,))), torch.nn.CrossEntropyLoss()
        >>> res = bncurv.curvature(model, loss_fn, batch, bncurv.ComponentGrad())
        >>> res.grad_component["0.weight"].shape
        torch.Size([8, 3, 4])
    """

    field = "grad_component"
    wants = ("gradient",)
    per_component = True

    def start(self, batch: Batch) -> tuple[int, Result]:
        """N, and no samples yet."""
        return batch.samples, {} if batch.samples else zeros(batch.parameters, 0)

    def add(self, state: tuple[int, Result], key: str, rows: Rows) -> None:
        """g_n; without a copy where all come at once."""
        (samples, found), values = state, rows.values[:, 0]
        if len(values) == samples:
            found[rows.name] = values.contiguous()
        else:
            if rows.name not in found:
                found[rows.name] = values.new_empty(samples, *values.shape[1:])
            found[rows.name][rows.n] = values

    def finish(self, state: tuple[int, Result]) -> Result:
        """All samples."""
        return state[1]


class ComponentL2Grad(Quantity):
    """Squared norms ``l2_component [N]`` of the per-component gradients, one per sample and parameter: ‖g_n‖².

    Example:
        >>> import torch, bncurv
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2))
        >>> batch, loss_fn = (torch.randn(8, 4), torch.randint(2, (8,))), torch.nn.CrossEntropyLoss()
        >>> res = bncurv.curvature(model, loss_fn, batch, bncurv.ComponentL2Grad(), bncurv.ComponentGrad())
        >>> norms = res.grad_component["0.weight"].flatten(1).norm(dim=1)
        >>> torch.allclose(res.l2_component["0.weight"], norms**2)
        True
    """

    field = "l2_component"
    wants = ("gradient",)
    per_component = True
    degree = 2

    def start(self, batch: Batch) -> Result:
        """Zeros ``[N]``."""
        return {name: p.new_zeros(batch.samples) for name, p in batch.parameters.items()}

    def numbers(self, batch: Batch) -> int:
        """N for each parameter."""
        return batch.samples * len(batch.parameters)

    def add(self, state: Result, key: str, rows: Rows) -> None:
        """‖g_n‖²."""
        state[rows.name][rows.n] = _squares(rows.values.flatten(1), 1)


class SumComponentGradSquared(Quantity):
    """Second moment ``sum_grad_squared [*p]``: Σ_n g_n², elementwise (BackPACK's SumGradSquared, with coupling).

    Example:
        >>> import torch, bncurv
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2))
        >>> batch, loss_fn = (torch.randn(8, 4), torch.randint(2, (8,))), torch.nn.CrossEntropyLoss()
        >>> res = bncurv.curvature(model, loss_fn, batch, bncurv.SumComponentGradSquared(), bncurv.ComponentGrad())
        >>> squares = res.grad_component["0.weight"].square().sum(0)
        >>> torch.allclose(res.sum_grad_squared["0.weight"], squares)
        True
    """

    field = "sum_grad_squared"
    wants = ("gradient",)
    degree = 2
    squares_only = True

    def add(self, state: Result, key: str, rows: Rows | Squares) -> None:
        """Σ_n g_n²."""
        state[rows.name] += rows.sum_squares()


class Moments(NamedTuple):
    """Number, mean and sum of squared deviations of values ``[*p]``."""

    number: int
    mean: Tensor
    spread: Tensor

    def joined(self, other: Moments) -> Moments:
        """Those of both groups together (Chan, Golub & LeVeque 1983)."""
        number, shift = self.number + other.number, other.mean - self.mean
        spread = self.spread + other.spread + shift**2 * (self.number * other.number / number)
        return Moments(number, self.mean + shift * (other.number / number), spread)

    def times(self, scale: float) -> Moments:
        """Those of the values times a number."""
        return Moments(self.number, self.mean * scale, self.spread * scale**2)


class ComponentVariance(Quantity):
    """Variance ``variance [*p]`` of the per-component gradients: mean_n g_n² - (mean_n g_n)², elementwise.

    BackPACK's scaling: g_n carries the loss' 1/N of a mean reduction, and the mean over n divides by N once more.
    Computed from centred blocks, so it is never negative and does not cancel. It is not the variance of mini-batch
    gradients: with BatchNorm the g_n depend on each other.

    Example:
        >>> import torch, bncurv
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2))
        >>> batch, loss_fn = (torch.randn(8, 4), torch.randint(2, (8,))), torch.nn.CrossEntropyLoss()
        >>> res = bncurv.curvature(model, loss_fn, batch, bncurv.ComponentVariance(), bncurv.ComponentGrad())
        >>> variance = res.grad_component["0.weight"].var(0, correction=0)
        >>> torch.allclose(res.variance["0.weight"], variance)
        True
    """

    field = "variance"
    wants = ("gradient",)

    def numbers(self, batch: Batch) -> int:
        """Means and spreads."""
        return 2 * entries(batch)

    def start(self, batch: Batch) -> dict[str, Moments]:
        """No values yet."""
        return {name: Moments(0, mean, torch.zeros_like(mean)) for name, mean in zeros(batch.parameters).items()}

    def add(self, state: dict[str, Moments], key: str, rows: Rows) -> None:
        """Join the moments of another block, which may be empty."""
        if not len(rows.values):
            return
        new = rows.values.mean((0, 1))
        block = Moments(len(rows.values), new, _squares(rows.values - new, (0, 1)))
        state[rows.name] = state[rows.name].joined(block)

    def reduce(self, part: dict[str, Moments], ranks: Ranks, sharing: int) -> dict[str, Moments]:
        """Moments of all ranks' components together."""
        if ranks.size == 1:
            return part
        numbers = [int(n) for n in ranks.numbers(next(iter(part.values())).number)]
        means, spreads = (
            {name: ranks.gather(getattr(m, key), "results") for name, m in part.items()} for key in ("mean", "spread")
        )
        return {
            name: functools.reduce(Moments.joined, map(Moments, numbers, means[name], spreads[name])) for name in part
        }

    def merge(self, parts: Sequence[dict[str, Moments]], shares: Sequence[float]) -> dict[str, Moments]:
        """Moments of all components together, each times its mini-batch's share."""
        scaled = [{name: m.times(share) for name, m in part.items()} for part, share in zip(parts, shares, strict=True)]
        return functools.reduce(lambda a, b: {name: a[name].joined(b[name]) for name in a}, scaled)

    def fields(self, part: dict[str, Moments]) -> dict[str, Any]:
        """Divide by the number of components."""
        return {self.field: {name: m.spread / m.number for name, m in part.items()}}


class DiagGGNExact(Quantity):
    """Exact diagonal ``diag_ggn_exact [*p]`` of the GGN G = Jᵀ (∇²_F L) J = Σ_k V[k] V[k]ᵀ of the whole batch.

    J differentiates through the batch statistics. The scale is that of the loss (a mean's 1/N is inside), as in
    BackPACK's extension of the same name (Dangel, Kunstner & Hennig 2020, ICLR).

    Example:
        >>> import torch, bncurv, bncurv.reference
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2))
        >>> batch, loss_fn = (torch.randn(8, 4), torch.randint(2, (8,))), torch.nn.CrossEntropyLoss()
        >>> res = bncurv.curvature(model, loss_fn, batch, bncurv.DiagGGNExact())
        >>> exact = bncurv.reference.ggn_diagonal(model, loss_fn, *batch)["0.weight"]
        >>> torch.allclose(res.diag_ggn_exact["0.weight"].double(), exact, rtol=1e-3, atol=1e-7)
        True
    """

    field = "diag_ggn_exact"
    squares_only = True

    def add(self, state: Result, key: str, rows: Rows | Squares) -> None:
        """Σ_k V[k]², never negative."""
        state[rows.name] += rows.sum_squares()


class ComponentDiagGGNExact(Quantity):
    """Diagonals ``diag_ggn_exact_component [N, *p]`` of the components' GGNs: Σ_c V[(n, c)]²; they sum to the diagonal.

    G_n = J_nᵀ (∇²_{F_n} L) J_n with J_n = ∂F_n(whole batch)/∂θ: it depends on all samples.

    Example:
        >>> import torch, bncurv
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2))
        >>> batch, loss_fn = (torch.randn(8, 4), torch.randint(2, (8,))), torch.nn.CrossEntropyLoss()
        >>> res = bncurv.curvature(model, loss_fn, batch, bncurv.ComponentDiagGGNExact())
        >>> res.diag_ggn_exact_component["0.weight"].shape
        torch.Size([8, 3, 4])
    """

    field = "diag_ggn_exact_component"
    per_component = True

    def add(self, state: Result, key: str, rows: Rows) -> None:
        """Σ_c V[(n, c)]²."""
        state[rows.name][rows.n] += _squares(rows.values, 1)


class SqrtGGNExact(Quantity):
    """The factor V itself, ``sqrt_ggn_exact [C, N, *p]``: G = Σ_{c,n} V[c, n] V[c, n]ᵀ.

    C columns per sample: as many as the model has outputs per sample. The exact factor of cross-entropy needs one
    column less per position; those are zero. Unique up to a rotation of a sample's columns.

    Example:
        >>> import torch, bncurv
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2))
        >>> batch, loss_fn = (torch.randn(8, 4), torch.randint(2, (8,))), torch.nn.CrossEntropyLoss()
        >>> res = bncurv.curvature(model, loss_fn, batch, bncurv.SqrtGGNExact(), bncurv.DiagGGNExact())
        >>> V = res.sqrt_ggn_exact["0.weight"]
        >>> V.shape
        torch.Size([2, 8, 3, 4])
        >>> torch.allclose(V.square().sum((0, 1)), res.diag_ggn_exact["0.weight"])
        True
    """

    field = "sqrt_ggn_exact"
    degree = 0.5

    @property
    def grows(self) -> bool:
        """Along the samples."""
        return True

    def numbers(self, batch: Batch) -> int:
        """All rows of V."""
        return entries(batch) * batch.output.numel()

    def start(self, batch: Batch) -> Result:
        """Zeros ``[C, N, *p]``."""
        return zeros(batch.parameters, batch.output[0].numel(), batch.samples)

    def add(self, state: Result, key: str, rows: Rows) -> None:
        """V, columns first."""
        state[rows.name][rows.c, rows.n] = rows.values.transpose(0, 1)

    def reduce(self, part: Result, ranks: Ranks, sharing: int) -> Result:
        """Rows stay with their samples."""
        return part

    def merge(self, parts: Sequence[Result], shares: Sequence[float]) -> Result:
        """Concatenated along the samples, times √share."""
        return combine(parts, [share**self.degree for share in shares], axis=1)
