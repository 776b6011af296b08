"""Curvature back-ends of laplace-torch: the exact GGN, or empirical Fisher, of the mode in which the network trains.

laplace-torch puts the model in eval mode, where the batch statistics are constants. Here the normalisation layers, and
only these (no dropout), are in training mode while curvature is computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

import bncurv
from bncurv.gate import COUPLED
from bncurv.precision import full_precision

try:
    import laplace
    from laplace.curvature import CurvatureInterface, EFInterface, GGNInterface
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "bncurv.adapters.laplace needs laplace-torch 0.3 or newer: pip install 'bncurv[laplace]'."
    ) from error


class _InTrainMode(CurvatureInterface):
    """`bncurv.curvature` of laplace-torch's loss, a sum over samples, in its order of the parameters."""

    def __init__(
        self,
        model: nn.Module,
        likelihood: str,
        last_layer: bool = False,
        subnetwork_indices: Tensor | None = None,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
        train: Iterable[str] | None = None,
        low_rank: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, likelihood, last_layer, subnetwork_indices, dict_key_x, dict_key_y)
        self._train, self._low_rank, self._options = _training_modules(model, train), low_rank, options

    @contextmanager
    def _mode(self) -> Iterator[None]:
        """Training mode of the chosen modules."""
        before = [(module, module.training) for module in self._train]
        try:
            for module in self._train:
                module.training = True
            yield
        finally:
            for module, mode in before:
                module.training = mode

    def _curvature(self, data: Any, quantity: bncurv.quantities.Quantity) -> tuple[bncurv.Results, Tensor]:
        """Results and loss of one batch ``(x, y)``, or of a loader, without laplace-torch's factor."""
        seen = []

        def forward(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
            x, y = (t.to(self.params[0].device) if isinstance(t, Tensor) else t for t in batch)
            output = model(x)
            seen.append((output.detach(), y))
            return output, y

        with self._mode():
            res = bncurv.curvature(
                self.model, self.lossfunc, data, quantity, params=self.params, forward=forward, **self._options
            )
        return res, torch.stack([self.lossfunc(output, y) for output, y in seen]).sum()

    def _of_subnetwork(self, t: Tensor) -> Tensor:
        """``[..., D]`` → the entries of the subnetwork."""
        return t if self.subnetwork_indices is None else t[..., self.subnetwork_indices]

    def kron(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: through batch statistics a layer's block has no Kronecker form."""
        raise NotImplementedError(
            f"{type(self).__name__} has no Kronecker factors (hessian_structure='kron'): through batch statistics a "
            "layer's GGN is none. Use 'diag' or 'full', or bncurv.adapters.laplace.LowRankLaplace."
        )


class BncurvGGN(_InTrainMode, GGNInterface):
    """The exact GGN in train mode: ``Laplace(model, likelihood, subset, structure, backend=BncurvGGN)``.

    For ``"diag"`` and ``"full"``, of all weights, the last layer or a subnetwork, and for `LowRankLaplace`. By
    laplace-torch's conventions losses are summed over the data, and 1/2 makes the squared error a Gaussian likelihood:
    H = Jᵀ J for regression and Jᵀ (diag p - p pᵀ) J for classification. Every mini-batch of the loader has its own
    statistics, so the batch size is part of the definition; the log likelihood is of the same mode.

    Fitting leaves the model in eval mode, and predictions are laplace-torch's, by Jacobians of that mode. Train mode
    is blind to the scale of weights in front of a BatchNorm, so along these the posterior is the prior, which
    predictions of eval mode do see. ``FunctionalLaplace`` and its kin work from Jacobians alone, and so in eval mode.

    Args:
        model: see laplace-torch, as for all up to ``dict_key_y``.
        likelihood: ``"classification"`` or ``"regression"``.
        last_layer: only the last layer's parameters.
        subnetwork_indices: only these entries of the flat parameters.
        dict_key_x: as in laplace-torch.
        dict_key_y: as in laplace-torch.
        train: names of the modules in training mode. Default: all normalisation layers with statistics of the batch,
            and those given to `bncurv.register_coupled`; name some if you froze others.
        low_rank: of `LowRankLaplace` only so many leading eigenpairs; default: all that are not zero.
        **options: of `bncurv.curvature`: ``method``, ``tol``, ``chunk_size``, ``progress``, ``precision``.

    Raises:
        ValueError: for a name in ``train`` that is no module's; else as `bncurv.curvature`.
        NotImplementedError: for ``"kron"``.

    Example:
        >>> import torch
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from laplace import Laplace
        >>> from bncurv.adapters.laplace import BncurvGGN
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2))
        >>> data = TensorDataset(torch.randn(8, 4), torch.randint(2, (8,)))
        >>> la = Laplace(model, "classification", "all", "diag", backend=BncurvGGN)
        >>> la.fit(DataLoader(data, batch_size=8))
        >>> la.posterior_variance.shape
        torch.Size([29])
    """

    def diag(self, x: Any, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Loss and diagonal ``[D]``."""
        res, loss = self._curvature((x, y), bncurv.DiagGGNExact())
        return self.factor * loss, self.factor * self._of_subnetwork(res.flat("diag_ggn_exact"))

    def full(self, x: Any, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Loss and matrix ``[D, D]``."""
        res, loss = self._curvature((x, y), bncurv.SqrtGGNExact())
        V = self._of_subnetwork(res.flat("sqrt_ggn_exact").flatten(0, 1))  # [K, D]
        with full_precision(V):
            return self.factor * loss, self.factor * (V.T @ V)

    def eig_lowrank(self, data_loader: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Eigenvectors ``[D, k]`` as columns, eigenvalues ``[k]`` and loss, over all batches."""
        res, loss = self._curvature(data_loader, bncurv.LowRankGGN(top=self._low_rank))
        return res.ggn.unit_vectors(), self.factor * res.ggn.eigenvalues, self.factor * loss


class BncurvEF(_InTrainMode, EFInterface):
    """The empirical Fisher Σ_n g_n g_nᵀ of the per-component gradients in train mode, for ``"diag"`` and ``"full"``.

    With g_n the part of the gradient that passes through output n; factors are laplace-torch's. Arguments as of
    `BncurvGGN`.

    Example:
        >>> import torch
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from laplace import Laplace
        >>> from bncurv.adapters.laplace import BncurvEF
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2))
        >>> data = TensorDataset(torch.randn(8, 4), torch.randint(2, (8,)))
        >>> la = Laplace(model, "classification", "all", "diag", backend=BncurvEF)
        >>> la.fit(DataLoader(data, batch_size=8))
        >>> la.posterior_variance.shape
        torch.Size([29])
    """

    def gradients(self, x: Any, y: Tensor) -> tuple[Tensor, Tensor]:
        """g_n of the summed loss, ``[N, D]``, and the loss."""
        res, loss = self._curvature((x, y), bncurv.ComponentGrad())
        return self._of_subnetwork(res.flat("grad_component")), loss


class LowRankLaplace(laplace.LowRankLaplace):
    """laplace-torch's own, whose constructor asks for a library (asdfghjkl) that only its own back-end needs.

    Args:
        model: see laplace-torch.
        likelihood: ``"classification"`` or ``"regression"``.
        **options: of laplace-torch; ``backend`` is `BncurvGGN`, its options are in ``backend_kwargs``.

    Example:
        >>> import torch
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from bncurv.adapters.laplace import LowRankLaplace
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2))
        >>> data = TensorDataset(torch.randn(8, 4), torch.randint(2, (8,)))
        >>> la = LowRankLaplace(model, "classification")
        >>> la.fit(DataLoader(data, batch_size=8))
        >>> la.sample(5).shape
        torch.Size([5, 29])
    """

    _key = ("all", "bncurv_lowrank")  # `Laplace(..., "lowrank")` stays what it was

    def __init__(self, model: nn.Module, likelihood: str, **options: Any) -> None:
        super(laplace.LowRankLaplace, self).__init__(model, likelihood, **({"backend": BncurvGGN} | options))


def _training_modules(model: nn.Module, names: Iterable[str] | None) -> list[nn.Module]:
    """Those to be in training mode."""
    modules = dict(model.named_modules())
    if names is None:
        return [m for m in modules.values() if isinstance(m, nn.modules.batchnorm._NormBase) or type(m) in COUPLED]
    names = list(names)
    unknown = [name for name in names if name not in modules]
    if unknown:
        raise ValueError(f"train= names {unknown}, no modules of {type(model).__name__}; it has {list(modules)[1:]}.")
    return [modules[name] for name in names]
