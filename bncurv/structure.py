"""What a trace says about the ways of cotangents: which layers lie below which statistics (letters: ``engine.py``)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.autograd.graph import GradientEdge

from bncurv.graph import Trace
from bncurv.order import Order

ALL = -1  # the bit set of all sites


class Structure:
    """Order and neighbourhood of the sites of a traced graph.

    Args:
        trace: the traced graph.
        wanted: parameters by name.

    Attributes:
        uses: parameter name → the (site, role) pairs that use it; parameters used elsewhere have none.
        couplings: sites of the couplings that any wanted parameter lies below, in forward order.
        direct: by coupling, the site whose output is its input, entry by entry, if channels lead its parameters' axes.
        below: by coupling, what a pass from its statistics must reach: calls but the direct one, lower couplings.
        through: by coupling, all sites that such a pass crosses, as a bit set.
        exclusive: direct sites whose output nothing but the BatchNorm behind takes up.
        rows_of_sisters: of sisters, once it is known: by site below, whose the rows are; ``None``: they share some.
        pulled_from: parameter name → couplings whose passes reach it, in forward order.
        width: by coupling, the number of its statistics.
        sisters: the couplings in forward order, those together whose statistics may be pulled back at once: one module
            called on several parts of the batch.
        entries: parameter name → rows of P it needs: the statistics above it but for those directly above.
        hooked: calls whose cotangent, or that of a coupling above them, is read at a tensor with a hook. PyTorch reads
            it there before or after the hook, depending on what else it is asked for.
    """

    def __init__(self, trace: Trace, wanted: Mapping[str, Tensor]) -> None:
        self._trace = trace
        self.uses = _uses(trace, wanted)
        self._calls = sorted({j for uses in self.uses.values() for j, _ in uses})
        sites = trace.sites
        self.couplings = [j for j, s in enumerate(sites) if s.mark.coupling and self.calls_in(s.upstream)]
        self.direct = {j: self._find_direct(j) for j in self.couplings}
        self.below: dict[int, list[int]] = {}
        self.through: dict[int, int] = {}
        for j, i in self.direct.items():
            upstream = sites[j].upstream
            self.below[j] = sorted({*self.calls_in(upstream), *self.lower(j)} - {i})
            self.through[j] = upstream if i is None else upstream & ~(1 << i)
        ends = {i: sites[i].edge for i in self.direct.values() if i is not None}
        self.exclusive = {i for i, e in ends.items() if trace.consumers[e.node, e.output_nr] == 1}
        self.width = {j: sites[j].coupling.statistics.numel() for j in self.couplings}
        self.sisters = self._find_sisters()
        self.rows_of_sisters: dict[tuple[int, ...], dict[int, Order | None] | None] = {}
        self.pulled_from = {
            name: [j for j in self.couplings if not self.sites(name).isdisjoint(self.below[j])] for name in wanted
        }
        self.hooked = self._find_hooked()
        self.entries = {name: sum(self.width[j] for j in above) for name, above in self.pulled_from.items()}

    def _find_sisters(self) -> list[list[int]]:
        found: dict[tuple, list[int]] = {}
        for j in self.couplings:
            site, alone = self._trace.sites[j], self.direct[j] is not None or not self.below[j]
            alike = (site.name, site.coupling.statistics.shape, site.upstream)
            found.setdefault((j,) if alone else alike, []).append(j)
        return sorted(found.values())

    def _find_hooked(self) -> set[int]:
        found: set[int] = set()
        for j, site in enumerate(self._trace.sites):
            if (site.edge.node, site.edge.output_nr) in self._trace.hooked:
                found |= {j, *(self.calls_in(site.upstream) if site.mark.coupling else ())}
        return found

    def sites(self, name: str) -> set[int]:
        """Sites that use a parameter."""
        return {j for j, _ in self.uses.get(name, ())}

    def vanishes(self, name: str) -> bool:
        """Whether all rows of a parameter are zero: a bias that the BatchNorm behind takes off again."""
        uses = self.uses.get(name, ())
        return bool(uses) and all(j in self.exclusive and role == "bias" for j, role in uses)

    def calls_in(self, sites: int) -> list[int]:
        """Sites of a bit set that hold a wanted parameter's call, in forward order."""
        return [j for j in self._calls if sites >> j & 1]

    def lower(self, j: int) -> list[int]:
        """Couplings below coupling ``j``, in forward order."""
        return [i for i in self.couplings if self._trace.sites[j].upstream >> i & 1]

    def edges(self, sites: list[int]) -> list[GradientEdge]:
        """Where the cotangents of ``sites`` are read."""
        return [self._trace.sites[j].edge for j in sites]

    def _find_direct(self, j: int) -> int | None:
        shape, below = self._trace.sites[j].coupling.channelled, self._trace.sites[j].mark.below
        if shape is None:
            return None
        for i in self.calls_in(self._trace.sites[j].upstream):
            call, edge = self._trace.sites[i].call, self._trace.sites[i].edge
            if edge.node is below[0].node and call.layer.channels_lead(call.output) and not call.leaves:
                if (edge.node, edge.output_nr) in self._trace.hooked:
                    return None  # the hook acts between the layer and its BatchNorm
                whole = edge.output_nr == below[0].output_nr and call.output == shape
                return i if whole and len(call.below) < 2 else None  # `Layer.from_channels` knows one input
        return None


def _uses(trace: Trace, wanted: Mapping[str, Tensor]) -> dict[str, list[tuple[int, str]]]:
    """Parameter name → the (site, role) pairs that use it; none for those that are also used elsewhere."""
    loose = {id(p) for p in trace.loose}
    names = {id(p): name for name, p in wanted.items() if id(p) not in loose}
    found: dict[str, list[tuple[int, str]]] = {}
    for j, site in enumerate(trace.sites):
        for role, p in site.call.learnt() if site.mark.call and site.call.output[0] else ():
            if id(p) in names:
                found.setdefault(names[id(p)], []).append((j, role))
    return found
