"""What is pulled back and what comes out: a batch, sources of columns, blocks of V (letters: ``engine.py``)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from bncurv.graph import Trace
from bncurv.loss_at_batch import LossAtBatch
from bncurv.ranks import ALONE, Ranks
from bncurv.spread import Shard, whole


@dataclass(frozen=True)
class Batch:
    """One recorded forward pass with its loss.

    Attributes:
        output: the model's output ``[N, ...]`` on its graph.
        loss: gradient and Hessian factor of the loss there.
        parameters: those asked for, by name.
        trace: what the forward pass left on the graph.
        graph_survives: whether the graph outlives the call.
        memo: lives as long as the call: what the first mini-batch decides for all.
        generator: random numbers of the call, for quantities without a generator of their own (``None``: torch's
            global ones).
        ranks: those that share batch statistics; ``ranks.everybody``: those whose samples make the loss.
        spread: which samples of the batch are here; ``None``: all.
        memory: most bytes of the whole call.
        kinds: makes a list of the modules that the parameters belong to: their names and types, by parameter name.
        reads: makes a list of what the graph may read when it is run backward, by what a message calls it.
        kept: what was computed at this batch and serves again; ``None``: nothing is kept.
    """

    output: Tensor
    loss: LossAtBatch
    parameters: Mapping[str, Tensor]
    trace: Trace
    graph_survives: bool = True
    memo: dict[str, Any] = field(default_factory=dict)
    generator: torch.Generator | None = None
    reads: Callable[[], Mapping[str, Tensor]] = dict
    ranks: Ranks = ALONE
    spread: Shard | None = None
    kinds: Callable[[], Mapping[str, tuple[str, str]]] = dict
    kept: dict[Any, Any] | None = None
    memory: int | None = None

    @property
    def samples(self) -> int:
        """N; of several ranks, those of this one."""
        return self.shard.own

    @property
    def shard(self) -> Shard:
        """Which samples of the batch they are."""
        return self.spread or whole(len(self.output))


class Source(Protocol):
    """Columns to pull back: ``columns_per_sample`` of them for each sample."""

    @property
    def columns_per_sample(self) -> int:
        """Number of columns of each sample."""
        ...

    def columns(self, c: slice) -> Tensor:
        """Columns ``c`` of all samples, each in its own row: ``[c, n, *output]``."""
        ...

    def mixture(self) -> Tensor:
        """Σ_c w[n, c] s_(n, c) with fixed weights without a visible order, ``[n, *output]``."""
        ...


@dataclass(frozen=True)
class WholeBatch:
    """Cotangents of the whole batch to pull back, ``[q, n, *output]``; their rows come as one block ``[1, q, *p]``."""

    cotangents: Tensor


@dataclass(frozen=True)
class Correction:
    """Σ_q A[q, k] P[q] for one parameter.

    The statistics of the BatchNorm directly above a layer's output are a special case: the parameters of channel o feel
    the statistics of channel o only, so that their P is kept per channel. Of its two moments the mean drops out where
    the layer's input is centred (`Products.centred`).

    Attributes:
        A: coefficients ``[n, c, R]`` (``None``: none).
        P: directions ``[R, *p]``.
        direct: pairs of coefficients ``[n, c, moment, o]`` and directions ``[moment, *p]``, o the parameter's axis 0.
    """

    A: Tensor | None = None
    P: Tensor | None = None
    direct: tuple[tuple[Tensor, Tensor], ...] = ()

    def add_to(self, rows: Tensor, n: slice) -> None:
        """Add the correction of the samples ``n`` to their rows ``[n, c, *p]``."""
        if not len(rows):
            return
        if self.A is not None and self.P is not None:
            flat = rows.view(rows.shape[0] * rows.shape[1], -1)
            flat.addmm_(self.A[n].flatten(0, 1), self.P.reshape(len(self.P), -1))
        for a, p in self.direct:
            by_channel = rows.view(*rows.shape[:2], p.shape[1], -1)
            for moment in range(len(p)):
                by_channel.addcmul_(a[n, :, moment, :, None], p[moment].reshape(p.shape[1], -1))

    def of(self, n: slice) -> Correction:
        """That of the samples ``n``."""
        return Correction(None if self.A is None else self.A[n], self.P, tuple((a[n], p) for a, p in self.direct))

    def summed(self, like: Tensor) -> Tensor:
        """Summed over samples and columns, ``[*p]`` as ``like``."""
        total = torch.zeros_like(like)
        if self.A is not None and self.P is not None:
            total += torch.tensordot(self.A.sum((0, 1)), self.P, 1)
        for a, p in self.direct:
            by_channel = a.sum((0, 1))  # [moment, o]
            total += (by_channel.view(*by_channel.shape, *(1,) * (p.dim() - 2)) * p).sum(0)
        return total

    def dense(self) -> tuple[Tensor, Tensor] | None:
        """All of it as one pair ``A [n, c, R]``, ``P [R, p]``; ``None`` if there is nothing."""
        pairs = [] if self.A is None or self.P is None else [(self.A, self.P.reshape(len(self.P), -1))]
        for a, p in self.direct:
            eye = torch.eye(p.shape[1], dtype=p.dtype, device=p.device)
            spread = torch.einsum("moi,oc->mcoi", p.reshape(*p.shape[:2], -1), eye)
            pairs.append((a.flatten(2), spread.flatten(0, 1).flatten(1)))
        if not pairs:
            return None
        return torch.cat([a for a, _ in pairs], -1), torch.cat([p for _, p in pairs])


class Rows(NamedTuple):
    """A block of V: ``values [n, c, *p]`` of parameter ``name`` for the samples ``n`` and columns ``c``.

    In the coupled way also the correction that went into it and, where the engine keeps it, the squared norm of the own
    part.
    """

    name: str
    values: Tensor
    n: slice
    c: slice
    own: Tensor | None = None
    correction: Correction | None = None

    def sum_squares(self) -> Tensor:
        """Σ_(n, c) V², ``[*p]``."""
        return self.values.square().sum((0, 1))


class Squares(NamedTuple):
    """Σ_(n, c) V² ``[*p]`` of parameter ``name`` over all samples and some columns, for who needs no more of V."""

    name: str
    values: Tensor

    def sum_squares(self) -> Tensor:
        """Themselves."""
        return self.values
