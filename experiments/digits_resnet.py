"""Exact curvature of a trained BatchNorm ResNet on scikit-learn's digits, in train mode.

    python experiments/digits_resnet.py [--epochs 10] [--batch-size 128] [--device cpu] [--quick]

Trains a small ResNet, computes its per-component gradients and its exact GGN diagonal with batch
statistics differentiated through, checks both against plain `torch.autograd.grad`, prints what the
coupling between samples does to every layer and saves three plots. The exit status is 1 if the
accuracy or a check misses its limit.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from pathlib import Path
from typing import NamedTuple

import matplotlib
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from tqdm import tqdm

from bncurv import ComponentGrad, DiagGGNExact, curvature

Tensors = dict[str, Tensor]

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#777777"  # Okabe and Ito


# --- the network and its data ---------------------------------------------------------------------


class Digits(NamedTuple):
    """Training and test images `[N, 1, 8, 8]`, normalised, and their labels `[N]`."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def load_data(seed: int = 0, device: str = "cpu") -> Digits:
    """Split the 1797 digits 4:1, each class alike, and normalise by the training images."""
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=seed)
    train_x, test_x = (torch.tensor(x, dtype=torch.float32).view(-1, 1, 8, 8) for x in parts[:2])
    train_y, test_y = (torch.tensor(y, dtype=torch.long).to(device) for y in parts[2:])
    mean, std = train_x.mean(), train_x.std()
    return Digits(
        ((train_x - mean) / std).to(device), train_y, ((test_x - mean) / std).to(device), test_y
    )


class Block(nn.Module):
    """conv-BN-ReLU-conv-BN beside a shortcut, then ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu_(self.bn1(self.conv1(x)))
        return torch.relu_(self.bn2(self.conv2(hidden)) + self.shortcut(x))


class SmallResNet(nn.Module):
    """A stem and two residual blocks for 8x8 images: six BatchNorms, ten classes."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.block1 = Block(width, width)
        self.block2 = Block(width, 2 * width, stride=2)
        self.fc = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu_(self.bn(self.conv(x)))
        x = self.block2(self.block1(x))
        return self.fc(x.mean(dim=(2, 3)))


def train(model: nn.Module, digits: Digits, epochs: int, batch_size: int = 64) -> None:
    """Train in place with AdamW and a one-cycle learning rate."""
    steps = len(digits.train_x) // batch_size
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=epochs * steps)
    model.train()
    with tqdm(total=epochs * steps, desc="training", unit="step") as bar:
        for _ in range(epochs):
            order = torch.randperm(len(digits.train_x))
            for batch in order[: steps * batch_size].split(batch_size):
                loss = nn.functional.cross_entropy(
                    model(digits.train_x[batch]), digits.train_y[batch]
                )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of images that the model in eval mode labels correctly."""
    mode = model.training
    predictions = model.eval()(images).argmax(dim=1)
    model.train(mode)
    return (predictions == labels).float().mean().item()


# --- what bncurv is compared with -----------------------------------------------------------------


@torch.no_grad()
def freeze_statistics(model: nn.Module, X: Tensor) -> nn.Module:
    """Copy the model with every BatchNorm holding the statistics of the batch `X` as constants.

    The copy computes the same outputs for `X`, but its samples are independent: its curvature is
    the "own part" of the train-mode curvature, and what tools for per-sample quantities compute.
    """
    frozen = copy.deepcopy(model)

    def keep(bn: nn.Module, inputs: tuple[Tensor]) -> None:
        dims = [d for d in range(inputs[0].dim()) if d != 1]
        statistics[bn] = torch.var_mean(inputs[0], dim=dims, correction=0)

    statistics: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    norms = [m for m in frozen.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    handles = [bn.register_forward_pre_hook(keep) for bn in norms if bn.training]
    frozen(X)
    for handle in handles:
        handle.remove()
    for bn, (variance, mean) in statistics.items():
        bn.running_mean, bn.running_var = mean, variance
        bn.eval()
    return frozen


def plain_gradient(model: nn.Module, X: Tensor, y: Tensor) -> Tensors:
    """The gradient of the mean cross-entropy, as any training loop has it."""
    model = copy.deepcopy(model)
    names, params = zip(*model.named_parameters(), strict=True)
    loss = nn.functional.cross_entropy(model(X), y)
    return dict(zip(names, torch.autograd.grad(loss, params), strict=True))


def plain_component_gradients(
    model: nn.Module, X: Tensor, y: Tensor, samples: list[int]
) -> Tensors:
    """Gradients of `loss_n / N` for some samples: one backward pass of the whole batch each."""
    model = copy.deepcopy(model)
    names, params = zip(*model.named_parameters(), strict=True)
    losses = nn.functional.cross_entropy(model(X), y, reduction="none") / len(X)
    grads = [torch.autograd.grad(losses[n], params, retain_graph=True) for n in samples]
    return {name: torch.stack(g) for name, g in zip(names, zip(*grads, strict=True), strict=True)}


def plain_diag_ggn(model: nn.Module, X: Tensor) -> Tensors:
    """The GGN diagonal of the mean cross-entropy: N·C backward passes of the whole batch.

    The Hessian of one sample's loss, `(diag(p) - p pᵀ) / N`, is the sum of `s sᵀ` over the columns
    `s = sqrt(p_c / N) (e_c - p)`; the diagonal is the sum of the squares of all `Jᵀ s`.
    """
    model = copy.deepcopy(model)
    names, params = zip(*model.named_parameters(), strict=True)
    outputs = model(X)
    probabilities = outputs.detach().softmax(dim=1)
    diagonal = [torch.zeros_like(p) for p in params]
    for n, p in enumerate(tqdm(probabilities, desc="plain backward passes", unit="sample")):
        columns = (p / len(X)).sqrt().unsqueeze(1) * (torch.eye(len(p)).to(p) - p)
        for column in columns:
            pulled_back = torch.autograd.grad(outputs[n], params, column, retain_graph=True)
            for total, v in zip(diagonal, pulled_back, strict=True):
                total += v.square()
    return dict(zip(names, diagonal, strict=True))


def relative_error(values: Tensors, truth: Tensors) -> float:
    """Largest deviation, each parameter tensor's measured by its own largest entry."""
    return max(
        ((values[name] - truth[name]).abs().max() / truth[name].abs().max()).item()
        for name in truth
    )


