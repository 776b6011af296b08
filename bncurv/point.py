"""A recorded batch as an object: several calls at the same point, and nothing that one has done is done again.

Kept while the point is open: the graph, whose forward pass is not run again; the coupling directions P and B, where
they fit together; rows of V, where they are small. Copies of what the graph reads tell whether it is still that point.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch

from bncurv.blocks import Batch
from bncurv.call import Call
from bncurv.checks import check_quantities
from bncurv.lowrank.recorded import POINT, Reads
from bncurv.quantities import Quantity
from bncurv.ranks import Ranks
from bncurv.results import Results
from bncurv.sampling import generator_of_call
from bncurv.undo import Undo, without_trace


class Point:
    """What `bncurv.at` gives: call it with quantities, as often as you like.

    Args:
        call: what is differentiated by what.
        data: the batch, or mini-batches; all are recorded now.
        ranks: those over which the batch is spread.

    Example:
        >>> import torch, bncurv
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2))
        >>> batch, loss_fn = (torch.randn(8, 4), torch.randint(2, (8,))), torch.nn.CrossEntropyLoss()
        >>> point = bncurv.at(model, loss_fn, batch, method="coupled")
        >>> point(bncurv.ComponentGrad()).passes, point(bncurv.DiagGGNExact()).passes  # the coupling is known already
        (1, 1)
    """

    def __init__(self, call: Call, data: Any, ranks: Ranks) -> None:
        self._call, self._everybody = call, ranks.everybody
        self._recorded: list[Batch] = []
        self._reads: list[Reads] = []

        def record(undo: Undo) -> None:
            call.leave_as_is(undo)
            copies: dict[str, torch.Tensor] = {}
            for batch in call.record(undo, data):
                learnt = list(batch.parameters.values())
                self._reads.append(Reads(POINT, [batch.output], learnt, batch.reads(), copies))
                self._recorded.append(replace(batch, kept={}))

        self._open = True
        with self._everybody.together():
            try:
                without_trace(record)
            except BaseException:
                self.close()
                raise

    def __call__(self, *quantities: Quantity) -> Results:
        """The quantities at this point, as `bncurv.curvature` gives them.

        Args:
            *quantities: what to compute.

        Returns:
            Results of this call; ``passes`` are those that were still to do.

        Raises:
            RuntimeError: where the point is closed, or is no longer what was recorded: a parameter has changed, say.
        """
        with self._everybody.together():
            check_quantities(quantities)
            if not self._open:
                raise RuntimeError(
                    "this point is closed, and its graph is gone: call it inside of 'with bncurv.at(...) as point'."
                )
            self._everybody.messages.clear()

            def run(undo: Undo) -> Results:
                self._call.leave_as_is(undo)
                with ExitStack() as stack:
                    for reads in self._reads:
                        stack.enter_context(reads.unchanged())
                    return self._call.compute(undo, self._recorded, quantities)

            results = without_trace(run)
            generator_of_call(quantities, torch.device("cpu"))  # moves the global random state on
            return results

    def close(self) -> None:
        """Free the graph and all that was kept.

        Example:
            >>> point.close()
            >>> point
            Point(closed)
        """
        self._open = False
        self._recorded.clear()
        self._reads.clear()

    def __enter__(self) -> Point:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        held = f"{len(self._recorded)} mini-batch(es) recorded" if self._open else "closed"
        return f"Point({held})"
