"""A snapshot of everything that a call must leave as it found it: `with unchanged(model): ...`."""

import contextlib
import random
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import backpack
import numpy as np
import sympy  # noqa: F401  PyTorch imports it at its first batched backward pass, which adds a filter of warnings
import torch
from backpack.context import CTX
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from bncurv import autocast, context, eager, turns

COMPILER = "torch._dynamo.eval_frame"
GLOBAL_HOOKS = [name for name in vars(torch_module) if name.startswith("_global_")]
# newer than the oldest PyTorch that is supported: there, hooks left behind are not seen
SAVED_TENSOR_HOOKS = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", bool)


def value(t: Tensor | None) -> Any:
    """A tensor by its bits, whatever its dtype (NaN equals NaN)."""
    if t is None or t.is_meta:
        return t if t is None else (t.dtype, tuple(t.shape), "meta")
    if t.layout != torch.strided:
        return t.layout, value(t.to_dense())
    flat = t.detach().contiguous().reshape(-1)
    return t.dtype, tuple(t.shape), bytes(flat.view(torch.uint8).tolist()) if t.numel() else b""


def of_process() -> dict[str, Any]:
    """Everything global that PyTorch or BackPACK keeps."""
    hooks = {name: getattr(torch_module, name) for name in GLOBAL_HOOKS}
    return {
        **{name: list(h.items()) if isinstance(h, dict) else h for name, h in hooks.items()},
        "function modes": torch.overrides._get_current_function_mode_stack(),
        "function transforms": torch._C._functorch.get_dynamic_layer_stack_depth(),
        "dispatch modes": torch._C._len_torch_dispatch_stack(),
        "saved-tensor hooks": SAVED_TENSOR_HOOKS(True),
        "random state": value(torch.get_rng_state()),
        "python's random state": random.getstate(),
        "NumPy's random state": str(np.random.get_state()),
        "warnings": list(warnings.filters),
        "compiler's stance": str(sys.modules[COMPILER]._stance) if COMPILER in sys.modules else None,
        "bncurv's own": (dict(turns._OWNER), dict(turns._HELD), dict(eager._WATCHERS), list(context._BLOCKS)),
        "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "default dtype": torch.get_default_dtype(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), torch.autocast.__enter__),
        "autocast kept off": (autocast._off(), dict(autocast._CALLS), dict(autocast._BEFORE)),
        "autocast's regions": (torch.autocast_increment_nesting(), torch.autocast_decrement_nesting()),
        "BackPACK": (CTX.active_exts, CTX.extension_hook, CTX.debug, CTX.retain_graph),
        "BackPACK stores": backpack.disable.store_io,
        "BackPACK's hooks": list(CTX.hook_handles),
    }


def of_module(prefix: str, m: nn.Module) -> dict[str, Any]:
    """Attributes, mode and hooks of one module."""
    hooks = {name: list(h.items()) for name, h in vars(m).items() if "_hooks" in name and h}
    return {
        f"{prefix} attributes": sorted(vars(m)),
        f"{prefix} forward": vars(m).get("forward"),
        f"{prefix} mode": m.training,
        f"{prefix} hooks": hooks,
        f"{prefix} entries": {n: id(t) for n, t in (m._parameters | m._buffers).items()},
        **{f"{prefix} buffer {n}": value(b) for n, b in m._buffers.items()},
    }


def of_parameter(prefix: str, p: Tensor) -> dict[str, Any]:
    """Value, gradient (the object and its value), attributes and hooks of one parameter."""
    return {
        f"{prefix} value": value(p),
        f"{prefix} version": p._version,
        f"{prefix} requires_grad": p.requires_grad,
        f"{prefix} grad": (id(p.grad), value(p.grad)),
        f"{prefix} attributes": sorted(vars(p)),
        f"{prefix} hooks": [list((h or {}).items()) for h in (p._backward_hooks, p._post_accumulate_grad_hooks)],
    }


def snapshot(*modules: nn.Module) -> dict[str, Any]:
    """What is seen of the process and of the modules, as a flat dictionary."""
    seen = of_process()
    for i, root in enumerate(modules):
        for name, m in root.named_modules():
            seen |= of_module(f"{i} {name or type(m).__name__}", m)
        for name, p in root.named_parameters():
            seen |= of_parameter(f"{i} {name}", p)
    return seen


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Names of the entries that are not equal."""
    return sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k))


@contextlib.contextmanager
def unchanged(*modules: nn.Module, but: tuple[str, ...] = ()) -> Iterator[None]:
    """Assert that the block leaves no trace, except in entries with one of the words ``but``."""
    before = snapshot(*modules)
    yield
    left = differences(before, snapshot(*modules))
    assert [entry for entry in left if not any(word in entry for word in but)] == []
