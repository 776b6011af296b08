"""A bell beside the messages: a rank that has failed rings, and the others hear it between passes.

Without it they would come to know at their next message, which may be minutes of passes away. What has failed and
where, the agreement tells in which they all meet then (``ranks.py``).
"""

from __future__ import annotations

import os
import time
from typing import Any

import torch.distributed as dist

INTERVAL = 0.1  # seconds between two looks at the store


class Alarm:
    """The bell of one call, in the store by which the processes have found each other; without one it is silent.

    Attributes:
        proposed: a number that no other call has.
        agreed: rank 0's, once all know it.
    """

    def __init__(self) -> None:
        self.proposed, self.agreed = int.from_bytes(os.urandom(6), "little"), 0
        self._looked = time.monotonic()
        self._store: Any = None
        try:
            self._store = dist.distributed_c10d._get_default_store()
        except (AttributeError, RuntimeError, ValueError):  # it has no public name
            pass

    def ring(self) -> None:
        """Have the others come to the next agreement at once."""
        if self.agreed:
            self._ask("set", self._key, "failed")

    def rings(self) -> bool:
        """Whether another rank has rung; asked often, it looks rarely."""
        now = time.monotonic()
        if not self.agreed or now < self._looked + INTERVAL:
            return False
        self._looked = now
        return bool(self._ask("check", [self._key]))

    @property
    def _key(self) -> str:
        return f"bncurv/{self.agreed}"

    def _ask(self, method: str, *args: Any) -> Any:
        try:
            return self._store and getattr(self._store, method)(*args)
        except RuntimeError:  # the process that keeps the store is gone
            self._store = None
