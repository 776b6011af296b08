"""Where parameters live: with values, whole, on one device, in one process. What lives elsewhere is refused by name."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from bncurv.slow import listed

_ALONE = "Compute on the plain module, whole and on one device of each process"


def device_of(model: nn.Module) -> torch.device | None:
    """The device of all parameters with values; ``None`` where there are several, or none."""
    found = {p.device for p in model.parameters()} - {torch.device("meta")}
    return found.pop() if len(found) == 1 else None


def check_placement(model: nn.Module, wanted: Mapping[str, Tensor]) -> None:
    """Raise TypeError/ValueError for models of which this process, or one device, holds a part only.

    Args:
        model: with all its modules.
        wanted: the parameters asked for, by name.
    """
    for name, module in model.named_modules():
        problem = _several_processes(module)
        if problem:
            raise TypeError(f"{f'module {name!r}, ' if name else ''}{problem}. {_ALONE}.")
    bare = [name for name, p in wanted.items() if p.is_meta]
    if bare:
        raise ValueError(_no_values(bare))
    parts = [name for name, p in wanted.items() if _is(p, "torch.distributed.tensor", "DTensor")]
    if parts:
        raise TypeError(
            f"parameter(s) {listed(parts)} are DTensors (fully_shard, tensor parallelism): this process holds a part "
            f"of each. {_ALONE} (torch.distributed.checkpoint.state_dict gives a full state dict)."
        )
    devices: dict[torch.device, str] = {}
    for name, p in chain(((n, p) for n, p in model.named_parameters() if p.requires_grad), wanted.items()):
        devices.setdefault(p.device, name)
    if len(devices) > 1:
        where = ", ".join(f"'{name}' on {device}" for device, name in devices.items())
        raise ValueError(
            f"the model's parameters are on several devices ({where}); curvature across devices is not supported. Move "
            "the model to one: model.to(device)."
        )


@contextmanager
def values_needed(model: nn.Module) -> Iterator[None]:
    """A forward pass: where PyTorch fails for tensors without values, ValueError names them."""
    try:
        yield
    except RuntimeError as error:
        bare = [name for name, t in chain(model.named_parameters(), model.named_buffers()) if t.is_meta]
        if not bare or not re.search(r"\bmeta\b", str(error)):
            raise
        raise ValueError(_no_values(bare)) from error


def _no_values(names: list[str]) -> str:
    return (
        f"parameter(s) or buffer(s) {listed(names)} are on the meta device: they have no values (never loaded, or kept "
        "elsewhere by a library that offloads them). Load the model onto a device first: model.to_empty(device=...), "
        "then load_state_dict, or from_pretrained without device_map."
    )


def _is(thing: Any, module: str, name: str) -> bool:
    """Whether it is of a class of a module that may not have been imported."""
    found = sys.modules.get(module)
    return found is not None and isinstance(thing, getattr(found, name, ()))


def _several_processes(module: Any) -> str | None:
    """How a module spreads its parameters, or one process' batch."""
    if _is(module, "torch.distributed.fsdp", "FullyShardedDataParallel"):
        return "FullyShardedDataParallel, keeps parameters in flat tensors of its own, spread over processes"
    if isinstance(module, nn.DataParallel) and len(module.device_ids) > 1:
        return f"DataParallel, splits the batch over {len(module.device_ids)} devices"
    return None
