"""Common to all tests: one thread, a fixed seed, float64 on request, another device on request.

``pytest --device cuda`` runs the tests of exactness, of the gestures and of leaving no trace there, and no others.
"""

from collections.abc import Iterator

import cases
import pytest
import torch

# The cases are tiny: more threads gain nothing, and beside a busy neighbour they cost up to 30x.
torch.set_num_threads(1)

# Files whose tensors come from factories without a device: what is the default decides where they run.
ANYWHERE = {"test_exact", "test_gesture", "test_left_as_is", "test_quantities", "test_deflation", "test_point"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where the tests' tensors are made, e.g. cuda")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--device") != "cpu":
        torch.set_default_device(config.getoption("--device"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--device") == "cpu":
        return
    others = [item for item in items if item.path.stem not in ANYWHERE]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if item.path.stem in ANYWHERE]


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test starts from the same generator state."""
    torch.manual_seed(0)


@pytest.fixture
def float64() -> Iterator[None]:
    """Float64 as the default dtype, a fixed seed; both restored."""
    with cases.float64(seed=0):
        yield
