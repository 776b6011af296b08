"""All differentiable operations that PyTorch tests itself with: batched backward passes against a loop; in a network.

With torch 2.13 the batched backward (``torch.vmap``) of two of them is another map: that of ``cdist``, unless p = 2
goes by matrix products, and that of ``roll`` on a tensor without axes. bncurv notices both.
"""

import itertools
import re
import sys
import types
import unittest
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import Net, float64
from torch import Tensor, nn

from bncurv import DiagGGNExact, curvature, reference
from bncurv.linearity import Verdict, examine
from bncurv.passes import vjp
from bncurv.probes import pattern

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
WRONG = {"cdist", "roll"}


def operations() -> list[Any]:
    """PyTorch's own table of operations with inputs; importing it forbids to set backend flags, which is undone."""
    sys.modules.setdefault("expecttest", types.SimpleNamespace(TestCase=unittest.TestCase))  # type: ignore[arg-type]
    table = pytest.importorskip("torch.testing._internal.common_methods_invocations").op_db
    vars(torch.backends)["__allow_nonbracketed_mutation_flag"] = True
    return [op for op in table if op.supports_autograd and torch.float64 in op.supported_dtypes("cpu")]


def calls(op: Any, most: int | None = None) -> Iterator[Any]:
    """An operation's sample inputs."""
    try:
        yield from itertools.islice(op.sample_inputs("cpu", torch.float64, requires_grad=True), most)
    except NotImplementedError:  # for sparse layouts
        return


def run(op: Any, sample: Any, x: Any = None) -> list[Tensor]:
    """The differentiable outputs of one call, at another input perhaps."""
    return list(tensors(op(sample.input if x is None else x, *sample.args, **sample.kwargs)))


def tensors(found: Any) -> Iterator[Tensor]:
    """Those in nested lists that a backward pass can start at or end in."""
    if isinstance(found, Tensor):
        if found.requires_grad and found.dtype == torch.float64 and found.layout == torch.strided and found.numel():
            yield found
    elif isinstance(found, list | tuple):
        for part in found:
            yield from tensors(part)


def apart(rows: list[Tensor | None], loop: list[Tensor | None]) -> bool:
    """Whether they differ by more than rounding; inputs and cotangents are of size 1."""
    for a, b in zip(rows, loop, strict=True):
        a, b = (t if t is not None else torch.zeros(()) for t in (a, b))
        if not float((a - b).abs().max()) <= 1e-10 * float(b.abs().max()) + 1e-11:
            return True
    return False


def judged(op: Any, sample: Any) -> tuple[bool, Verdict] | None:
    """Whether batched rows differ from a loop's, and what bncurv says of them; ``None``: nothing to differentiate."""
    ends = list(tensors([sample.input, list(sample.args), list(sample.kwargs.values())]))
    outputs = run(op, sample)
    if not ends or not outputs:
        return None
    u = pattern((3, *outputs[0].shape), outputs[0])
    loop = vjp(outputs[:1], ends, [u], singly=True)
    sizes = [float(g.abs().max()) for g in loop if g is not None]
    if not 1e-11 < max(sizes, default=0.0) < float("inf"):  # nothing but rounding, or a singular point
        return None
    rows = vjp(outputs[:1], ends, [u])
    return apart(rows, loop), examine(lambda v: vjp(outputs[:1], ends, [v], singly=True), u, rows)


def test_batched_backward_passes_against_a_loop():
    """Where they differ the comparison sees it, and nowhere else."""
    found, wrong = set(), set()
    for op in operations():
        for sample in calls(op):
            verdict = judged(op, sample)
            if verdict is None:
                continue
            assert verdict[0] == (verdict[1] is not Verdict.RIGHT), (op.name, sample, verdict)
            found.add(op.name)
            wrong |= {op.name} if verdict[0] else set()
    assert len(found) > 300
    if re.match(r"2\.13\.", torch.__version__):
        assert wrong == WRONG


def network(op: Any, sample: Any) -> tuple[nn.Module, Tensor, Tensor] | None:
    """A linear layer, the operation on each sample's row, a batch of two; ``None`` where that is no function."""
    x = sample.input
    if not isinstance(x, Tensor) or x.dtype != torch.float64 or not 0 < x.numel() <= 30:
        return None

    def each(row: Tensor) -> Tensor:
        return torch.cat([t.flatten() for t in run(op, sample, x.detach() + 0.01 * row.view(x.shape))])

    rows = torch.randn(2, x.numel(), requires_grad=True)
    try:
        outputs = run(op, sample, x.detach() + 0.01 * rows[0].view(x.shape))
    except RuntimeError:  # for sparse inputs, or for views into a larger storage: PyTorch's own refusal
        return None
    if not outputs or not torch.equal(each(rows[0]), each(rows[0])):  # random, or not differentiable
        return None
    size = len(each(rows[0]))
    model = Net(lambda net, X: torch.stack([each(row) for row in net.a(X)]), a=nn.Linear(3, x.numel()))
    fine = 0 < size <= 30 and bool(each(rows[0]).isfinite().all())
    return (model, torch.randn(2, 3), torch.randn(2, size)) if fine else None


def test_operations_in_a_network():
    """Whatever the operation, the numbers are the oracle's."""
    tried = set()
    for op in operations():
        for sample in calls(op, None if op.name in WRONG else 4):
            with float64(0):
                try:
                    problem = network(op, sample)
                except NotImplementedError:  # for this layout
                    problem = None
                if problem is None:
                    continue
                model, X, y = problem
                want = reference.ggn_diagonal(model, nn.MSELoss(), X, y)
                if not all(bool(t.isfinite().all()) for t in want.values()):
                    continue
                got = curvature(model, nn.MSELoss(), (X, y), DiagGGNExact(), method="dense").diag_ggn_exact
            for name, t in want.items():
                assert float((got[name] - t).norm()) <= 1e-10 * float(t.norm()) + 1e-20, (op.name, sample)
            tried.add(op.name)
    assert len(tried) > 250
