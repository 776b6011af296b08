"""The quantity that collects V (or the network's graph) and makes a `LowRank` of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from bncurv.engine import Mixed, Rows, Source
from bncurv.loss_at_batch import LossAtBatch
from bncurv.lowrank import LowRank
from bncurv.operator import BatchOperator, MatrixFreeGGN
from bncurv.quantities import Parameters, Quantity

SMALL_BYTES = 32 * 2**20  # V of this size is cheaper than working through the graph


class LowRankGGN(Quantity):
    """The GGN as a `LowRank` object: ``quantity.result`` after ``backward()``, ``Results.ggn`` of `curvature`.

    Over several mini-batches it is the mean of their GGNs (each has its own batch statistics, so the composition of the
    batches is part of the definition).

    Args:
        top: only so many leading eigenpairs (by Lanczos iterations); default: the whole spectrum.
        groups: ``None``: one GGN of all parameters. ``"layer"``: one per module. A mapping: one per named group of
            parameter names. With groups the result is a dict ``{group: LowRank}``, all from one pass.
        memory: most bytes for V (N·C·D numbers) of a mini-batch.
        matrix_free: with ``top``: work through the network's graph instead of V (`MatrixFreeGGN`), without trace,
            log-determinant and samples. Default: so where V is larger than 32 MiB, because it is then faster and
            smaller; but not with groups, nor in BackPACK's gesture, where the graph is gone after ``backward()``.
    """

    field = "ggn"
    pulls = ("factor", "gradient")

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
        self._free: bool | None = None
        self._result: Any = None

    @property
    def result(self) -> Any:
        """The `LowRank` (or dict of them) of the last backward pass inside ``with backpack(...)``."""
        if self._result is None:
            raise RuntimeError(
                "LowRankGGN has no result yet: run loss.backward() of an extended model and loss inside "
                "'with backpack(ggn)', or use Results.ggn of bncurv.curvature."
            )
        return self._result

    def begin(self, graph_survives: bool) -> None:
        """Decide as far as possible whether to work matrix-free; the first mini-batch's size decides the rest."""
        able = self.top is not None and self.groups is None and graph_survives
        self._free = self.matrix_free if self.matrix_free is not None or able else False

    def sources(self, at_batch: LossAtBatch, output: Tensor, parameters: Parameters) -> dict[str, Source | Mixed]:
        """The factor; the gradient too where it is no combination of the factor's columns; nothing if matrix-free."""
        entries = sum(p.numel() * p.element_size() for p in parameters.values())
        need = entries * len(output) * (at_batch.factor.columns_per_sample + 1)
        if self._free is None:
            self._free = need > SMALL_BYTES
        if not self._free and need > self.memory:
            raise ValueError(
                f"LowRankGGN needs {need / 2**30:.1f} GiB for V (N={len(output)}, {at_batch.factor.columns_per_sample} "
                f"columns per sample, {sum(p.numel() for p in parameters.values())} parameters), more than "
                f"memory={self.memory / 2**30:.1f} GiB. Use LowRankGGN(top=k, matrix_free=True), fewer samples or "
                "parameters (params=...), or raise memory=."
            )
        self._weights = None if self._free else gradient_weights(at_batch)
        self._operator = BatchOperator(output, at_batch, parameters) if self._free else None
        if self._free:
            return {}
        sources = super().sources(at_batch, output, parameters)
        return sources if self._weights is None else {"factor": sources["factor"]}

    def start(self, parameters: Parameters, samples: int, columns: dict[str, int]) -> Any:
        """Empty V ``[N, C, *p]`` and gradients ``[N, *p]``."""
        keys = [] if self._free else ["factor"] if self._weights is not None else list(self.pulls)
        return {
            key: {
                n: torch.empty((samples, columns[key], *p.shape), dtype=p.dtype, device=p.device)
                for n, p in parameters.items()
            }
            for key in keys
        }

    def add(self, state: Any, key: str, rows: Rows) -> None:
        """V[k] and g_n."""
        state[key][rows.name][rows.n, rows.c] = rows.values

    def finish(self, state: Any) -> dict[str, Any]:
        """Rows of V (or the operator), and the per-component gradients; `merge` makes the result of them."""
        operator, self._operator = self._operator, None
        if operator is not None:
            return {self.field: (operator, {})}
        gradients: Mapping[str, Tensor]
        if self._weights is None:
            gradients = {name: g[:, 0] for name, g in state["gradient"].items()}
        else:
            gradients = WeightedRows(self._weights, state["factor"])
        return {self.field: ({name: v.flatten(0, 1) for name, v in state["factor"].items()}, gradients)}

    def merge(self, batches: list[dict[str, Any]]) -> dict[str, Any]:
        """Mean of GGNs: rows of V concatenated and divided by √B, gradients by B."""
        count, (rows, gradients) = len(batches), zip(*(b[self.field] for b in batches), strict=True)
        if isinstance(rows[0], BatchOperator):
            assert self.top is not None  # matrix-free only with top
            return {self.field: MatrixFreeGGN(list(rows), self.top)}
        if count == 1:
            return {self.field: self._assemble(rows[0], gradients[0])}
        scaled = {n: torch.cat([r[n] for r in rows]) * count**-0.5 for n in rows[0]}
        mean = {n: torch.cat([g[n] for g in gradients]) / count for n in rows[0]}
        return {self.field: self._assemble(scaled, mean)}

    def _assemble(self, rows: dict[str, Tensor], gradients: Mapping[str, Tensor]) -> Any:
        if self.groups is None:
            return LowRank(rows, gradients, self.top)
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
        return {group: LowRank({n: rows[n] for n in names}, gradients, self.top) for group, names in groups.items()}

    def deliver(self, fields: dict[str, Any], parameters: Parameters) -> None:
        """Keep the result on this object."""
        if isinstance(fields[self.field][0], BatchOperator):
            raise ValueError(
                "LowRankGGN(matrix_free=True) needs the network's graph, which backward() frees; use "
                "bncurv.curvature(...), or matrix_free=False inside 'with backpack(...)'."
            )
        self._result = self.merge([fields])[self.field]

    def withdraw(self, parameters: Parameters) -> None:
        """Forget it."""
        self._result = None


class WeightedRows(Mapping[str, Tensor]):
    """Per-component gradients ``{name: [N, *p]}`` as weighted rows of V, computed when asked for."""

    def __init__(self, weights: Tensor, rows: dict[str, Tensor]) -> None:
        self._weights, self._rows = weights, rows

    def __getitem__(self, name: str) -> Tensor:
        return torch.einsum("nc,nc...->n...", self._weights, self._rows[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


def gradient_weights(at_batch: LossAtBatch) -> Tensor | None:
    """Weights ``[n, c]`` with ∂L/∂F_n = Σ_c w[n, c] s_(n, c), so that g_n = Σ_c w[n, c] V[(n, c)] needs no pass.

    ``None`` where the gradient is not in the range of the factor (a saturated output in finite precision).
    """
    blocks = at_batch.factor.blocks.double()  # [n, t, e, j]
    n, t, e, _ = blocks.shape
    gradient = at_batch.gradient.reshape(n, e, t).mT.double()[..., None]
    if blocks.shape[-1] == 0:
        return None
    weights = torch.linalg.lstsq(blocks, gradient).solution
    error = (blocks @ weights - gradient).norm()
    good = error <= 1e3 * torch.finfo(at_batch.gradient.dtype).eps * gradient.norm() and bool(weights.isfinite().all())
    return weights.reshape(n, -1).to(at_batch.gradient.dtype) if good else None
