"""The coupling report: how much of the curvature runs through the batch statistics, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bncurv.blocks import Batch, Rows
from bncurv.quantities import Quantity
from bncurv.ranks import Ranks
from bncurv.structure import Structure


@dataclass(eq=False, repr=False)
class LayerCoupling:
    """One layer's share.

    Attributes:
        own_trace: trace of the GGN with the batch statistics held constant, what a per-sample tool would give.
        full_trace: trace of the exact GGN.
        directions: number of statistics above the layer, through which its parameters couple samples (R).

    Example:
        >>> import torch, bncurv
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2))
        >>> batch, loss_fn = (torch.randn(8, 4), torch.randint(2, (8,))), torch.nn.CrossEntropyLoss()
        >>> res = bncurv.curvature(model, loss_fn, batch, bncurv.CouplingReport(), method="coupled")
        >>> layer = res.coupling["0"]
        >>> layer.directions
        6
    """

    own_trace: float
    full_trace: float
    directions: int
    _AA: Tensor
    _PP: Tensor

    def __repr__(self) -> str:
        return f"LayerCoupling(own_trace={self.own_trace:.3g}, full_trace={self.full_trace:.3g}, R={self.directions})"

    def scalars(self) -> dict[str, float]:
        """The two traces, for a logger.

        Example:
            >>> sorted(layer.scalars())
            ['full_trace', 'own_trace']
        """
        return {"own_trace": self.own_trace, "full_trace": self.full_trace}

    def to_dict(self) -> dict[str, Any]:
        """Numbers and the singular values.

        Example:
            >>> sorted(layer.to_dict())
            ['directions', 'full_trace', 'own_trace', 'singular_values']
        """
        return {**self.scalars(), "directions": self.directions, "singular_values": self.singular_values}

    @cached_property
    def singular_values(self) -> Tensor:
        """Singular values of the correction V - own = A P, descending.

        Example:
            >>> bool((layer.singular_values.diff() <= 0).all())
            True
        """
        # (A P)(A P)ᵀ has the non-zero eigenvalues of (AᵀA)^½ P Pᵀ (AᵀA)^½
        values, vectors = torch.linalg.eigh(self._AA)
        root = vectors * values.clamp(min=0).sqrt()
        return torch.linalg.eigvalsh(root.T @ self._PP @ root).clamp(min=0).sqrt().flip(0)


class CouplingReport(Quantity):
    """Coupling per layer, ``{module name: LayerCoupling}``: ``Results.coupling``, or ``.result`` after ``backward()``.

    Needs the coupled way. Over several mini-batches the report is that of the first.

    Example:
        >>> import torch, bncurv
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2))
        >>> batch, loss_fn = (torch.randn(8, 4), torch.randint(2, (8,))), torch.nn.CrossEntropyLoss()
        >>> res = bncurv.curvature(model, loss_fn, batch, bncurv.CouplingReport(), method="coupled")
        >>> {name: layer.directions for name, layer in res.coupling.items()}
        {'0': 6, '1': 0, '2': 0}
    """

    field = "coupling"
    coupled_only = True

    def __init__(self) -> None:
        super().__init__()
        self.result: dict[str, LayerCoupling] = {}

    def numbers(self, batch: Batch) -> int:
        """AᵀA and P of all parameters in float64, the largest ones as they are made too."""
        structure, held = Structure(batch.trace, batch.parameters), [0]
        for name, p in batch.parameters.items():
            directions = structure.entries[name] + 2 * p.shape[:1].numel()
            held.append(directions * (2 * directions + p.numel()))
        return (sum(held) + 4 * max(held)) * 8 // batch.output.element_size()

    def start(self, batch: Batch) -> Any:
        """Per parameter: own and full trace, AᵀA, P."""
        return {name: {"own": 0.0, "full": 0.0, "AA": 0.0, "P": None} for name in batch.parameters}

    def add(self, state: Any, key: str, rows: Rows) -> None:
        """Squared norms before and after the correction."""
        sums = state[rows.name]
        full = torch.linalg.vector_norm(rows.values).square()
        sums["full"] = sums["full"] + full
        sums["own"] = sums["own"] + (full if rows.own is None else rows.own)
        pair = rows.correction and rows.correction.dense()
        if pair:
            A = pair[0][rows.n].flatten(0, 1).double()
            sums["AA"] = sums["AA"] + A.T @ A
            sums["P"] = pair[1].double()

    def finish(self, state: Any) -> dict[str, LayerCoupling]:
        """Parameters of a module together; they share its couplings."""
        layers: dict[str, list[dict[str, Any]]] = {}
        for name, sums in state.items():
            layers.setdefault(name.rpartition(".")[0], []).append(sums)
        return {layer: self._layer(parts) for layer, parts in layers.items()}

    def _layer(self, parts: list[dict[str, Any]]) -> LayerCoupling:
        own, full = (float(sum(p[key] for p in parts)) for key in ("own", "full"))
        coupled = [p for p in parts if p["P"] is not None]
        if not coupled:
            nothing = torch.zeros(0, 0, dtype=torch.float64, device="cpu")
            return LayerCoupling(own, full, 0, nothing, nothing)
        size = max(len(p["P"]) for p in coupled)
        flat = [p["P"] for p in coupled if len(p["P"]) == size]
        AA = next(p["AA"] for p in coupled if len(p["P"]) == size)
        return LayerCoupling(own, full, size, AA, sum(P @ P.T for P in flat))

    def reduce(self, part: dict[str, LayerCoupling], ranks: Ranks, sharing: int) -> dict[str, LayerCoupling]:
        """Traces and AᵀA of all ranks' components together; P is the same on those that share statistics."""
        if ranks.size == 1:
            return part
        traces = torch.tensor([[c.own_trace, c.full_trace] for c in part.values()], dtype=torch.float64)
        device = next((c._AA.device for c in part.values() if c.directions), traces.device)
        own, full = ranks.sum([traces.to(device)], "results")[0].T.tolist()
        gram = ranks.sum([c._AA.to(device) for c in part.values()], "results")
        return {
            layer: LayerCoupling(own[i], full[i], c.directions, gram[i], c._PP)
            for i, (layer, c) in enumerate(part.items())
        }

    def merge(self, parts: Sequence[dict[str, LayerCoupling]], shares: Sequence[float]) -> dict[str, LayerCoupling]:
        """The first mini-batch's report."""
        return parts[0]

    def deliver(self, fields: dict[str, Any], parameters: Mapping[str, Tensor]) -> None:
        """Keep the report on this object."""
        self.result = fields[self.field]

    def withdraw(self, parameters: Mapping[str, Tensor]) -> None:
        """Forget it."""
        self.result = {}
