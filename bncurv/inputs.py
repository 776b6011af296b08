"""From the user's data to an output and a target: pairs (X, y), or any batches with a ``forward`` of the user's own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from bncurv.losses import name_of
from bncurv.nested import moved, renewed, tensors

_CONTAINERS = ("tuple", "list", "sequence", "iterable")  # words of annotations
Forward: TypeAlias = Callable[[nn.Module, Any], tuple[Any, Any]]


def number_of_batches(data: Any, forward: Forward | None = None) -> int:
    """How many mini-batches there are; 1 where it is not known."""
    try:
        return 1 if _is_one(data, forward) else len(data)
    except (TypeError, NotImplementedError):  # of an iterator
        return 1


def _is_one(data: Any, forward: Forward | None) -> bool:
    """Whether data are one batch."""
    if forward is not None:
        return isinstance(data, Tensor | tuple) or hasattr(data, "keys") or not isinstance(data, Iterable)
    if isinstance(data, tuple | list) and len(data) == 2:
        several = isinstance(data[1], Mapping) and not isinstance(data[0], Mapping)
        return several or any(isinstance(t, Tensor) for t in data)
    return isinstance(data, tuple) and len(data) > 2 and all(isinstance(t, Tensor) for t in data)


def batches(data: Any, forward: Forward | None = None) -> Iterator[tuple[Any, Any]]:
    """The mini-batches as pairs of what the model gets and the target; with ``forward`` a batch and ``None``.

    Raises:
        TypeError: for what is no batch.
    """
    if forward is not None:
        if data is None or (isinstance(data, list) and data and all(isinstance(t, Tensor) for t in data)):
            raise TypeError(
                f"data is {'None' if data is None else 'a list of tensors'}; with forward=, a tuple or a mapping is "
                "one batch and a list yields batches. Pass tuple(data) for one batch, iter(data) for many."
            )
        yield from ((batch, None) for batch in ([data] if _is_one(data, forward) else data))
        return
    if _is_one(data, None):
        data = [data]
    if not isinstance(data, Iterable):
        raise TypeError(f"data is {type(data).__name__}; expected one batch (X, y), or an iterable of such pairs.")
    for pair in data:
        if not (isinstance(pair, tuple | list) and len(pair) == 2):
            raise TypeError(
                f"data yields {type(pair).__name__}{_length(pair)}; expected pairs (X, y) with a tensor y. For other "
                f"batches say what to do with one: {_line(pair)}."
            )
        if not any(True for _ in tensors(pair[1])):
            raise TypeError(
                f"y is {type(pair[1]).__name__}; expected a tensor, or a tuple, list or dict of tensors, the second of "
                "a pair (X, y)."
            )
        yield pair[0], pair[1]


def _length(batch: Any) -> str:
    return f" of length {len(batch)}" if isinstance(batch, tuple | list) else ""


def _line(batch: Any) -> str:
    """The ``forward=`` that may be meant."""
    if isinstance(batch, tuple | list) and len(batch) > 2:
        given = ", ".join(f"batch[{i}]" for i in range(len(batch) - 1))
        return f"forward=lambda model, batch: (model({given}), batch[{len(batch) - 1}])"
    return "forward=lambda model, batch: (model(...), target)"


def output_and_target(model: nn.Module, X: Any, y: Any, forward: Forward | None, device: torch.device | None) -> Any:
    """Run the model on a mini-batch, or ``forward`` with it.

    Raises:
        TypeError: where ``forward`` returns anything but an output and targets, or X may be called in two ways.
    """
    X = renewed(X)  # the code may take out what it has read
    if forward is None:
        return _run(model, moved(X, device)), y
    found = forward(model, X)
    if not (isinstance(found, tuple | list) and len(found) == 2):
        raise TypeError(
            f"forward {name_of(forward)} returned {type(found).__name__}{_length(found)}; expected a pair "
            "(output, target) of the model's output and what the loss compares it with."
        )
    if not any(True for _ in tensors(found[1])):
        raise TypeError(
            f"forward {name_of(forward)} returned a target that is {type(found[1]).__name__}; expected a tensor, or a "
            "tuple, list or dict of tensors."
        )
    return tuple(found)


def _run(model: nn.Module, X: Any) -> Any:
    """``model(X)``; ``model(*X)`` of a sequence that one argument cannot be; ``model(**X)`` of arguments by name."""
    if isinstance(X, tuple | list | Mapping):
        signature = _signature(model)
        if signature is None:
            return model(X)
        if isinstance(X, Mapping) and X and all(isinstance(key, str) for key in X):
            by_name = all(key in signature.parameters for key in X)
            if by_name or (not _binds(signature, X) and _binds(signature, **X)):
                return model(**X)
        if not isinstance(X, Mapping) and _is_several(signature, X):
            return model(*X)
    return model(X)


def _is_several(signature: inspect.Signature, X: Any) -> bool:
    """Whether a sequence is the model's arguments, and not the first one.

    Raises:
        TypeError: where it may be both.
    """
    if len(X) < 2 or not _binds(signature, *X) or not _binds(signature, X):
        return not _binds(signature, X) and _binds(signature, *X)
    first = next(iter(signature.parameters.values()))
    says = str(first.annotation).lower()
    if first.annotation is not first.empty and any(word in says for word in (*_CONTAINERS, "tensor")):
        return not any(word in says for word in _CONTAINERS)
    raise TypeError(
        f"X is a {type(X).__name__} of {len(X)}, which forward{signature} may take as its arguments or as the first of "
        "them. Say which: forward=lambda model, batch: (model(*batch[0]), batch[1]), or (model(batch[0]), batch[1])."
    )


def _signature(model: nn.Module) -> inspect.Signature | None:
    """Of the forward that the user wrote, below wrappers; ``None`` of scripted ones."""
    while isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        model = model.module
    extended = vars(model).get("_bncurv")
    try:
        return inspect.signature(extended.plain(model) if extended else model.forward)
    except ValueError:
        return None


def _binds(signature: inspect.Signature, *args: Any, **kwargs: Any) -> bool:
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        return False
    return True
