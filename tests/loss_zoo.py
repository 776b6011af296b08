"""Losses of PyTorch and of other libraries, written anew, each with what becomes of its curvature."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

N, C = 6, 4
EXACT, ZERO = "exact", "zero, said"
NOT_CONVEX, ONCE, WHOLE = "refused: not convex", "refused: once differentiable", "exact, of the whole batch"


@dataclass(frozen=True)
class Entry:
    """A loss of output ``[N, *out]`` and the target that ``target(N, *out)`` makes."""

    name: str
    loss: Callable[[], Any]
    target: Callable[..., Tensor]
    verdict: str = EXACT
    head: Callable[[], nn.Module] = nn.Identity
    out: int = C

    def __str__(self) -> str:
        return self.name


def numbers(n: int, c: int) -> Tensor:
    return torch.randn(n, c)


def counts(n: int, c: int) -> Tensor:
    return torch.randn(n, c).abs().round()


def classes(n: int, c: int) -> Tensor:
    return torch.randint(c, (n,))


def binary(n: int, c: int) -> Tensor:
    return torch.randint(2, (n, c)).to(torch.get_default_dtype())


def signs(n: int, c: int) -> Tensor:
    return 2 * binary(n, c) - 1


def soft(n: int, c: int) -> Tensor:
    return torch.randn(n, c).softmax(1)


def label(o: Tensor, y: Tensor) -> Tensor:
    """The label's log-probability."""
    return o.log_softmax(1).gather(1, y[:, None])[:, 0]


def focal(o: Tensor, y: Tensor) -> Tensor:
    log_p = label(o, y)
    return (-((1 - log_p.exp()) ** 2) * log_p).mean()


def sigmoid_focal(o: Tensor, y: Tensor) -> Tensor:
    ce = F.binary_cross_entropy_with_logits(o, y, reduction="none")
    p = o.sigmoid()
    return ((0.25 * y + 0.75 * (1 - y)) * (1 - (p * y + (1 - p) * (1 - y))) ** 2 * ce).sum()


def asymmetric(o: Tensor, y: Tensor) -> Tensor:
    p = o.sigmoid()
    q = (1 - p + 0.05).clamp(max=1)
    return -(y * p.log() + (1 - y) * (1 - q) ** 4 * q.log()).sum()


def focal_detached(o: Tensor, y: Tensor) -> Tensor:
    log_p = label(o, y)
    return (-((1 - log_p.exp()) ** 2).detach() * log_p).mean()


def poly_one(o: Tensor, y: Tensor) -> Tensor:
    log_p = label(o, y)
    return (-log_p + 1 - log_p.exp()).mean()


def generalised(o: Tensor, y: Tensor) -> Tensor:
    return ((1 - label(o, y).exp() ** 0.7) / 0.7).mean()


def overlap(alpha: float, beta: float) -> Callable:
    def loss(o: Tensor, y: Tensor) -> Tensor:
        p = o.sigmoid()
        hit = (p * y).sum(1)
        return (1 - (hit + 1) / (hit + alpha * (p * (1 - y)).sum(1) + beta * ((1 - p) * y).sum(1) + 1)).mean()

    return loss


def lovasz_hinge(o: Tensor, y: Tensor) -> Tensor:
    def image(o: Tensor, y: Tensor) -> Tensor:
        errors, order = (1 - o * (2 * y - 1)).sort(descending=True)
        y = y[order]
        jaccard = 1 - (y.sum() - y.cumsum(0)) / (y.sum() + (1 - y).cumsum(0))
        return errors.relu() @ torch.cat([jaccard[:1], jaccard.diff()])

    return torch.stack([image(a, b) for a, b in zip(o, y, strict=True)]).mean()


def coral(o: Tensor, y: Tensor) -> Tensor:
    levels = (y[:, None] > torch.arange(o.shape[1])).to(o.dtype)
    return -(F.logsigmoid(o) * levels + (F.logsigmoid(o) - o) * (1 - levels)).sum(1).mean()


