"""Rank and null space of the GGN of BatchNorm networks: predicted, counted, and checked vector by vector.

    python experiments/rank_nullspace.py [--quick] [--seed S] [--device D] [--out DIR]

The rank is at most N C, with cross-entropy N (C - 1). Where there are more components than parameters, what is missing
to full rank is what the network's symmetries predict, and BatchNorm brings two per unit. A count alone proves little:
with frozen statistics it comes out the same, but the predicted vectors are not in that null space.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from lib import figures
from lib.command import Run, main
from lib.statements import Row, check
from lib.symmetries import flat, predicted
from lib.systems import TINY, Batch, digits, frozen, ggn, mlp, one_hot, relative, train
from torch import Tensor, nn

import bncurv
from bncurv import reference

CE = nn.CrossEntropyLoss()


def plain_spectrum(model: nn.Module, data: Batch) -> Tensor:
    """All N C eigenvalues of the cross-entropy's GGN by the plain Jacobian and a factor of C columns per sample."""
    J = torch.cat([t.flatten(1) for t in reference.jacobian(model, data[0]).values()], 1)
    p = model(data[0]).detach().softmax(1)
    S = (p.sqrt().diag_embed() - p[:, :, None] * p.sqrt()[:, None, :]) / len(p) ** 0.5  # [n, entry, column]
    rows = torch.einsum("nec,ned->ncd", S, J.unflatten(0, p.shape))
    return torch.linalg.svdvals(rows.flatten(0, 1)) ** 2


def rows_of_V(model: nn.Module, data: Batch, loss_fn: nn.Module = CE) -> Tensor:
    """V ``[K, D]``."""
    V = bncurv.curvature(model, loss_fn, data, bncurv.SqrtGGNExact()).sqrt_ggn_exact
    return torch.cat([t.flatten(0, 1).flatten(1) for t in V.values()], 1)


# --- rank -----------------------------------------------------------------------------------------


def rank_rows(run: Run) -> Iterator[Row]:
    """D16 over training, with the laws for squared error and a BatchNorm at the end; D17."""
    data = X, y = digits(24, run.seed, standardised=True, device=run.device)
    net = mlp((64, 64, 64, 10), device=run.device).train()
    n, bound = len(X), len(X) * 9
    spectra: dict[int, Tensor] = {}
    ranks = []
    for steps in (0, 20, 80):
        train(net, data, steps, 0.1)
        spectra[sum((0, 20, 80)[: len(spectra) + 1])] = plain_spectrum(net, data)
        ranks.append(ggn(net, data).rank)
        run.tick()
    gaps = {t: (float(s[bound - 1] / s[0]), float(s[bound] / s[0])) for t, s in spectra.items()}

    others = {"squared error": (ggn(net, (X, one_hot(y)), nn.MSELoss()).rank, n * 10)}
    last = nn.Sequential(*mlp((64, 64, 10), device=run.device), nn.BatchNorm1d(10, eps=TINY).to(run.device)).train()
    below = [name for name, _ in last.named_parameters() if not name.startswith("4")]
    for name, loss_fn, t, law in (("CE", CE, y, (n - 1) * 9), ("MSE", nn.MSELoss(), one_hot(y), (n - 2) * 10)):
        G = bncurv.curvature(last, loss_fn, (X, t), bncurv.LowRankGGN(), params=below).ggn
        others[f"BatchNorm last, {name}"] = (G.rank, law)
    laws = all(rank == law for rank, law in others.values())
    smallest, noise = min(g[0] for g in gaps.values()), max(g[1] for g in gaps.values())
    said = f"rank {ranks} at steps 0, 20, 100; N (C - 1) = {bound}; λ_{bound}/λ_1 ≥ {smallest:.0e}, "
    said += f"λ_{bound + 1}/λ_1 ≤ {noise:.0e}; MSE N C: {others['squared error'][0]}; BatchNorm last, ε = 0: "
    said += f"(N-1)(C-1) = {others['BatchNorm last, CE'][0]} (CE), (N-2) C = {others['BatchNorm last, MSE'][0]} (MSE)"
    holds = ranks == [bound] * 3 and noise < 1e-12 and laws
    yield check("D16", holds, said, spectra=spectra, ranks=ranks, bound=bound, laws=others)

    G = ggn(net, data)
    E, values = G.unit_vectors(), G.eigenvalues
    residual = float((G.residuals() / values).max())
    orthogonal = float((E.T @ E - torch.eye(G.rank, device=run.device)).abs().max())
    trace = abs(float(values.sum() / G.trace) - 1)
    try:
        G.unit_vectors(G.rank + 1)
        refused = False
    except ValueError:
        refused = True
    said = f"‖G e - λ e‖/λ ≤ {residual:.0e}, Eᵀ E - I ≤ {orthogonal:.0e}, trace {trace:.0e}; more than {G.rank} refused"
    holds = residual < 1e-8 and orthogonal < 1e-8 and trace < 1e-12 and refused
    yield check("D17", holds, said, residual=residual, orthogonality=orthogonal, trace=trace)


