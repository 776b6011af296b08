"""The quantity that collects V (or the network's graph) and makes a `LowRank` of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bncurv.blocks import Batch, Rows, Source, WholeBatch
from bncurv.budget import USUAL
from bncurv.frontier import graph_bytes
from bncurv.lowrank import BatchOperator, LowRank, MatrixFreeGGN
from bncurv.lowrank.rows import OF_NONE
from bncurv.quantities import Parameters, Quantity, combine, entries
from bncurv.ranks import Ranks


class _Collected(NamedTuple):
    """State of a mini-batch: its operator; or weights of V's rows in g_n, where known, blocks by source, first n."""

    operator: BatchOperator | None
    weights: Tensor | None = None
    blocks: Mapping[str, dict[str, Tensor]] = {}
    first: int = 0


class _Operators(NamedTuple):
    """G = Σ share · operator."""

    operators: list[BatchOperator]
    shares: list[float]


class _Factor(NamedTuple):
    """Rows of V by parameter name, the sample of each, and weights of the rows in g_n; or g_n itself by name."""

    rows: dict[str, Tensor]
    samples: Tensor
    weights: Tensor | None
    gradients: dict[str, Tensor]

    @property
    def number(self) -> int:
        """N; 0 where they have no rows."""
        return int(self.samples[-1]) + 1 if len(self.samples) else 0

    def by_component(self) -> dict[str, Tensor]:
        """Per-component gradients ``{name: [N, *p]}``."""
        if self.weights is None:
            return self.gradients
        zeros = {name: r.new_zeros(int(self.samples[-1]) + 1, *r.shape[1:]) for name, r in self.rows.items()}
        return {
            name: zeros[name].index_add_(0, self.samples, self.weights.view(-1, *[1] * (r.dim() - 1)) * r)
            for name, r in self.rows.items()
        }


