"""The GGN as a linear operator of curvlinops: for its estimators of traces, diagonals, norms and spectra."""

from __future__ import annotations

import torch
from torch import Tensor

from bncurv.lowrank import GGN

try:
    from curvlinops._torch_base import PyTorchLinearOperator
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "bncurv.adapters.curvlinops needs curvlinops 3.0 or newer: pip install 'bncurv[curvlinops]'."
    ) from error


class ExactGGNLinearOperator(PyTorchLinearOperator):
    """G of `bncurv.curvature` with the interface of curvlinops; see `as_linear_operator`.

    Example:
        >>> import torch, bncurv
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2))
        >>> batch, loss_fn = (torch.randn(8, 4), torch.randint(2, (8,))), torch.nn.CrossEntropyLoss()
        >>> from bncurv.adapters.curvlinops import as_linear_operator
        >>> res = bncurv.curvature(model, loss_fn, batch, bncurv.LowRankGGN())
        >>> A = as_linear_operator(res.ggn)
        >>> type(A).__name__, (2 * A @ torch.ones(29)).shape
        ('ExactGGNLinearOperator', torch.Size([29]))
    """

    SELF_ADJOINT = True

    def __init__(self, ggn: GGN) -> None:
        shapes = [tuple(shape) for shape in ggn.shapes.values()]
        super().__init__(shapes, shapes)
        self.ggn = ggn

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        """G X for matrices in the form ``[*p, m]``."""
        columns = X[0].shape[-1]
        GX = self.ggn @ torch.cat([x.reshape(-1, columns) for x in X])  # [D, m]
        parts = GX.split([shape.numel() for shape in self.ggn.shapes.values()])
        return [part.reshape(*shape, columns) for part, shape in zip(parts, self.ggn.shapes.values(), strict=True)]

    @property
    def device(self) -> torch.device:
        """Of vectors."""
        return self.ggn.device

    @property
    def dtype(self) -> torch.dtype:
        """Of vectors."""
        return self.ggn.dtype


def as_linear_operator(ggn: GGN) -> ExactGGNLinearOperator:
    """The exact GGN, BatchNorm coupling included, as a linear operator of curvlinops.

    It is made of a GGN that is known already, so a product costs no more than that GGN's own: K·D multiplications where
    V is held, two backward passes where it is matrix-free. Scale, order of the parameters, dtype and device are the
    GGN's. Sums, multiples, inverses, ``SubmatrixLinearOperator`` and the estimators (``hutchinson_diag``, ``xdiag``,
    ``hutchinson_trace``, ``xtrace``, ``hutchpp_trace``, ``hutchinson_squared_fro``, ``lanczos_approximate_spectrum``)
    take it as they take curvlinops' own operators.

    Args:
        ggn: a `LowRank` or a `MatrixFreeGGN`: ``Results.ggn``; of a ``LowRankGGN(groups=...)`` one of them.

    Returns:
        Operator of shape ``(D, D)``: ``A @ v`` for a flat ``[D]`` or ``[D, m]``, or a list of ``[*p]`` or ``[*p, m]``
        (curvlinops has the columns *last*, bncurv's own vectors have them first).

    Raises:
        TypeError: for anything that is no GGN.

    Example:
        >>> import torch, bncurv, curvlinops
        >>> from bncurv.adapters.curvlinops import as_linear_operator
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2))
        >>> X, y = torch.randn(8, 4), torch.randint(2, (8,))
        >>> res = bncurv.curvature(model, torch.nn.CrossEntropyLoss(), (X, y), bncurv.LowRankGGN())
        >>> A = as_linear_operator(res.ggn)
        >>> curvlinops.xdiag(A, num_matvecs=10).shape
        torch.Size([29])
    """
    if not isinstance(ggn, GGN):
        groups = f" of the groups {list(ggn)[:3]}" if isinstance(ggn, dict) else ""
        raise TypeError(
            f"as_linear_operator got {type(ggn).__name__}{groups}; expected one GGN, Results.ggn of "
            f"bncurv.LowRankGGN(){', one group at a time' if groups else ''}."
        )
    return ExactGGNLinearOperator(ggn)
