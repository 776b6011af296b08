"""Products of data with parameters, in whatever form, as a linear layer or a convolution of one position.

``own(t)`` tells whether a tensor is made from parameters alone. What cannot be taken apart is ``NotImplemented``.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor

Own = Callable[[Tensor], bool]


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
    some = _unrepeated(operands, inputs)
    if some is None:
        return NotImplemented
    tensors, inputs = some
    sides: dict[bool, dict[int, str]] = {False: {}, True: {}}
    for k, (t, letters) in enumerate(zip(tensors, inputs, strict=True)):
        sides[own(t)][k] = letters
    if not sides[False] or not sides[True]:
        return NotImplemented
    (x, of_x), (w, of_w) = (
        _joined([tensors[k] for k in part], list(part.values()), {*output}.union(*others.values()))
        for part, others in ((sides[False], sides[True]), (sides[True], sides[False]))
    )
    rows = [c for c in output if c in of_x and c not in of_w]
    return _contracted(x, of_x, w, of_w, output, rows) if rows else NotImplemented


def _letters(equation: str, operands: Sequence[Tensor]) -> list[str] | None:
    """The letters of the operands' axes and of the output's; ``None`` for diagonals."""
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
    return None if any(len(set(letters)) < len(letters) for letters in found) else found


def _unrepeated(operands: Sequence[Tensor], terms: list[str]) -> tuple[list[Tensor], list[str]] | None:
    """Operands without axes of length one along which others are longer, and their letters; ``None`` if none fits."""
    axes = [list(zip(term, t.shape, strict=True)) for term, t in zip(terms, operands, strict=True)]
    lengths = {c: {length for of in axes for other, length in of if other == c} for of in axes for c, _ in of}
    if any(len(found - {1}) > 1 for found in lengths.values()):
        return None
    kept = [[(c, length) for c, length in of if length > 1 or len(lengths[c]) == 1] for of in axes]
    shapes = [[length for _, length in of] for of in kept]
    return [t.reshape(shape) for t, shape in zip(operands, shapes, strict=True)], [
        "".join(c for c, _ in of) for of in kept
    ]


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


def matmul(own: Own, input: Tensor, other: Tensor) -> Any:
    """As `einsum`."""
    a, b = input.dim(), other.dim()
    if not a or not b or input.shape[-1] != other.shape[-2 if b > 1 else 0]:
        return NotImplemented  # for PyTorch to refuse
    left, right = "k" if a == 1 else "...mk", "k" if b == 1 else "...kn"
    output = "..." * (a > 1 or b > 1) + "m" * (a > 1) + "n" * (b > 1)
    if a > 1 and b == 1:
        left, output = "...k", "..."
    return einsum(own, f"{left},{right}->{output}", input, other)


def rmatmul(own: Own, b: Tensor, a: Tensor) -> Any:
    """``a @ b``, asked of b."""
    return matmul(own, a, b)


def of_axes(a: int, b: int) -> Callable[..., Any]:
    """`matmul` of tensors with so many axes, those of the batch alike (``mm``, ``mv``, ``bmm``)."""

    def product(own: Own, input: Tensor, other: Tensor) -> Any:
        fits = input.dim() == a and other.dim() == b and input.shape[: a - 2] == other.shape[: a - 2]
        return matmul(own, input, other) if fits else NotImplemented

    return product


def addmm(own: Own, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Any:
    """``beta input + alpha mat1 @ mat2``."""
    if mat1.dim() != mat2.dim() or mat1.shape[:-2] != mat2.shape[:-2]:
        return NotImplemented
    product = matmul(own, mat1, mat2) if own(mat1) or own(mat2) else torch.matmul(mat1, mat2)
    if product is NotImplemented:
        return product
    product = product if alpha == 1 else alpha * product
    return product + (input if beta == 1 else beta * input)


def bilinear(own: Own, input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    """``y_o = x1ᵀ W_o x2 + b_o``."""
    y = einsum(own, "...i,oij,...j->...o", input1, weight, input2)
    return y if y is NotImplemented or bias is None else y + bias
