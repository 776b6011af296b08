"""START HERE. The cut: a train-mode BatchNorm as batch statistics + a per-sample map, with a gate between.

A layer that couples the samples of a batch is two steps, ``stats = stats(x)`` over the whole batch and then a
*per-sample* map ``y_n = apply(x_n, stats)``. The gate between them decides what backpropagation sees:

    open     the whole layer, ``y = apply(x, stats(x))`` (the truth; also what ``loss.backward()`` sees)
    closed   the statistics held constant: nothing flows from one sample to another; what would have flowed
             into the statistics is read off per sample instead (`Coupling.per_sample`: the coefficients A).

``statistics`` itself is a node of the graph, so that d statistics / d θ (P) is an ordinary backward pass from there.
The general pair is in this module (`couple`, `register_coupled`). BatchNorm is built in, fused (``batchnorm.py``): its
forward and open backward are PyTorch's own kernels, to the bit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bncurv.order import Order, summed
from bncurv.precision import FORMULA
from bncurv.probes import pattern


class Gates:
    """All gates of one forward pass, open unless bncurv closes them.

    Attributes:
        closed: whether nothing flows into the statistics.
        sums: while closed, whether the fused layers also sum up over the batch what their parameters and statistics
            would receive (at the parameters and at `Coupling.handle`).
    """

    def __init__(self) -> None:
        self.open()

    def open(self) -> None:
        """As the user's own passes see them."""
        self.closed = self.sums = False


class _Gate(torch.autograd.Function):
    """Identity; closed, it lets no cotangent through."""

    is_linear = True  # its backward pass

    @staticmethod
    def forward(ctx, statistics, gates):
        ctx.gates = gates
        return statistics.clone()

    @staticmethod
    def backward(ctx, g):
        return (None if ctx.gates.closed else g), None


def couple(
    stats: Callable[[Tensor], Tensor],
    apply: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    name: str,
    gates: Gates,
) -> tuple[Tensor, Tensor, Coupling | None]:
    """In general: ``y = apply(x, copies)`` with one gated copy of ``stats(x)`` per sample; y, copies, coupling."""
    statistics = stats(x)
    copies = _Gate.apply(statistics, gates).expand(x.shape[0], *statistics.shape)
    y = apply(x, copies)
    return y, copies, CopiesCoupling(name, statistics, gates) if statistics.requires_grad else None


