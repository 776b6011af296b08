"""What arrives, before it is used: quantities, options, parameters, batches, outputs. Complaints say what to do."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bncurv.graph import Trace, coarsest, leaves
from bncurv.nested import named, tensors
from bncurv.precision import ulp
from bncurv.quantities import Quantity
from bncurv.slow import listed, user_level

QUANTIZED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "torch.nn.quantized")


def check_quantities(quantities: Iterable[Any]) -> None:
    """Raise TypeError/ValueError unless these are distinct bncurv quantities, at least one."""
    names = []
    for q in quantities:
        if not isinstance(q, Quantity):
            hint = f"{q.__name__}()" if isinstance(q, type) else "e.g. bncurv.DiagGGNExact()"
            raise TypeError(f"quantity {q!r} is not an instance of a bncurv quantity; expected {hint}.")
        names.append(q.field)
    if not names:
        raise ValueError("no quantity asked for; pass at least one, e.g. bncurv.DiagGGNExact().")
    if len(set(names)) < len(names):
        raise ValueError(f"quantities {names} name the same field twice; ask for each once.")


def check_options(method: str, tol: float, chunk_size: int | None) -> None:
    """Raise ValueError for a method, tolerance or chunk size that means nothing."""
    if method not in ("auto", "coupled", "dense"):
        raise ValueError(f"method={method!r}; expected 'auto', 'coupled' or 'dense'.")
    if isinstance(tol, bool) or not isinstance(tol, int | float) or not 0 <= tol < 1:
        raise ValueError(f"tol={tol!r}; expected a relative tolerance, 0 <= tol < 1.")
    if chunk_size is not None and (not isinstance(chunk_size, int) or isinstance(chunk_size, bool) or chunk_size < 1):
        raise ValueError(f"chunk_size={chunk_size!r}; expected None or a positive integer (vectors held at once).")


def dtype_of(precision: Any) -> torch.dtype | None:
    """The dtype that ``precision`` names; ValueError for another than single and double precision."""
    for dtype in (torch.float32, torch.float64):
        if isinstance(precision, str | torch.dtype) and precision in (dtype, str(dtype).removeprefix("torch.")):
            return dtype
    if precision is not None:
        raise ValueError(f"precision={precision!r}; expected 'float32', 'float64', or None for the model's own.")
    return None


def check_modules(model: nn.Module) -> None:
    """Raise TypeError for quantized modules: autograd has no derivative there, so all before them would be zero."""
    for name, module in model.named_modules():
        if type(module).__module__.startswith(QUANTIZED):
            raise TypeError(
                f"module '{name}' ({type(module).__name__}) is quantized: PyTorch has no derivative there, so all "
                "that lies before it would have no curvature. Use the model before its conversion."
            )


def check_input(X: Any, name: str = "X") -> list[str]:
    """Raise ValueError for an input that is empty, without values, or not finite.

    Returns:
        Which of several parts hold -inf: additive attention masks may, if `check_finite` finds nothing.
    """
    masks = []
    for part, t in named(name, X):
        if t.is_meta:
            raise ValueError(f"{part} of shape {tuple(t.shape)} is on the meta device: it has no values.")
        if t.numel() == 0:
            raise ValueError(f"the batch is empty: {part} has shape {tuple(t.shape)}; expected at least one sample.")
        if t.layout != torch.strided or t.is_nested or not t.is_floating_point() or bool(t.isfinite().all()):
            continue
        if isinstance(X, Tensor) or not bool((t < math.inf).all()):  # NaN is not, too
            bad = (~t.isfinite()).reshape(len(t), -1).any(1).nonzero().flatten().tolist() if t.dim() else [0]
            raise ValueError(
                f"{part} has NaN or inf in sample(s) {bad[:5]}; curvature is undefined there. Remove them."
            )
        masks.append(part)
    return masks


def check_finite(output: Tensor, wanted: Mapping[str, Tensor], masks: list[str]) -> None:
    """Raise ValueError where parts of the input that hold -inf leave no derivative."""
    if not masks:
        return
    ones = torch.ones_like(output)
    found = torch.autograd.grad(output, list(wanted.values()), ones, retain_graph=True, allow_unused=True)
    bad = [name for name, g in zip(wanted, found, strict=True) if g is not None and not bool(g.isfinite().all())]
    if bad:
        raise ValueError(
            f"{', '.join(masks)} has -inf, and with it the output has no derivative by {listed(bad)}: only what is "
            "added to the logits of a softmax may have it. Use a large negative number instead."
        )


def check_output(output: Any, y: Any, wanted: Mapping[str, Tensor], X: Any = None) -> None:
    """Raise unless the model's output can be differentiated sample by sample.

    Args:
        output: what the model returned.
        y: the targets, a tensor or a structure of them.
        wanted: parameters by name.
        X: the input, where it is known, for messages.

    Raises:
        TypeError: not a tensor, or in half precision.
        ValueError: no batch axis of y's length, empty, not finite, or without parameters behind it.
    """
    if not isinstance(output, Tensor):
        raise TypeError(
            f"the model returns {type(output).__name__}{_parts(output, y)}; expected one tensor [N, ...]. Wrap the "
            f"model, or say which one the loss takes: {_line(output, y)}."
        )
    if output.dim() == 0 or output.shape[0] not in _lengths(y):
        given = f"X has shape {tuple(X.shape)}, " if isinstance(X, Tensor) else ""
        shapes = " and ".join(f"{name} has shape {tuple(t.shape)}" for name, t in named("y", y))
        raise ValueError(
            f"{given}the model's output has shape {tuple(output.shape)} and {shapes}; expected the batch first and of "
            "equal length in output and y."
        )
    if len(output) == 0:
        raise ValueError(f"the batch is empty: the output has shape {tuple(output.shape)}; expected N > 0 samples.")
    device = next(iter(wanted.values())).device
    if output.is_meta or output.device != device:
        raise ValueError(
            f"the model's output is on {output.device}, its parameters on {device}: curvature across devices is not "
            "supported. Move the model and its input to one device."
        )
    kinds = {str(p.dtype) for p in wanted.values()} | {str(output.dtype)}
    if kinds not in ({"torch.float32"}, {"torch.float64"}):
        raise TypeError(
            f"parameters and output have dtypes {sorted(kinds)}{_lowest(wanted)}; expected all float32 or all float64 "
            "(half precision and autocast lose the digits that curvature needs). Use bncurv.curvature(..., "
            "precision='float32'), or call model.float() or model.double(), and X likewise."
        )
    if not bool(output.isfinite().all()):
        raise ValueError(
            "the model's output contains NaN or inf, so it has no curvature; check the inputs and parameters."
        )
    if not output.requires_grad:
        raise ValueError("the model's output depends on no parameter that requires grad (forward under no_grad?).")


def _lowest(wanted: Mapping[str, Tensor]) -> str:
    """The parameters in half precision."""
    low = [name for name, p in wanted.items() if p.dtype not in (torch.float32, torch.float64)]
    return f", {listed(low)} in half precision" if low else ""


def _tensors(output: Any, y: Any) -> dict[Any, Tensor]:
    """The tensors of a structured output that have as many rows as the target, by key or position."""
    positions = enumerate(output if isinstance(output, tuple | list) else ())
    parts = output.items() if isinstance(output, Mapping) else positions
    return {key: t for key, t in parts if isinstance(t, Tensor) and t.dim() and t.shape[0] in _lengths(y)}


def _lengths(y: Any) -> set[int]:
    """How many samples the targets may have."""
    return {len(t) for t in tensors(y) if t.dim()}


def _parts(output: Any, y: Any) -> str:
    found = ", ".join(f"[{key!r}] {tuple(t.shape)}" for key, t in _tensors(output, y).items())
    return f" with {found}" if found else ""


def _line(output: Any, y: Any) -> str:
    """The ``forward=`` that may be meant."""
    key = next(iter(_tensors(output, y)), 0)
    return f"forward=lambda model, batch: (model(batch[0])[{key!r}], batch[1])"


def check_own(output: Tensor, wanted: Mapping[str, Tensor], others: Iterable[Tensor]) -> None:
    """Raise ValueError where other tensors take part in place of parameters.

    Args:
        output: the model's.
        wanted: the parameters asked for, by name.
        others: the input's tensors, and the model's other parameters.
    """
    known = {id(t) for t in others} | {id(p) for p in wanted.values()}
    found = {id(t): t for t in leaves(output)}
    strange = {t.shape for key, t in found.items() if key not in known}
    idle = {name: p.shape for name, p in wanted.items() if id(p) not in found}
    replaced = [name for name, shape in idle.items() if shape in strange]
    if replaced or (strange and len(idle) == len(wanted)):
        raise ValueError(
            f"the output does not depend on parameter(s) {listed(replaced or idle)}, but on tensors that are none of "
            f"the model's parameters, of shape {tuple(idle[replaced[0]] if replaced else strange.pop())} "
            "(torch.func.functional_call with tensors of your own, parameters replaced during the forward pass?). Put "
            "these into the model, e.g. by load_state_dict, or leave the parameters out with params=."
        )


def check_precision(trace: Trace, output: Tensor) -> None:
    """Raise TypeError where a part of the model computes in half precision; warn of single inside of double.

    Raises:
        TypeError: with the modules' names.
    """
    dtype, operation, module = coarsest(output)
    single, digits = ulp(torch.float32), ulp(dtype)
    where = f"inside the model ({operation}{f' below the output of module {module!r}' if module else ''})"
    if digits == single > ulp(output.dtype):
        warnings.warn(
            f"There are {dtype} numbers {where}, by a cast in its code: the results are float64 with the digits of "
            "float32. Let the code follow x.dtype.",
            stacklevel=user_level(),
        )
    if digits > single and not trace.lowered:
        raise TypeError(
            f"There are {dtype} numbers {where}, which lose the digits that curvature needs: autocast, or a cast in "
            "the code, where only PyTorch sees it (scripted, exported). Use the module that this was made from."
        )
    if trace.lowered:
        raise TypeError(
            f"Module(s) {listed(dict.fromkeys(trace.lowered))} compute in half precision inside the model (autocast, "
            "or a cast in the code), which loses the digits that curvature needs. Use bncurv.curvature(..., "
            "precision='float32'), which runs modules and autocast regions in float32; a cast in the code must go."
        )


def check_grads(parameters: Mapping[str, Tensor], before: Mapping[str, tuple[Tensor | None, int | None]]) -> None:
    """Raise RuntimeError where our passes have accumulated into ``.grad``: a backward pass that calls ``backward()``.

    Args:
        parameters: by name.
        before: their ``.grad`` before the passes, and its version.
    """
    changed = [
        name
        for name, p in parameters.items()
        if p.grad is not before[name][0] or (p.grad is not None and p.grad._version != before[name][1])
    ]
    if changed:
        raise RuntimeError(
            f"The backward pass of the model adds to .grad of {listed(changed)} by itself: a custom autograd Function "
            "calls backward() inside (reversible or memory-saving blocks), which torch.autograd.grad cannot follow. "
            "Let it return these gradients (torch.autograd.grad inside), or leave the parameters out with params=...."
        )