# --- the computation ------------------------------------------------------------------------------


class Timed(NamedTuple):
    """A quantity by parameter name, the way it was computed, seconds and backward passes."""

    values: Tensors
    way: str
    seconds: float
    passes: int


class Report(NamedTuple):
    """All that the tables and the plots show of one batch."""

    components: Timed
    coupled: Timed
    dense: Timed
    own: Tensors


class Check(NamedTuple):
    """A statement, what was measured, and the limit it must keep."""

    statement: str
    measured: float
    limit: float
    at_least: bool = False

    @property
    def passed(self) -> bool:
        """Whether the measured value keeps the limit (NaN does not)."""
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit


def timed(
    quantity: ComponentGrad | DiagGGNExact, model: nn.Module, X: Tensor, y: Tensor, method: str
) -> Timed:
    """Compute a quantity in the given way, with a progress bar."""
    start = time.perf_counter()
    result = curvature(model, nn.CrossEntropyLoss(), (X, y), quantity, method=method, progress=True)
    seconds = time.perf_counter() - start
    is_diagonal = isinstance(quantity, DiagGGNExact)
    values = result.diag_ggn_exact if is_diagonal else result.grad_component
    return Timed(values, result.method, seconds, result.passes)


def compute(model: nn.Module, X: Tensor, y: Tensor) -> Report:
    """Components and diagonal of one batch; also the dense diagonal and the own part."""
    print("\nPer-component gradients")
    components = timed(ComponentGrad(), model, X, y, "auto")
    print("Exact GGN diagonal, coupled way")
    coupled = timed(DiagGGNExact(), model, X, y, "coupled")
    print("Exact GGN diagonal, dense way (for comparison)")
    dense = timed(DiagGGNExact(), model, X, y, "dense")
    print("Exact GGN diagonal, batch statistics held constant (for comparison)")
    own = timed(DiagGGNExact(), freeze_statistics(model, X), X, y, "auto")
    return Report(components, coupled, dense, own.values)


