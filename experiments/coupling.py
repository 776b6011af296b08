"""Coupling between samples fades from the outputs' derivatives as the batch grows, but not from the curvature.

    python experiments/coupling.py [--quick] [--seed S] [--device D] [--out DIR]

BatchNorm's share of ∂F/∂X that links different samples falls like 2/N. The GGN sums over samples before it squares, and
there the links add up: what the usual shortcuts make of its diagonal is wrong by the same factor for every N.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator

import torch
from lib import figures, transform
from lib.command import Run, main
from lib.statements import Row, check, refute
from lib.systems import Batch, digits, evaluated, frozen, ggn, mlp, relative, slope
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import bncurv
from bncurv import reference

CE = nn.CrossEntropyLoss()
IGNORED = "error of the GGN's diagonal when the\nstatistics are held constant"
HIDDEN = math.pi / (math.pi - 1)  # E[x²]/Var[x] of x = ReLU(z), z ~ N(0, 1)


def off_diagonal(model: nn.Module, X: Tensor) -> float:
    """Share of ‖∂F/∂X‖² in the blocks ∂F_n/∂x_k, n ≠ k."""
    X = X.clone().requires_grad_()
    F, blocks = model(X), torch.zeros(len(X), len(X)).to(X)  # [n, k]
    for n in range(len(X)):
        for_n = torch.zeros(F.shape[1], *F.shape).to(X)
        for_n[:, n] = torch.eye(F.shape[1])
        J = torch.autograd.grad(F, X, for_n, retain_graph=True, is_grads_batched=True)[0]  # [c, k, i]
        blocks[n] = J.square().sum((0, 2))
    return 1 - float(blocks.diagonal().sum() / blocks.sum())


# --- the usual mistakes ---------------------------------------------------------------------------


def mistaken(model: nn.Sequential, data: Batch) -> dict[str, dict[str, Tensor]]:
    """Diagonals of the linear layers' weights by three shortcuts, ``{mistake: {layer: [out, in]}}``.

    With B[k, z] the vector that arrives at sample z's pre-activation when column k = (n, c) is pulled back, and x_z the
    layer's input, the truth is Σ_k (Σ_z B[k, z] x_zᵀ)². "naive" squares before the sum over z, "own path" keeps z = n
    only, "frozen" holds the statistics constant.
    """
    X, _ = data
    n, inputs, outputs, names = len(X), [], [], []
    for name, layer in model.named_children():
        if isinstance(layer, nn.Linear):
            inputs.append(X)
            outputs.append(layer(X))
            names.append(name)
            X = outputs[-1]
        else:
            X = layer(X)
    p = X.detach().softmax(1)
    S = (p.sqrt().diag_embed() - p[:, :, None] * p.sqrt()[:, None, :]) / n**0.5  # [n, entry, column]
    squares = [torch.zeros_like(t) for t in outputs]  # Σ_k B[k, z]²
    own = [torch.zeros_like(t) for t in outputs]  # of sample z's own columns
    for k, columns in enumerate(S):
        cotangents = torch.zeros(len(columns), *X.shape).to(X)
        cotangents[:, k] = columns.T
        for i, B in enumerate(torch.autograd.grad(X, outputs, cotangents, retain_graph=True, is_grads_batched=True)):
            squares[i] += B.square().sum(0)
            own[i][k] = B[:, k].square().sum(0)
    diagonal = bncurv.curvature(frozen(model, data[0]), CE, data, bncurv.DiagGGNExact()).diag_ggn_exact
    return {
        "naive": {name: b.T @ x.detach() ** 2 for name, b, x in zip(names, squares, inputs, strict=True)},
        "own path": {name: b.T @ x.detach() ** 2 for name, b, x in zip(names, own, inputs, strict=True)},
        "frozen": {name: diagonal[f"{name}.weight"] for name in names},
    }


def weights_diagonal(model: nn.Module, data: Batch) -> dict[str, Tensor]:
    """The exact diagonal of the linear layers' weights, by layer."""
    exact = bncurv.curvature(model, CE, data, bncurv.DiagGGNExact()).diag_ggn_exact
    return {name.split(".")[0]: t for name, t in exact.items() if t.dim() == 2}


