"""Pictures of results: `spectrum` of a low-rank GGN, `coupling` of a coupling report.

They are drawn with matplotlib: ``pip install bncurv[plots]``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from bncurv.lowrank import GGN

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#777777"  # Okabe & Ito: told apart by everybody


def spectrum(low_rank: GGN, ax: Axes | None = None) -> Axes:
    """Eigenvalues above the cut-off against their index, on a log scale; rank and cut-off marked.

    Args:
        low_rank: ``Results.ggn``, or ``LowRankGGN.result`` (of groups: one of its values).
        ax: where to draw; default: a new figure.

    Returns:
        The axes.

    Example:
        >>> import torch, bncurv
        >>> from bncurv import plots
        >>> nn = torch.nn
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
        >>> batch = torch.randn(8, 4), torch.randint(2, (8,))
        >>> res = bncurv.curvature(model, nn.CrossEntropyLoss(), batch, bncurv.LowRankGGN())
        >>> plots.spectrum(res.ggn).get_yscale()
        'log'
    """
    if isinstance(low_rank, Mapping):
        raise TypeError(
            f"spectrum got the groups {list(low_rank)}; pass one of them, e.g. result[{next(iter(low_rank), '')!r}]."
        )
    ax = _axes(ax, (7, 4.5))
    values = [float(v) for v in low_rank.eigenvalues]
    rank, cutoff = len(values), low_rank.cutoff
    reached = rank == low_rank.top  # there are more eigenvalues, which were not computed
    last = f"top {rank}" if reached else f"rank {rank} of at most {min(low_rank.components, low_rank.dim)}"
    ax.semilogy(range(1, rank + 1), values, ".", color=BLUE, label="eigenvalues")
    ax.axvline(rank, color=ORANGE, linewidth=1.5, label=last)
    ax.axhline(cutoff, color=GREY, linestyle="--", label=f"cut-off {cutoff:.1e}: rounding below")
    ax.set(
        xlabel="index, largest eigenvalue first",
        ylabel="eigenvalue of the GGN",
        title=_share(low_rank, values),
    )
    ax.grid(alpha=0.3)
    ax.legend()
    return ax


def coupling(report: Mapping[str, Any], ax: Axes | None = None) -> Axes:
    """Trace of each layer's block of the GGN: exact, and with the statistics held constant (own).

    Args:
        report: ``Results.coupling`` of `CouplingReport`, ``{module name: LayerCoupling}``; or a
            mapping from layers to ``{"own": float, "full": float}``.
        ax: where to draw; default: a new figure.

    Returns:
        The axes: per layer a bar of the exact trace and below it one of the own part, in the
        report's order.

    Example:
        >>> from bncurv import plots
        >>> traces = {"conv": {"own": 8.0, "full": 2.0}, "fc": {"own": 3.0, "full": 3.0}}
        >>> ax = plots.coupling(traces)
        >>> print(ax.get_title())
        'conv' looks 4.0 times as curved as it is
        when the batch statistics are held constant
    """
    if not report:
        raise ValueError("the coupling report is empty; expected at least one layer.")
    layers = list(report)
    full = [_trace(report[layer], "full") for layer in layers]
    own = [_trace(report[layer], "own") for layer in layers]
    ax = _axes(ax, (7, 1.8 + 0.45 * len(layers)))
    rows, height = range(len(layers)), 0.4
    frozen = "batch statistics held constant"
    ax.barh([r - height / 2 for r in rows], full, height, color=BLUE, label="exact")
    ax.barh([r + height / 2 for r in rows], own, height, color=ORANGE, label=frozen)
    positive = [t for t in (*full, *own) if t > 0] or [1.0]
    ax.set(
        xscale="log",
        xlim=(min(positive) / 3, max(positive) * 3),
        xlabel="trace of the layer's block of the GGN",
        title=_sentence(layers, own, full),
    )
    ax.set_yticks(rows, layers)
    ax.set_ylim(len(layers) + 1, -0.6)  # the first layer on top, room for the legend below the last
    ax.grid(axis="x", alpha=0.3)
    ax.set_axisbelow(True)
    ax.legend(loc="lower right")
    return ax


def _axes(ax: Axes | None, size: tuple[float, float]) -> Axes:
    """The given axes, or those of a new figure."""
    if ax is not None:
        return ax
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("bncurv.plots draws with matplotlib; install it with: pip install bncurv[plots]") from error
    return plt.subplots(figsize=size, layout="constrained")[1]


def _share(low_rank: GGN, values: list[float]) -> str:
    """What part of the trace the leading eigenvalues hold, in words."""
    if not values:
        return "All eigenvalues are zero"
    leading = min(10, len(values))
    subject = f"{leading} largest eigenvalues" if leading > 1 else "largest eigenvalue"
    trace = getattr(low_rank, "trace", None)
    if trace is None:  # matrix-free
        return f"The {subject} of the GGN"
    share = sum(values[:leading]) / float(trace)
    return f"The {subject} {'hold' if leading > 1 else 'holds'} {share:.0%} of the trace"


def _trace(layer: Any, part: str) -> float:
    """``layer[part]`` of a mapping, ``layer.<part>_trace`` of anything else."""
    return float(layer[part] if isinstance(layer, Mapping) else getattr(layer, f"{part}_trace"))


def _sentence(layers: list[str], own: list[float], full: list[float]) -> str:
    """The layer whose own part is farthest from the truth, in words."""
    traces = zip(layers, own, full, strict=True)
    ratio = {layer: o / f for layer, o, f in traces if o > 0 and f > 0}
    worst = max(ratio, key=lambda layer: abs(math.log(ratio[layer])), default=None)
    if worst is None or abs(ratio[worst] - 1) < 0.005:
        return "No layer's curvature runs through the batch statistics"
    times = f"{ratio[worst]:.1f} times as curved as it is"
    return f"{worst!r} looks {times}\nwhen the batch statistics are held constant"
