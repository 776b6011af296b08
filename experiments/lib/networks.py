"""The networks of the benchmark, in plain torch, and the random problem each of them is asked."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn


def conv_bn(c_in: int, c_out: int, kernel: int = 3, stride: int = 1, bias: bool = False) -> list[nn.Module]:
    """A convolution that keeps the size (but for its stride) and its BatchNorm."""
    return [nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=bias), nn.BatchNorm2d(c_out)]


def head(c_in: int, classes: int) -> list[nn.Module]:
    """Global average pooling and the classifier."""
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c_in, classes)]


class Residual(nn.Module):
    """``relu(branch(x) + shortcut(x))``, the basic block of a CIFAR ResNet."""

    def __init__(self, c_in: int, c_out: int, stride: int = 1) -> None:
        super().__init__()
        self.branch = nn.Sequential(*conv_bn(c_in, c_out, 3, stride), nn.ReLU(), *conv_bn(c_out, c_out))
        same = stride == 1 and c_in == c_out
        self.shortcut = nn.Identity() if same else nn.Sequential(*conv_bn(c_in, c_out, 1, stride))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.branch(x) + self.shortcut(x))


class PreActivation(nn.Module):
    """Block of a wide ResNet: BN-ReLU-conv twice, shortcut from the activation where it projects."""

    def __init__(self, c_in: int, c_out: int, stride: int = 1) -> None:
        super().__init__()
        self.activation = nn.Sequential(nn.BatchNorm2d(c_in), nn.ReLU())
        self.branch = nn.Sequential(*conv_bn(c_in, c_out, 3, stride), nn.ReLU(), conv_bn(c_out, c_out)[0])
        self.projects = stride != 1 or c_in != c_out
        self.shortcut = nn.Conv2d(c_in, c_out, 1, stride, bias=False) if self.projects else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        a = self.activation(x)
        return self.branch(a) + self.shortcut(a if self.projects else x)


def mlp(classes: int) -> nn.Module:
    """64-100-100-C, BN after each hidden linear layer."""
    hidden: list[nn.Module] = []
    for f_in, f_out in ((64, 100), (100, 100)):
        hidden += [nn.Linear(f_in, f_out), nn.BatchNorm1d(f_out), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Linear(100, classes))


def plain(classes: int, widths: tuple[int, ...]) -> nn.Module:
    """Convolutions with BN for 1x8x8, a pooling (0) among them."""
    layers: list[nn.Module] = []
    c_in = 1
    for width in widths:
        layers += [*conv_bn(c_in, width, bias=True), nn.ReLU()] if width else [nn.MaxPool2d(2)]
        c_in = width or c_in
    return nn.Sequential(*layers, *head(c_in, classes))


def residual(block: Callable[[int, int, int], nn.Module], c_in: int, widths: tuple[int, ...], count: int) -> nn.Module:
    """``count`` blocks per width, stride 2 between widths."""
    layers = []
    for i, width in enumerate(widths):
        for j in range(count):
            layers.append(block(c_in, width, 2 if i > 0 and j == 0 else 1))
            c_in = width
    return nn.Sequential(*layers)


def resnet(classes: int, widths: tuple[int, ...], blocks: int) -> nn.Module:
    """CIFAR ResNet: a stem, ``blocks`` residual blocks per width."""
    stem = [*conv_bn(3, widths[0]), nn.ReLU()]
    return nn.Sequential(*stem, residual(Residual, widths[0], widths, blocks), *head(widths[-1], classes))


def wrn(classes: int, blocks: int, widen: int) -> nn.Module:
    """Wide ResNet of depth ``6 * blocks + 4``."""
    widths = 16 * widen, 32 * widen, 64 * widen
    body = nn.Conv2d(3, 16, 3, padding=1, bias=False), residual(PreActivation, 16, widths, blocks)
    return nn.Sequential(*body, nn.BatchNorm2d(widths[-1]), nn.ReLU(), *head(widths[-1], classes))


class AttentionBlock(nn.Module):
    """Block of a vision transformer with BatchNorm over the features in front of attention and MLP, and LayerScale."""

    def __init__(self, width: int, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.BatchNorm1d(width), nn.BatchNorm1d(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.gamma1, self.gamma2 = (nn.Parameter(torch.full((width,), 0.5)) for _ in range(2))

    def attend(self, x: Tensor) -> Tensor:
        """Softmax attention among the tokens of each image."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [n, head, token, d] each
        scores = (q @ k.mT) * q.shape[-1] ** -0.5
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.gamma1 * self.attend(self.norm1(x.mT).mT)
        return x + self.gamma2 * self.mlp(self.norm2(x.mT).mT)