def curvature_rows(run: Run, sizes: list[int]) -> Iterator[Row]:
    """D1, X5, D15, S9."""
    shares, errors = {}, {}
    one, two = (mlp(widths, device=run.device).train() for widths in ((64, 32, 10), (64, 32, 32, 10)))
    for n in sizes:
        data = digits(n, run.seed, device=run.device)
        shares[n] = off_diagonal(one, data[0]) if n <= 128 else None
        full, held = weights_diagonal(two, data), weights_diagonal(frozen(two, data[0]), data)
        errors[n] = relative(*(torch.cat([t.flatten() for t in part.values()]) for part in (held, full)))
        run.tick()
    shares = {n: share for n, share in shares.items() if share is not None}
    data = digits(16, run.seed, device=run.device)
    still = off_diagonal(evaluated(one), data[0])
    power = slope(list(shares), list(shares.values()))
    said = " ".join(f"{share:.3f}" for share in shares.values()) + f" at N = {', '.join(map(str, shares))}: slope "
    said += f"{power:.2f}; eval mode {still:g}"
    yield check("D1", still == 0 and abs(power + 0.94) < 0.1, said, shares=shares, slope=power)

    ratios: dict[str, dict[str, list[float]]] = {}
    for kind, width in (("Gaussian", 64), ("Gaussian", 256), ("digits", 256)):
        X, y = digits(64, run.seed, device=run.device)
        net, data = mlp((64, width, width, 10), he=True, device=run.device).train(), (X, y)
        if kind == "Gaussian":  # π/(π-1) holds for Gaussian pre-activations
            data = torch.randn(64, 64, device=run.device), y
        full = weights_diagonal(net, data)
        wrong = mistaken(net, data)
        ratios[f"{kind} {width}"] = {
            name: [float(t[i].sum() / full[i].sum()) for i in full] for name, t in wrong.items()
        }
        run.tick(2)
    narrow, hidden, real = (r["naive"][1] for r in ratios.values())
    exact_last = max(abs(r[name][2] - 1) for r in ratios.values() for name in r)
    keeps = errors[max(sizes)] > errors[min(sizes)] / 2
    said = f"hidden layer, naive ÷ full: Gaussian inputs {narrow:.3f} (width 64), {hidden:.4f} (256), theory "
    said += f"{HIDDEN:.4f}; digits {real:.3f}; diagonal's error {' '.join(f'{e:.1f}' for e in errors.values())} at N = "
    said += f"{', '.join(map(str, sizes))}; behind the last BatchNorm 1 to {exact_last:.0e}"
    holds = abs(hidden - HIDDEN) < 0.03 and keeps and exact_last < 1e-12
    yield check("X5", holds, said, ratios=ratios, errors=errors)

    net, data = mlp((64, 8, 8, 10), device=run.device).train(), digits(16, run.seed, device=run.device)
    full, truth = weights_diagonal(net, data), reference.ggn_diagonal(net, CE, *data, ["0.weight", "3.weight"])
    gap = max(relative(full[i], truth[f"{i}.weight"]) for i in ("0", "3"))
    off = {kind: relative(t["3"], full["3"]) for kind, t in mistaken(net, data).items()}
    said = f"error {gap:.0e}; " + ", ".join(f"{kind} {error:.0%} off" for kind, error in off.items()) + " (layer 2)"
    yield check("D15", gap < 1e-12 and min(off.values()) > 0.2, said, error=gap, mistakes=off)

    net, data = mlp((64, 32, 32, 32, 10), device=run.device).train(), digits(128, run.seed, device=run.device)
    kinds = [ggn(model, data) for model in (net, frozen(net, data[0]))]
    trace, top = float(kinds[1].trace / kinds[0].trace), float(kinds[1].eigenvalues[0] / kinds[0].eigenvalues[0])
    said = f"frozen ÷ train: {trace:.1f} in the trace, {top:.1f} in λ_max of the GGN (digits, at initialisation)"
    yield refute("S9", trace > 1.5 and top > 5, said, trace=trace, largest=top)
    run.tick(2)


# --- cost -----------------------------------------------------------------------------------------


