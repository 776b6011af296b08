"""Monte-Carlo quantities: random columns s̃ with E[s̃ s̃ᵀ] = ∇²_F L instead of the exact factor.

Two kinds of draw. ``"rademacher"``: random signs on the columns of the exact factor. ``"labels"``: the gradient's
deviation for labels drawn from the model's own predictive distribution (BackPACK's kind). Both are unbiased; signs
have the smaller variance, Var[(Σ_k ε_k v_k)²] = 2 (Σ v_k²)² - 2 Σ v_k⁴, the least of all independent weights of unit
variance.

Whole-batch draws are summed over samples *before* they are pulled back and squared after: with batch coupling each
sample's draw reaches all samples, and squaring per sample (as without BatchNorm) would be biased.

Every call draws afresh. Without ``generator=`` its random numbers come from one draw of torch's global random state,
which moves on by that draw: ``torch.manual_seed`` before a call makes it repeatable. A generator given moves on by all
numbers drawn, and the global state stays. Quantities without draws leave all random states as they were.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from bncurv.blocks import Batch, Rows, Source, WholeBatch
from bncurv.factor import Factor
from bncurv.quantities import Quantity, Result, SqrtGGNExact, _squares, combine, zeros
from bncurv.ranks import Ranks

STRIDE = 0x9E3779B97F4A7C15  # between the seeds of ranks


def generator_of_call(quantities: Iterable[Quantity], device: torch.device, rank: int = 0) -> torch.Generator | None:
    """Random numbers for one call, seeded by one draw of the global random state; ``None`` where none are needed.

    Other ones on every rank, whose global states may be the same.
    """
    if not any(q.draws for q in quantities):
        return None
    return _seeded(None, device, rank)


def _seeded(by: torch.Generator | None, device: torch.device, rank: int) -> torch.Generator:
    """Random numbers of one rank, seeded by a draw of a generator (``None``: the global one) alike on all of them."""
    seed = int(torch.randint(2**63 - 1, (), generator=by, device=by.device if by else "cpu"))
    return torch.Generator(device).manual_seed((seed + rank * STRIDE) % 2**63)


class _Sampled(Quantity):
    """Base: ``mc_samples`` draws of a kind from a generator.

    Args:
        mc_samples: number of draws M.
        kind: ``"rademacher"`` or ``"labels"``.
        generator: source of randomness, on any device; default: one seeded by a draw of torch's global random state.
    """

    def __init__(self, mc_samples: int = 1, kind: str = "rademacher", generator: torch.Generator | None = None) -> None:
        super().__init__()
        if not isinstance(mc_samples, int) or mc_samples < 1:
            raise ValueError(f"mc_samples={mc_samples!r}; expected a positive integer.")
        if kind not in ("rademacher", "labels"):
            raise ValueError(f"kind={kind!r}; expected 'rademacher' or 'labels'.")
        self.mc_samples, self.kind, self.generator = mc_samples, kind, generator

    @property
    def draws(self) -> bool:
        """Unless a generator was given."""
        return self.generator is None

    def draw(self, batch: Batch) -> Factor:
        """M random columns per sample."""
        generator, everybody = self.generator or batch.generator, batch.ranks.everybody
        if self.generator and everybody.size > 1:  # the same seed on all ranks must not give the same draws
            generator = _seeded(self.generator, self.generator.device, everybody.rank)
            generator = batch.ranks.helpers.alike(generator)  # draws of the same batch are divided
        return batch.loss.sample(self.mc_samples, self.kind, generator)


class DiagGGNMC(_Sampled):
    """Monte-Carlo diagonal ``diag_ggn_mc [*p]``, unbiased with batch coupling, M backward passes for any N.

    Each draw is one column for the whole batch, t_m = Σ_n s̃_{m,n}; the estimate is mean_m (Jᵀ t_m)². With
    ``mc_samples > 1`` the field ``diag_ggn_mc_stderr`` holds its standard error per entry.
    """

    field = "diag_ggn_mc"

    def sources(self, batch: Batch) -> dict[str, Source | WholeBatch]:
        """Whole-batch columns."""
        return {f"mixed {id(self)}": WholeBatch(self.draw(batch).columns(slice(None)))}

    def start(self, batch: Batch) -> tuple[Result, Result]:
        """Sums of squares and of fourth powers."""
        return zeros(batch.parameters), zeros(batch.parameters)

    def add(self, state: tuple[Result, Result], key: str, rows: Rows) -> None:
        """(Jᵀ t_m)²."""
        squares = rows.values[0].square()
        state[0][rows.name] += squares.sum(0)
        state[1][rows.name] += squares.square_().sum(0)

    def finish(self, state: tuple[Result, Result]) -> tuple[Result, Result]:
        """Mean, and variance of the mean (none for a single draw)."""
        m = self.mc_samples
        mean = {name: s / m for name, s in state[0].items()}
        if m == 1:
            return mean, {}
        return mean, {name: (s / m - mean[name] ** 2).clamp(min=0) / (m - 1) for name, s in state[1].items()}

    def reduce(self, part: tuple[Result, Result], ranks: Ranks, sharing: int) -> tuple[Result, Result]:
        """Estimates of the groups that share batch statistics add up, and so do their independent variances."""
        mean, variance = (ranks.sums(one, "results") for one in part)
        return tuple({name: t / sharing for name, t in one.items()} for one in (mean, variance))  # type: ignore

    def merge(self, parts: Sequence[tuple[Result, Result]], shares: Sequence[float]) -> tuple[Result, Result]:
        """Means add up, and so do the variances of independent draws."""
        means, variances = zip(*parts, strict=True)
        return combine(means, shares), combine(variances, [share**2 for share in shares])

    def fields(self, part: tuple[Result, Result]) -> dict[str, Any]:
        """Estimate and, for more than one draw, its standard error."""
        mean, variance = part
        if self.mc_samples == 1:
            return {self.field: mean}
        return {self.field: mean, f"{self.field}_stderr": {name: v.sqrt() for name, v in variance.items()}}


class _PerComponentSampled(_Sampled):
    """Base: each sample's own draws, pulled back one by one (M passes for the draws, as C for the exact factor)."""

    def sources(self, batch: Batch) -> dict[str, Source | WholeBatch]:
        """Per-sample columns, scaled so that V Vᵀ estimates G."""
        if batch.loss.whole is not None:
            raise ValueError(f"{type(self).__name__} goes by samples, but {batch.loss.compares}")
        drawn = self.draw(batch)
        return {f"sampled {id(self)}": replace(drawn, blocks=drawn.blocks * self.mc_samples**-0.5)}


class ComponentDiagGGNMC(_PerComponentSampled):
    """Monte-Carlo version ``diag_ggn_mc_component [N, *p]`` of `ComponentDiagGGNExact`: mean_m V[(n, m)]²."""

    field = "diag_ggn_mc_component"
    per_component = True

    def add(self, state: Result, key: str, rows: Rows) -> None:
        """mean_m V[(n, m)]²."""
        state[rows.name][rows.n] += _squares(rows.values, 1)


class SqrtGGNMC(_PerComponentSampled, SqrtGGNExact):
    """Monte-Carlo factor ``sqrt_ggn_mc [M, N, *p]``: E[Σ_{m,n} V[m, n] V[m, n]ᵀ] = G.

    The rows of a draw summed over samples, ``sqrt_ggn_mc.sum(1)``, are the whole-batch draws of `DiagGGNMC`.
    """

    field = "sqrt_ggn_mc"

    def start(self, batch: Batch) -> Result:
        """Zeros ``[M, N, *p]``."""
        return zeros(batch.parameters, self.mc_samples, batch.samples)
