"""Functions of PyTorch in terms of others: of rows of the layer table, of elementwise functions.

The recorder runs such a body in place of the function, and sees its calls one by one. Where a function has parameters
among its arguments that only some forms of it can take apart, the body returns ``NotImplemented`` before it does
anything, and the function runs as it is.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from functools import partial
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor

Own = Callable[[Tensor], bool]  # whether a tensor is made from parameters alone


def body_of(func: Any) -> FunctionType:
    """A Python function of PyTorch that modes see as one call, to be run call by call."""
    inside = {**func.__globals__, "has_torch_function": lambda tensors: False}
    body = FunctionType(func.__code__, inside, func.__name__, func.__defaults__, func.__closure__)
    body.__kwdefaults__ = func.__kwdefaults__
    return body


# ---------------------------------------------------------------------------- products
def einsum(own: Own, equation: Any, *operands: Any) -> Any:
    """Data times parameters: parameters first become one weight, data one input; then it is a linear layer.

    Letters in all three of input, weight and output make groups: a convolution of one position.
    """
    if operands and isinstance(operands[0], list | tuple):
        operands = tuple(operands[0])
    terms = _letters(equation, operands) if isinstance(equation, str) else None
    if terms is None or any(t.is_complex() for t in operands):
        return NotImplemented
    *inputs, output = terms
    sides: dict[bool, dict[int, str]] = {False: {}, True: {}}
    for k, (t, letters) in enumerate(zip(operands, inputs, strict=True)):
        sides[own(t)][k] = letters
    if not sides[False] or not sides[True]:
        return NotImplemented
    (x, of_x), (w, of_w) = (
        _joined([operands[k] for k in some], list(some.values()), {*output}.union(*others.values()))
        for some, others in ((sides[False], sides[True]), (sides[True], sides[False]))
    )
    rows = [c for c in output if c in of_x and c not in of_w]
    return _contracted(x, of_x, w, of_w, output, rows) if rows else NotImplemented


def _letters(equation: str, operands: Sequence[Tensor]) -> list[str] | None:
    """The letters of the operands' axes and of the output's; ``None`` for diagonals, and where axes are broadcast."""
    given, arrow, output = equation.replace(" ", "").partition("->")
    terms = given.split(",")
    unused = [c for c in string.ascii_letters if c not in equation]
    dots = max((t.dim() - len(term) + 3 for term, t in zip(terms, operands, strict=False) if "..." in term), default=0)
    if not arrow:
        plain = given.replace("...", "").replace(",", "")
        output = "..." * ("..." in given) + "".join(sorted(c for c in set(plain) if plain.count(c) == 1))
    more = "".join(unused[:dots])
    found = [_spelled(term, more, t.dim()) for term, t in zip(terms, operands, strict=True)]
    found.append(output.replace("...", more))
    lengths = {pair for letters, t in zip(found, operands, strict=False) for pair in zip(letters, t.shape, strict=True)}
    diagonal = any(len(set(letters)) < len(letters) for letters in found)
    return None if diagonal or len(lengths) > len({c for c, _ in lengths}) else found


def _spelled(term: str, more: str, axes: int) -> str:
    """A term with letters for its dots, the last ones first of all."""
    dots = axes - len(term.replace("...", ""))
    return term.replace("...", more[len(more) - dots :])


def _joined(ts: list[Tensor], letters: list[str], needed: set[str]) -> tuple[Tensor, str]:
    """One tensor with the axes that are needed further on."""
    kept = "".join(dict.fromkeys(c for c in "".join(letters) if c in needed))
    if len(ts) == 1 and kept == letters[0]:
        return ts[0], kept
    return torch.einsum(f"{','.join(letters)}->{kept}", *ts), kept


def _contracted(x: Tensor, of_x: str, w: Tensor, of_w: str, output: str, rows: list[str]) -> Tensor:
    """``einsum`` of one input and one weight as a linear layer or, with groups, a convolution."""
    groups = [c for c in output if c in of_x and c in of_w]
    out, summed = [c for c in output if c not in of_x], [c for c in of_x if c not in output]
    size = dict(zip(of_x + of_w, (*x.shape, *w.shape), strict=True))
    x, w = (t.permute([of.index(c) for c in order]) for t, of, order in (
        (x, of_x, rows + groups + summed), (w, of_w, groups + out + summed)
    ))  # fmt: skip
    many, g, o, i = (torch.Size(size[c] for c in some).numel() for some in (rows, groups, out, summed))
    if groups:
        y = nnf.conv1d(x.reshape(many, g * i, 1), w.reshape(g * o, i, 1), groups=g)
    else:
        y = nnf.linear(x.reshape(*(size[c] for c in rows), i), w.reshape(o, i))
    found = rows + groups + out
    return y.reshape([size[c] for c in found]).permute([found.index(c) for c in output])


def matmul(own: Own, a: Tensor, b: Tensor) -> Any:
    """As `einsum`."""
    left, right = "k" if a.dim() == 1 else "...mk", "k" if b.dim() == 1 else "...kn"
    output = "..." * (a.dim() > 1 or b.dim() > 1) + "m" * (a.dim() > 1) + "n" * (b.dim() > 1)
    if a.dim() > 1 and b.dim() == 1:
        left, output = "...k", "..."
    return einsum(own, f"{left},{right}->{output}", a, b)


def rmatmul(own: Own, b: Tensor, a: Tensor) -> Any:
    """``a @ b``, asked of b."""
    return matmul(own, a, b)


def addmm(own: Own, bias: Tensor, a: Tensor, b: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Any:
    """``beta bias + alpha a @ b``."""
    product = matmul(own, a, b) if own(a) or own(b) else torch.matmul(a, b)
    if product is NotImplemented:
        return product
    product = product if alpha == 1 else alpha * product
    return product + (bias if beta == 1 else beta * bias)


def bilinear(own: Own, one: Tensor, two: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    """``y_o = x1ᵀ W_o x2 + b_o``."""
    y = einsum(own, "...i,oij,...j->...o", one, weight, two)
    return y if y is NotImplemented or bias is None else y + bias


def embedding_bag(
    own: Own,
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Any:
    """Look up, weight, add up by bag; not ``max``, nor tables that change."""
    if max_norm is not None or scale_grad_by_freq or mode == "max" or input.is_nested:
        return NotImplemented
    rows = nnf.embedding(input, weight)
    factor = torch.ones_like(rows[..., 0]) if per_sample_weights is None else per_sample_weights
    if padding_idx is not None:
        factor = factor * (input != padding_idx % len(weight))
    rows = rows * factor.unsqueeze(-1)
    if offsets is None:
        total, number = rows.sum(1), factor.sum(1)
    else:
        place = torch.arange(len(input), device=input.device)
        bag = torch.bucketize(place, offsets, right=True) - 1
        zeros = rows.new_zeros(len(offsets) - include_last_offset, rows.shape[1])
        total, number = zeros.index_add(0, bag, rows), zeros[:, 0].index_add(0, bag, factor)
    return total if mode == "sum" else total / number.clamp(min=1).unsqueeze(-1)


# ---------------------------------------------------------------------------- recurrent layers
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


def recurrent(kind: str, own: Own, *args: Any) -> Any:
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
    kind: str, own: Own, x: Tensor, state: Any, w_in: Tensor, w_h: Tensor, b_in: Tensor | None, b_h: Tensor | None
) -> Any:
    """One step of a recurrent cell."""
    states = tuple(state) if kind == "lstm" else (state,)
    found = STEPS[kind](nnf.linear(x, w_in, b_in), nnf.linear(states[0], w_h, b_h), states)
    return found if kind == "lstm" else found[0]


# ---------------------------------------------------------------------------- the tables
def _batch_norm(x, weight, bias, mean, var, training, momentum, eps, cudnn_enabled):
    return nnf.batch_norm(x, mean, var, weight, bias, training, momentum, eps)


def _instance_norm(x, weight, bias, mean, var, use_input_stats, momentum, eps, cudnn_enabled):
    return nnf.instance_norm(x, mean, var, weight, bias, use_input_stats, momentum, eps)


def _layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5, cudnn_enable=True):
    return nnf.layer_norm(input, normalized_shape, weight, bias, eps)


def _group_norm(input, num_groups, weight=None, bias=None, eps=1e-5, cudnn_enabled=True):
    return nnf.group_norm(input, num_groups, weight, bias, eps)


def _embedding(weight, indices, padding_idx=-1, scale_grad_by_freq=False, sparse=False):
    padding = None if padding_idx < 0 else padding_idx
    return nnf.embedding(indices, weight, padding, scale_grad_by_freq=scale_grad_by_freq, sparse=sparse)


ALWAYS: dict[Callable, Callable] = {
    nnf.multi_head_attention_forward: body_of(nnf.multi_head_attention_forward),
    torch.batch_norm: _batch_norm,
    torch.instance_norm: _instance_norm,
    torch.layer_norm: _layer_norm,
    torch.group_norm: _group_norm,
    torch.embedding: _embedding,
}
_RECURRENT = {kind: getattr(torch._VF, kind) for kind in STEPS}
_CELLS = {kind: getattr(torch._VF, f"{kind}_cell") for kind in STEPS}
WITH_PARAMETERS: dict[Callable, Callable] = {
    torch.einsum: einsum,
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm), matmul),
    **dict.fromkeys((torch.bmm, Tensor.bmm, torch.mv, Tensor.mv), matmul),
    Tensor.__rmatmul__: rmatmul,
    **dict.fromkeys((torch.addmm, Tensor.addmm, torch.baddbmm, Tensor.baddbmm), addmm),
    nnf.bilinear: bilinear,
    nnf.embedding_bag: embedding_bag,
    **{function: partial(recurrent, kind) for kind, function in _RECURRENT.items()},
    **{function: partial(cell, kind) for kind, function in _CELLS.items()},
}
