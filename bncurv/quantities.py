"""What each quantity makes of V, block by block. One class per quantity.

A quantity is a specification (and, by `BackpropExtension`, something that BackPACK's context manager accepts): which
columns it wants pulled back (`sources`), what it does with a block of V (`add`), what it hands out (`finish`), and how
mini-batches combine (`merge`). Scales: what the loss' reduction puts into the gradient and into S (``engine.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from backpack.extensions.backprop_extension import BackpropExtension
from torch import Tensor, nn

from bncurv.engine import Mixed, Rows, Source, Squares
from bncurv.loss_at_batch import LossAtBatch

Result = dict[str, Tensor]
Parameters = Mapping[str, Tensor]


class Quantity(BackpropExtension):
    """Base class of all quantities.

    Attributes:
        field: attribute of parameters and of `Results` that receives the result.
        pulls: the columns pulled back, of ``"gradient"`` (∂L/∂F, one per sample) and ``"factor"`` (S).
        per_component: whether the result's leading axis is the sample; mini-batches are then concatenated.
        coupled_only: whether the coupled way must be taken.
        squares_only: whether `add` asks a block for ``sum_squares()`` alone; blocks may then be `Squares`, which are
            cheaper.
    """

    field: ClassVar[str]
    pulls: ClassVar[tuple[str, ...]] = ("factor",)
    per_component: ClassVar[bool] = False
    coupled_only: ClassVar[bool] = False
    squares_only: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__(self.field, {}, fail_mode="SILENT")
        self.runs = 0

    def expects_backpropagation_quantities(self) -> bool:
        """BackPACK need not propagate anything for us."""
        return False

    def __call__(self, module: nn.Module, g_inp: Any, g_out: Any) -> None:
        """BackPACK runs this on each of its extended modules; our work happens at the loss (``extension.py``)."""

    def begin(self, graph_survives: bool) -> None:
        """Called once before the mini-batches of a call; ``graph_survives``: whether their graphs outlive it."""

    def sources(self, at_batch: LossAtBatch, output: Tensor, parameters: Parameters) -> dict[str, Source | Mixed]:
        """The columns to pull back, by a key; what several quantities share has one key and is pulled once."""
        return {key: at_batch if key == "gradient" else at_batch.factor for key in self.pulls}

    def start(self, parameters: Parameters, samples: int, columns: dict[str, int]) -> Any:
        """Empty state for one mini-batch: zeros ``[*p]``, or ``[N, *p]`` per component.

        Args:
            parameters: parameters by name.
            samples: N.
            columns: columns per sample of each source.
        """
        return zeros(parameters, *((samples,) if self.per_component else ()))

    def add(self, state: Any, key: str, rows: Any) -> None:
        """Put one block of V (`Rows`; with ``squares_only`` also `Squares`), of the source ``key``, into the state."""
        raise NotImplementedError

    def finish(self, state: Any) -> dict[str, Any]:
        """Field name → result of one mini-batch."""
        return {self.field: state}

    def merge(self, batches: list[dict[str, Any]]) -> dict[str, Any]:
        """Average of mini-batch results; per-component ones are concatenated and divided by their number."""
        if len(batches) == 1:
            return batches[0]
        combine = torch.cat if self.per_component else sum
        return {
            field: {name: combine([b[field][name] for b in batches]) / len(batches) for name in batches[0][field]}
            for field in batches[0]
        }

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


def zeros(parameters: Parameters, *lead: int) -> Result:
    """Zeros ``[*lead, *p]`` for every parameter."""
    return {name: torch.zeros((*lead, *p.shape), dtype=p.dtype, device=p.device) for name, p in parameters.items()}


def _squares(values: Tensor, axes: int | tuple[int, ...]) -> Tensor:
    """Sum of squares over axes."""
    return values.square().sum(axes)


class ComponentGrad(Quantity):
    """Per-component gradients ``grad_component [N, *p]``: g_n = (∂F_n/∂θ)ᵀ ∂L/∂F_n, F_n = F_n(whole batch, θ).

    They sum to the gradient of the loss as reduced (a mean's 1/N is inside). With BatchNorm in training mode g_n is
    not the gradient of a loss of sample n alone, since F_n depends on the whole batch. Definition: Dangel (2021),
    "Structural implications of batch normalization".
    """

    field = "grad_component"
    pulls = ("gradient",)
    per_component = True

    def add(self, state: Result, key: str, rows: Rows) -> None:
        """g_n."""
        state[rows.name][rows.n] = rows.values[:, 0]


class ComponentL2Grad(Quantity):
    """Squared norms ``l2_component [N]`` of the per-component gradients, one per sample and parameter: ‖g_n‖²."""

    field = "l2_component"
    pulls = ("gradient",)
    per_component = True

    def start(self, parameters: Parameters, samples: int, columns: dict[str, int]) -> Result:
        """Zeros ``[N]``."""
        return {name: torch.zeros(samples, dtype=p.dtype, device=p.device) for name, p in parameters.items()}

    def add(self, state: Result, key: str, rows: Rows) -> None:
        """‖g_n‖²."""
        state[rows.name][rows.n] = _squares(rows.values.flatten(1), 1)

    def merge(self, batches: list[dict[str, Any]]) -> dict[str, Any]:
        """Concatenated; g_n carries 1/B over B mini-batches, its square 1/B²."""
        merged = super().merge(batches)
        return {f: {n: t / len(batches) for n, t in result.items()} for f, result in merged.items()}


class SumComponentGradSquared(Quantity):
    """Second moment ``sum_grad_squared [*p]``: Σ_n g_n², elementwise (BackPACK's SumGradSquared, with coupling)."""

    field = "sum_grad_squared"
    pulls = ("gradient",)
    squares_only = True

    def add(self, state: Result, key: str, rows: Rows | Squares) -> None:
        """Σ_n g_n²."""
        state[rows.name] += rows.sum_squares()


class ComponentVariance(Quantity):
    """Variance ``variance [*p]`` of the per-component gradients: mean_n g_n² - (mean_n g_n)², elementwise.

    BackPACK's scaling: g_n carries the loss' 1/N of a mean reduction, and the mean over n divides by N once more.
    Computed from centred blocks, so it is never negative and does not cancel. It is not the variance of mini-batch
    gradients: with BatchNorm the g_n depend on each other.
    """

    field = "variance"
    pulls = ("gradient",)

    def start(self, parameters: Parameters, samples: int, columns: dict[str, int]) -> Any:
        """Per parameter: count, mean, sum of squared deviations."""
        return {name: [0, mean, torch.zeros_like(mean)] for name, mean in zeros(parameters).items()}

    def add(self, state: Any, key: str, rows: Rows) -> None:
        """Merge two groups' moments (Chan, Golub & LeVeque 1983)."""
        count, mean, spread = state[rows.name]
        more = len(rows.values)
        new = rows.values.mean((0, 1))
        shift = new - mean
        spread = spread + _squares(rows.values - new, (0, 1)) + shift**2 * (count * more / (count + more))
        state[rows.name] = [count + more, mean + shift * (more / (count + more)), spread]

    def finish(self, state: Any) -> dict[str, Any]:
        """Divide by N."""
        return {self.field: {name: spread / count for name, (count, _, spread) in state.items()}}


class DiagGGNExact(Quantity):
    """Exact diagonal ``diag_ggn_exact [*p]`` of the GGN G = Jᵀ (∇²_F L) J = Σ_k V[k] V[k]ᵀ of the whole batch.

    J differentiates through the batch statistics. The scale is that of the loss (a mean's 1/N is inside), as in
    BackPACK's extension of the same name (Dangel, Kunstner & Hennig 2020, ICLR).
    """

    field = "diag_ggn_exact"
    squares_only = True

    def add(self, state: Result, key: str, rows: Rows | Squares) -> None:
        """Σ_k V[k]², never negative."""
        state[rows.name] += rows.sum_squares()


class ComponentDiagGGNExact(Quantity):
    """Diagonals ``diag_ggn_exact_component [N, *p]`` of the components' GGNs: Σ_c V[(n, c)]²; they sum to the diagonal.

    G_n = J_nᵀ (∇²_{F_n} L) J_n with J_n = ∂F_n(whole batch)/∂θ: it depends on all samples.
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
    """

    field = "sqrt_ggn_exact"

    def sources(self, at_batch: LossAtBatch, output: Tensor, parameters: Parameters) -> dict[str, Source | Mixed]:
        """The factor."""
        self._width = output[0].numel()
        return super().sources(at_batch, output, parameters)

    def start(self, parameters: Parameters, samples: int, columns: dict[str, int]) -> Result:
        """Zeros ``[C, N, *p]``."""
        return zeros(parameters, self._width, samples)

    def add(self, state: Result, key: str, rows: Rows) -> None:
        """V, columns first."""
        state[rows.name][rows.c, rows.n] = rows.values.transpose(0, 1)

    def merge(self, batches: list[dict[str, Any]]) -> dict[str, Any]:
        """Concatenated along the samples and divided by √B, so that V Vᵀ averages over B mini-batches."""
        scale = len(batches) ** -0.5
        return {
            field: {name: torch.cat([b[field][name] for b in batches], 1) * scale for name in batches[0][field]}
            for field in batches[0]
        }
