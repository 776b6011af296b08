"""What a call gives back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from bncurv.ranks import Messages


@dataclass(frozen=True)
class Results:
    """What `curvature` returns: the quantities as attributes, each by its field name.

    ``results.diag_ggn_exact["fc.weight"]`` is the field of `DiagGGNExact` for the parameter ``fc.weight``.

    Attributes:
        fields: field name → {parameter name → tensor}.
        method: the way taken, ``"coupled"`` or ``"dense"`` (of the last mini-batch); ``"sampled"`` where all that was
            asked is an estimate that went neither.
        passes: backward passes of a whole batch that it took, over all mini-batches; over several ranks this one's.
        batches: number of mini-batches.
        error: with ``tol > 0``, the estimated Frobenius norm of what was dropped from V, by parameter name, over all
            columns of all mini-batches at their weights; empty where nothing was. A diagonal of the GGN with trace t is
            off by at most ``2 √t error + error²`` in the sum of its entries.
        samples: which samples the rows of per-component results are: all in order; over several ranks this rank's,
            counted mini-batch by mini-batch and in each of them rank by rank.
        messages: over several ranks, what was sent: purpose → number, and bytes of this rank's.
    """

    fields: Mapping[str, Any]
    method: str
    passes: int
    batches: int = 1
    error: Mapping[str, float] = field(default_factory=dict)
    samples: Tensor | None = None
    messages: Mapping[str, Messages] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        fields = self.__dict__.get("fields", {})
        if name in fields:
            return fields[name]
        raise AttributeError(f"these results hold {', '.join(sorted(fields))}; '{name}' was not asked for")

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self.fields]

    def __repr__(self) -> str:
        held = ", ".join(sorted(self.fields))
        return f"Results({held}; method={self.method!r}, passes={self.passes}, batches={self.batches})"
