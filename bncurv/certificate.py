"""The certificate: with the gates closed, no sample may feel another; and whose each row is.

The pull-back with constant statistics is block-diagonal over samples if and only if scaling sample n's cotangent by f_n
scales all gradients of sample n by f_n and does nothing else. That is checked at every recorded layer, entry by entry,
for all pairs of samples: coupling of n' with n leaves (f_n' / f_n - 1) J_nn' u_n' behind in row n. The f_n are powers
of two, by which rounding commutes: without coupling nothing at all is left, also where a gradient cancels down to
rounding. They are 2^digit / loudness. The loudness, sample n's largest gradient, makes what a quiet sample leaves in a
loud one's row as large as it is beside its own. The digits are those of n's rank, the quieter the higher, to base 32,
one pass per digit: the highest digit in which two samples differ adds to what their loudness makes of f. The cotangents
u are the loss' own columns, mixed: what they do not reach plays no part.

Where rows are not the samples' in order, the same scaling tells whose they are: with f_n = 2^digit of n itself, the
largest entry of a row grows by its sample's digit. What is read so is then checked as above.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from bncurv.graph import Trace
from bncurv.order import Order
from bncurv.precision import COUPLED
from bncurv.probes import loudness, pattern, power_of_two

BASE = 32
Gradients = list[Tensor | None]
Orders = Mapping[int, Order]
Pull = Callable[[Tensor], Gradients]


def leaks(pull: Pull, u: Tensor, plain: Gradients, samples: int) -> bool:
    """Whether `leaking` finds anything."""
    return bool(leaking(pull, u, plain, samples))


def leaking(pull: Pull, u: Tensor, plain: Gradients, samples: int, orders: Orders | None = None) -> set[int]:
    """Where scaling the cotangents ``u [n·t, ...]`` per sample does more than scale their gradients.

    Args:
        pull: an ordinary backward pass.
        u: cotangents, sample by sample.
        plain: their gradients, with rows sample by sample, or in the order that is given for them.
        samples: N.
        orders: by index into ``plain``.

    Returns:
        Indices into ``plain``.
    """
    found = set[int]()
    of = {i: order.owner for i, order in (orders or {}).items()}
    before = {i: _rows(p, samples, of.get(i)) for i, p in enumerate(plain) if p is not None and p.numel()}
    if not before:
        return found
    sizes = {i: _largest(p, samples, of.get(i)) for i, p in before.items()}
    level = power_of_two(torch.stack(list(sizes.values())).amax(0))
    rank = level.argsort(descending=True).argsort()
    for digit in _digits(rank, samples):
        scale = torch.ldexp(1 / level, digit)
        found |= _moved(pull(_times(u, scale)), before, sizes, scale, of)
        if len(found) == len(before):
            break
    return found


def _moved(
    scaled: Gradients,
    before: Mapping[int, Tensor],
    sizes: Mapping[int, Tensor],
    scale: Tensor,
    of: Mapping[int, Tensor],
) -> set[int]:
    """Where gradients are not those of before times their samples' scale."""
    found = set[int]()
    for i, p in before.items():
        by, size = (t if i not in of else t[of[i]] for t in (scale, sizes[i]))
        after = scaled[i]
        back = torch.zeros_like(p) if after is None else after.reshape(p.shape) / by[:, None].to(p.dtype)
        if bool(((back - p).abs() > COUPLED[p.dtype] * p.abs() + _rounded(p, size)[:, None]).any()):
            found.add(i)
    return found


def _digits(number: Tensor, samples: int) -> Iterator[Tensor]:
    """Digits of numbers below N, to base `BASE`."""
    place = 1
    while place < samples:
        yield number // place % BASE
        place *= BASE


