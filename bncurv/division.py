"""The same batch on every rank: whether it is, so that the work may be divided (``Ranks.divides``).

A plain model with a process group is one of two things. Either the ranks have different samples: then each has batch
statistics of its own, and the result is the mean of their matrices. Or all have the same: then it is one matrix, every
rank has the whole graph and pulls its share of the columns and directions. The data tell, to the bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bncurv.loss_at_batch import LossAtBatch
from bncurv.nested import held
from bncurv.precision import ROUGHLY
from bncurv.probes import pattern
from bncurv.ranks import ALONE, Ranks

_KINDS = Tensor, np.ndarray, str, bytes, int, float, complex


class Division:
    """Whether the ranks have the same mini-batches.

    Args:
        ranks: those of the call.
        model: must have the same parameters on all of them.
        loss_fn: must have the same tensors.

    Raises:
        ValueError: where parameters differ.
    """

    def __init__(self, ranks: Ranks, model: nn.Module, loss_fn: Any) -> None:
        self._ranks, self._divided = ranks, Ranks(everybody=ranks.everybody, alone=True, divides=True)
        self._asked = ranks.everybody if ranks.plain else ALONE  # who is asked
        self._same: bool | None = None
        self._count = 0
        if self._asked.size > 1:
            self._check_state(model, loss_fn)

    def _check_state(self, model: nn.Module, loss_fn: Any) -> None:
        tensors = {f"parameter '{name}'": p for name, p in model.named_parameters()}
        if isinstance(loss_fn, nn.Module):
            tensors |= {f"'{name}' of the loss": t for name, t in loss_fn.state_dict().items()}
        for name, there in zip(tensors, self._equal([[t] for t in tensors.values()]), strict=True):
            if not there:
                raise ValueError(
                    f"process_group: {name} is not the same on all {self._asked.size} ranks, and curvature is that "
                    "of one model. Broadcast it (torch.distributed.broadcast) or load the same state on all."
                )

    def of(self, batch: Any) -> Ranks:
        """The ranks that the next mini-batch is computed with.

        Raises:
            ValueError: where it is another one on some rank, and those before were the same on all.
        """
        self._count += 1
        if self._asked.size > 1 and self._same is not False:
            (same,) = self._equal([held(batch, kinds=_KINDS)])
            if self._same and not same:
                raise ValueError(
                    f"mini-batch {self._count} is not the same on all {self._asked.size} ranks, but those before were, "
                    "and were divided. Give all ranks the same (a loader that shuffles: seeded alike), or each its own "
                    "from the first one on."
                )
            self._same = same
        return self._divided if self._same else self._ranks

    def check(self, loss: LossAtBatch) -> None:
        """Raise ValueError where the same batch has another output or loss on some rank, by more than rounding."""
        if not self._same:
            return
        F, everywhere = loss.output, f"the same on all {self._asked.size} ranks"
        rtol = ROUGHLY.get(F.dtype, ROUGHLY[torch.float32])
        rows = [t.reshape(len(F), -1).sum(1) for t in (F * pattern(F.shape, F), F.abs())]
        (first, size), *others = self._asked.gather(torch.stack(rows).double(), "comparison")
        for rank, (other, _) in enumerate(others, 1):
            apart = (other - first).abs() > rtol * size
            if bool(apart.any()):
                raise ValueError(
                    f"batch and parameters are {everywhere}, but the model's output is not (rank {rank}, sample(s) "
                    f"{apart.nonzero()[:5, 0].tolist()}): its forward pass draws random numbers (dropout), or has "
                    "other buffers or attributes there. Call torch.manual_seed with the same seed on all ranks before, "
                    "and load the same state; or leave process_group out."
                )
        with torch.no_grad():
            values = torch.tensor(self._asked.numbers(float(loss.value_on(F))), dtype=torch.float64, device="cpu")
        if not bool(torch.isclose(values, values[0], rtol=rtol, atol=0, equal_nan=True).all()):
            raise ValueError(
                f"batch, parameters and output are {everywhere}, but the loss is not ({values.tolist()}): pass the "
                "same function."
            )

    def _equal(self, groups: list[Iterable[Any]]) -> list[bool]:
        """Of several groups of values, whether each is the same on all ranks, to the bit."""
        asked = self._asked
        found = torch.stack(asked.gather(torch.tensor([digest(g) for g in groups], device="cpu"), "comparison"))
        return [bool(same) for same in (found == found[0]).all(0)]


def digest(values: Iterable[Any]) -> int:
    """64 bits of tensors, arrays, numbers and strings: dtypes, shapes and contents."""
    found = hashlib.blake2b(digest_size=8)
    for value in values:
        if isinstance(value, Tensor):
            t = value.detach()
            for part in t.unbind() if t.is_nested else [t]:
                part = part if part.layout == torch.strided else part.to_dense()
                found.update(f"{part.dtype} {tuple(part.shape)}".encode())
                if not part.is_meta:
                    flat = part.resolve_conj().resolve_neg().cpu().contiguous().view(-1)
                    found.update(flat.view(torch.uint8).numpy().data)
        elif isinstance(value, np.ndarray) and value.dtype != object:
            found.update(f"{value.dtype} {value.shape}".encode() + value.tobytes())
        else:
            found.update(repr(value).encode())
    return int.from_bytes(found.digest(), "little", signed=True)