class VisionTransformer(nn.Module):
    """For 1x8x8: 16 patches of 2x2, a class token and a table of positions, blocks, BN and the classifier."""

    def __init__(self, classes: int, width: int, depth: int) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, width, 2, stride=2)
        self.token = nn.Parameter(0.1 * torch.randn(1, 1, width))
        self.position = nn.Parameter(0.1 * torch.randn(1, 17, width))
        self.blocks = nn.Sequential(*(AttentionBlock(width) for _ in range(depth)))
        self.head = nn.Sequential(nn.BatchNorm1d(width), nn.Linear(width, classes))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).mT
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        return self.head(self.blocks(x)[:, 0])


class ScaledBlock(nn.Module):
    """Block of a ConvNeXt with BatchNorm: depthwise convolution, two pointwise ones, LayerScale, residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width), nn.BatchNorm2d(width)
        pointwise = nn.Conv2d(width, 4 * width, 1), nn.GELU(), nn.Conv2d(4 * width, width, 1)
        self.branch = nn.Sequential(*depthwise, *pointwise)
        self.gamma = nn.Parameter(torch.full((width, 1, 1), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma * self.branch(x)


def convnext(classes: int, width: int, depth: int) -> nn.Module:
    """ConvNeXt-like network with LayerScale, for 1x8x8."""
    stem = [nn.Conv2d(1, width, 2, stride=2), nn.BatchNorm2d(width)]
    return nn.Sequential(*stem, *(ScaledBlock(width) for _ in range(depth)), *head(width, classes))


class Network(NamedTuple):
    """How to build a network for a number of classes, and its input's shape."""

    build: Callable[[int], nn.Module]
    shape: tuple[int, ...]


SMALL, IMAGE = (1, 8, 8), (3, 32, 32)
NETWORKS = {
    "mlp": Network(mlp, (64,)),
    "cnn": Network(partial(plain, widths=(16, 0, 32)), SMALL),
    "vgg": Network(partial(plain, widths=(16, 16, 0, 32, 32, 0, 64, 64)), SMALL),
    "vit": Network(partial(VisionTransformer, width=24, depth=2), SMALL),
    "convnext": Network(partial(convnext, width=16, depth=3), SMALL),
    "resnet20": Network(partial(resnet, widths=(16, 32, 64), blocks=3), IMAGE),
    "wrn16-2": Network(partial(wrn, blocks=2, widen=2), IMAGE),
    "wrn16-4": Network(partial(wrn, blocks=2, widen=4), IMAGE),
    "resnet18": Network(partial(resnet, widths=(64, 128, 256, 512), blocks=2), IMAGE),
}


def build(name: str) -> tuple[nn.Module, tuple[int, ...], int]:
    """A network by its name, its input's shape and its number of classes: 10, or C for ``name-cC``."""
    base, _, classes = name.partition("-c")
    network, C = NETWORKS[base], int(classes or 10)
    return network.build(C), network.shape, C


def make_problem(name: str, n: int, device: torch.device, seed: int = 0) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """A train-mode network, its loss, and a random batch of ``n`` samples."""
    torch.manual_seed(seed)
    model, shape, classes = build(name)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    X, y = torch.randn(n, *shape), torch.randint(classes, (n,))
    return model.train().to(device), nn.CrossEntropyLoss(), X.to(device), y.to(device)


def untracked(model: nn.Module) -> nn.Module:
    """A copy whose BNs keep no running statistics: curvlinops cannot trace their update."""
    model = copy.deepcopy(model)
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.track_running_stats, m.running_mean, m.running_var, m.num_batches_tracked = False, None, None, None
    return model
