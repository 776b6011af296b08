"""What an experiment runs in."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def defaults(seed: int) -> Any:
    """Float64, one thread, a seeded generator; dtype and threads as before afterwards."""
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_num_threads(threads)