class Coupling(ABC):
    """What one forward call of a coupled layer leaves behind.

    Attributes:
        name: qualified name of the module that made the call.
        statistics: the batch statistics, a node of the graph above the layer's input.
        gates: the forward pass' gates.
        handle: a leaf that receives `summed` as its gradient in a pass with `Gates.sums`; ``None``: there is none.
        offset: largest mean of a channelled input in units of its standard deviation: so many digits are lost in it.
        order: of the rows of the input; ``None``: sample by sample.
        channelled: shape of an input whose every channel (axis 1) has moments of its own, R = moments · channels with
            the moment slowest and a first moment that centring the input removes; ``None``: another kind of statistics.
    """

    handle: Tensor | None = None
    order: Order | None = None
    channelled: torch.Size | None = None
    offset: float = 0.0

    def __init__(self, name: str, statistics: Tensor, gates: Gates) -> None:
        self.name, self.statistics, self.gates = name, statistics, gates

    @abstractmethod
    def per_sample(self, delta: Tensor, samples: int, order: Order | None) -> Tensor:
        """Closed gates: gradient with respect to sample n's use of the statistics, ``[n, q, R]``, contiguous.

        Args:
            delta: cotangents ``[q, n·t, ...]`` at the edge where the recorder put the mark.
            samples: N.
            order: of the rows; not only samples may have rows.
        """

    @abstractmethod
    def summed(self, delta: Tensor) -> tuple[Tensor, Tensor | None]:
        """The same summed over the samples, ``[q, R]``; and what the layer's own parameters receive, where known.

        The latter is ``[q, 2, channel]``, bias first.
        """

    def received(self, delta: Tensor) -> Tensor:
        """λ = dL/d statistics ``[R]``, differentiable in the cotangent ``delta [n·t, ...]`` and the layer's input."""
        raise TypeError(self._no_weights())

    def share(self, samples: int) -> Tensor:
        """The share of the statistics' rows that are each sample's, ``[n]``."""
        raise TypeError(self._no_weights())

    def deviations(self, samples: int) -> Tensor:
        """w_n ∂ statistics / ∂w_n at equal weights of the samples, ``[n, R]``, differentiable in the layer's input."""
        raise TypeError(self._no_weights())

    def _no_weights(self) -> str:
        return (
            f"Influence gradients weight the samples in the batch statistics, and how that is done in '{self.name}', a "
            "layer given to bncurv.register_coupled, is not known. They are defined for BatchNorm only."
        )

    def own_cotangents(self, coordinates: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """D statistic / dx of some coordinates of channelled statistics (all: ``None``).

        Returns:
            Their channels ``[q]`` and, in those channels of the input, the derivatives ``[q, n·t, *position]``.
        """
        raise NotImplementedError(f"{type(self).__name__} is channelled, so it must define own_cotangents.")


class CopiesCoupling(Coupling):
    """General pair: the mark sits on the per-sample copies of the statistics, whose gradient is the answer."""

    def per_sample(self, delta: Tensor, samples: int, order: Order | None) -> Tensor:
        """Flatten the copies' gradient."""
        by_row = delta.reshape(*delta.shape[:2], -1).transpose(0, 1)
        return summed(order, by_row, samples).contiguous()

    def summed(self, delta: Tensor) -> tuple[Tensor, Tensor | None]:
        """Summed over the copies."""
        return delta.sum(1).reshape(len(delta), -1), None


@dataclass(frozen=True)
class CoupledLayer:
    """A coupled layer's pair of functions, see `register_coupled`."""

    stats: Callable[[nn.Module, Tensor], Tensor]
    apply: Callable[[nn.Module, Tensor, Tensor], Tensor]


COUPLED: dict[type[nn.Module], CoupledLayer] = {}


def register_coupled(
    module_class: type[nn.Module],
    stats: Callable[[nn.Module, Tensor], Tensor],
    apply: Callable[[nn.Module, Tensor, Tensor], Tensor],
) -> None:
    """Teach bncurv a layer that couples the samples of a batch through batch statistics.

    Whenever a module of this class (exactly) runs under bncurv, its output is recomputed as
    ``apply(module, x, copies)``; a certificate checks that nothing but the statistics couples samples.

    Args:
        module_class: the layer's class; its forward takes one tensor ``x [N, ...]``.
        stats: ``(module, x) -> Tensor [*s]``, the batch statistics (stack several into one tensor).
        apply: ``(module, x, copies) -> y`` with ``copies [N, *s]``: the rest of the layer, where sample ``n``
            uses ``copies[n]`` only. ``apply(module, x, stats(module, x).expand(N, ...))`` must equal the
            module's own output.

    Example:
        >>> import torch, bncurv
        >>> class Centred(torch.nn.Module):
        ...     def forward(self, x):
        ...         return x - x.mean(0)
        >>> bncurv.register_coupled(Centred, lambda module, x: x.mean(0), lambda module, x, means: x - means)
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), Centred(), torch.nn.Linear(3, 2))
        >>> batch = torch.randn(8, 4), torch.randint(2, (8,))
        >>> loss_fn = torch.nn.CrossEntropyLoss()
        >>> bncurv.curvature(model, loss_fn, batch, bncurv.DiagGGNExact(), method="coupled").method
        'coupled'
    """
    COUPLED[module_class] = CoupledLayer(stats, apply)


def recoupled(
    module: nn.Module, x: Tensor, expected: Tensor, name: str, gates: Gates
) -> tuple[Tensor, Tensor, Coupling | None]:
    """`couple` by a registered module's pair, held against the module's own output."""
    pair = COUPLED[type(module)]
    stats = lambda t: _one_tensor(pair.stats(module, t), module, name)  # noqa: E731
    found = couple(stats, lambda t, s: pair.apply(module, t, s), x, name, gates)
    _check_pair(name, type(module).__name__, x, expected, found[0])
    return found


def _one_tensor(statistics: Any, module: nn.Module, name: str) -> Tensor:
    if isinstance(statistics, Tensor):
        return statistics
    raise TypeError(
        f"The pair registered for {type(module).__name__}, called as module '{name}': stats returned "
        f"{type(statistics).__name__}; expected one tensor [*s] (stack several into one)."
    )


def _check_pair(name: str, kind: str, x: Tensor, expected: Tensor, y: Tensor) -> None:
    """Raise ValueError unless a registered pair reproduces its module, in value and in derivative."""
    if y.shape != expected.shape:
        problem = f"output's shape ({tuple(y.shape)} instead of {tuple(expected.shape)})"
    else:
        u = pattern(y.shape, y)
        pulled = [
            torch.autograd.grad(t, x, u, retain_graph=True, allow_unused=True)[0] if x.requires_grad else None
            for t in (expected, y)
        ]
        derivatives = [torch.zeros_like(x) if g is None else g for g in pulled]
        tolerance = FORMULA[y.dtype]
        pairs = {"output": (expected, y), "derivative": tuple(derivatives)}
        wrong = [what for what, (a, b) in pairs.items() if not (a - b).norm() <= tolerance * (a.norm() + b.norm())]
        if not wrong:
            return
        a, b = pairs[wrong[0]]
        problem = f"{wrong[0]} by {float((a - b).abs().max()):.2e} (largest difference)"
    raise ValueError(
        f"The pair registered for {kind} does not reproduce module '{name}': it misses the {problem}. "
        "apply(module, x, copies) with copies = stats(module, x) expanded to one per sample must equal module(x). "
        "Correct the pair given to bncurv.register_coupled."
    )
