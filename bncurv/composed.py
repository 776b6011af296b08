"""What ``backward()`` was called on: the extended loss times a number, or something else, which is refused.

The gradient that arrives at the loss does not tell: that of ``loss.sqrt()`` is a number like that of ``3 * loss``, and
other terms never pass there. So the graph between the two is read: it may only add, average, reshape and multiply with
what is independent of the model, and nothing beside the loss may lead to the model's parameters.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from bncurv.marks import LOSS, metadata
from bncurv.quantities import Quantity
from bncurv.turns import backward_frame

# Nodes of PyTorch's graph, by their names without "Backward0": linear in all inputs together; piecewise, so with the
# same curvature almost everywhere; linear in each input (a quotient in its first)
_LINEAR = {
    *("Add", "Sub", "Rsub", "Neg", "Sum", "Nansum", "Mean", "Stack", "Cat", "Where", "Cumsum", "Trace", "Diagonal"),
    *("View", "UnsafeView", "ReshapeAlias", "Expand", "Repeat", "Squeeze", "Unsqueeze", "Permute", "Transpose", "T"),
    *("Select", "Slice", "Index", "IndexSelect", "Gather", "Split", "SplitWithSizes", "Unbind", "AsStrided", "Flip"),
    *("Clone", "Alias", "Copy", "ToCopy", "MaskedFill", "NanToNum"),
    "BackwardHookFunction",
}
_PIECEWISE = {"Clamp", "ClampMin", "ClampMax", "Relu", "Abs"}
_PRODUCT = {"Mul", "Div", "Dot", "Mv", "Mm", "Bmm"}


def check_multiple(loss: str, token: object, thread: int, parameters: Iterable[Tensor]) -> None:
    """Called in a backward pass: raise RuntimeError unless it began at a multiple of the loss.

    Args:
        loss: the loss' class, for the message.
        token: among the notes at the node of the loss, under `LOSS`.
        thread: where ``backward()`` was called, perhaps.
        parameters: those whose curvature is asked for.
    """
    frame = backward_frame() or backward_frame(thread)
    roots: Sequence[Tensor | GradientEdge] = frame.f_locals["t_outputs"] if frame else ()
    between, beside = _read([r.grad_fn if isinstance(r, Tensor) else r.node for r in roots], token)
    if _reaches(beside, parameters):
        raise RuntimeError(
            f"backward() was called on {loss} composed with other terms that depend on the model, whose curvature "
            f"bncurv does not know. Call backward() on the extended loss (times a positive number, if you like), and "
            "add the gradient of other terms in a backward() outside the block."
        )
    if not any(_is_loss(node, token) for node in between):
        raise RuntimeError(
            f"It is not known what backward() was called on, so it is not known that it is a multiple of {loss}. "
            "Call it by loss.backward(), torch.autograd.backward or torch.autograd.grad."
        )
    for node in between:
        problem = None if _is_loss(node, token) else _nonlinear(node, between)
        if problem:
            raise RuntimeError(
                f"backward() was called on a function of {loss} that is no multiple of it, or not known to be one "
                f"({problem}), so its curvature is another one. Call backward() on the extended loss, times a positive "
                "number, if you like."
            )


def _is_loss(node: Node, token: object) -> bool:
    return token in metadata(node).get(LOSS, ())


def _read(roots: Sequence[Node | None], token: object) -> tuple[list[Node], list[Node]]:
    """Nodes above the loss, itself included, and all others; what is below the loss alone is not visited."""
    above: dict[Node, bool] = {}
    stack: list[tuple[Node, bool]] = [(node, False) for node in roots if node is not None]
    while stack:
        node, children_done = stack.pop()
        if children_done:
            above[node] = any(above.get(child, False) for child, _ in node.next_functions if child is not None)
        elif node not in above:
            above[node] = _is_loss(node, token)
            if not above[node]:
                stack.append((node, True))
                stack.extend((child, False) for child, _ in node.next_functions if child is not None)
    return [n for n, is_above in above.items() if is_above], [n for n, is_above in above.items() if not is_above]


def _reaches(nodes: list[Node], parameters: Iterable[Tensor]) -> bool:
    ids = {id(p) for p in parameters}
    return any(id(getattr(node, "variable", None)) in ids for node in nodes)


def _nonlinear(node: Node, above: Collection[Node]) -> str | None:
    """What a node between the loss and the start of backward() does, unless it is linear in the loss."""
    name = re.sub(r"(Backward|Backwards)\d*$", "", node.name().removeprefix("torch::autograd::"))
    inputs = [i for i, (child, _) in enumerate(node.next_functions) if child in above]
    if name in _LINEAR | _PIECEWISE or (name in _PRODUCT and inputs == [0]):
        return None
    if name in _PRODUCT - {"Div"} and len(inputs) == 1:
        return None
    return "a product of losses" if name == "Mul" else node.name()


def expect_gradient(
    loss: str,
    output: Tensor,
    gradient: Tensor,
    wanted: Mapping[str, Tensor],
    grads: Mapping[str, Tensor | None],
    quantities: Sequence[Quantity],
) -> Callable[[], None]:
    """A check for the end of ``backward()``: ``.grad`` must have grown by this loss' gradient.

    Args:
        loss: the loss' class, for the message.
        output: the model's output.
        gradient: that of the loss there.
        wanted: the parameters whose curvature is asked for.
        grads: ``.grad`` before, of those that are checked.
        quantities: what is taken back if the check fails.
    """
    before = {name: (g, None if g is None else (g._version, g.detach().clone())) for name, g in grads.items()}
    parameters = [wanted[name] for name in grads]
    pull = partial(torch.autograd.grad, retain_graph=True, allow_unused=True, materialize_grads=True)
    expected = pull(output, parameters, gradient) if parameters else ()
    # same kernels as backward()'s: equal to rounding; for a zero gradient (bias before a BatchNorm) to the whole's
    relative = 1e-9 if gradient.dtype == torch.float64 else 1e-4
    whole = torch.stack([own.norm() for own in expected]).norm() if parameters else 0.0

    def check() -> None:  # all tensors here are detached
        for (name, (found, as_it_was)), own in zip(before.items(), expected, strict=True):
            now = wanted[name].grad
            if now is None or (now is found and as_it_was and now._version == as_it_was[0]):
                continue  # torch.autograd.grad, or backward(inputs=...): nothing was accumulated here
            grown, scale = now.detach(), own.norm()
            if as_it_was:
                grown, scale = grown - as_it_was[1], scale + as_it_was[1].norm()
            if not (grown - own).norm() <= relative * (scale + 0.1 * whole):
                for q in quantities:
                    q.withdraw(wanted)
                raise RuntimeError(
                    f"backward() gave '{name}' a gradient that is not that of {loss} alone (relative difference "
                    f"{float((grown - own).norm() / (scale + 0.1 * whole)):.1e}): a module's backward hook "
                    "changes gradients. Use bncurv.curvature, which leaves hooks out, or remove the hook."
                )

    return check