class LowRankGGN(Quantity):
    """The GGN as a `LowRank` object: ``quantity.result`` after ``backward()``, ``Results.ggn`` of `curvature`.

    Over several mini-batches it is the weighted mean, or the sum, of their GGNs (each has its own batch statistics, so
    the composition of the batches is part of the definition).

    Args:
        top: only so many leading eigenpairs (by Lanczos iterations); default: the whole spectrum.
        groups: ``None``: one GGN of all parameters. ``"layer"``: one per module. A mapping: one per named group of
            parameter names. With groups the result is a dict ``{group: LowRank}``, all from one pass.
        memory: most bytes for V (N·C·D numbers) of a mini-batch.
        matrix_free: with ``top``: work through the network's graph instead of V (`MatrixFreeGGN`), without trace,
            log-determinant and samples. Default: so where V is larger than 32 MiB, because it is then faster and
            smaller; but not with groups, nor in BackPACK's gesture, where the graph is gone after ``backward()``.

    Example:
        >>> import torch, bncurv
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2))
        >>> batch, loss_fn = (torch.randn(8, 4), torch.randint(2, (8,))), torch.nn.CrossEntropyLoss()
        >>> res = bncurv.curvature(model, loss_fn, batch, bncurv.LowRankGGN())
        >>> res.ggn.eigenvalues.shape == (res.ggn.rank,)  # largest first
        True
        >>> layers = bncurv.curvature(model, loss_fn, batch, bncurv.LowRankGGN(groups="layer")).ggn
        >>> sorted(layers)
        ['0', '1', '2']
    """

    field = "ggn"
    wants = ("factor", "gradient")

    def __init__(
        self,
        top: int | None = None,
        groups: str | Mapping[str, Iterable[str]] | None = None,
        memory: float = 4 * 2**30,
        matrix_free: bool | None = None,
    ) -> None:
        super().__init__()
        if top is not None and (not isinstance(top, int) or top < 1):
            raise ValueError(f"top={top!r}; expected a positive integer or None.")
        if not (groups is None or groups == "layer" or isinstance(groups, Mapping)):
            raise ValueError(f"groups={groups!r}; expected None, 'layer', or a mapping from group to parameter names.")
        if matrix_free and (top is None or groups is not None):
            raise ValueError(
                "matrix_free=True needs top=k, and has no groups; pass LowRankGGN(top=10, matrix_free=True)."
            )
        self.top, self.groups, self.memory, self.matrix_free = top, groups, memory, matrix_free
        self._result: Any = None  # delivered by BackPACK's gesture

    @property
    def result(self) -> Any:
        """The `LowRank` (or dict of them) of the last backward pass inside ``with backpack(...)``.

        Example:
            >>> from backpack import backpack
            >>> model, loss_fn = bncurv.extend(model), bncurv.extend(loss_fn)
            >>> with backpack(quantity := bncurv.LowRankGGN()):
            ...     loss_fn(model(batch[0]), batch[1]).backward()
            >>> quantity.result.dim
            29
        """
        if self._result is None:
            raise RuntimeError(
                "LowRankGGN has no result yet: run loss.backward() of an extended model and loss inside "
                "'with backpack(ggn)', or use Results.ggn of bncurv.curvature."
            )
        return self._result

    def sources(self, batch: Batch) -> dict[str, Source | WholeBatch]:
        """The factor; the gradient too where it is no combination of the factor's columns; nothing if matrix-free."""
        if self._works_free(batch):
            return {}
        if batch.loss.whole is not None:
            return {"factor": WholeBatch(batch.loss.whole.columns), "gradient": batch.loss}
        sources = super().sources(batch)
        return sources if batch.loss.weights is None else {"factor": sources["factor"]}

    @property
    def grows(self) -> bool:
        """Rows of V, or graphs."""
        return True

    def numbers(self, batch: Batch) -> int:
        """V and g_n; or the operator."""
        if self._works_free(batch):
            return self._operator_numbers(batch)
        whole = batch.loss.whole
        rows = len(whole.columns) if whole is not None else batch.samples * batch.loss.factor.columns_per_sample
        return entries(batch) * (rows + (batch.samples if whole is not None or batch.loss.weights is None else 0))

    def _operator_numbers(self, batch: Batch) -> int:
        """The graph, that of its backward pass (twice differentiable), Lanczos vectors and eigenvectors."""
        vectors = max(2 * (self.top or 0) + 1, 20) + 3 * (self.top or 0) + 8
        return 4 * graph_bytes(batch.output) // batch.output.element_size() + vectors * entries(batch)

    def _works_free(self, batch: Batch) -> bool:
        """Whether to work matrix-free: decided by the first mini-batch. Refuses a V that does not fit."""
        whole, free, several = batch.loss.whole, self.matrix_free, batch.ranks.everybody.size > 1
        samples = batch.shard.everywhere
        rows = len(whole.columns) if whole is not None else samples * batch.loss.factor.columns_per_sample
        need = sum(p.numel() * p.element_size() for p in batch.parameters.values()) * (rows + samples)
        if several and whole is not None:
            raise ValueError(f"LowRankGGN works on one process, and not over several, where {batch.loss.compares}")
        if free and whole is not None:
            raise ValueError(f"LowRankGGN(matrix_free=True) goes by samples, but {batch.loss.compares}")
        if free and not batch.graph_survives:
            raise ValueError(
                "LowRankGGN(matrix_free=True) needs the network's graph, which backward() frees; use "
                "bncurv.curvature(...), or matrix_free=False inside 'with backpack(...)'."
            )
        if free is None:
            able = whole is None and self.top is not None and self.groups is None and batch.graph_survives
            free = batch.memo.setdefault(self.field, able and self._better_free(batch, need))
        if not free and need > max(self.memory, batch.memory or 0):  # what the call may hold is seen to elsewhere
            raise ValueError(
                f"LowRankGGN needs {need / 2**30:.1f} GiB for V (N={samples}, {rows // samples} "
                f"columns per sample, {sum(p.numel() for p in batch.parameters.values())} parameters), more than "
                f"memory={self.memory / 2**30:.1f} GiB. Use LowRankGGN(top=k, matrix_free=True), fewer samples or "
                "parameters (params=...), or raise memory=."
            )
        return bool(free)

    def _better_free(self, batch: Batch, need: int) -> bool:
        """Whether the network's graph is faster than a V of so many bytes; or, of what there is, smaller by far."""
        small = USUAL.small
        if batch.memory is None or need <= min(small, batch.memory // 4):
            return need > small
        numbers = self._operator_numbers(batch)
        return max(batch.ranks.everybody.numbers(numbers)) * batch.output.element_size() < need

    def start(self, batch: Batch) -> _Collected:
        """Empty V ``[N, C, *p]`` and gradients ``[N, *p]``; or the operator of the mini-batch."""
        if self._works_free(batch):
            return _Collected(BatchOperator(batch))

        def empty(*lead: int) -> dict[str, Tensor]:
            return {
                name: torch.empty((*lead, *p.shape), dtype=p.dtype, device=p.device)
                for name, p in batch.parameters.items()
            }

        if batch.loss.whole is not None:  # rows of no sample
            V, gradients = empty(1, len(batch.loss.whole.columns)), empty(batch.samples, 1)
            return _Collected(None, None, {"factor": V, "gradient": gradients}, OF_NONE)
        V = empty(batch.samples, batch.loss.factor.columns_per_sample)
        gradients = empty(batch.samples, 1 if batch.loss.weights is None else 0)
        weights = None if batch.loss.weights is None else batch.loss.weights[batch.shard.rows()]
        return _Collected(None, weights, {"factor": V, "gradient": gradients})

    def add(self, state: _Collected, key: str, rows: Rows) -> None:
        """V[k] and g_n."""
        state.blocks[key][rows.name][rows.n, rows.c] = rows.values

    def finish(self, state: _Collected) -> _Operators | _Factor:
        """The operator; or rows of V and the per-component gradients."""
        if state.operator is not None:
            return _Operators([state.operator], [1.0])
        V = state.blocks["factor"]
        n, c = next(iter(V.values())).shape[:2]
        samples = state.first + torch.arange(n, device=next(iter(V.values())).device).repeat_interleave(c)
        weights = None if state.weights is None else state.weights.flatten()
        gradients = {} if weights is not None else {name: g[:, 0] for name, g in state.blocks["gradient"].items()}
        return _Factor({name: v.flatten(0, 1) for name, v in V.items()}, samples, weights, gradients)

    def reduce(self, part: _Operators | _Factor, ranks: Ranks, sharing: int) -> _Operators | _Factor:
        """V of all samples, on every rank: whatever is asked of it later needs no message."""
        if ranks.size == 1 or isinstance(part, _Operators):
            return part
        counts = [int(n) for n in ranks.numbers(part.number)]
        samples = ranks.rows(part.samples + sum(counts[: ranks.rank]), "V")
        weights = None if part.weights is None else ranks.rows(part.weights, "V")
        rows, gradients = (
            {name: ranks.rows(t, "V") for name, t in some.items()} for some in (part.rows, part.gradients)
        )
        return _Factor(rows, samples, weights, gradients)

    def merge(self, parts: Sequence[Any], shares: Sequence[float]) -> _Operators | _Factor:
        """Σ_b share_b G_b: rows of V concatenated times √share, gradients times their share."""
        if isinstance(parts[0], _Operators):
            return _Operators(
                [op for part in parts for op in part.operators],
                [share * s for part, share in zip(parts, shares, strict=True) for s in part.shares],
            )
        roots = [share**0.5 for share in shares]
        rows = combine([part.rows for part in parts], roots, 0)
        counts = [0, *(part.number for part in parts)]
        samples = torch.cat([part.samples + sum(counts[: i + 1]) for i, part in enumerate(parts)])
        # share g_n = Σ_k √share w[k] · √share V[k]
        weights = [root * part.weights for root, part in zip(roots, parts, strict=True) if part.weights is not None]
        if len(weights) == len(parts):
            return _Factor(rows, samples, torch.cat(weights), {})
        return _Factor(rows, samples, None, combine([part.by_component() for part in parts], shares, 0))

    def fields(self, part: Any) -> dict[str, Any]:
        """`LowRank`, one per group where there are groups, or `MatrixFreeGGN`."""
        if isinstance(part, _Operators):
            assert self.top is not None  # matrix-free only with top
            return {self.field: MatrixFreeGGN(part.operators, self.top, part.shares)}
        return {self.field: self._assemble(part)}

    def _assemble(self, part: _Factor) -> Any:
        rows, gradients = part.rows, part.gradients if part.weights is None else part.weights
        if self.groups is None:
            return LowRank(rows, gradients, self.top, part.samples)
        groups: dict[str, list[str]] = {}
        if isinstance(self.groups, Mapping):
            groups = {group: list(names) for group, names in self.groups.items()}
        else:
            for name in rows:
                groups.setdefault(name.rpartition(".")[0], []).append(name)
        for group, names in groups.items():
            unknown = [n for n in names if n not in rows]
            if unknown or not names:
                raise ValueError(f"group '{group}' names {unknown or 'nothing'}; the parameters are {list(rows)}.")
        return {
            group: LowRank({n: rows[n] for n in names}, gradients, self.top, part.samples)
            for group, names in groups.items()
        }

    def deliver(self, fields: dict[str, Any], parameters: Parameters) -> None:
        """Keep the result on this object."""
        self._result = fields[self.field]

    def withdraw(self, parameters: Parameters) -> None:
        """Forget it."""
        self._result = None
