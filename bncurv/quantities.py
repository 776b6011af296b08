"""What each quantity makes of V, block by block. One class per quantity.

A quantity is a specification (and, by `BackpropExtension`, something BackPACK's context manager accepts). The engine
feeds its `add` with blocks of V; `merge` says how mini-batches combine. Scales: whatever the loss' reduction puts into
the gradient and into S (see ``engine.py``), nothing else.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from backpack.extensions.backprop_extension import BackpropExtension
from torch import Tensor, nn

from bncurv.engine import Rows


class Quantity(BackpropExtension):
    """Base class of all quantities.

    Attributes:
        field: attribute of parameters and of `Results` that receives the result.
        columns: what is pulled back, ``"gradient"`` (∂L/∂F, one column per sample) or ``"factor"`` (S).
        per_component: whether the result's leading axis is the sample; mini-batches are then concatenated.
    """

    field: ClassVar[str]
    columns: ClassVar[str] = "factor"
    per_component: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__(self.field, {}, fail_mode="SILENT")
        self.runs = 0

    def expects_backpropagation_quantities(self) -> bool:
        """BackPACK need not propagate anything for us."""
        return False

    def __call__(self, module: nn.Module, g_inp: Any, g_out: Any) -> None:
        """BackPACK runs this on each of its extended modules; bncurv's work happens at the loss (``api.py``)."""

    def start(self, parameters: dict[str, Tensor], samples: int, columns: int) -> dict[str, Tensor]:
        """Empty result for one mini-batch: zeros ``[*p]``, or ``[N, *p]`` per component."""
        lead = (samples,) if self.per_component else ()
        return {name: torch.zeros((*lead, *p.shape), dtype=p.dtype, device=p.device) for name, p in parameters.items()}

    def add(self, result: dict[str, Tensor], rows: Rows) -> None:
        """Put one block of V into the result."""
        raise NotImplementedError

    def deliver(self, result: dict[str, Tensor], parameters: dict[str, Tensor]) -> None:
        """Store the result where BackPACK's users look for it: ``parameter.<field>``."""
        for name, p in parameters.items():
            setattr(p, self.field, result[name])

    def withdraw(self, parameters: dict[str, Tensor]) -> None:
        """Take back what `deliver` stored."""
        for p in parameters.values():
            p.__dict__.pop(self.field, None)

    def merge(self, batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Average of mini-batch results; per-component ones are concatenated and divided by their number."""
        combine = torch.cat if self.per_component else sum
        return {name: combine([b[name] for b in batches]) / len(batches) for name in batches[0]}


class ComponentGrad(Quantity):
    """Per-component gradients ``grad_component [N, *p]``: g_n = (∂F_n/∂θ)ᵀ ∂L/∂F_n, F_n = F_n(whole batch, θ).

    They sum to the gradient of the loss as reduced (a mean's 1/N is inside). With BatchNorm in training mode g_n is
    not the gradient of a loss of sample n alone, since F_n depends on the whole batch. Definition: Dangel (2021),
    "Structural implications of batch normalization".
    """

    field = "grad_component"
    columns = "gradient"
    per_component = True

    def add(self, result: dict[str, Tensor], rows: Rows) -> None:
        """Store the block."""
        result[rows.name][rows.n] = rows.values[:, 0]


class DiagGGNExact(Quantity):
    """Exact diagonal ``diag_ggn_exact [*p]`` of the GGN G = Jᵀ (∇²_F L) J = Σ_k V[k] V[k]ᵀ of the whole batch.

    J differentiates through the batch statistics. The scale is that of the loss (a mean's 1/N is inside), as in
    BackPACK's extension of the same name (Dangel, Kunstner & Hennig 2020, ICLR).
    """

    field = "diag_ggn_exact"

    def add(self, result: dict[str, Tensor], rows: Rows) -> None:
        """Add the squares of the block: Σ_k V[k]², never negative."""
        flat = rows.values.flatten(0, 1)
        result[rows.name] += torch.linalg.vector_norm(flat, dim=0).square()
