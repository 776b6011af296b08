"""Slow dense oracle: what the engine must reproduce, computed in the most literal way.

Everything here is one ordinary backward pass per row of the full-batch Jacobian, in float64, on a
deep copy of the model. Batch statistics are differentiated through because autograd does so; no
gate, no loss factor, no ``vmap`` and no layer rule is shared with the engine. Use it on tiny nets.

Words: ``n`` sample (of ``N``), ``i`` row of the flattened output (of ``M = N * C``, ``C`` counts
all entries of one sample's output), ``p`` parameter (of ``D`` in total). ``[*p]`` is the shape of a
parameter. With ``F`` the output of the whole batch and ``L`` the loss *as the module reduces it*

    J = dF/dtheta  [M, D]        H = d^2 L / dF^2  [M, M]        G = J^T H J  [D, D]

so that the ``1/N`` of a mean reduction sits in ``H`` and in ``dL/dF``, nowhere else.

Parameters are those that require gradients, in the model's order, or the ones named in ``params``
(still in the model's order; a frozen parameter may be named). ``seed`` fixes the random draws of
the forward pass; without it they start from the caller's generator state. The caller's generators
are never advanced, and the caller's model, loss and data are never touched.
"""

import copy
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from einops import rearrange, reduce
from torch import Tensor, nn

__all__ = [
    "component_ggn_diagonal",
    "component_gradients",
    "ggn",
    "ggn_diagonal",
    "gradient",
    "jacobian",
    "loss_hessian",
]

Loss = Callable[[Tensor, Tensor], Tensor]
Callee = TypeVar("Callee", bound=Callable[..., Tensor])


def jacobian(
    model: nn.Module, X: Tensor, params: Iterable[str] | None = None, *, seed: int | None = None
) -> dict[str, Tensor]:
    """Jacobian of the whole batch's output, batch statistics differentiated through.

    Args:
        model: Any module whose output on ``X`` is one tensor, sample dimension first.
        X: The batch, sample dimension first.
        params: Names of parameters; default: all that require gradients.
        seed: Seed of the forward pass, for models that draw random numbers.

    Returns:
        For every name ``dF/dp`` of shape ``[N*C, *p]``; row ``i`` belongs to ``F.flatten()[i]``.

    Example:
        >>> import torch
        >>> from bncurv import reference
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2))
        >>> X, y = torch.randn(8, 4), torch.randint(2, (8,))
        >>> reference.jacobian(model, X)["0.weight"].shape
        torch.Size([16, 3, 4])
    """
    return _jacobian(*_forward(model, X, params, seed))


def loss_hessian(loss_fn: Loss, F: Tensor, y: Tensor) -> Tensor:
    """Hessian of the reduced loss with respect to the model's output, by double backward.

    The loss may mix samples: nothing is assumed about the structure of the result.

    Args:
        loss_fn: Maps ``(F, y)`` to a scalar.
        F: Model output of any shape, ``M`` entries.
        y: Targets.

    Returns:
        ``d^2 L / dF^2`` of shape ``[M, M]``, rows and columns in the order of ``F.flatten()``.

    Example:
        >>> import torch
        >>> from bncurv import reference
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2))
        >>> X, y = torch.randn(8, 4), torch.randint(2, (8,))
        >>> reference.loss_hessian(torch.nn.CrossEntropyLoss(), model(X), y).shape
        torch.Size([16, 16])
    """
    loss = _bind(loss_fn, y)
    hessian = torch.autograd.functional.hessian(loss, _double(F))
    return hessian.reshape(F.numel(), F.numel())


def gradient(
    model: nn.Module,
    loss_fn: Loss,
    X: Tensor,
    y: Tensor,
    params: Iterable[str] | None = None,
    *,
    seed: int | None = None,
) -> dict[str, Tensor]:
    """Gradient of the loss as reduced: what ``loss_fn(model(X), y).backward()`` gives.

    Args:
        model: Any module whose output on ``X`` is one tensor, sample dimension first.
        loss_fn: Maps ``(output, y)`` to a scalar.
        X: The batch, sample dimension first.
        y: Targets.
        params: Names of parameters; default: all that require gradients.
        seed: Seed of the forward pass, for models that draw random numbers.

    Returns:
        For every name the gradient, shape ``[*p]``.

    Example:
        >>> import torch
        >>> from bncurv import reference
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2))
        >>> X, y = torch.randn(8, 4), torch.randint(2, (8,))
        >>> reference.gradient(model, torch.nn.CrossEntropyLoss(), X, y)["0.weight"].shape
        torch.Size([3, 4])
    """
    F, chosen = _forward(model, X, params, seed)
    return dict(zip(chosen, _vjp(_bind(loss_fn, y)(F), chosen), strict=True))


