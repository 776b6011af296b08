"""What one forward pass leaves on its autograd graph.

A `Recorder` watches a forward pass without touching the model: it is a ``TorchFunctionMode``, so it sees every
``torch`` call of user code (modules or functional). Calls of the layer table leave a `Call` on the graph node
that they made; train-mode batch normalisations and registered coupled layers run gated and leave a `Coupling`.
Nothing global is kept: the marks live and die with the graph; ``graph.py`` collects them.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from traceback import walk_stack
from typing import Any, NamedTuple

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.nn.modules import module as torch_module
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from bncurv.batchnorm import batch_norm
from bncurv.gate import COUPLED, Coupling, Gates, couple
from bncurv.layers import LAYERS, BatchNormTrain, Layer

MARK = "bncurv"
MODEL = "bncurv.model"
RETAINED = "bncurv.retained"
_TRAIN = BatchNormTrain()


def metadata(node: Node) -> dict[str, Any]:
    """The notes that a graph node carries (torch's stubs take this attribute for a method)."""
    notes: Any = node.metadata
    return notes


def edges_below(node: Node) -> list[GradientEdge]:
    """Where a node's inputs come from."""
    return [GradientEdge(below, output_nr) for below, output_nr in node.next_functions if below is not None]


@dataclass(eq=False)
class Call:
    """One use of a table layer: the input it saw and the parameters it used."""

    layer: Layer
    name: str
    arguments: dict[str, Any]
    output: torch.Size
    versions: list[int]
    below: list[GradientEdge]

    @property
    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """The parameters among the arguments, with the names of their roles."""
        for role in self.layer.parameters:
            p = self.arguments.get(role)
            if p is not None and p.requires_grad:
                yield role, p

    def right(self, role: str, rows: slice = slice(None)) -> Tensor | None:
        """Right operand of a parameter product for some ``rows`` of the input."""
        inputs = {key: self.arguments[key] for key in self.layer.inputs}
        if [x._version for x in inputs.values()] != self.versions:
            raise RuntimeError(
                f"The input of layer '{self.name}' was modified in place after the layer had used it, so its "
                "gradient cannot be computed. Replace the in-place operation after this layer by its "
                "out-of-place form."
            )
        sliced = {key: x.detach()[rows] for key, x in inputs.items()}
        return self.layer.right(role, self.arguments | sliced, sliced["input"])


def _one_tensor(statistics: Any, module: nn.Module, name: str) -> Tensor:
    if isinstance(statistics, Tensor):
        return statistics
    raise TypeError(
        f"The pair registered for {type(module).__name__}, called as module '{name}': stats returned "
        f"{type(statistics).__name__}; expected one tensor [*s] (stack several into one)."
    )


def _check_pair(name: str, kind: str, x: Tensor, expected: Tensor, y: Tensor) -> None:
    """Raise ValueError unless a registered pair reproduces its module, in value and in derivative."""
    if y.shape != expected.shape:
        problem = f"output's shape ({tuple(y.shape)} instead of {tuple(expected.shape)})"
    else:
        u = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y)
        pulled = [
            torch.autograd.grad(t, x, u, retain_graph=True, allow_unused=True)[0] if x.requires_grad else None
            for t in (expected, y)
        ]
        derivatives = [torch.zeros_like(x) if g is None else g for g in pulled]
        tolerance = 1e-8 if y.dtype == torch.float64 else 1e-3
        pairs = {"output": (expected, y), "derivative": tuple(derivatives)}
        wrong = [what for what, (a, b) in pairs.items() if not (a - b).norm() <= tolerance * (a.norm() + b.norm())]
        if not wrong:
            return
        a, b = pairs[wrong[0]]
        problem = f"{wrong[0]} by {float((a - b).abs().max()):.2e} (largest difference)"
    raise ValueError(
        f"The pair registered for {kind} does not reproduce module '{name}': it misses the {problem}. "
        "apply(module, x, copies) with copies = stats(module, x) expanded to one per sample must equal module(x). "
        "Correct the pair given to bncurv.register_coupled."
    )


def _plain_wanted(x: Tensor, *affine: Tensor | None) -> bool:
    """Whether a BatchNorm must run ungated: where PyTorch differentiates it otherwise than by one recorded graph.

    Inside ``torch.utils.checkpoint`` the second run must save the same tensors; ``torch.func`` transforms (asked for
    as `torch.autograd.Function` does) and forward-mode differentiation have rules for PyTorch's own BatchNorm only.
    """
    callers = (frame.f_globals.get("__name__") for frame, _ in walk_stack(None))
    return (
        torch._C._are_functorch_transforms_active()
        or any(unpack_dual(t).tangent is not None for t in (x, *affine) if t is not None)
        or "torch.utils.checkpoint" in callers
    )


class Mark(NamedTuple):
    """Contents of a marked node: a table call, a coupling, or both; ``rows`` is the output's first axis."""

    call: Call | None = None
    coupling: Coupling | None = None
    output_nr: int = 0
    rows: int = 0
    below: tuple[GradientEdge, ...] = ()


