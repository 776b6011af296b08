"""What is a per-sample gradient where samples share their statistics? Four objects, and what each is good for.

    python experiments/per_sample.py [--quick] [--seed S] [--device D] [--out DIR]

Component, path, influence and frozen gradients are one thing without BatchNorm and four with it
(docs/per_sample_gradients.md). Influence gradients answer the question that the first source leaves open: they alone
agree with leaving a sample out and have the covariance of the mini-batch gradient. That gradient is biased, by O(1/B).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from lib import figures
from lib.command import Run, main
from lib.per_sample import (
    backpack_gradients,
    component_gradients,
    draw,
    flat,
    four_objects,
    gradient_of,
    gradient_variance,
    jacobian_rows,
    leave_one_out,
    squared_bias,
    without_buffers,
)
from lib.statements import Row, check, listed
from lib.systems import Batch, digits, evaluated, mlp, relative, slope, train
from torch import Tensor, nn

CE = nn.CrossEntropyLoss()
LOOKS = {
    "influence": {"color": figures.BLUE, "marker": "o", "label": "influence"},
    "component": {"color": figures.GREEN, "marker": "^", "label": "component"},
    "frozen": {"color": figures.ORANGE, "marker": "s", "label": "frozen"},
    "path": {"color": figures.PURPLE, "marker": "v", "label": "path (weights)"},
}


# --- definitions ----------------------------------------------------------------------------------


def definition_rows(run: Run) -> Iterator[Row]:
    """D8, D9, D10."""
    net, data = mlp((64, 32, 32, 10), device=run.device).train(), digits(32, run.seed, device=run.device)
    train(net, data, 20, 0.1)
    weights = ["0.weight", "3.weight", "6.weight"]
    still = evaluated(net)
    error = relative(flat(component_gradients(still, CE, data)), flat(backpack_gradients(still, CE, data)))
    yield check("D8", error < 1e-12, f"eval mode: {error:.0e}", error=error)

    kinds, truth = four_objects(net, CE, data), jacobian_rows(net, data)
    error = relative(flat(kinds["component"]), flat(truth))
    off = {kind: [relative(kinds[kind][name], truth[name]) for name in weights] for kind in ("path", "frozen")}
    peer = relative(flat(backpack_gradients(net, CE, data), weights), flat(kinds["path"], weights))
    said = f"component against the Jacobian's rows {error:.0e}; "
    said += "; ".join(f"{kind} differs by " + listed(errors, ".0%") for kind, errors in off.items())
    said += f" (three layers); BackPACK's BatchGrad in train mode is the path gradient ({peer:.0e})"
    below, above = min(e for errors in off.values() for e in errors[:2]), max(errors[2] for errors in off.values())
    yield check("D9", error < 1e-12 and below > 0.3 and above < 1e-12, said, error=error, off=off, peer=peer)

    sums = {}
    for reduction in ("sum", "mean"):
        loss_fn = nn.CrossEntropyLoss(reduction=reduction)
        whole = gradient_of(net, loss_fn, data)
        for kind, g in four_objects(net, loss_fn, data).items():
            sums[f"{kind}, {reduction}"] = relative(flat(g).sum(0), flat(whole, g)[0])
    exact = max(error for kind, error in sums.items() if "frozen" not in kind)
    held = min(error for kind, error in sums.items() if "frozen" in kind)
    said = f"component, path and influence sum to it to {exact:.0e} (reductions sum and mean), frozen {held:.0%} off"
    yield check("D10", exact < 1e-12 and held > 0.3, said, sums=sums)
    run.tick()


# --- leaving a sample out -------------------------------------------------------------------------


def leave_one_out_row(run: Run, sizes: list[int]) -> Row:
    """X3, smooth network: kinks would add flips of O(1/N) that never fade."""
    X, y = digits(seed=run.seed, device=run.device)
    net = mlp((64, 24, 10), activation=nn.Tanh, device=run.device).train()
    errors: dict[str, dict[str, list[float]]] = {}
    for stage in ("at initialisation", "after training"):
        errors[stage] = {kind: [] for kind in LOOKS}
        for n in sizes:
            truth = leave_one_out(net, CE, (X[:n], y[:n]))
            for kind, g in four_objects(net, CE, (X[:n], y[:n])).items():
                errors[stage][kind].append(relative(flat(g), flat(truth, g)))
            run.tick(n / 256)
        train(net, (X, y), 300, 0.1, batch_size=64, seed=run.seed)
    powers = {stage: slope(sizes, found["influence"]) for stage, found in errors.items()}
    said = "; ".join(
        f"{stage}: influence {listed(found['influence'], '.2g')} (slope {powers[stage]:.2f}), component "
        + listed(found["component"], ".2f")
        + f", frozen and path > {min(*found['frozen'], *found['path']):.1f}"
        for stage, found in errors.items()
    )
    last = [found["influence"][-1] for found in errors.values()]
    others = min(e for found in errors.values() for kind in LOOKS if kind != "influence" for e in found[kind])
    holds = max(powers.values()) < -0.8 and max(last) < 0.01 and others > 0.1
    return check("X3", holds, f"{said}; N = {listed(sizes)}", sizes=sizes, errors=errors, slopes=powers)


# --- variance and bias of the mini-batch gradient -------------------------------------------------


def variance_ratios(model: nn.Module, data: Batch, B: int, seed: int, count: int, inside: int) -> dict[str, list]:
    """Mean over batches of (trace of the covariance of N g_n) ÷ B ÷ true variance; for each kind, layer by layer."""
    true = gradient_variance(model, CE, data, draw(len(data[0]), count, B, seed))
    found: dict[str, dict[str, float]] = {kind: {} for kind in LOOKS}
    for index in draw(len(data[0]), inside, B, seed + 1):
        for kind, gradients in four_objects(model, CE, (data[0][index], data[1][index])).items():
            for name, g in gradients.items():
                found[kind][name] = found[kind].get(name, 0) + B * float(g.var(0).sum()) / inside
    layers = list(dict.fromkeys(name.split(".")[0] for name in true))
    ratios: dict[str, list] = {}
    for kind, estimate in found.items():
        members = [[name for name in estimate if name.split(".")[0] == layer] for layer in layers]
        ratios[kind] = [sum(estimate[m] for m in ms) / sum(true[m] for m in ms) if ms else None for ms in members]
    return ratios


def variance_row(run: Run, sizes: list[int], count: int, inside: int) -> Row:
    """D11. Influence gradients make the jackknife's estimate, too large by O(1/B) (Efron & Stein 1981)."""
    data = digits(seed=run.seed, device=run.device)
    net = mlp((64, 24, 24, 24, 10), device=run.device).train()
    train(net, data, 300, 0.05, batch_size=128, seed=run.seed)
    ratios = {}
    for B in sizes:
        ratios[f"ReLU, B = {B}"] = variance_ratios(net, data, B, run.seed, count, inside * 256 // B)
        run.tick(8)
    smooth = mlp((64, 24, 10), activation=nn.Tanh, device=run.device).train()
    train(smooth, data, 300, 0.05, batch_size=128, seed=run.seed)
    ratios["tanh, B = 256"] = variance_ratios(smooth, data, 256, run.seed, count, inside)
    run.tick(4)
    said = "; ".join(
        f"{case}: component {found['component'][-1]:.2f}, influence {found['influence'][-1]:.2f} (all layers "
        f"{min(found['influence']):.2f}-{max(found['influence']):.2f}), path {found['path'][0]:.1f}, frozen "
        f"{found['frozen'][0]:.1f} (first layer)"
        for case, found in ratios.items()
    )
    decided = ratios[f"ReLU, B = {sizes[-1]}"]
    component, influence, path = decided["component"][-1], decided["influence"][-1], decided["path"][0]
    return check("D11", component < 0.85 <= influence <= 1.15 and path > 2, said, ratios=ratios)


def bias_row(run: Run, sizes: list[int], count: int) -> Row:
    """W10."""
    data = digits(seed=run.seed, device=run.device)
    found: dict[str, list[tuple[float, float]]] = {}
    for kind in ("bn", "none"):
        net = mlp((64, 24, 10), kind, device=run.device).train()
        for stage in ("at initialisation", "after training"):
            batches = (draw(len(data[0]), count, B, run.seed + B) for B in sizes)
            found[f"{kind} {stage}"] = [squared_bias(net, CE, data, index) for index in batches]
            train(net, data, 200, 0.1, batch_size=128, seed=run.seed)
            run.tick()
    bias = {key: [max(square, 0) ** 0.5 for square, _ in pairs] for key, pairs in found.items()}
    z = max(abs(square / error) for key, pairs in found.items() if "none" in key for square, error in pairs)
    powers = {key: slope(sizes, values) for key, values in bias.items() if "bn" in key}
    said = "; ".join(
        f"{key.removeprefix('bn ')}: bias ÷ ‖∇L‖ {listed(bias[key], '.3f')} (slope {power:.2f})"
        for key, power in powers.items()
    )
    said += f" at B = {listed(sizes)}; without BatchNorm within {z:.1f} standard errors of 0"
    holds = all(-1.25 <= power <= -0.7 for power in powers.values()) and z < 3
    return check("W10", holds, said, sizes=sizes, bias=bias, squares=found)


def randomness_rows(run: Run, sizes: list[int], count: int) -> Iterator[Row]:
    """W11, G9: outputs for four images, each among random others."""
    X, _ = digits(seed=run.seed, device=run.device)
    net = without_buffers(mlp((64, 24, 10), device=run.device).train())
    batched = torch.func.vmap(net)

    def variance(B: int) -> Tensor:
        others = X[draw(len(X), count, B - 1, run.seed)]  # [k, B - 1, i]
        outputs = [batched(torch.cat([x.expand(count, 1, -1), others], 1))[:, 0] for x in X[:4]]
        return torch.stack([F.var(0).sum() for F in outputs]).mean()

    with torch.no_grad():
        variances = [float(variance(B)) for B in sizes]
    power = slope(sizes, variances)
    spread = [v**0.5 for v in variances]
    said = f"deviation × √B {listed((s * B**0.5 for s, B in zip(spread, sizes, strict=True)), '.2f')} at B = "
    said += f"{listed(sizes)}; slope {power / 2:.2f}"
    yield check("W11", abs(power / 2 + 0.5) < 0.15, said, spread=spread, sizes=sizes)
    yield check("G9", abs(power + 1) < 0.3, f"variance's exponent {power:.2f}; see W11", power=power)
    run.tick()


def picture(rows: dict[str, Row], case: str) -> figures.Figure:
    """Leave-one-out error; variance ratios by layer; bias."""
    figure, axes = figures.panels(3, size=(15, 4.7))
    found, ratios, biases = rows["X3"].numbers, rows["D11"].numbers["ratios"][case], rows["W10"].numbers
    for shift, (kind, style) in zip((0, -0.12, 0.12, 0.24), LOOKS.items(), strict=True):
        for stage, lines in (("at initialisation", {}), ("after training", {"ls": "--", "mfc": "white", "label": ""})):
            axes[0].loglog(found["sizes"], found["errors"][stage][kind], **style | lines)
        points = [(i + shift, value) for i, value in enumerate(ratios[kind]) if value is not None]
        axes[1].semilogy(*zip(*points, strict=True), **style | {"linestyle": "", "markersize": 9})
    axes[0].set(xlabel="batch size N", ylabel="error against leave-one-out", title="Which one is leaving n out?")
    axes[0].set_xticks(found["sizes"], [str(n) for n in found["sizes"]])
    axes[0].minorticks_off()
    axes[0].legend(title="filled: at initialisation,\nopen: after training", fontsize=9, title_fontsize=9)
    axes[1].axhline(1, color=figures.BLACK, linewidth=1)
    axes[1].set_xticks(range(7), [f"{kind}{i}" for i in (1, 2, 3) for kind in ("W", "BN")] + ["W4"])
    axes[1].set_yticks([0.3, 0.5, 1, 2, 4], ["0.3", "0.5", "1", "2", "4"])
    axes[1].minorticks_off()
    axes[1].set(ylabel="variance ÷ true variance", title=f"Whose covariance is the mini-batch's? ({case})")
    for stage, line, face in (("at initialisation", "-", None), ("after training", "--", "white")):
        for kind, color, mark in (("bn", figures.BLUE, "o"), ("none", figures.GREY, "v")):
            values = biases["bias"][f"{kind} {stage}"]
            if kind == "none":
                values = [(max(square, 0) + 3 * error) ** 0.5 for square, error in biases["squares"][f"none {stage}"]]
            label = f"{'BatchNorm' if kind == 'bn' else 'no BatchNorm: below'}, {stage}"
            style = {"color": color, "marker": mark, "mfc": face or color, "label": label}
            axes[2].loglog(biases["sizes"], values, linestyle=line if kind == "bn" else "", **style)
    axes[2].set_xticks(biases["sizes"], [str(b) for b in biases["sizes"]])
    axes[2].minorticks_off()
    axes[2].set(xlabel="batch size B", ylabel="bias ÷ ‖∇L‖", title="Mini-batch gradients are biased by 1/B")
    axes[2].set_ylim(top=30)
    axes[2].legend(fontsize=9)
    return figure


def experiment(run: Run) -> Iterator[Row]:
    """All rows."""
    sizes, B = run.pick([16, 32, 64, 128, 256], [16, 64, 256]), run.pick([128, 256], [256])
    run.expect(1 + 2 * sum(sizes) / 256 + 8 * len(B) + 4 + 4 + 1)
    rows = [*definition_rows(run), leave_one_out_row(run, sizes)]
    rows += [variance_row(run, B, run.pick(4000, 1000), run.pick(24, 5))]
    rows.append(bias_row(run, [8, 16, 32, 64], run.pick(3000, 2000)))
    rows += randomness_rows(run, [16, 32, 64, 128, 256], 300)
    run.save(
        picture({row.id: row for row in rows}, f"ReLU, B = {B[-1]}"),
        "Left: only influence gradients agree with leaving a sample out, the better the larger the batch. Middle: only "
        "their covariance is that of the mini-batch gradient, in every layer. Right: with BatchNorm the mini-batch "
        "gradient is biased; without it the bias is below what so many batches can show (triangles).",
    )
    yield from rows


if __name__ == "__main__":
    sys.exit(main(experiment))