def component_gradients(
    model: nn.Module,
    loss_fn: Loss,
    X: Tensor,
    y: Tensor,
    params: Iterable[str] | None = None,
    *,
    seed: int | None = None,
) -> dict[str, Tensor]:
    """Per-component gradients ``g_n = J_n^T dL/dF_n``; they sum to the gradient of the loss.

    ``J_n`` are the rows of the full-batch Jacobian that belong to sample ``n``: in train mode
    ``g_n`` depends on every sample. With a mean reduction each ``g_n`` carries its share of the
    factor (``1/N`` for an unweighted mean over samples).

    Arguments as in :func:`gradient`.

    Returns:
        For every name the components, shape ``[N, *p]``.

    Example:
        >>> import torch
        >>> from bncurv import reference
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2))
        >>> X, y = torch.randn(8, 4), torch.randint(2, (8,))
        >>> reference.component_gradients(model, torch.nn.CrossEntropyLoss(), X, y)["0.weight"].shape
        torch.Size([8, 3, 4])
    """
    F, chosen = _forward(model, X, params, seed)
    leaf = F.detach().requires_grad_()
    (loss_grad,) = torch.autograd.grad(_bind(loss_fn, y)(leaf), leaf)
    cotangents = torch.zeros(len(F), *F.shape, dtype=F.dtype, device=F.device)
    for n, row in enumerate(loss_grad):
        cotangents[n, n] = row
    return _pull_back(F, chosen, cotangents)


def ggn(
    model: nn.Module,
    loss_fn: Loss,
    X: Tensor,
    y: Tensor,
    params: Iterable[str] | None = None,
    *,
    seed: int | None = None,
) -> Tensor:
    """Generalised Gauss-Newton matrix ``G = J^T H J`` of the loss as reduced.

    Arguments as in :func:`gradient`.

    Returns:
        The dense matrix, shape ``[D, D]``; parameters in the model's order, each flattened.

    Example:
        >>> import torch
        >>> from bncurv import reference
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2))
        >>> X, y = torch.randn(8, 4), torch.randint(2, (8,))
        >>> reference.ggn(model, torch.nn.CrossEntropyLoss(), X, y).shape
        torch.Size([29, 29])
    """
    J, H, _ = _factors(model, loss_fn, X, y, params, seed)
    flat = torch.cat([rearrange(rows, "i ... -> i (...)") for rows in J.values()], dim=1)
    return flat.T @ H @ flat


def component_ggn_diagonal(
    model: nn.Module,
    loss_fn: Loss,
    X: Tensor,
    y: Tensor,
    params: Iterable[str] | None = None,
    *,
    seed: int | None = None,
) -> dict[str, Tensor]:
    """Share of every sample in the GGN's diagonal; the shares sum to :func:`ggn_diagonal`.

    For a loss that does not mix samples this is ``diag(J_n^T H_n J_n)``: the sum of squares over
    the columns ``V[(n, c)]`` of sample ``n``, whatever factor ``S S^T = H`` they come from.

    Arguments as in :func:`gradient`.

    Returns:
        For every name the shares, shape ``[N, *p]``.

    Example:
        >>> import torch
        >>> from bncurv import reference
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2))
        >>> X, y = torch.randn(8, 4), torch.randint(2, (8,))
        >>> reference.component_ggn_diagonal(model, torch.nn.CrossEntropyLoss(), X, y)["0.weight"].shape
        torch.Size([8, 3, 4])
    """
    J, H, N = _factors(model, loss_fn, X, y, params, seed)
    return {
        name: reduce(rows * torch.tensordot(H, rows, 1), "(n c) ... -> n ...", "sum", n=N) for name, rows in J.items()
    }


def ggn_diagonal(
    model: nn.Module,
    loss_fn: Loss,
    X: Tensor,
    y: Tensor,
    params: Iterable[str] | None = None,
    *,
    seed: int | None = None,
) -> dict[str, Tensor]:
    """Diagonal of :func:`ggn` without the ``[D, D]`` matrix.

    Arguments as in :func:`gradient`.

    Returns:
        For every name the diagonal entries, shape ``[*p]``.

    Example:
        >>> import torch
        >>> from bncurv import reference
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2))
        >>> X, y = torch.randn(8, 4), torch.randint(2, (8,))
        >>> loss_fn = torch.nn.CrossEntropyLoss()
        >>> diagonal = reference.ggn_diagonal(model, loss_fn, X, y)["0.weight"]
        >>> torch.allclose(reference.ggn(model, loss_fn, X, y).diagonal()[:12], diagonal.flatten())
        True
    """
    J, H, _ = _factors(model, loss_fn, X, y, params, seed)
    return {name: (rows * torch.tensordot(H, rows, 1)).sum(0) for name, rows in J.items()}


