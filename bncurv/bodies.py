"""Functions of PyTorch in terms of others: of rows of the layer table, of elementwise functions.

The recorder runs such a body in place of the function, and sees its calls one by one. Where a function has parameters
among its arguments that only some forms of it can take apart, the body returns ``NotImplemented`` before it does
anything, and the function runs as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor

from bncurv.einsum import Own, addmm, bilinear, einsum, matmul, of_axes, rmatmul
from bncurv.recurrent import STEPS, cell, recurrent


def body_of(func: Any) -> FunctionType:
    """A Python function of PyTorch that modes see as one call, to be run call by call."""
    inside = {**func.__globals__, "has_torch_function": lambda tensors: False}
    body = FunctionType(func.__code__, inside, func.__name__, func.__defaults__, func.__closure__)
    body.__kwdefaults__ = func.__kwdefaults__
    return body


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


def attention(
    own: Own, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *rest: Any, **options: Any
) -> Any:
    """With a copy of the mask for every sample."""
    shape = query.shape[:-1] + key.shape[-2:-1]
    if attn_mask is None or attn_mask.shape == shape or not own(attn_mask):
        return NotImplemented
    return nnf.scaled_dot_product_attention(query, key, value, attn_mask.expand(shape), *rest, **options)


def repeat(own: Own, t: Tensor, *sizes: Any) -> Any:
    """``t.repeat(n, 1, ...)`` of a parameter with a first axis of its own, by a view of n copies."""
    sizes = tuple(sizes[0]) if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes
    if t.dim() != len(sizes) or not sizes or len(t) == 1 or any(n != 1 for n in sizes[1:]) or not own(t):
        return NotImplemented
    return t.expand(sizes[0], *t.shape).flatten(0, 1)


def _batch_norm(input, weight, bias, running_mean, running_var, training, momentum, eps, cudnn_enabled):
    return nnf.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


def _instance_norm(input, weight, bias, running_mean, running_var, use_input_stats, momentum, eps, cudnn_enabled):
    return nnf.instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)


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
_RECURRENT = {kind: getattr(torch, kind) for kind in STEPS}
_CELLS = {kind: getattr(torch, f"{kind}_cell") for kind in STEPS}
WITH_PARAMETERS: dict[Callable, Callable] = {
    torch.einsum: einsum,
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__), matmul),
    **dict.fromkeys((torch.mm, Tensor.mm), of_axes(2, 2)),
    **dict.fromkeys((torch.mv, Tensor.mv), of_axes(2, 1)),
    **dict.fromkeys((torch.bmm, Tensor.bmm), of_axes(3, 3)),
    Tensor.__rmatmul__: rmatmul,
    **dict.fromkeys((torch.addmm, Tensor.addmm, torch.baddbmm, Tensor.baddbmm), addmm),
    nnf.bilinear: bilinear,
    nnf.scaled_dot_product_attention: attention,
    Tensor.repeat: repeat,
    nnf.embedding_bag: embedding_bag,
    **{function: partial(recurrent, kind) for kind, function in _RECURRENT.items()},
    **{function: partial(cell, kind) for kind, function in _CELLS.items()},
}
