"""The tables of exactness and of cost in backward passes in docs/exactness.md, as Markdown.

    python experiments/exactness.py [--quick] [--write]

Exactness: bncurv in float64 against the dense oracle (`bncurv.reference`) on every case of
`tests/cases.py`; the largest relative error of a family. Cost: backward passes of the batch for
the exact GGN diagonal of the benchmark's networks, counted while they are taken. `--write` puts the
tables into that page, and the largest error of each family into the README.
"""

from __future__ import annotations

import argparse
import re
import sys
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from lib.modules import module_from
from lib.networks import make_problem
from lib.pages import ROOT, insert
from torch import Tensor
from tqdm import tqdm

from bncurv import ComponentGrad, DiagGGNExact, LowRankGGN, SlowPathWarning, curvature, reference

cases = module_from(ROOT / "tests/cases.py")  # the tests' catalogue: their data, not their code, is what is tabled

FAMILIES = {
    "networks: BatchNorm in every option and place, all layers, U-Net, segmentation, sequences": [
        c for c in cases.MODELS if not c.fallback
    ],
    "architectures: ResNet (two kinds), DenseNet, MobileNet, EfficientNet, GoogLeNet, ShuffleNet, "
    "DCGAN": cases.ARCHITECTURES,
    "losses and their options": cases.LOSSES,
    "dropout, LSTM, attention, checkpointing; parameters without a product (slow path)": [
        *(c for c in cases.MODELS if c.fallback),
        *cases.EXOTIC,
        *cases.RANDOM,
    ],
    "samples mixed by unknown code": cases.COUPLED_UNKNOWN,
}
COSTS = {"mlp": (128, 512), "cnn": (128, 512), "vgg": (128, 256), "resnet20-c100": (64,)}


# --- exactness ------------------------------------------------------------------------------------


def relative_error(values: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> float:
    """Largest relative error of a tensor; of one that is zero, relative to the largest entry."""
    largest = max(float(t.abs().max()) for t in truth.values())
    errors = []
    for name, expected in truth.items():
        scale = float(expected.norm())
        zero = scale <= 1e-10 * largest * expected.numel() ** 0.5
        errors.append(float((values[name] - expected).norm()) / (largest if zero else scale))
    return max(errors)


def spectrum_error(eigenvalues: Tensor, G: Tensor) -> float:
    """Largest deviation of an eigenvalue, relative to the largest one."""
    expected = torch.linalg.eigvalsh(G).flip(0)
    return float((eigenvalues - expected[: len(eigenvalues)]).abs().max() / expected[0])


def errors(case: Any, method: str) -> tuple[float, float, float]:
    """Diagonal, per-component gradients, eigenvalues."""
    built = case.build()
    model, loss_fn, X, y = built
    quantities = DiagGGNExact(), ComponentGrad(), LowRankGGN()
    torch.manual_seed(0)
    result = curvature(model, loss_fn, (X, y), *quantities, method=method)
    return (
        relative_error(result.diag_ggn_exact, reference.ggn_diagonal(*built, seed=0)),
        relative_error(result.grad_component, reference.component_gradients(*built, seed=0)),
        spectrum_error(result.ggn.eigenvalues, reference.ggn(*built, seed=0)),
    )


def exactness_table(quick: bool) -> list[str]:
    """One row per family: number of cases, worst errors of the coupled / the dense way."""
    rows = [
        "| cases | number | GGN diagonal | per-component gradients | eigenvalues |",
        "|---|---|---|---|---|",
    ]
    for family, members in FAMILIES.items():
        chosen = members[::8] if quick else members
        columns = [[], [], []]
        for method in ("coupled", "dense"):
            if members is cases.COUPLED_UNKNOWN and method == "coupled":
                worst = ["refused"] * 3
            else:
                bar = tqdm(chosen, desc=f"{family[:20]}, {method}", leave=False)
                found = zip(*(errors(case, method) for case in bar), strict=True)
                worst = [f"{max(e):.0e}" if max(e) else "0" for e in found]
            for column, value in zip(columns, worst, strict=True):
                column.append(value)
        cells = " | ".join(" / ".join(column) for column in columns)
        rows.append(f"| {family} | {len(chosen)} | {cells} |")
    return rows


# --- cost -----------------------------------------------------------------------------------------


def cost_table(quick: bool) -> list[str]:
    """Backward passes of the batch, one row per network and batch size."""
    rows = [
        "| network | parameters D | statistics R | N | plain: N·(C-1) | bncurv, coupled | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, sizes in list(COSTS.items())[: 2 if quick else None]:
        for n in sizes[:1] if quick else sizes:
            model, loss_fn, X, y = make_problem(name, 8 if quick else n, torch.device("cpu"))
            if X.dim() == 4:
                X = X[..., :8, :8]  # the number of passes does not depend on the images' size
            result = curvature(model, loss_fn, (X, y), DiagGGNExact(), method="coupled")
            norms = [m for m in model.modules() if hasattr(m, "running_mean")]
            statistics = sum(2 * m.num_features for m in norms)
            D, C = sum(p.numel() for p in model.parameters()), model(X).shape[1]
            plain = len(X) * (C - 1)
            rows.append(
                f"| {name} | {D} | {statistics} | {len(X)} | {plain} | {result.passes} | {plain / result.passes:.1f} |"
            )
    return rows


# --- the command ----------------------------------------------------------------------------------


def tables(quick: bool) -> str:
    """Both tables with their captions."""
    parts = [
        "Largest relative error against the dense oracle, float64 "
        "(coupled / dense way; tensors that are zero by symmetry: relative to the largest entry):",
        "",
        *exactness_table(quick),
        "",
        "Backward passes of the whole batch for the exact GGN diagonal:",
        "",
        *cost_table(quick),
    ]
    return "\n".join(parts)


def brief(text: str) -> str:
    """The first of these tables with one figure for each family: its largest error."""
    first = [line for line in text.split("\n\n")[1].splitlines() if line.startswith("| ")]
    rows = ["| cases, float64 against the dense oracle | number | largest relative error |", "|---|---|---|"]
    for line in first[1:]:
        family, number, *cells = line.strip("| ").split(" | ")
        worst = max(re.findall(r"\d+e-\d+", " ".join(cells)), key=float)
        way = " by the dense way; the coupled one is refused" if "refused" in line else ""
        rows.append(f"| {family} | {number} | {worst}{way} |")
    return "\n".join(rows)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="every eighth case, tiny batches")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/exactness.md and README.md")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", SlowPathWarning)
    text = tables(args.quick)
    print(text)
    if args.write:
        insert(ROOT / "docs/exactness.md", "exactness", text)
        insert(ROOT / "README.md", "exactness-brief", brief(text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
