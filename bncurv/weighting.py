"""Ways to influence gradients: what a sample's weight does to the gradient, batch statistics included.

Weight the samples, L(θ, w) = Σ_n w_n ℓ_n, with the moments of every BatchNorm under the same weights (normalised), and

    g_n = w_n ∂_{w_n} ∇_θ L(θ, w)       at the weights of the loss as it is reduced

They act on the loss and on the statistics, ∂_{w_n} L = ℓ_n + Σ_q λ_q ∂statistics_q/∂w_n with λ = dL/d statistics, so

    g_n = ∇_θ h_n,    h_n = u_n · F_n + Σ_q λ_q d[n, q],    d[n, q] = w_n ∂statistics_q/∂w_n

where u = ∂L/∂F is held constant and λ, d are functions on the graph: N passes through the graph of a backward pass.
With more samples than statistics it is cheaper through the cut (letters: ``engine.py``), R such passes whatever N is:

    g_n = Σ_t δ_nt x_ntᵀ + Σ_q α[n, q] P[q] + Σ_q d[n, q] Λ[q],    Λ[q] = ∇_θ λ_q

δ: cotangents of the *ordinary* backward pass, so that the first term is the path gradient; α: what sample n sends into
the statistics less what weighting takes away again, carried down by B as A is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from bncurv.assurance import Assurance
from bncurv.blocks import Batch, Rows
from bncurv.budget import chunks
from bncurv.certificate import leaks
from bncurv.directions import Directions
from bncurv.engine import Engine, Procedure
from bncurv.memory import Memory
from bncurv.precision import FORMULA, ROUNDING, ulp
from bncurv.probes import pattern

WORTHWHILE = 1.5  # samples per statistic from which on the cut is cheaper than a pass for each sample


class Influence(Procedure):
    """All influence gradients of a batch, or their projections."""

    def __init__(self, batch: Batch, direction: Mapping[str, Tensor] | None = None) -> None:
        self._batch, self._direction = batch, direction

    def planned(self, engine: Engine) -> int:
        """N double passes; or P and Λ, and an ordinary pass."""
        if self._direction is not None:
            return 2
        structure = engine.structure
        widths = [structure.width[j] for j, *_ in structure.sisters if structure.below[j]]
        widths += structure.width.values()
        return 1 + sum(-(-r // engine.shard.helpers) for r in widths) if self._cut(engine) else engine.shard.total

    def _cut(self, engine: Engine) -> bool:
        statistics = sum(engine.structure.width.values())
        samples = engine.shard.everywhere if engine.ranks.divides else engine.shard.total  # on all ranks alike
        cheaper = not engine.slow and samples > WORTHWHILE * statistics > 0
        return cheaper and (engine.memory is None or self._fits(engine, engine.memory))

    def _fits(self, engine: Engine, memory: Memory) -> bool:
        """Whether there is room for P of all parameters at once."""
        return memory.fits("coupled") and len(engine.costs.groups(list(engine.wanted))) == 1

    def pull(self, engine: Engine) -> Iterator[Rows]:
        """Blocks of g_n; or all projections as one."""
        self._check(engine)
        try:
            with torch.enable_grad():
                yield from self._ways(engine)
        except NotImplementedError as error:
            raise _once_only(error) from error
        except RuntimeError as error:
            raise (_once_only(error) if "differentia" in str(error) or "derivative" in str(error) else error) from error

    def _ways(self, engine: Engine) -> Iterator[Rows]:
        if self._direction is not None:
            yield Rows("", self._projected(engine)[engine.shard.rows()], slice(None), slice(0, 1))
            return
        rows = self._through_the_cut(engine) if self._cut(engine) else {}
        if rows and engine.ranks.everybody.all(self._right(engine, rows)):
            for name, values in rows.items():
                yield Rows(name, values, slice(None), slice(0, 1))
        else:
            yield from self._one_by_one(engine)

    def _check(self, engine: Engine) -> None:
        """Raise unless the samples meet in BatchNorms alone."""
        problem = Assurance(engine.back, engine.trace, engine.products, [self._batch.loss], engine.shard).mixing()
        if problem:
            raise RuntimeError(
                f"Influence gradients weight the samples in the loss and in BatchNorm's statistics, but {problem} How "
                "weights act there is not known: replace it, or use ComponentGrad."
            )
        leaf = engine.output.detach().requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(self._batch.loss.value_on(leaf), leaf, create_graph=True)
        if not gradient.requires_grad:
            return

        def hessian(v: Tensor) -> list[Tensor | None]:
            return [torch.autograd.grad(gradient, leaf, v, retain_graph=True)[0]]

        u = pattern(leaf.shape, leaf)
        if leaks(hessian, u, hessian(u), len(u)):
            raise ValueError(
                f"{self._batch.loss.name} compares samples, so it is no weighted sum over them, which influence "
                "gradients are defined by. Use ComponentGrad, or a loss that is a sum or mean over samples."
            )

    # ---------------------------------------------------------------- on the graph
    def _received(self, engine: Engine) -> dict[int, Tensor]:
        """λ of every BatchNorm ``[R]``, a function on the graph of a backward pass."""
        sites = engine.structure.couplings
        value = self._batch.loss.value_on(engine.output)
        if not sites:
            return {}
        edges = engine.structure.edges(sites)
        cotangents = torch.autograd.grad(value, edges, create_graph=True, allow_unused=True)
        return {
            j: engine.trace.sites[j].coupling.received(delta)
            for j, delta in zip(sites, cotangents, strict=True)
            if delta is not None
        }

    def _weighted(self, engine: Engine) -> Tensor:
        """H ``[n]``: its gradients by the parameters are the influence gradients."""
        samples = len(engine.output)
        h = (self._batch.loss.gradient * engine.output).reshape(samples, -1).sum(1)
        for j, received in self._received(engine).items():
            h = h + engine.trace.sites[j].coupling.deviations(samples) @ received
        return h

    def _one_by_one(self, engine: Engine) -> Iterator[Rows]:
        h, parameters = self._weighted(engine), list(engine.wanted.values())
        for n in chunks(engine.shard.total, engine.costs.dense_chunk()):  # samples of all ranks
            own, place = engine.shard.here(n)
            one_hot = h.new_zeros(n.stop - n.start, len(h))
            one_hot[place, engine.shard.rows(own)] = torch.eye(own.stop - own.start, dtype=h.dtype, device=h.device)
            got = engine.back.vjp(h, parameters, one_hot, beyond="influence")
            zeros = engine.products.zeros
            rows = {k: zeros(k, len(one_hot)) if t is None else t for k, t in zip(engine.wanted, got, strict=True)}
            for name, values in engine.ranks.sums(rows, "influence gradients").items():
                if own.start < own.stop:
                    yield Rows(name, values[place, None], own, slice(0, 1))

    def _projected(self, engine: Engine) -> Tensor:
        """g_n · v: Σ_n ε_n g_n is a gradient linear in ε, whose product with v is differentiated by ε."""
        assert self._direction is not None
        h = self._weighted(engine)
        epsilon = torch.zeros_like(h, requires_grad=True)
        wanted = {name: engine.wanted[name] for name in self._direction}
        mixed = torch.autograd.grad(
            h, list(wanted.values()), epsilon, create_graph=True, allow_unused=True, materialize_grads=True
        )
        engine.back.note(2)
        along = torch.stack([(g * v.to(g)).sum() for g, v in zip(mixed, self._direction.values(), strict=True)]).sum()
        return torch.autograd.grad(along, epsilon, materialize_grads=True)[0]

    # ---------------------------------------------------------------- through the cut
    @torch.no_grad()
    def _through_the_cut(self, engine: Engine) -> dict[str, Tensor]:
        """All g_n of this rank ``[n, 1, *p]`` by name."""
        structure, samples, names = engine.structure, len(engine.output), list(engine.wanted)
        sites = sorted({*(j for name in names for j in structure.sites(name)), *structure.couplings})
        got = engine.back.vjp(engine.output, structure.edges(sites), self._batch.loss.gradient[None])
        delta = dict(zip(sites, got, strict=True))
        a = engine.back.coefficients(delta, 1)  # [n, 1, R] by BatchNorm
        d = {j: engine.trace.sites[j].coupling.deviations(samples).detach() for j in structure.couplings}
        for j, coefficients in a.items():
            (received,) = engine.ranks.sum([coefficients.sum(0)[0]], "influence gradients")  # λ [R]
            _less_weighting(coefficients, d[j], engine.trace.sites[j].coupling.share(samples), received)
        directions = Directions(engine.back, engine.products, engine.costs, names)
        directions.carry(a)
        rows, own = {}, engine.shard.rows()
        for name in names:
            rows[name] = engine.products.own(name, delta, own, 1)
            directions.correction(name).add_to(rows[name], own)
        self._add_second_order(engine, rows, d)
        return rows

    def _add_second_order(self, engine: Engine, rows: dict[str, Tensor], d: dict[int, Tensor]) -> None:
        """Σ_q d[n, q] Λ[q], some q at a time; every rank has λ, and its share of the cotangent, or of the q."""
        with torch.enable_grad():
            received = self._received(engine)
        parameters, helpers, purpose = list(engine.wanted.values()), engine.ranks.helpers, "influence gradients"
        for j, one in received.items():
            for q in chunks(len(one), engine.costs.dense_chunk() * helpers.size):
                one_hot = torch.eye(len(one), dtype=one.dtype, device=one.device)[q] / engine.ranks.size
                share = one_hot[helpers.share(len(one_hot))]
                got = engine.back.vjp(one, parameters, share, beyond=f"influence {j}")
                reached = {name: t for name, t in zip(engine.wanted, got, strict=True) if t is not None}
                if helpers.size > 1:  # to some rank's share there may be nothing
                    reached = {name: reached.get(name, engine.products.zeros(name, len(share))) for name in rows}
                reached = helpers.joined(engine.ranks.sums(reached, purpose), len(one_hot), purpose)
                for name, second in reached.items():
                    rows[name] += torch.tensordot(d[j][engine.shard.rows(), q], second, 1)[:, None]

    def _right(self, engine: Engine, rows: dict[str, Tensor]) -> bool:
        """Whether a combination of the rows is what one double pass gives."""
        h, own = self._weighted(engine), engine.shard.rows()
        f = torch.zeros_like(h)
        f[own] = pattern(h.shape, h)[own]
        found = torch.autograd.grad(
            h, list(engine.wanted.values()), f, allow_unused=True, materialize_grads=True, retain_graph=True
        )
        got = engine.ranks.sum(found, "check")
        sums = engine.ranks.sum([torch.tensordot(f[own], values[:, 0], 1) for values in rows.values()], "check")
        size = max(float(g.abs().amax()) for g in got)
        floor = ROUNDING**2 * ulp(h.dtype) * size  # of a bias that a BatchNorm takes off again nothing else is left
        return all(
            float((s - g).abs().amax()) <= FORMULA[g.dtype] * float(g.abs().amax()) + floor
            for s, g in zip(sums, got, strict=True)
        )


def _once_only(error: Exception) -> RuntimeError:
    return RuntimeError(
        f"Influence gradients differentiate the backward pass, which an operation of this model or loss does not "
        f"allow: {error}"
    )


def _less_weighting(a: Tensor, d: Tensor, share: Tensor, received: Tensor) -> None:
    """From what a sample sends into the statistics to α, in place.

    α_v = a_v - s_n λ_v and α_mean = a_mean - s_n λ_mean - 2 λ_v d[n, mean], ``[n, 1, R]``, with λ = Σ_n a_n and n's
    share s_n of the rows; they sum to zero.
    """
    channels = a.shape[2] // 2
    a -= share.to(a)[:, None, None] * received
    a[:, 0, :channels] -= 2 * received[channels:] * d[:, :channels]