def cost_rows(run: Run) -> Iterator[Row]:
    """D18: backward passes; G5: work of one BatchNorm's backward pass."""
    sizes, widths = (
        [32, 64, 128],
        {"dense": (64, 16, 16, 10), "coupled": (64, 16, 16, 10), "one BatchNorm": (64, 16, 10)},
    )
    passes: dict[str, list[int]] = {}
    for key, shape in widths.items():
        net, method = mlp(shape, device=run.device).train(), "dense" if key == "dense" else "coupled"
        batches = [digits(n, run.seed, device=run.device) for n in sizes]
        results = [bncurv.curvature(net, CE, data, bncurv.DiagGGNExact(), method=method) for data in batches]
        passes[key] = [result.passes for result in results]
    power = slope(sizes, passes["dense"])
    said = f"N = {sizes}: plain {passes['dense']} (exponent {power:.2f}), through the cut {passes['coupled']}, "
    said += f"with one BatchNorm behind the first layer {passes['one BatchNorm']}"
    fixed = all(len(set(passes[key])) == 1 for key in ("coupled", "one BatchNorm"))
    holds = abs(power - 1) < 0.05 and fixed and passes["one BatchNorm"][0] == 9
    yield check("D18", holds, said, passes=passes)
    run.tick()

    work = {axis: {} for axis in ("m", "d")}
    for size in (64, 128, 256, 512):
        work["m"][size], work["d"][size] = entries_touched(size, 64), entries_touched(64, size)
    powers = {axis: slope(*zip(*counts.items(), strict=True)) for axis, counts in work.items()}
    per_entry = work["m"][512] / (512 * 64)
    said = f"{per_entry:.0f} numbers read or written per entry; exponent {powers['m']:.2f} in m, {powers['d']:.2f} in d"
    yield check("G5", all(abs(p - 1) < 0.1 for p in powers.values()), said, work=work)
    run.tick()


class Touched(TorchDispatchMode):
    """Counts the entries of all operands and results of the operations inside."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.count += sum(t.numel() for t in tree_leaves((args, result)) if isinstance(t, Tensor))
        return result


def entries_touched(m: int, d: int) -> int:
    """Numbers that the formulas of the backward pass read and write, for inputs ``[m, d]``."""
    x, gamma = torch.randn(m, d), torch.ones(d)
    with Touched() as touched:
        transform.backward(torch.ones(m, d), x, gamma, 1e-5)
    return touched.count


def picture(rows: dict[str, Row]) -> figures.Figure:
    """1/N against flat; the shortcuts by layer."""
    figure, (left, right) = figures.panels(2, size=(11.5, 4.6))
    shares, errors, ratios = rows["D1"].numbers["shares"], rows["X5"].numbers["errors"], rows["X5"].numbers["ratios"]
    left.loglog(*zip(*errors.items(), strict=True), color=figures.ORANGE, marker="s", label=IGNORED)
    left.loglog(
        *zip(*shares.items(), strict=True), color=figures.BLUE, marker="o", label="share of ∂F/∂X between samples"
    )
    left.loglog(list(shares), [2 / n for n in shares], color=figures.BLACK, linestyle="--", linewidth=1, label="2/N")
    left.set_xticks(list(errors), [str(n) for n in errors])
    left.minorticks_off()
    left.set(xlabel="batch size N", ylabel="relative size", title="Samples decouple; curvature does not")
    left.legend(loc="center left", bbox_to_anchor=(0, 0.6))
    words = {"naive": "squared before the sum over samples", "own path": "own path of each sample only"}
    words["frozen"] = "statistics held constant"
    looks = {"naive": (figures.SKY, "o"), "own path": (figures.PURPLE, "v"), "frozen": (figures.ORANGE, "s")}
    for shift, (kind, values) in zip((-0.15, 0, 0.15), ratios["digits 256"].items(), strict=True):
        where, (color, marker) = [i + shift for i in range(3)], looks[kind]
        right.plot(where, values, color=color, marker=marker, linestyle="", markersize=9, label=words[kind])
    right.axhline(1, color=figures.BLACK, linewidth=1)
    figures.reference_line(right, "π/(π-1)", y=HIDDEN)
    right.set_xticks(range(3), ["first layer", "hidden layer", "last layer"])
    right.set(ylabel="trace ÷ exact trace", title="What shortcuts make of each layer (digits)", yscale="log")
    right.set_yticks([1, 1.5, 2, 3, 5, 10], ["1", "1.5", "2", "3", "5", "10"])
    right.minorticks_off()
    right.legend()
    return figure


def experiment(run: Run) -> Iterator[Row]:
    """All rows."""
    sizes = run.pick([8, 16, 32, 64, 128, 256], [8, 16, 32, 64])
    run.expect(len(sizes) + 10)
    rows = [*curvature_rows(run, sizes), *cost_rows(run)]
    run.save(
        picture({row.id: row for row in rows}),
        "Left: links between samples fade like 2/N (blue), the error of ignoring them in the curvature stays (orange). "
        "Right: every shortcut is right behind the last BatchNorm only.",
    )
    yield from rows


if __name__ == "__main__":
    sys.exit(main(experiment))
