"""Graphs: PyTorch Geometric, unequal graphs in one batch, one label each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch_geometric.nn as gnn
from torch import Tensor, nn
from torch_geometric.data import Batch, Data
from zoo.measure import Architecture

N, C, FEATURES, WIDTH = 8, 3, 5, 8


class Classifier(nn.Module):
    """A network of nodes, pooled by graph, a linear layer."""

    def __init__(self, nodes: nn.Module, pool: nn.Module | Callable, width: int = WIDTH) -> None:
        super().__init__()
        self.nodes, self.pool, self.head = nodes, pool, nn.Linear(width, C)

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:
        return self.head(self.pool(self.nodes(x, edge_index), batch))


class GPS(nn.Module):
    """A layer of message passing beside attention within each graph."""

    def __init__(self) -> None:
        super().__init__()
        inner = gnn.GINConv(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()))
        self.embed, self.head = nn.Linear(FEATURES, WIDTH), nn.Linear(WIDTH, C)
        self.layer = gnn.GPSConv(WIDTH, inner, heads=2)

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:
        return self.head(gnn.global_add_pool(self.layer(self.embed(x), edge_index, batch), batch))


class TopK(nn.Module):
    """Nodes that are left out by their score."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = gnn.ARMAConv(FEATURES, WIDTH, 2), nn.BatchNorm1d(WIDTH)
        self.pool, self.head = gnn.TopKPooling(WIDTH, 0.6), nn.Linear(WIDTH, C)

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:
        x = self.norm(self.conv(x, edge_index)).relu()
        x, _, _, batch, *_ = self.pool(x, edge_index, batch=batch)
        return self.head(gnn.global_mean_pool(x, batch))


def graph(nodes: int) -> Data:
    """A ring with random chords."""
    ring = torch.arange(nodes)
    edges = torch.stack([ring, ring.roll(1)])
    chords = torch.randint(nodes, (2, nodes // 2))
    edges = torch.cat([edges, edges.flip(0), chords, chords.flip(0)], 1)
    return Data(torch.randn(nodes, FEATURES), edges.unique(dim=1), y=torch.randint(C, (1,)))


def graphs() -> Batch:
    return Batch.from_data_list([graph(3 + n % 4) for n in range(N)])


def call(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    return model(batch.x, batch.edge_index, batch.batch), batch.y


def net(name: str, kind: Any, pool: Any = gnn.global_mean_pool, **options: Any) -> Architecture:
    def build() -> nn.Module:
        return Classifier(kind(FEATURES, WIDTH, num_layers=2, norm="batch_norm", **options), pool)

    return Architecture(name, "torch_geometric", build, graphs, call)


ARCHITECTURES = [
    net("GCN", gnn.GCN, dropout=0.1),
    net("GraphSAGE", gnn.GraphSAGE, gnn.global_max_pool),
    net("GIN", gnn.GIN, gnn.global_add_pool, train_eps=True),
    net("GAT", gnn.GAT, heads=2, dropout=0.1),
    net("GATv2", gnn.GAT, v2=True, heads=2),
    net("PNA", gnn.PNA, aggregators=["mean", "max", "std"], scalers=["identity"], deg=torch.ones(10)),
    net("EdgeCNN", gnn.EdgeCNN),
    Architecture("GPS", "torch_geometric", GPS, graphs, call),
    Architecture("ARMA with TopK pooling", "torch_geometric", TopK, graphs, call),
]