def _factors(
    model: nn.Module,
    loss_fn: Loss,
    X: Tensor,
    y: Tensor,
    params: Iterable[str] | None,
    seed: int | None,
) -> tuple[dict[str, Tensor], Tensor, int]:
    """``J`` by name [M, *p], ``H`` [M, M] and ``N``, all from the same forward pass."""
    F, chosen = _forward(model, X, params, seed)
    return _jacobian(F, chosen), loss_hessian(loss_fn, F, y), len(F)


def _forward(
    model: nn.Module, X: Tensor, params: Iterable[str] | None, seed: int | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Output of a float64 copy of the model, and the chosen parameters of that copy."""
    twin = _twin(model)
    chosen = _choose(twin, params)
    with torch.enable_grad(), torch.random.fork_rng([X.device] if X.is_cuda else []):
        if seed is not None:
            torch.manual_seed(seed)
        F = twin(_double(X))
    if not isinstance(F, Tensor):
        raise TypeError(f"the model must return one tensor, it returned {type(F).__name__}")
    return F, chosen


def _choose(model: nn.Module, params: Iterable[str] | None) -> dict[str, Tensor]:
    """Chosen parameters in the model's order, ready to be differentiated."""
    named = dict(model.named_parameters())
    wanted = {n for n, p in named.items() if p.requires_grad} if params is None else set(params)
    if not wanted:
        raise ValueError("nothing to differentiate: no parameter requires gradients or is named")
    if unknown := sorted(wanted - named.keys()):
        raise ValueError(f"no such parameters: {unknown}; the model has {sorted(named)}")
    return {name: p.requires_grad_() for name, p in named.items() if name in wanted}


def _jacobian(F: Tensor, chosen: dict[str, Tensor]) -> dict[str, Tensor]:
    """One backward pass per entry of ``F``."""
    identity = torch.eye(F.numel(), dtype=F.dtype, device=F.device)
    return _pull_back(F, chosen, identity.reshape(-1, *F.shape))


def _pull_back(F: Tensor, chosen: dict[str, Tensor], cotangents: Tensor) -> dict[str, Tensor]:
    """Vector-Jacobian products of all cotangents, one ordinary backward pass each."""
    rows = zip(*(_vjp(F, chosen, cotangent.clone()) for cotangent in cotangents), strict=True)
    return {name: torch.stack(row) for name, row in zip(chosen, rows, strict=True)}


def _vjp(output: Tensor, chosen: dict[str, Tensor], cotangent: Tensor | None = None) -> tuple[Tensor, ...]:
    """One backward pass; parameters that do not take part get zeros."""
    return torch.autograd.grad(
        output,
        list(chosen.values()),
        cotangent,
        retain_graph=True,
        allow_unused=True,
        materialize_grads=True,
    )


def _bind(loss_fn: Loss, y: Tensor) -> Callable[[Tensor], Tensor]:
    """The loss as a float64 function of the output alone."""
    twin, target = _twin(loss_fn), _double(y)

    def loss(F: Tensor) -> Tensor:
        with torch.enable_grad():
            value = twin(F, target)
        if value.numel() != 1:
            raise ValueError(f"the loss must be a scalar, its shape is {tuple(value.shape)}")
        return value

    return loss


def _twin(callee: Callee) -> Callee:
    """Float64 deep copy of a module without backward hooks; other callables as they are."""
    if not isinstance(callee, nn.Module):
        return callee
    computed = [t for m in callee.modules() for t in vars(m).values() if isinstance(t, Tensor) and not t.is_leaf]
    twin = copy.deepcopy(callee, {id(t): t.detach() for t in computed}).double()  # e.g. of prune, computed again
    for module in twin.modules():  # e.g. BackPACK's, which would refuse in-place activations
        module._backward_hooks.clear()
        module._backward_pre_hooks.clear()
    return twin


def _double(tensor: Tensor) -> Tensor:
    """Detached copy, float64 if floating point (token indices and class labels stay integers)."""
    copied = tensor.detach().clone()
    return copied.double() if copied.is_floating_point() else copied
