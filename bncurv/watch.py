"""Seeing a forward pass go by: which module runs, what it returns; everything put back afterwards."""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn.modules import module as torch_module
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from bncurv.constants import Constants
from bncurv.eager import release, run_eagerly
from bncurv.gate import COUPLED, Gates, recoupled
from bncurv.marks import MARK, MODULE, RETAINED, Mark, edges_below, metadata


class Watch(TorchFunctionMode):
    """Watch the forward pass of ``model`` inside a ``with`` block.

    Args:
        model: the model that runs in the block; gives modules their names.
        private: nobody but us pulls through the graph, so ``retain_grad()`` in its code means nothing.
    """

    def __init__(self, model: nn.Module, private: bool = False) -> None:
        super().__init__()
        self._private, self._model = private, model
        named = [(m, name or type(m).__name__) for name, m in model.named_modules()]
        self._modules, self._names = [m for m, _ in named], {id(m): name for m, name in named}
        self._learnt = {id(p) for m in self._modules for p in m._parameters.values() if p is not None}
        self._fixed = {id(b) for m in self._modules for b in m._buffers.values() if b is not None}

    def __enter__(self) -> Watch:
        self._stack, self._gates, self._thread = [type(self._model).__name__], Gates(), threading.get_ident()
        self._constants = Constants(self._modules)
        register_module_forward_pre_hook(self._enter_module)
        register_module_forward_hook(self._leave_module, with_kwargs=True, always_call=True)
        run_eagerly(self)
        return super().__enter__()

    def __exit__(self, *exc: object) -> None:
        if _get_current_function_mode_stack()[-1:] == [self]:  # else an interrupt came while PyTorch held it apart
            super().__exit__(*exc)
        self.stop()

    def stop(self) -> None:
        """Take back all but the function mode itself; may be called again, also if nothing had begun."""
        release(self)
        for table in (torch_module._global_forward_pre_hooks, torch_module._global_forward_hooks):
            for key, hook in list(table.items()):
                if getattr(hook, "__self__", None) is self:
                    torch_module._global_forward_hooks_with_kwargs.pop(key, None)
                    torch_module._global_forward_hooks_always_called.pop(key, None)
                    table.pop(key, None)

    @staticmethod
    def watches() -> bool:
        """Whether a recorder watches this thread."""
        return any(isinstance(mode, Watch) for mode in _get_current_function_mode_stack())

    def _watched(self, module: nn.Module) -> bool:
        """Hooks for all modules fire in all threads, and for other models too."""
        return id(module) in self._names and threading.get_ident() == self._thread

    def _enter_module(self, module: nn.Module, args: tuple) -> None:
        if self._watched(module):
            self._stack.append(self._names[id(module)])

    def _leave_module(self, module: nn.Module, args: tuple, *rest: Any) -> Any:
        kwargs, output = rest if len(rest) == 2 else ({}, None)  # after a failed forward PyTorch drops an argument
        if not self._watched(module):
            return None
        pair = COUPLED.get(type(module))
        if pair is not None and isinstance(output, Tensor) and output.requires_grad:
            output = self._couple(module, args[0] if args else next(iter(kwargs.values())), output)
        name = self._stack.pop()
        first = output[0] if isinstance(output, tuple | list) and output else output
        if isinstance(first, Tensor):
            with torch._C.DisableTorchFunction():  # what is read here need not come by
                node, shape, output_nr = first.grad_fn, first.shape, first.output_nr
            if node is not None:
                metadata(node).setdefault(MODULE, (name, shape, output_nr))
        return output if pair is not None else None

    def _couple(self, module: nn.Module, x: Tensor, expected: Tensor) -> Tensor:
        y, copies, coupling = recoupled(module, x, expected, self._stack[-1], self._gates)
        if coupling is not None:
            node = get_gradient_edge(copies).node
            metadata(node)[MARK] = Mark(None, coupling, copies.output_nr, len(copies), tuple(edges_below(node)))
        return y

    def _retain_grad(self, x: Tensor) -> None:
        if self._private and x.requires_grad:
            return
        x.retain_grad()
        if x.grad_fn is not None:
            metadata(x.grad_fn).setdefault(RETAINED, []).append(weakref.ref(x))