class Recorder(TorchFunctionMode):
    """Watch the forward pass of ``model`` inside a ``with`` block.

    Args:
        model: the model that runs in the block; gives modules their names.
        private: nobody but us pulls through the graph, so ``retain_grad()`` in its code means nothing.
    """

    def __init__(self, model: nn.Module, private: bool = False) -> None:
        super().__init__()
        self._private = private
        self._names = {id(m): name or type(m).__name__ for name, m in model.named_modules()}
        self._stack: list[str] = [type(model).__name__]
        self._gates = Gates()

    def __enter__(self) -> Recorder:
        self._hooks = [
            register_module_forward_pre_hook(self._enter_module),
            register_module_forward_hook(self._leave_module, with_kwargs=True, always_call=True),
        ]
        # compiled modules run eagerly meanwhile; asking for that would import the compiler where nobody has
        self._stance = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
        self._stance.__enter__()
        return super().__enter__()

    def __exit__(self, *exc: object) -> None:
        super().__exit__(*exc)
        self._stance.__exit__(None, None, None)
        for hook in self._hooks:
            hook.remove()
            torch_module._global_forward_hooks_with_kwargs.pop(hook.id, None)  # remove() forgets this entry

    def _enter_module(self, module: nn.Module, args: tuple) -> None:
        if id(module) in self._names:
            self._stack.append(self._names[id(module)])

    def _leave_module(self, module: nn.Module, args: tuple, *rest: Any) -> Any:
        kwargs, output = rest if len(rest) == 2 else ({}, None)  # after a failed forward PyTorch drops an argument
        if id(module) not in self._names:
            return None
        pair = COUPLED.get(type(module))
        if pair is not None and isinstance(output, Tensor) and output.requires_grad:
            output = self._couple(module, args[0] if args else next(iter(kwargs.values())), output)
        name = self._stack.pop()
        first = output[0] if isinstance(output, tuple | list) and output else output
        if isinstance(first, Tensor) and first.grad_fn is not None:
            metadata(first.grad_fn).setdefault("bncurv.module", (name, first.shape, first.output_nr))
        return output if pair is not None else None

    def _couple(self, module: nn.Module, x: Tensor, expected: Tensor) -> Tensor:
        pair, name = COUPLED[type(module)], self._stack[-1]
        y, copies, coupling = couple(
            lambda t: _one_tensor(pair.stats(module, t), module, name),
            lambda t, s: pair.apply(module, t, s),
            x,
            name,
            self._gates,
        )
        _check_pair(name, type(module).__name__, x, expected, y)
        if coupling is not None:
            node = get_gradient_edge(copies).node
            mark = Mark(None, coupling, copies.output_nr, len(copies), tuple(edges_below(node)))
            metadata(node)[MARK] = mark
        return y

    def __torch_function__(self, func, types, args=(), kwargs=None):
        layer = LAYERS.get(func)
        if func is Tensor.retain_grad:
            return self._retain_grad(args[0])
        if layer is None or not torch.is_grad_enabled():
            return func(*args, **(kwargs or {}))
        arguments = {**dict(zip(layer.arguments, args, strict=False)), **(kwargs or {})}
        if func is nnf.batch_norm and arguments.get("training", False):
            if not _plain_wanted(arguments["input"], arguments.get("weight"), arguments.get("bias")):
                return self._batch_norm(arguments)
        output = func(*args, **(kwargs or {}))
        if layer.accepts(arguments):
            self._mark(output, layer, arguments)
        return output

    def _retain_grad(self, x: Tensor) -> None:
        if self._private and x.requires_grad:
            return
        x.retain_grad()
        if x.grad_fn is not None:
            metadata(x.grad_fn).setdefault(RETAINED, []).append(weakref.ref(x))

    def _batch_norm(self, arguments: dict[str, Any]) -> Tensor:
        x, affine = arguments["input"], {role: arguments.get(role) for role in ("weight", "bias")}
        fused = all(p is None or p.is_leaf for p in affine.values())
        if not fused:  # a computed weight must stay on the graph: normalise, then multiply
            arguments = {**arguments, "weight": None, "bias": None}
        y, coupling, statistics = batch_norm(arguments, self._stack[-1], self._gates)
        self._mark(y, _TRAIN, {**arguments, **statistics}, coupling)
        if not fused:
            axes = (1, -1) + (1,) * (x.dim() - 2)
            for role, combine in (("weight", torch.mul), ("bias", torch.add)):
                p = affine[role]
                y = y if p is None else combine(y, p.view(axes))
        return y

    def _mark(self, output: Tensor, layer: Layer, arguments: dict[str, Any], coupling: Coupling | None = None) -> None:
        given = [arguments.get(role) for role in layer.parameters]
        learnt = [p for p in given if p is not None and p.requires_grad]
        if output.grad_fn is None or not (learnt or coupling) or not all(p.is_leaf for p in learnt):
            return
        inputs = [arguments[key] for key in layer.inputs]
        below = [get_gradient_edge(x) for x in inputs if x.requires_grad]
        versions = [x._version for x in inputs]
        call = Call(layer, self._stack[-1], arguments, output.shape, versions, below) if learnt else None
        metadata(output.grad_fn)[MARK] = Mark(call, coupling, output.output_nr, len(output), tuple(below))