# --- null space -----------------------------------------------------------------------------------


def network(kind: str, eps: float, device: torch.device) -> nn.Sequential:
    """An MLP for 30 pixels of ten digits, or a conv network for images of three digits."""
    if kind == "MLP":
        return mlp((30, 5, 10), eps=eps, device=device).train()
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4, eps=eps), nn.ReLU()),
        *(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4, eps=eps), nn.ReLU(), nn.AvgPool2d(2)),
        *(nn.Flatten(), nn.Linear(64, 3)),
    ).to(device).train()  # fmt: skip


def census(kind: str, eps: float, data: Batch, device: torch.device) -> dict[str, object]:
    """Predicted and counted null directions in train mode and frozen, and each predicted vector's |V b|/(|V| |b|)."""
    net = network(kind, eps, device)
    for bn in (m for m in net if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)):
        nn.init.uniform_(bn.weight, 0.5, 1.5)
        nn.init.normal_(bn.bias, std=0.1)
    basis = predicted(net, data[0])
    B = torch.stack([flat(b, net) for vectors in basis.values() for b in vectors], 1)
    kinds = [name for name, vectors in basis.items() for _ in vectors]
    result: dict[str, object] = {"predicted": int(torch.linalg.matrix_rank(B)), "kinds": kinds}
    for mode, model in (("train", net), ("frozen", frozen(net, data[0]))):
        V = rows_of_V(model, data)
        result[mode] = ((V @ B).norm(dim=0) / V.norm() / B.norm(dim=0)).tolist()
        result[f"{mode} count"] = V.shape[1] - ggn(model, data).rank
    radial = B[:, kinds.index("radial")].clone()
    radial[sum(p.numel() for name, p in net.named_parameters() if name.startswith("0")) :] = 0  # without its tilt
    V = rows_of_V(net, data)
    result["untilted"] = float((V @ radial).norm() / V.norm() / radial.norm())
    return result


def null_rows(run: Run) -> Iterator[Row]:
    """X13, G3."""
    X, y = digits(None, run.seed, standardised=True, device=run.device)
    n, alive, three = run.pick(160, 120), (X[:160] > X.min(0).values).double().mean(0).topk(30).indices, y < 3
    batches = {"MLP": (X[:n, alive], y[:n]), "conv": (X[three][:200].view(-1, 1, 8, 8), y[three][:200])}
    found = {}
    for kind, data in batches.items():
        for eps in (TINY, 1e-5):
            found[f"{kind}, ε = {'0' if eps == TINY else '1e-5'}"] = census(kind, eps, data, run.device)
            run.tick()
    counts = all(c["predicted"] == c["train count"] == c["frozen count"] for c in found.values())
    worst = max(max(c["train"]) for c in found.values())
    frozen_gap = min(max(c["frozen"]) for c in found.values())
    said = ", ".join(f"{name}: {c['train count']}/{c['predicted']}" for name, c in found.items())
    untilted = found["MLP, ε = 1e-5"]["untilted"]
    said += f"; |V b|/(|V| |b|) ≤ {worst:.0e}; frozen: same counts, |V b| up to {frozen_gap:.2f}; radial vector "
    said += f"without its tilt {untilted:.0e}"
    yield check("X13", counts and worst < 1e-12 and frozen_gap > 1e-3, said, census=found)

    x = torch.randn(6, 5, 4, 4, device=run.device)
    rows = x.permute(0, 2, 3, 1).reshape(-1, 5)
    as_rows = nn.BatchNorm1d(5).to(run.device)(rows).view(6, 4, 4, 5).permute(0, 3, 1, 2)
    gap = relative(nn.BatchNorm2d(5).to(run.device)(x), as_rows)
    conv = found["conv, ε = 1e-5"]
    said = f"error {gap:.0e}; conv network: null space {conv['train count']} counted, {conv['predicted']} predicted"
    yield check("G3", gap < 1e-12 and conv["train count"] == conv["predicted"], said, error=gap)


