"""Affine maps per feature: of normalisations, PReLU (letters: ``layers/base.py``)."""

from __future__ import annotations

from abc import abstractmethod

import torch.nn.functional as nnf
from einops import rearrange
from torch import Tensor

from bncurv.layers.base import Arguments, Layer


class Affine(Layer):
    """``y = x̂ ∘ weight + bias`` behind a normalisation; subclasses say what x̂ is."""

    @abstractmethod
    def normalised(self, arguments: Arguments, x: Tensor) -> Tensor:
        """The input x̂ of the affine map."""

    def left(self, role, arguments, delta):
        return self.spread(arguments, delta, 1).unsqueeze(3)

    def right(self, role, arguments, x):
        if role == "bias":
            return None
        return rearrange(self.spread(arguments, self.normalised(arguments, x), 0), "n g s -> g n s 1")

    def spread(self, arguments: Arguments, x: Tensor, lead: int) -> Tensor:
        """Bring ``x [*lead, n, ...]`` to ``[*lead, n, feature, position]``; features are on axis 1 of a sample."""
        return x.reshape(*x.shape[: lead + 2], -1)


class LayerNorm(Affine):
    """Layer normalisation: features are the trailing axes."""

    arguments: tuple[str, ...] = ("input", "normalized_shape", "weight", "bias", "eps")

    def accepts(self, arguments):
        return arguments["input"].dim() > len(arguments["normalized_shape"])  # not over the samples

    def row_axes(self, arguments):
        return arguments["input"].dim() - len(arguments["normalized_shape"])

    def normalised(self, arguments, x):
        return nnf.layer_norm(x, arguments["normalized_shape"], eps=arguments.get("eps", 1e-5))

    def spread(self, arguments, x, lead):
        features = len(arguments["normalized_shape"])
        flat = x.reshape(*x.shape[: lead + 1], -1, x.shape[-features:].numel())
        return flat.mT


class GroupNorm(Affine):
    """Group normalisation."""

    arguments = ("input", "num_groups", "weight", "bias", "eps")

    def normalised(self, arguments, x):
        return nnf.group_norm(x, arguments["num_groups"], eps=arguments.get("eps", 1e-5))


class InstanceNorm(Affine):
    """Instance normalisation, with the instance's own or with running statistics."""

    arguments = ("input", "running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps")

    def normalised(self, arguments, x):
        eps = arguments.get("eps", 1e-5)
        if arguments.get("use_input_stats", True):
            return nnf.instance_norm(x, eps=eps)
        return nnf.batch_norm(x, arguments["running_mean"], arguments["running_var"], eps=eps)


class BatchNormEval(Affine):
    """Batch normalisation with running statistics: an affine map per channel."""

    arguments = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")

    def accepts(self, arguments):
        return not arguments.get("training", False)  # training: batchnorm.py

    def normalised(self, arguments, x):
        eps = arguments.get("eps", 1e-5)
        return nnf.batch_norm(x, arguments["running_mean"], arguments["running_var"], eps=eps)


class BatchNormTrain(Affine):
    """Affine part of a train-mode batch normalisation; ``mean`` and ``invstd`` are the batch's."""

    def normalised(self, arguments, x):
        axes = (1, -1) + (1,) * (x.dim() - 2)
        return (x - arguments["mean"].view(axes)) * arguments["invstd"].view(axes)


class RMSNorm(LayerNorm):
    """Root-mean-square normalisation over the trailing axes."""

    arguments = ("input", "normalized_shape", "weight", "eps")
    parameters = ("weight",)

    def normalised(self, arguments, x):
        return nnf.rms_norm(x, arguments["normalized_shape"], eps=arguments.get("eps"))


class PReLU(Affine):
    """``y = max(x, 0) + weight min(x, 0)`` with one weight, or one per channel."""

    arguments = ("input", "weight")
    parameters = ("weight",)

    def normalised(self, arguments, x):
        return x.clamp(max=0)

    def spread(self, arguments, x, lead):
        if arguments["weight"].numel() == 1:
            return x.reshape(*x.shape[: lead + 1], 1, -1)
        return super().spread(arguments, x, lead)
