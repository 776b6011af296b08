"""Influence gradients as quantities; ``weighting.py`` defines and computes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bncurv.blocks import Batch, Rows
from bncurv.frontier import graph_bytes
from bncurv.quantities import Parameters, Quantity, Result, entries
from bncurv.ranks import Ranks
from bncurv.weighting import Influence


class InfluenceGrad(Quantity):
    """Influence gradients ``grad_influence [N, *p]``: g_n = w_n ∂_{w_n} ∇_θ L(θ, w), statistics weighted too.

    They sum to the gradient of the loss as reduced (a mean's 1/N is inside), equal the per-sample gradients without
    BatchNorm, are N times closer than the per-component gradients to what leaving a sample out does to the gradient,
    and have the covariance of the true mini-batch gradient. Class weights' normaliser is held fixed. Over several
    mini-batches a sample is weighted within its own.

    Raises:
        RuntimeError: where samples are mixed by something else than BatchNorm, whose weighting is not known.
        TypeError: for layers given to `register_coupled`.
        ValueError: for a loss that compares samples.

    Example:
        >>> import torch, bncurv
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2))
        >>> X, y = torch.randn(8, 4), torch.randint(2, (8,))
        >>> res = bncurv.curvature(model, torch.nn.CrossEntropyLoss(), (X, y), bncurv.InfluenceGrad())
        >>> res.grad_influence["0.weight"].shape
        torch.Size([8, 3, 4])
    """

    field = "grad_influence"
    per_component = True

    def numbers(self, batch: Batch) -> int:
        """g_n, all rows that they are made from, and the graph of a backward pass."""
        return 2 * entries(batch) * batch.samples + 2 * graph_bytes(batch.output) // batch.output.element_size()

    def sources(self, batch: Batch) -> dict[str, Any]:
        """A way of its own."""
        return {"influence": Influence(batch)}

    def add(self, state: Result, key: str, rows: Rows) -> None:
        """g_n."""
        state[rows.name][rows.n] = rows.values[:, 0]


class InfluenceProjection(Quantity):
    """Influence gradients along one direction, ``influence_projection [N]``: g_n · v, all N for a few passes.

    With v the gradient of another loss it is how much more weight on sample n changes that loss per unit of a gradient
    step. ``Results.influence_projection``, or ``.result`` after ``backward()``.

    Args:
        direction: v by parameter name, ``[*p]`` each; parameters that it does not name count as zero. Default: the
            gradient of the loss itself, at each mini-batch; the projections then sum to its squared norm.

    Raises:
        ValueError: for a direction that does not fit the parameters; else as `InfluenceGrad`.

    Example:
        >>> import torch, bncurv
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2))
        >>> batch, loss_fn = (torch.randn(8, 4), torch.randint(2, (8,))), torch.nn.CrossEntropyLoss()
        >>> res = bncurv.curvature(model, loss_fn, batch, bncurv.InfluenceProjection())
        >>> loss_fn(model(batch[0]), batch[1]).backward()
        >>> squared = sum(p.grad.square().sum() for p in model.parameters())
        >>> torch.allclose(res.influence_projection.sum(), squared, rtol=1e-3, atol=1e-6)
        True
    """

    field = "influence_projection"

    def __init__(self, direction: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        self.direction = None if direction is None else dict(direction)
        self.result: Tensor | None = None

    @property
    def grows(self) -> bool:
        """Sample by sample."""
        return True

    def numbers(self, batch: Batch) -> int:
        """Two gradients, and the graphs of two backward passes."""
        return 2 * entries(batch) + 3 * graph_bytes(batch.output) // batch.output.element_size()

    def sources(self, batch: Batch) -> dict[str, Any]:
        """A way of its own."""
        direction = self.direction
        if direction is None:
            gradients = torch.autograd.grad(
                batch.output,
                list(batch.parameters.values()),
                batch.loss.gradient,
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
            total = batch.ranks.parts.sum(gradients, "gradient")
            direction = dict(zip(batch.parameters, total, strict=True))
        unknown = [name for name in direction if name not in batch.parameters]
        if unknown or not direction:
            raise ValueError(f"direction names {unknown or 'nothing'}; the parameters are {list(batch.parameters)}.")
        for name, v in direction.items():
            if v.shape != batch.parameters[name].shape:
                raise ValueError(
                    f"direction['{name}'] has shape {tuple(v.shape)}; expected the parameter's, "
                    f"{tuple(batch.parameters[name].shape)}."
                )
        return {f"influence along {id(self)}": Influence(batch, direction)}

    def start(self, batch: Batch) -> Tensor:
        """Zeros ``[N]``."""
        return batch.output.new_zeros(batch.samples)

    def add(self, state: Tensor, key: str, rows: Rows) -> None:
        """g_n · v."""
        state.copy_(rows.values)

    def reduce(self, part: Tensor, ranks: Ranks, sharing: int) -> Tensor:
        """They stay with their samples."""
        return part

    def merge(self, parts: Any, shares: Any) -> Tensor:
        """Concatenated, each times its mini-batch's share."""
        return torch.cat([share * part for part, share in zip(parts, shares, strict=True)])

    def deliver(self, fields: dict[str, Any], parameters: Parameters) -> None:
        """Keep the result on this object."""
        self.result = fields[self.field]

    def withdraw(self, parameters: Parameters) -> None:
        """Forget it."""
        self.result = None
