"""Recurrent layers and cells step by step, in linear layers and elementwise functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor


def _lstm_step(x: Tensor, h: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    i, f, g, o = (x + h).chunk(4, -1)
    c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru_step(x: Tensor, h: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    (r, z, n), (hr, hz, hn) = x.chunk(3, -1), h.chunk(3, -1)
    new = (n + (r + hr).sigmoid() * hn).tanh()
    return ((state[0] - new) * (z + hz).sigmoid() + new,)


STEPS: dict[str, Callable[[Tensor, Tensor, tuple[Tensor, ...]], tuple[Tensor, ...]]] = {
    "lstm": _lstm_step,
    "gru": _gru_step,
    "rnn_tanh": lambda x, h, state: ((x + h).tanh(),),
    "rnn_relu": lambda x, h, state: ((x + h).relu(),),
}


def recurrent(kind: str, own: Any, *args: Any) -> Any:
    """A recurrent layer step by step; not for packed sequences."""
    if len(args) < 9 or isinstance(args[2], Tensor) or (kind == "lstm" and isinstance(args[1], Tensor)):
        return NotImplemented
    x, state, weights, biased, layers, dropout, training, bidirectional, batch_first = args
    states = tuple(state) if kind == "lstm" else (state,)
    ways = 2 if bidirectional else 1
    each = len(weights) // (layers * ways)
    x = x.transpose(0, 1) if batch_first else x
    last: list[tuple[Tensor, ...]] = []
    for layer in range(layers):
        found = []
        for way in range(ways):
            k = layer * ways + way
            some = weights[k * each : (k + 1) * each]
            y, end = _one_way(kind, x, tuple(s[k] for s in states), some, biased, backwards=way == 1)
            found.append(y)
            last.append(end)
        x = torch.cat(found, -1) if found[1:] else found[0]
        if dropout and training and layer < layers - 1:
            x = nnf.dropout(x, dropout)
    ends = [torch.stack(some) for some in zip(*last, strict=True)]
    return x.transpose(0, 1) if batch_first else x, *ends


def _one_way(
    kind: str, x: Tensor, state: tuple[Tensor, ...], weights: Sequence[Tensor], biased: bool, backwards: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """One layer in one direction over ``x [t, n, i]``: outputs ``[t, n, h]`` and the last state."""
    w_in, w_h = weights[:2]
    b_in, b_h = weights[2:4] if biased else (None, None)
    projection = weights[-1] if len(weights) % 2 else None  # an LSTM's proj_size
    steps = nnf.linear(x, w_in, b_in).unbind(0)
    found = []
    for step in steps[::-1] if backwards else steps:
        state = STEPS[kind](step, nnf.linear(state[0], w_h, b_h), state)
        if projection is not None:
            state = nnf.linear(state[0], projection), *state[1:]
        found.append(state[0])
    return torch.stack(found[::-1] if backwards else found), state


def cell(
    kind: str, own: Any, x: Tensor, state: Any, w_in: Tensor, w_h: Tensor, b_in: Tensor | None, b_h: Tensor | None
) -> Any:
    """One step of a recurrent cell."""
    states = tuple(state) if kind == "lstm" else (state,)
    found = STEPS[kind](nnf.linear(x, w_in, b_in), nnf.linear(states[0], w_h, b_h), states)
    return found if kind == "lstm" else found[0]
