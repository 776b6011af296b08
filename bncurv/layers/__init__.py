"""The one table of layers: torch function → how to build the operands of its parameter products (``base.py``)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as nnf
from torch import Tensor

from bncurv.layers.affine import BatchNormEval, GroupNorm, InstanceNorm, LayerNorm, PReLU, RMSNorm
from bncurv.layers.base import Layer
from bncurv.layers.convolution import Conv, ConvTranspose
from bncurv.layers.copies import Embedding, Expanded
from bncurv.layers.linear import AddMM, Linear, MatMul

__all__ = ["EXPANDED", "LAYERS", "Layer", "register_layer"]

LAYERS: dict[Callable, Layer] = {
    nnf.linear: Linear(),
    **dict.fromkeys((torch.conv1d, torch.conv2d, torch.conv3d), Conv()),
    **dict.fromkeys((torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d), ConvTranspose()),
    nnf.layer_norm: LayerNorm(),
    nnf.group_norm: GroupNorm(),
    nnf.instance_norm: InstanceNorm(),
    nnf.batch_norm: BatchNormEval(),
    nnf.embedding: Embedding(),
    nnf.rms_norm: RMSNorm(),
    **dict.fromkeys((torch.prelu, Tensor.prelu), PReLU()),
    **dict.fromkeys((torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__), MatMul()),
    **dict.fromkeys((torch.addmm, Tensor.addmm), AddMM()),
}
EXPANDED = Expanded()


def register_layer(function: Callable, layer: Layer) -> None:
    """Add a row to the table: calls of ``function`` get their parameter products from ``layer``.

    Args:
        function: a torch function (``torch.nn.functional.*``, ``torch.*``) that dispatches to
            ``__torch_function__``, e.g. ``torch.nn.functional.bilinear``.
        layer: how to build the operands of its products.

    Example:
        >>> import torch, bncurv
        >>> from bncurv.layers import LAYERS, Layer
        >>> class Square(Layer):  # y_o = Σ_i W_oi x_i²
        ...     arguments, inputs, parameters = ("input", "weight"), ("input",), ("weight",)
        ...     def left(self, role, arguments, delta):  # [q, n, o] → [q, n, g, o, s]
        ...         return delta[:, :, None, :, None]
        ...     def right(self, role, arguments, x):  # [n, i] → [g, n, s, i]
        ...         return x.square()[None, :, None]
        >>> def squared(input, weight):
        ...     return torch.nn.functional.linear(input.square(), weight)
        >>> bncurv.register_layer(squared, Square())
        >>> LAYERS[squared].parameters
        ('weight',)
    """
    LAYERS[function] = layer
