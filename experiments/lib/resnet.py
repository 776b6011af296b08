"""The demo's network and data: a small BatchNorm ResNet on scikit-learn's digits, in float32, trained with AdamW."""

from __future__ import annotations

from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from tqdm import tqdm


class Digits(NamedTuple):
    """Training and test images `[N, 1, 8, 8]`, normalised, and their labels `[N]`."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def load_data(seed: int = 0, device: str = "cpu") -> Digits:
    """Split the 1797 digits 4:1, each class alike, and normalise by the training images."""
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=seed)
    train_x, test_x = (torch.tensor(x, dtype=torch.float32).view(-1, 1, 8, 8) for x in parts[:2])
    train_y, test_y = (torch.tensor(y, dtype=torch.long).to(device) for y in parts[2:])
    mean, std = train_x.mean(), train_x.std()
    return Digits(((train_x - mean) / std).to(device), train_y, ((test_x - mean) / std).to(device), test_y)


class Block(nn.Module):
    """conv-BN-ReLU-conv-BN beside a shortcut, then ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu_(self.bn1(self.conv1(x)))
        return torch.relu_(self.bn2(self.conv2(hidden)) + self.shortcut(x))


class SmallResNet(nn.Module):
    """A stem and two residual blocks for 8x8 images: six BatchNorms, ten classes."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.block1 = Block(width, width)
        self.block2 = Block(width, 2 * width, stride=2)
        self.fc = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu_(self.bn(self.conv(x)))
        x = self.block2(self.block1(x))
        return self.fc(x.mean(dim=(2, 3)))


def train(model: nn.Module, digits: Digits, epochs: int, batch_size: int = 64) -> None:
    """Train in place with AdamW and a one-cycle learning rate."""
    steps = len(digits.train_x) // batch_size
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=epochs * steps)
    model.train()
    with tqdm(total=epochs * steps, desc="training", unit="step") as bar:
        for _ in range(epochs):
            order = torch.randperm(len(digits.train_x))
            for batch in order[: steps * batch_size].split(batch_size):
                loss = nn.functional.cross_entropy(model(digits.train_x[batch]), digits.train_y[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of images that the model in eval mode labels correctly."""
    mode = model.training
    predictions = model.eval()(images).argmax(dim=1)
    model.train(mode)
    return (predictions == labels).float().mean().item()
