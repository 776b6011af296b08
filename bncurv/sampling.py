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
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.special import chdtri
from torch import Tensor

from bncurv.blocks import Batch, Rows, Source, Squares, WholeBatch
from bncurv.deflation import FEWEST, Deflated, Goal, Tail
from bncurv.factor import Factor
from bncurv.quantities import Quantity, Result, SqrtGGNExact, _squares, combine, entries, zeros
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
        return batch.loss.sample(self.mc_samples, self.kind, self._random(batch))

    def _random(self, batch: Batch) -> torch.Generator | None:
        everybody = batch.ranks.everybody
        if self.generator and everybody.size > 1:  # the same seed on all ranks must not give the same draws
            seeded = _seeded(self.generator, self.generator.device, everybody.rank)
            return batch.ranks.helpers.alike(seeded)  # draws of the same batch are divided
        return self.generator or batch.generator


class Estimate(NamedTuple):
    """An estimate by parameter name, the random part of it, and the variance (of a single draw none)."""

    mean: Result
    random: Result
    variance: Result


class DiagGGNMC(_Sampled):
    """Estimate ``diag_ggn_mc [*p]`` of the GGN's diagonal, unbiased with batch coupling, in backward passes of any N.

    ``mc_samples=M``: M whole-batch draws t_m = Σ_n s̃_{m,n}, the estimate is mean_m (Jᵀ t_m)²: M passes, relative error
    about √(2/M) of an entry. For M > 1 the field ``diag_ggn_mc_stderr`` holds the standard error of each entry as seen
    from the draws. The entries are skewed: an interval of so many standard errors to either side covers less than it
    would for a normal distribution.

    ``passes=B`` or ``rtol=ε``: directions that make up most of the diagonal are taken exactly, found from C passes,
    and the rest is random (``deflation.py``): the best of B passes; or as many as it takes until the relative error of
    every parameter's trace and diagonal (in the Euclidean norm) is at most ε, all of them together at ``confidence``
    as estimated from the draws. Where the exact diagonal is no dearer, it is taken, and ``Results.method`` is the way
    it went; else ``"sampled"``. The fields ``diag_ggn_mc_lower`` and ``diag_ggn_mc_upper`` are limits within which the
    true entry lies with probability ``confidence``, each entry by itself; equal to the value where it is exact.

    Args:
        mc_samples: number of draws M; default 1.
        kind: of these draws, ``"rademacher"`` or ``"labels"``.
        generator: source of randomness, on any device; default: one seeded by a draw of torch's global random state.
        passes: most backward passes of a mini-batch, B.
        rtol: relative error ε of a mini-batch.
        confidence: of the limits and of the goal.

    Raises:
        ValueError: for more than one of ``mc_samples``, ``passes`` and ``rtol``, or values without meaning.

    Example:
        >>> import torch, bncurv
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2))
        >>> X, y = torch.randn(8, 4), torch.randint(2, (8,))
        >>> res = bncurv.curvature(model, torch.nn.CrossEntropyLoss(), (X, y), bncurv.DiagGGNMC(rtol=0.05))
        >>> bool((res.diag_ggn_mc_lower["0.weight"] <= res.diag_ggn_mc_upper["0.weight"]).all())
        True
    """

    field = "diag_ggn_mc"

    def __init__(
        self,
        mc_samples: int | None = None,
        kind: str = "rademacher",
        generator: torch.Generator | None = None,
        *,
        passes: int | None = None,
        rtol: float | None = None,
        confidence: float = 0.95,
    ) -> None:
        given = {"mc_samples": mc_samples, "passes": passes, "rtol": rtol}
        given = {name: value for name, value in given.items() if value is not None}
        if len(given) > 1:
            raise ValueError(f"DiagGGNMC was given {' and '.join(given)}; expected one of mc_samples, passes and rtol.")
        super().__init__(1 if mc_samples is None else mc_samples, kind, generator)
        if passes is not None and (not isinstance(passes, int) or passes < 1):
            raise ValueError(f"passes={passes!r}; expected a positive integer.")
        if rtol is not None and not 0 < rtol < 1:
            raise ValueError(f"rtol={rtol!r}; expected a relative error between 0 and 1.")
        if not 0 < confidence < 1:
            raise ValueError(f"confidence={confidence!r}; expected a probability between 0 and 1.")
        self.passes, self.rtol, self.confidence = passes, rtol, confidence
        if self.goal and kind != "rademacher":
            raise ValueError(f"kind={kind!r} goes with mc_samples=M; passes=B and rtol=ε draw Gaussian columns.")

    @property
    def goal(self) -> Goal | None:
        """What to reach, where it is no number of draws."""
        return Goal(self.passes, self.rtol, self.confidence) if self.passes or self.rtol else None

    def __repr__(self) -> str:
        return super().__repr__().replace("mc_samples=1, ", "") if self.goal else super().__repr__()

    def sources(self, batch: Batch) -> dict[str, Any]:
        """Whole-batch columns; or a way of its own."""
        if self.goal:
            return {f"deflated {id(self)}": Deflated(batch, self.goal, self._random(batch))}
        return {f"mixed {id(self)}": WholeBatch(self.draw(batch).columns(slice(None)))}

    def numbers(self, batch: Batch) -> int:
        """Sums and what they are made into; with a goal also those of its way, for an error its first draws."""
        first = 2 * FEWEST if self.goal and self.goal.rtol else 0
        return (5 + (3 if self.goal else 0) + first) * entries(batch)

    def start(self, batch: Batch) -> Estimate:
        """Sums; without a goal of squares and of fourth powers."""
        random = zeros(batch.parameters) if self.goal else {}
        return Estimate(zeros(batch.parameters), random, zeros(batch.parameters))

    def add(self, state: Estimate, key: str, rows: Rows | Squares | Tail) -> None:
        """(Jᵀ t_m)²; what is exact, and the mean T of what is random, Var[T] = 2 T²/M."""
        if isinstance(rows, Tail):
            state.random[rows.name].copy_(rows.values)
            state.mean[rows.name] += rows.values
            state.variance[rows.name] += rows.values.square() * (2 / rows.draws)
        elif isinstance(rows, Squares):
            state.mean[rows.name] += rows.values
        else:
            squares = rows.values[0].square()
            state.mean[rows.name] += squares.sum(0)
            state.variance[rows.name] += squares.square_().sum(0)

    def finish(self, state: Estimate) -> Estimate:
        """Mean, and variance of the mean (none for a single draw)."""
        if self.goal:
            return state
        m = self.mc_samples
        mean = {name: s / m for name, s in state.mean.items()}
        if m == 1:
            return Estimate(mean, {}, {})
        spread = {name: (s / m - mean[name] ** 2).clamp(min=0) for name, s in state.variance.items()}
        return Estimate(mean, {}, {name: s / (m - 1) for name, s in spread.items()})

    def reduce(self, part: Estimate, ranks: Ranks, sharing: int) -> Estimate:
        """Estimates of the groups that share batch statistics add up, and so do their independent variances."""
        if ranks.size == 1:
            return part
        return Estimate(*({n: t / sharing for n, t in ranks.sums(one, "results").items()} for one in part))

    def merge(self, parts: Sequence[Estimate], shares: Sequence[float]) -> Estimate:
        """Means add up, and so do the variances of independent draws."""
        means, randoms, variances = zip(*parts, strict=True)
        squares = [share**2 for share in shares]
        return Estimate(combine(means, shares), combine(randoms, shares), combine(variances, squares))

    def fields(self, part: Estimate) -> dict[str, Any]:
        """Estimate and its limits; or, for more than one draw, its standard error."""
        found = {self.field: part.mean}
        if self.goal:
            limits = {name: self._limits(name, part, self.goal.confidence) for name in part.mean}
            for i, which in enumerate(("lower", "upper")):
                found[f"{self.field}_{which}"] = {name: ends[i] for name, ends in limits.items()}
        elif self.mc_samples > 1:
            found[f"{self.field}_stderr"] = {name: v.sqrt() for name, v in part.variance.items()}
        return found

    @staticmethod
    def _limits(name: str, part: Estimate, confidence: float) -> tuple[Tensor, Tensor]:
        """From ν T/t ~ χ²_ν, with ν = 2 T²/Var[T] also for a sum of several (Welch-Satterthwaite)."""
        mean, T, variance = (one[name] for one in part)
        freedom = torch.where(variance > 0, 2 * T.square() / variance, 1.0).clamp(1)
        below, several = freedom.long(), np.arange(1, int(freedom.max()) + 2)
        beyond = (1 - confidence) / 2, (1 + confidence) / 2
        ratios = [torch.from_numpy(several / chdtri(several, p)).to(T) for p in beyond]  # t/T at the limits, by ν
        lower, upper = (torch.lerp(ratio[below - 1], ratio[below], freedom - below) for ratio in ratios)
        return mean + T * (lower - 1), mean + T * (upper - 1)


