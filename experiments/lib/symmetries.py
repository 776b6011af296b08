"""Null directions of the GGN that a network's modules predict, for a Sequential of layer-BatchNorm-ReLU blocks.

They are the whole null space where there are more components than parameters and every unit is active on more samples
than it has weights (a ReLU unit that is active on few samples hides the rest of its weights' space).

Four kinds, each a direction in which the loss does not move to first order, whatever the batch:

    bias      of a layer below a BatchNorm: the BatchNorm takes it off again
    radial    (w_k, -γ_k ε/(σ_k² + ε)): scaling a unit's weights changes ŷ only through ε, which γ makes up for
    rescaling (γ_k, β_k, -the weights that read unit k): positive factors pass through ReLU and pooling
    shift     all classes' weights of one feature, or all biases, together: the softmax does not see it
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

Direction = dict[str, Tensor]


def predicted(model: nn.Sequential, X: Tensor) -> dict[str, list[Direction]]:
    """Null directions of the train-mode GGN of the cross-entropy at the batch ``X``, by kind.

    Args:
        model: blocks of Linear or Conv2d, BatchNorm, ReLU (pooling and flattening between them), a Linear at the end.
        X: the batch; the radial directions need its variances where ε > 0.

    Returns:
        Lists of vectors ``{parameter name: tensor}``; names that are missing are zero.
    """
    found: dict[str, list[Direction]] = {"bias": [], "radial": [], "rescaling": [], "shift": []}
    layers = [(i, m) for i, m in enumerate(model) if isinstance(m, nn.Linear | nn.Conv2d)]
    variances = below_batch_norms(model, X)
    for (i, layer), (j, reader) in zip(layers, layers[1:], strict=False):
        bn = model[i + 1]
        share = bn.eps / (variances[i + 1] + bn.eps)
        readers = reader.weight.detach().unflatten(1, (bn.num_features, -1))  # a channel's features lie together
        for k in range(bn.num_features):
            unit = torch.zeros_like(bn.weight)
            unit[k] = 1
            only = unit.view(-1, *[1] * (layer.weight.dim() - 1))
            if layer.bias is not None:
                found["bias"].append({f"{i}.bias": unit})
            tilt = -bn.weight.detach() * share * unit
            found["radial"].append({f"{i}.weight": layer.weight.detach() * only, f"{i + 1}.weight": tilt})
            reads = torch.zeros_like(readers)
            reads[:, k] = -readers[:, k]
            found["rescaling"].append(
                {
                    f"{i + 1}.weight": bn.weight.detach() * unit,
                    f"{i + 1}.bias": bn.bias.detach() * unit,
                    f"{j}.weight": reads.flatten(1, 2),
                }
            )
    last, linear = layers[-1]
    for feature in range(linear.in_features):
        weight = torch.zeros_like(linear.weight)
        weight[:, feature] = 1
        found["shift"].append({f"{last}.weight": weight})
    found["shift"].append({f"{last}.bias": torch.ones_like(linear.bias)})
    return found


@torch.no_grad()
def below_batch_norms(model: nn.Sequential, X: Tensor) -> dict[int, Tensor]:
    """Biased variance of each channel that enters a BatchNorm, by the BatchNorm's index; running statistics stay."""
    variances, kept = {}, {key: value.clone() for key, value in model.state_dict().items()}
    for i, module in enumerate(model):
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            variances[i] = X.transpose(0, 1).flatten(1).var(1, correction=0)
        X = module(X)
    model.load_state_dict(kept)
    return variances


def flat(direction: Direction, model: nn.Module) -> Tensor:
    """``[D]`` in the order of the model's parameters."""
    parts = [direction.get(name, torch.zeros_like(p)) for name, p in model.named_parameters()]
    return torch.cat([part.detach().reshape(-1) for part in parts])