def bias_rows(run: Run) -> Iterator[Row]:
    """W5, G1: a bias below BatchNorm."""
    data = digits(64, run.seed, standardised=True, device=run.device)
    net = mlp((64, 16, 16, 10), device=run.device).train()
    shares = {}
    for method in ("coupled", "dense"):
        result = bncurv.curvature(net, CE, data, bncurv.DiagGGNExact(), bncurv.ComponentGrad(), method=method)
        gradient = {name: g.sum(0).norm() for name, g in result.grad_component.items()}
        diagonal = {name: t.mean() for name, t in result.diag_ggn_exact.items()}
        pairs = [(f"{i}.bias", f"{i}.weight") for i in (0, 3)]
        for what, part in (("gradient", gradient), ("diagonal", diagonal)):
            shares[f"{what}, {method}"] = max(float(part[b] / part[w]) for b, w in pairs)
    said = ", ".join(f"{what} {share:.0e}" for what, share in shares.items()) + " of the weights'"
    yield check("W5", max(shares.values()) < 1e-14, said, **shares)

    bare = mlp((64, 16, 16, 10), bias=False, device=run.device).train()
    bare.load_state_dict(net.state_dict(), strict=False)
    with_bias, without = ggn(net, data), ggn(bare, data)
    same = with_bias.rank == without.rank
    gap = float((with_bias.eigenvalues - without.eigenvalues).abs().max() / without.eigenvalues[0]) if same else 1.0
    said = f"rank {with_bias.rank} with, {without.rank} without b; spectra differ by {gap:.0e} of λ_1"
    yield check("G1", same and gap < 1e-10, said, error=gap)


def picture(rank: Row, null: Row) -> figures.Figure:
    """Spectra with the predicted rank; the predicted null vectors in both modes."""
    figure, (left, right) = figures.panels(2, size=(11.5, 4.6))
    colors = (figures.SKY, figures.BLUE, figures.PURPLE)
    for color, (steps, values) in zip(colors, rank.numbers["spectra"].items(), strict=True):
        left.semilogy(range(1, len(values) + 1), values / values[0], color=color, linewidth=2, label=f"step {steps}")
    figures.reference_line(left, f"N (C - 1) = {rank.numbers['bound']}", x=rank.numbers["bound"])
    left.set(xlabel="index", ylabel="eigenvalue / λ_1", title="The spectrum ends where predicted", ylim=(1e-35, 3))
    left.legend(loc="lower left")

    c = null.numbers["census"]["MLP, ε = 1e-5"]
    index = range(1, len(c["kinds"]) + 1)
    for mode in ("train", "frozen"):
        style = figures.look(mode, linestyle="")
        right.semilogy(index, [max(v, 1e-19) for v in c[mode]], **style)
    edges = [c["kinds"].index(kind) for kind in ("radial", "rescaling", "shift")]
    for edge in edges:
        right.axvline(edge + 0.5, color=figures.GREY, linewidth=0.8)
    for kind, start, stop in zip(
        ("bias", "radial", "rescaling", "shift"), [0, *edges], [*edges, len(index)], strict=True
    ):
        right.annotate(kind, ((start + stop + 1) / 2, 5), ha="center")
    right.set(
        xlabel="predicted null vector b (MLP, ε = 1e-5)",
        ylabel="|V b| / (|V| |b|)",
        title="Same count, another null space",
        ylim=(1e-19, 30),
    )
    right.xaxis.get_major_locator().set_params(integer=True)
    right.legend(loc="center left")
    return figure


def experiment(run: Run) -> Iterator[Row]:
    """All rows."""
    run.expect(8)
    rows = [*rank_rows(run), *null_rows(run), *bias_rows(run)]
    run.tick()
    by_id = {row.id: row for row in rows}
    run.save(
        picture(by_id["D16"], by_id["X13"]),
        "Left: all N C eigenvalues at three stages of training; behind N (C - 1) only rounding. Right: every predicted "
        "vector is null in train mode (blue). Frozen (orange), the null space is as large, but biases and radial "
        "directions are not in it.",
    )
    yield from rows


if __name__ == "__main__":
    sys.exit(main(experiment))