class _PerComponentSampled(_Sampled):
    """Base: each sample's own draws, pulled back one by one (M passes for the draws, as C for the exact factor)."""

    def sources(self, batch: Batch) -> dict[str, Source | WholeBatch]:
        """Per-sample columns, scaled so that V Vᵀ estimates G."""
        if batch.loss.whole is not None:
            raise ValueError(f"{type(self).__name__} goes by samples, but {batch.loss.compares}")
        drawn = self.draw(batch)
        return {f"sampled {id(self)}": replace(drawn, blocks=drawn.blocks * self.mc_samples**-0.5)}


class ComponentDiagGGNMC(_PerComponentSampled):
    """Monte-Carlo version ``diag_ggn_mc_component [N, *p]`` of `ComponentDiagGGNExact`: mean_m V[(n, m)]².

    Example:
        >>> import torch, bncurv
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2))
        >>> batch, loss_fn = (torch.randn(8, 4), torch.randint(2, (8,))), torch.nn.CrossEntropyLoss()
        >>> res = bncurv.curvature(model, loss_fn, batch, bncurv.ComponentDiagGGNMC(mc_samples=5))
        >>> res.diag_ggn_mc_component["0.weight"].shape
        torch.Size([8, 3, 4])
    """

    field = "diag_ggn_mc_component"
    per_component = True

    def add(self, state: Result, key: str, rows: Rows) -> None:
        """mean_m V[(n, m)]²."""
        state[rows.name][rows.n] += _squares(rows.values, 1)


class SqrtGGNMC(_PerComponentSampled, SqrtGGNExact):
    """Monte-Carlo factor ``sqrt_ggn_mc [M, N, *p]``: E[Σ_{m,n} V[m, n] V[m, n]ᵀ] = G.

    The rows of a draw summed over samples, ``sqrt_ggn_mc.sum(1)``, are the whole-batch draws of `DiagGGNMC`.

    Example:
        >>> import torch, bncurv
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2))
        >>> batch, loss_fn = (torch.randn(8, 4), torch.randint(2, (8,))), torch.nn.CrossEntropyLoss()
        >>> res = bncurv.curvature(model, loss_fn, batch, bncurv.SqrtGGNMC(mc_samples=5))
        >>> res.sqrt_ggn_mc["0.weight"].shape
        torch.Size([5, 8, 3, 4])
    """

    field = "sqrt_ggn_mc"

    def numbers(self, batch: Batch) -> int:
        """All rows."""
        return self.mc_samples * entries(batch) * batch.samples

    def start(self, batch: Batch) -> Result:
        """Zeros ``[M, N, *p]``."""
        return zeros(batch.parameters, self.mc_samples, batch.samples)