def check_batch(model: nn.Module, X: Tensor, y: Tensor, report: Report) -> list[Check]:
    """Hold some components against plain passes, and the coupled way against the dense one."""
    samples = list(range(0, len(X), max(1, len(X) // 8)))
    some = {name: g[samples] for name, g in report.components.values.items()}
    total = {name: g.sum(dim=0) for name, g in report.components.values.items()}
    return [
        Check(
            f"gradients of {len(samples)} components against plain passes",
            relative_error(some, plain_component_gradients(model, X, y, samples)),
            1e-3,
        ),
        Check(
            "sum of all components against the ordinary gradient",
            relative_error(total, plain_gradient(model, X, y)),
            1e-3,
        ),
        Check(
            "GGN diagonal, coupled against dense way",
            relative_error(report.coupled.values, report.dense.values),
            1e-3,
        ),
    ]


def check_exactly(model: nn.Module, X: Tensor, y: Tensor) -> list[Check]:
    """Hold the coupled way against plain passes in float64, for all components of a small batch."""
    model, X = copy.deepcopy(model).double(), X.double()
    components = timed(ComponentGrad(), model, X, y, "coupled").values
    diagonal = timed(DiagGGNExact(), model, X, y, "coupled").values
    which = f"N={len(X)}, float64: "
    return [
        Check(
            which + "gradients of all components against plain passes",
            relative_error(components, plain_component_gradients(model, X, y, list(range(len(X))))),
            1e-8,
        ),
        Check(
            which + "GGN diagonal against plain passes",
            relative_error(diagonal, plain_diag_ggn(model, X)),
            1e-8,
        ),
    ]


# --- what is shown --------------------------------------------------------------------------------


def by_layer(diagonal: Tensors) -> dict[str, Tensor]:
    """All entries of each layer's parameters, e.g. `weight` and `bias` of "fc", in one vector."""
    layers: dict[str, list[Tensor]] = {}
    for name, values in diagonal.items():
        layers.setdefault(name.rpartition(".")[0], []).append(values.flatten())
    return {layer: torch.cat(values) for layer, values in layers.items()}


def print_table(report: Report) -> None:
    """Per layer: size, trace, largest entry, own part and the share that is coupling."""
    full, own = by_layer(report.coupled.values), by_layer(report.own)
    full["all layers"], own["all layers"] = (torch.cat(list(x.values())) for x in (full, own))
    print(
        f"\n{'layer':<20}{'parameters':>11}{'trace':>12}{'largest':>12}"
        f"{'own part':>12}{'coupling':>14}"
    )
    for layer, entries in full.items():
        trace, own_trace = entries.sum().item(), own[layer].sum().item()
        share = round(1 - own_trace / trace, 2) + 0.0  # -0.0 becomes 0.0
        print(
            f"{layer:<20}{len(entries):>11}{trace:>12.3e}{entries.max().item():>12.3e}"
            f"{own_trace:>12.3e}{share:>+14.0%}"
        )
    print(
        "own part: the trace with the batch statistics held constant. coupling: the share of the"
        "\ntrace that comes through the statistics, 1 - own part / trace; negative where the own"
        "\npart alone is too large. Layers after the last BatchNorm have none."
    )


def print_times(report: Report) -> None:
    """Way, seconds and backward passes of what was computed."""
    rows = (
        ("per-component gradients", report.components),
        ("GGN diagonal", report.coupled),
        ("GGN diagonal", report.dense),
    )
    print(f"\n{'computation':<26}{'way':<10}{'seconds':>9}{'passes':>9}")
    for name, item in rows:
        print(f"{name:<26}{item.way:<10}{item.seconds:>9.2f}{item.passes:>9}")
    ratio = report.dense.seconds / report.coupled.seconds
    print(f"GGN diagonal: the dense way took {ratio:.1f} times as long as the coupled way.")


def print_checks(checks: list[Check]) -> None:
    """One line per check: statement, measured value, limit, verdict."""
    print(f"\n{'check':<68}{'measured':>10}{'limit':>10}")
    for item in checks:
        verdict = "ok" if item.passed else "FAILED"
        print(f"{item.statement:<68}{item.measured:>10.2g}{item.limit:>10.2g}  {verdict}")


def save_figure(figure: plt.Figure, path: Path) -> Path:
    """Write a figure and close it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def plot_layers(diagonal: Tensors, own_diagonal: Tensors) -> plt.Figure:
    """Trace of every layer, exact and with the batch statistics held constant."""
    full, own = (
        {layer: entries.sum().item() for layer, entries in by_layer(part).items()}
        for part in (diagonal, own_diagonal)
    )
    worst = max(full, key=lambda layer: own[layer] / full[layer])
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    rows, x, y = range(len(full)), list(full.values()), list(own.values())
    axes.hlines(rows, x, y, color=GREY, linewidth=2, zorder=1)
    axes.scatter(y, rows, marker="s", s=90, color=ORANGE, label="batch statistics held constant")
    axes.scatter(x, rows, s=40, color=BLUE, label="exact: differentiated through them")
    axes.set(
        xscale="log",
        xlabel="trace of the layer's block of the GGN",
        title=f"The layer {worst!r} looks {own[worst] / full[worst]:.1f} times as curved as it is "
        "when the batch statistics are held constant",
    )
    axes.title.set_size("medium")
    axes.set_yticks(rows, list(full))
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.legend()
    return figure


def plot_entries(diagonal: Tensors, own_diagonal: Tensors, model: nn.Module) -> plt.Figure:
    """Every entry of the diagonal: statistics held constant against exact."""
    layers = dict(model.named_modules())
    kinds = (
        ("convolutions", nn.Conv2d, BLUE, "o"),
        ("BatchNorms", nn.BatchNorm2d, ORANGE, "s"),
        ("linear layer", nn.Linear, GREEN, "^"),
    )
    full, own = by_layer(diagonal), by_layer(own_diagonal)
    figure, axes = plt.subplots(figsize=(7.5, 6.5), layout="constrained")
    for label, kind, color, marker in kinds:
        names = [name for name in full if isinstance(layers[name], kind)]
        x, y = (torch.cat([part[name] for name in names]).cpu() for part in (full, own))
        axes.scatter(x, y, s=12, alpha=0.5, color=color, marker=marker, label=label, linewidths=0)
    ratio = (torch.cat(list(own.values())) / torch.cat(list(full.values()))).median().item()
    axes.axline((1e-3, 1e-3), slope=1, color="black", linewidth=1, label="equal")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="entry of the GGN diagonal, exact",
        ylabel="the same entry, batch statistics held constant",
        title=f"Constant batch statistics make the typical entry {ratio:.1f} times what it is",
    )
    axes.grid(alpha=0.3)
    axes.legend(markerscale=2)
    return figure


def component_norms(components: Tensors) -> Tensor:
    """The norm of each per-component gradient over all parameters, `[N]`."""
    return sum(g.flatten(1).square().sum(dim=1) for g in components.values()).sqrt()


def plot_components(components: Tensors, X: Tensor, y: Tensor, shown: int = 8) -> plt.Figure:
    """The digits with the largest gradients, and all norms in descending order."""
    norms, order = component_norms(components).cpu().sort(descending=True)
    count, half = len(norms), int((norms.cumsum(0) < norms.sum() / 2).sum()) + 1
    figure = plt.figure(figsize=(10, 4.5), layout="constrained")
    grid = figure.add_gridspec(2, shown, height_ratios=(1, 2))
    for rank, n in enumerate(order[:shown].tolist()):
        axes = figure.add_subplot(grid[0, rank])
        axes.imshow(X[n, 0].cpu(), cmap="gray_r")
        axes.set(title=f"#{rank + 1}: a {y[n].item()}", xticks=[], yticks=[])
    axes = figure.add_subplot(grid[1, :])
    colors = [ORANGE] * half + [BLUE] * (count - half)
    axes.bar(range(1, count + 1), norms, width=1, color=colors)
    axes.set(
        xlabel="digits of the batch, largest gradient first",
        ylabel="norm of the\nper-component gradient",
        xlim=(0.5, count + 0.5),
    )
    figure.suptitle(f"{half} of {count} digits (orange) make up half of all gradient norms")
    return figure


# --- the command ----------------------------------------------------------------------------------


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=10, help="epochs of training")
    parser.add_argument("--batch-size", type=int, default=128, help="N, the curvature's batch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="e.g. cpu, cuda")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "output")
    parser.add_argument("--quick", action="store_true", help="N at most 64, for a smoke test")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    matplotlib.use("Agg")
    torch.manual_seed(args.seed)
    size = min(args.batch_size, 64) if args.quick else args.batch_size
    digits = load_data(args.seed, args.device)
    model = SmallResNet().to(args.device)
    train(model, digits, args.epochs)
    test_accuracy = accuracy(model, digits.test_x, digits.test_y)
    print(f"Trained: {test_accuracy:.1%} of {len(digits.test_x)} test digits right.")

    model.train()
    X, y = digits.train_x[:size], digits.train_y[:size]
    report = compute(model, X, y)
    checks = [Check("accuracy on the test digits", test_accuracy, 0.97, at_least=True)]
    print("Checks against plain backward passes")
    checks += check_batch(model, X, y, report) + check_exactly(model, X[:16], y[:16])
    print_table(report)
    print_times(report)
    print_checks(checks)

    figures = {
        "layers": plot_layers(report.coupled.values, report.own),
        "entries": plot_entries(report.coupled.values, report.own, model),
        "components": plot_components(report.components.values, X, y),
    }
    print("\nPlots")
    for name, figure in figures.items():
        print(save_figure(figure, args.out / f"digits_resnet_{name}.png"))
    return 0 if all(item.passed for item in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
