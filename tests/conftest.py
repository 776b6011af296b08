"""Common to all tests: one thread, a fixed seed, float64 on request."""

from collections.abc import Iterator

import cases
import pytest
import torch

# The cases are tiny: more threads gain nothing, and beside a busy neighbour they cost up to 30x.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test starts from the same generator state."""
    torch.manual_seed(0)


@pytest.fixture
def float64() -> Iterator[None]:
    """Float64 as the default dtype, a fixed seed; both restored."""
    with cases.float64(seed=0):
        yield
