"""The networks of the benchmark, in plain torch, and the random problem each of them is asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


class Residual(nn.Module):
    """``relu(branch(x) + shortcut(x))``, the basic block of a CIFAR ResNet."""

    def __init__(self, c_in: int, c_out: int, stride: int = 1) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(c_out),
            nn.ReLU(),
            nn.Conv2d(c_out, c_out, 3, padding=1, bias=False),
            nn.BatchNorm2d(c_out),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or c_in != c_out:
            conv = nn.Conv2d(c_in, c_out, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(c_out))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.branch(x) + self.shortcut(x))


class PreActivation(nn.Module):
    """Pre-activation block of a wide ResNet (BN-ReLU-conv twice, shortcut from the activation)."""

    def __init__(self, c_in: int, c_out: int, stride: int = 1) -> None:
        super().__init__()
        self.activation = nn.Sequential(nn.BatchNorm2d(c_in), nn.ReLU())
        self.branch = nn.Sequential(
            nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(c_out),
            nn.ReLU(),
            nn.Conv2d(c_out, c_out, 3, padding=1, bias=False),
        )
        self.projects = stride != 1 or c_in != c_out
        self.shortcut: nn.Module = (
            nn.Conv2d(c_in, c_out, 1, stride, bias=False) if self.projects else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        a = self.activation(x)
        return self.branch(a) + self.shortcut(a if self.projects else x)


def conv_bn_relu(c_in: int, c_out: int, bias: bool = True) -> list[nn.Module]:
    """A 3x3 convolution that keeps the size, its BN and its ReLU."""
    return [nn.Conv2d(c_in, c_out, 3, padding=1, bias=bias), nn.BatchNorm2d(c_out), nn.ReLU()]


def head(c_in: int, classes: int) -> list[nn.Module]:
    """Global average pooling and the classifier."""
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c_in, classes)]


def mlp(classes: int) -> nn.Module:
    """64-100-100-C, BN after each hidden linear layer."""
    hidden: list[nn.Module] = []
    for f_in, f_out in ((64, 100), (100, 100)):
        hidden += [nn.Linear(f_in, f_out), nn.BatchNorm1d(f_out), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Linear(100, classes))


def cnn(classes: int) -> nn.Module:
    """Two convolutions with BN, for 1x8x8."""
    first, second = conv_bn_relu(1, 16), conv_bn_relu(16, 32)
    return nn.Sequential(*first, nn.MaxPool2d(2), *second, *head(32, classes))


def vgg(classes: int) -> nn.Module:
    """Six convolutions with BN (16-16-M-32-32-M-64-64), for 1x8x8."""
    layers: list[nn.Module] = []
    c_in = 1
    for width in (16, 32, 64):
        if c_in > 1:
            layers.append(nn.MaxPool2d(2))
        layers += conv_bn_relu(c_in, width) + conv_bn_relu(width, width)
        c_in = width
    return nn.Sequential(*layers, *head(64, classes))


def resnet(classes: int, widths: tuple[int, ...], blocks: int) -> nn.Module:
    """CIFAR ResNet: a stem, ``blocks`` residual blocks per width, stride 2 between widths."""
    layers = conv_bn_relu(3, widths[0], bias=False)
    c_in = widths[0]
    for i, width in enumerate(widths):
        for j in range(blocks):
            layers.append(Residual(c_in, width, 2 if i > 0 and j == 0 else 1))
            c_in = width
    return nn.Sequential(*layers, *head(c_in, classes))


def wrn(classes: int, blocks: int = 2, widen: int = 2) -> nn.Module:
    """Wide ResNet 16-2 (depth ``6 * blocks + 4``)."""
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1, bias=False)]
    c_in = 16
    for i, width in enumerate((16 * widen, 32 * widen, 64 * widen)):
        for j in range(blocks):
            layers.append(PreActivation(c_in, width, 2 if i > 0 and j == 0 else 1))
            c_in = width
    return nn.Sequential(*layers, nn.BatchNorm2d(c_in), nn.ReLU(), *head(c_in, classes))


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


class Tokens(nn.Module):
    """Patches of 2x2, a class token and a table of positions."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, width, 2, stride=2)
        self.token = nn.Parameter(0.1 * torch.randn(1, 1, width))
        self.position = nn.Parameter(0.1 * torch.randn(1, count + 1, width))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).mT
        return torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position


class First(nn.Module):
    """The first token."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, 0]


def vit(classes: int, width: int = 24, depth: int = 2) -> nn.Module:
    """Vision transformer with BatchNorm, for 1x8x8: 16 patches."""
    blocks = [AttentionBlock(width) for _ in range(depth)]
    return nn.Sequential(Tokens(width, 16), *blocks, First(), nn.BatchNorm1d(width), nn.Linear(width, classes))


class ScaledBlock(nn.Module):
    """Block of a ConvNeXt with BatchNorm: depthwise convolution, two pointwise ones, LayerScale, residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, groups=width),
            nn.BatchNorm2d(width),
            nn.Conv2d(width, 4 * width, 1),
            nn.GELU(),
            nn.Conv2d(4 * width, width, 1),
        )
        self.gamma = nn.Parameter(torch.full((width, 1, 1), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma * self.branch(x)


def convnext(classes: int, width: int = 16, depth: int = 3) -> nn.Module:
    """ConvNeXt-like network with LayerScale, for 1x8x8."""
    stem = [nn.Conv2d(1, width, 2, stride=2), nn.BatchNorm2d(width)]
    return nn.Sequential(*stem, *(ScaledBlock(width) for _ in range(depth)), *head(width, classes))


@dataclass(frozen=True)
class Network:
    """A network of the grid: how to build it, its input shape and its number of classes."""

    build: Callable[[int], nn.Module]
    shape: tuple[int, ...]
    classes: int


def _resnet20(classes: int) -> nn.Module:
    return resnet(classes, (16, 32, 64), 3)


def _resnet18(classes: int) -> nn.Module:
    return resnet(classes, (64, 128, 256, 512), 2)


IMAGE = (3, 32, 32)
NETWORKS = {
    "mlp": Network(mlp, (64,), 10),
    "mlp-c100": Network(mlp, (64,), 100),
    "cnn": Network(cnn, (1, 8, 8), 10),
    "cnn-c100": Network(cnn, (1, 8, 8), 100),
    "vgg": Network(vgg, (1, 8, 8), 10),
    "vit": Network(vit, (1, 8, 8), 10),
    "convnext": Network(convnext, (1, 8, 8), 10),
    "resnet20": Network(_resnet20, IMAGE, 10),
    "resnet20-c100": Network(_resnet20, IMAGE, 100),
    "wrn16-2": Network(wrn, IMAGE, 10),
    "wrn16-2-c100": Network(wrn, IMAGE, 100),
    "resnet18-c100": Network(_resnet18, IMAGE, 100),
}


def make_problem(
    name: str, n: int, device: torch.device, seed: int = 0
) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """A train-mode network, its loss, and a random batch of ``n`` samples."""
    network = NETWORKS[name]
    torch.manual_seed(seed)
    model = network.build(network.classes).train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    X, y = torch.randn(n, *network.shape), torch.randint(network.classes, (n,))
    return model.to(device), nn.CrossEntropyLoss(), X.to(device), y.to(device)