def cumulative_link(o: Tensor, y: Tensor) -> Tensor:
    cuts = torch.cat([o.new_tensor([-torch.inf]), torch.linspace(-1, 1, C - 1).to(o), o.new_tensor([torch.inf])])
    return -((cuts[y + 1] - o[:, 0]).sigmoid() - (cuts[y] - o[:, 0]).sigmoid()).log().mean()


def evidential(o: Tensor, y: Tensor) -> Tensor:
    mean, v, a, b = o[:, 0], F.softplus(o[:, 1]), F.softplus(o[:, 2]) + 1, F.softplus(o[:, 3])
    omega = 2 * b * (1 + v)
    fit = (a + 0.5) * (v * (y[:, 0] - mean) ** 2 + omega).log()
    return (0.5 * (math.pi / v).log() - a * omega.log() + fit + a.lgamma() - (a + 0.5).lgamma()).mean()


def tweedie(o: Tensor, y: Tensor) -> Tensor:
    return (-y * (-0.5 * o).exp() / -0.5 + (0.5 * o).exp() / 0.5).mean()


def gamma_nll(o: Tensor, y: Tensor) -> Tensor:
    return (y.abs() * (-o).exp() + o).mean()


def pinball(o: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(0.9 * (y - o), -0.1 * (y - o)).mean()


def log_cosh(o: Tensor, y: Tensor) -> Tensor:
    return (o - y).cosh().log().mean()


def charbonnier(o: Tensor, y: Tensor) -> Tensor:
    return ((o - y).square() + 1e-2).sqrt().sum()


def cauchy(o: Tensor, y: Tensor) -> Tensor:
    return (4 * (o - y).square()).log1p().mean()


def euclidean(o: Tensor, y: Tensor) -> Tensor:
    return (o - y).norm(dim=1).mean()


def cosine(o: Tensor, y: Tensor) -> Tensor:
    return F.cosine_embedding_loss(o, y, torch.ones(len(o)))


def nt_xent(o: Tensor, y: Tensor) -> Tensor:
    z = F.normalize(o, dim=1)
    return F.cross_entropy((z @ z.T / 0.5).fill_diagonal_(-1e9), torch.arange(len(o)).roll(1))


def triplet(o: Tensor, y: Tensor) -> Tensor:
    return F.triplet_margin_loss(o, o.roll(1, 0), o.roll(2, 0), margin=5.0)


def cox(o: Tensor, y: Tensor) -> Tensor:
    """Who fails next among those still at risk; times y."""
    at_risk = y[:, 0] >= y[:, :1]
    return (o[:, 0].masked_fill(~at_risk, -torch.inf).logsumexp(1) - o[:, 0]).mean()


def rank_net(o: Tensor, y: Tensor) -> Tensor:
    return F.softplus((o - o.T)[y[:, :1] < y[:, 0]]).mean()


def centred(o: Tensor, y: Tensor) -> Tensor:
    return (o - o.mean(0) - y).square().mean()


def ctc(o: Tensor, y: Tensor) -> Tensor:
    log_p = o.unflatten(1, (2, 2)).transpose(0, 1).log_softmax(2)
    return F.ctc_loss(log_p, torch.ones(len(o), 1).long(), torch.full((len(o),), 2), torch.ones(len(o)).long())


def gaussian_nll(o: Tensor, y: Tensor) -> Tensor:
    return F.gaussian_nll_loss(o, y, torch.full_like(o, 0.3))


class Times(nn.Module):
    """Outputs that are far apart."""

    def forward(self, x: Tensor) -> Tensor:
        return 8 * x


class Penalised(nn.Module):
    """A multiple of a cross-entropy, with a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.CrossEntropyLoss(weight=torch.linspace(0.5, 2, C), label_smoothing=0.1)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return 0.3 * self.inner(logits, labels) + 7


ZOO = [
    Entry("`F.cross_entropy`, `partial`s of it", lambda: partial(F.cross_entropy, label_smoothing=0.2), classes),
    Entry("wrapper around `CrossEntropyLoss`", Penalised, classes),
    Entry("`HuberLoss`", lambda: nn.HuberLoss(delta=0.7), numbers),
    Entry("`SmoothL1Loss`", nn.SmoothL1Loss, numbers),
    Entry("`PoissonNLLLoss`", nn.PoissonNLLLoss, counts),
    Entry("`GaussianNLLLoss`, variance given", lambda: gaussian_nll, numbers),
    Entry("`SoftMarginLoss`", nn.SoftMarginLoss, signs),
    Entry("`MultiLabelSoftMarginLoss`", nn.MultiLabelSoftMarginLoss, binary),
    Entry("`BCELoss` on probabilities", nn.BCELoss, binary, head=nn.Sigmoid),
    Entry("`KLDivLoss` of a log-softmax inside", lambda: lambda o, y: F.kl_div(o.log_softmax(1), y), soft),
    Entry("focal loss, weights detached", lambda: focal_detached, classes),
    Entry("Poly-1 cross-entropy", lambda: poly_one, classes),
    Entry("ordinal, CORAL", lambda: coral, classes),
    Entry("ordinal, cumulative link", lambda: cumulative_link, classes, out=1),
    Entry("Tweedie, log link", lambda: tweedie, counts),
    Entry("Gamma NLL, log link", lambda: gamma_nll, numbers),
    Entry("log-cosh", lambda: log_cosh, numbers),
    Entry("Charbonnier", lambda: charbonnier, numbers),
    Entry("Euclidean distance", lambda: euclidean, numbers),
    Entry("squared hinge", lambda: lambda o, y: (1 - o * y).relu().square().mean(), signs),
    Entry("Cox partial likelihood", lambda: cox, numbers, WHOLE, out=1),
    Entry("RankNet, pairs within the batch", lambda: rank_net, numbers, WHOLE, out=1),
    Entry("squared error of centred outputs", lambda: centred, numbers, WHOLE),
    Entry("`L1Loss`", nn.L1Loss, numbers, ZERO),
    Entry("quantile (pinball)", lambda: pinball, numbers, ZERO),
    Entry("`HingeEmbeddingLoss`", nn.HingeEmbeddingLoss, signs, ZERO),
    Entry("Lovász hinge", lambda: lovasz_hinge, binary, ZERO),
    Entry("`NLLLoss` on log-probabilities", nn.NLLLoss, classes, ZERO, lambda: nn.LogSoftmax(1)),
    Entry("`KLDivLoss` on log-probabilities", nn.KLDivLoss, soft, ZERO, lambda: nn.LogSoftmax(1)),
    Entry("focal loss, confident outputs", lambda: focal, classes, NOT_CONVEX, Times),
    Entry("sigmoid focal loss, confident outputs", lambda: sigmoid_focal, binary, NOT_CONVEX, Times),
    Entry("asymmetric loss, confident outputs", lambda: asymmetric, binary, NOT_CONVEX, Times),
    Entry("generalised cross-entropy", lambda: generalised, classes, NOT_CONVEX),
    Entry("Dice", lambda: overlap(0.5, 0.5), binary, NOT_CONVEX),
    Entry("Jaccard", lambda: overlap(1.0, 1.0), binary, NOT_CONVEX),
    Entry("Tversky", lambda: overlap(0.3, 0.7), binary, NOT_CONVEX),
    Entry("`CosineEmbeddingLoss`", lambda: cosine, numbers, NOT_CONVEX),
    Entry("Cauchy (Lorentzian)", lambda: cauchy, numbers, NOT_CONVEX),
    Entry("evidential regression", lambda: evidential, numbers, NOT_CONVEX),
    Entry("NT-Xent", lambda: nt_xent, numbers, NOT_CONVEX),
    Entry("triplets within the batch", lambda: triplet, numbers, NOT_CONVEX),
    Entry("`MultiMarginLoss`", nn.MultiMarginLoss, classes, ONCE),
    Entry("`MultiLabelMarginLoss`", nn.MultiLabelMarginLoss, lambda n, c: torch.randint(-1, c, (n, c)), ONCE),
    Entry("CTC", lambda: ctc, classes, ONCE),
]


def table() -> str:
    """As the README has it."""
    rows = [f"| {one.name} | {one.verdict} |" for one in ZOO]
    return "\n".join(["| loss | curvature |", "|---|---|", *rows]) + "\n"


if __name__ == "__main__":
    print(table(), end="")