def _times(u: Tensor, scale: Tensor) -> Tensor:
    """``u [n·t, ...]`` times a number for each sample."""
    rows = scale.repeat_interleave(len(u) // len(scale))
    return u * rows.view(-1, *(1,) * (u.dim() - 1)).to(u.dtype)


def _rows(p: Tensor, samples: int, owner: Tensor | None) -> Tensor:
    """``[n, entries]``, or ``[rows, entries]`` where an owner is given for each."""
    return p.reshape(samples if owner is None else len(owner), -1)


def _largest(rows: Tensor, samples: int, owner: Tensor | None) -> Tensor:
    """Largest entry of each sample, ``[n]``."""
    size = loudness(rows)
    return size if owner is None else size.new_zeros(samples).scatter_reduce_(0, owner, size, "amax")


def _rounded(p: Tensor, size: Tensor) -> Tensor:
    """What may be left without coupling, by row: numbers too small for all their digits.

    On devices whose sums come in any order also rounding.
    """
    limits = torch.finfo(p.dtype)
    relative = 2.0**30 * limits.tiny + (0.0 if p.device.type == "cpu" else 8 * limits.eps)
    return relative * size + limits.tiny / limits.eps


def read_orders(pull: Pull, u: Tensor, plain: Gradients, axes: Mapping[int, int], samples: int) -> dict[int, Order]:
    """Whose the rows are, where each is one sample's; to be checked by `leaking`.

    Args:
        pull: an ordinary backward pass.
        u: cotangents, sample by sample.
        plain: their gradients.
        axes: which of them to look at, and how many of their leading axes may make up the rows.
        samples: N.
    """
    index = torch.arange(samples, device=u.device)
    scaled = [pull(_times(u, torch.ldexp(torch.ones_like(index, dtype=u.dtype), d))) for d in _digits(index, samples)]
    found = dict[int, Order]()
    for i, most in axes.items():
        p = plain[i]
        for lead in range(1, most + 1):
            owner = None if p is None else _owner(p.flatten(0, lead - 1), [s[i] for s in scaled], samples)
            if owner is not None and i not in found:
                found[i] = Order(lead, owner, samples)
    return found


def _owner(p: Tensor, scaled: Gradients, samples: int) -> Tensor | None:
    """The sample of each row; ``None`` where one is several samples'. A row that the loss does not reach is free."""
    rows = p.reshape(len(p), -1)
    largest, at = rows.abs().max(1, keepdim=True)
    owner, place = torch.zeros(len(rows), dtype=torch.int64, device=p.device), 1
    for s in scaled:
        if s is None:
            return None
        s = s.reshape(rows.shape)
        digit = torch.frexp(s.gather(1, at) / rows.gather(1, at))[1] - 1
        back = torch.ldexp(s, -digit)
        if bool(((back - rows).abs() > COUPLED[p.dtype] * rows.abs() + _rounded(rows, largest)).any()):
            return None
        owner += place * digit[:, 0]
        place *= BASE
    default = torch.arange(len(rows), device=p.device) * samples // len(rows)
    owner = torch.where(largest[:, 0] > 0, owner, default)
    return owner if bool(((owner >= 0) & (owner < samples)).all()) else None


def find_mixing(
    pull: Callable[[Tensor, list[GradientEdge]], Gradients], u: Tensor, trace: Trace, mixed: Iterable[int]
) -> str:
    """Where samples are mixed other than at the gates; call with the gates closed.

    Args:
        pull: an ordinary backward pass from the model's output to some edges.
        u: cotangents ``[n, *output]``.
        trace: the recorded graph.
        mixed: sites with rows of several samples.

    Returns:
        A sentence with the cause: the first module after which each row is one sample's.
    """
    if trace.ungated:
        return trace.ungated[0]
    samples, sites = len(u), [site.edge for site in trace.sites]
    modules = [(m, shape, edge) for m, shape, edge in trace.modules if shape and shape[0] and shape[0] % samples == 0]
    edges = [edge for *_, edge in modules]
    plain = pull(u, edges)
    mixed_there = leaking(lambda v: pull(v, edges), u, plain, samples)
    name = f"'{trace.sites[max(mixed)].name}'"
    for i, (module, shape, edge) in enumerate(modules):
        if i in mixed_there:
            continue

        def from_here(v: Tensor, edge: GradientEdge = edge) -> Gradients:
            return list(torch.autograd.grad(edge, sites, v, retain_graph=True, allow_unused=True))

        v = pattern(shape, u)
        if unowned(from_here, v, from_here(v), {}, samples)[0]:
            name = f"'{module}'"
            break
    return f"the samples of the batch are mixed in or before module {name}, other than by a known coupled layer."


def unowned(
    pull: Pull, u: Tensor, plain: Gradients, axes: Mapping[int, int], samples: int
) -> tuple[set[int], dict[int, Order]]:
    """Which rows are not one sample's each; and the order of those that are, where it is not sample by sample.

    Args:
        pull: an ordinary backward pass.
        u: cotangents, sample by sample.
        plain: their gradients.
        axes: how many leading axes of each may make up the rows, if more than one.
        samples: N.

    Returns:
        Indices into ``plain``; orders by index.
    """
    there = {i for i, p in enumerate(plain) if p is not None and p.numel()}
    if samples == 1:
        return set(), {}
    whole = [p if i in there and p is not None and len(p) % samples == 0 else None for i, p in enumerate(plain)]
    bad = leaking(pull, u, whole, samples) | {i for i in there if whole[i] is None}
    orders = read_orders(pull, u, plain, {i: axes.get(i, 1) for i in bad}, samples) if bad else {}
    some = [p if i in orders else None for i, p in enumerate(plain)]
    wrong = leaking(pull, u, some, samples, orders)
    return (bad - orders.keys()) | wrong, {i: order for i, order in orders.items() if i not in wrong}
