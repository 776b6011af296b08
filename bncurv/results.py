"""What a call gives back: fields by name, and what one does with them next."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from bncurv.ranks import Messages


@dataclass(frozen=True, repr=False)
class Results(Mapping[str, Any]):
    """What `curvature` returns: the quantities by field name, as attributes or items.

    ``results.diag_ggn_exact["fc.weight"]`` is the field of `DiagGGNExact` for the parameter ``fc.weight``, and so is
    ``results["diag_ggn_exact"]["fc.weight"]``. Iteration, ``len`` and ``in`` go over the fields.

    Attributes:
        fields: field name → {parameter name → tensor}.
        method: the way taken, ``"coupled"`` or ``"dense"`` (of the last mini-batch); ``"sampled"`` where all that was
            asked is an estimate that went neither.
        passes: backward passes of a whole batch that it took, over all mini-batches; over several ranks this one's.
        batches: number of mini-batches.
        error: with ``tol > 0``, the estimated Frobenius norm of what was dropped from V, by parameter name, over all
            columns of all mini-batches at their weights. A diagonal of the GGN with trace t is off by at most
            ``2 √t error + error²`` in the sum of its entries.
        samples: which samples the rows of per-component results are: all in order; over several ranks this rank's,
            counted mini-batch by mini-batch and in each of them rank by rank.
        messages: over several ranks, what was sent: purpose → number, and bytes of this rank's.
        shapes: of the parameters, by name, in the model's order.

    Example:
        >>> import torch, bncurv
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2))
        >>> batch, loss_fn = (torch.randn(8, 4), torch.randint(2, (8,))), torch.nn.CrossEntropyLoss()
        >>> res = bncurv.curvature(model, loss_fn, batch, bncurv.DiagGGNExact(), bncurv.ComponentGrad())
        >>> list(res)
        ['diag_ggn_exact', 'grad_component']
        >>> res["diag_ggn_exact"]["2.bias"].shape
        torch.Size([2])
    """

    fields: Mapping[str, Any]
    method: str
    passes: int
    batches: int = 1
    error: Mapping[str, float] = field(default_factory=dict)
    samples: Tensor | None = None
    messages: Mapping[str, Messages] = field(default_factory=dict)
    shapes: Mapping[str, torch.Size] = field(default_factory=dict)

    # ---------------------------------------------------------------- a mapping
    def __getattr__(self, name: str) -> Any:
        fields = self.__dict__.get("fields", {})
        if name in fields:
            return fields[name]
        raise AttributeError(self._missing(name))

    def __getitem__(self, name: str) -> Any:
        if name in self.fields:
            return self.fields[name]
        raise KeyError(self._missing(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self.fields)

    def __len__(self) -> int:
        return len(self.fields)

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = object.__hash__

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self.fields]

    def _ipython_key_completions_(self) -> list[str]:
        return list(self.fields)

    def _missing(self, name: str) -> str:
        return f"these results hold {', '.join(sorted(self.__dict__.get('fields', ())))}; '{name}' was not asked for"

    # ---------------------------------------------------------------- elsewhere
    def to(self, *where: Any, **options: Any) -> Results:
        """The same with all tensors moved or cast, arguments as of ``Tensor.to``.

        Raises:
            RuntimeError: for a matrix-free GGN, which is where its graph is.

        Example:
            >>> res.to(torch.float64).diag_ggn_exact["2.bias"].dtype
            torch.float64
        """
        return replace(self, fields=_mapped(self.fields, lambda t: t.to(*where, **options)))

    def cpu(self) -> Results:
        """The same on the CPU.

        Example:
            >>> res.cpu().diag_ggn_exact["2.bias"].device
            device(type='cpu')
        """
        return self.to("cpu")

    def flat(self, name: str) -> Tensor:
        """A field of all parameters as one tensor ``[*lead, D]``, in the order of ``parameters_to_vector``.

        Args:
            name: the field; of shape ``[*p]``, ``[N, *p]``, ``[C, N, *p]`` for each parameter.

        Raises:
            KeyError, ValueError: for a field that is not there, or has no entry for each entry of a parameter.

        Example:
            >>> res.flat("grad_component").shape  # [N, D]
            torch.Size([8, 29])
        """
        value = self[name]
        parts = []
        for parameter, shape in self.shapes.items() if isinstance(value, Mapping) else ():
            t = value.get(parameter)
            lead = -1 if t is None else t.dim() - len(shape)
            if lead < 0 or t.shape[lead:] != shape:
                break
            parts.append(t.reshape(*t.shape[:lead], -1))
        if not parts or len(parts) < len(self.shapes) or len({p.shape[:-1] for p in parts}) > 1:
            raise ValueError(f"'{name}' does not have an entry for each entry of a parameter, so it has no flat form.")
        return torch.cat(parts, -1)

    def to_dict(self) -> dict[str, Any]:
        """Tensors, numbers and strings in dictionaries: ``torch.save`` it, load it with ``weights_only=True``.

        Of a GGN it holds eigenvalues, eigenvectors by parameter name, gradient and sizes, not V.

        Example:
            >>> import io
            >>> torch.save(res.to_dict(), file := io.BytesIO())
            >>> loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
            >>> torch.equal(loaded["fields"]["diag_ggn_exact"]["2.bias"], res.diag_ggn_exact["2.bias"])
            True
        """
        return {
            "fields": _plain(self.fields),
            "method": self.method,
            "passes": self.passes,
            "batches": self.batches,
            "error": dict(self.error),
            "samples": self.samples,
            "messages": {purpose: list(m) for purpose, m in self.messages.items()},
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
        }

    def scalars(self) -> dict[str, float]:
        """Numbers for a logger, by ``field/parameter``: the sum of a tensor's entries (of a diagonal its trace).

        Of a GGN ``ggn/largest`` and, where V is held, ``ggn/trace``; of a coupling report ``coupling/layer/own_trace``
        and ``.../full_trace``; further ``passes``.

        Example:
            >>> list(res.scalars())[:2]
            ['passes', 'diag_ggn_exact/0.weight']
        """
        found = {"passes": float(self.passes)}
        for name, value in self.fields.items():
            for path, one in value.items() if isinstance(value, Mapping) else (("", value),):
                key = f"{name}/{path}".rstrip("/")
                found |= {f"{key}/{what}".rstrip("/"): number for what, number in _numbers(one).items()}
        return found

    # ---------------------------------------------------------------- to look at
    def __repr__(self) -> str:
        held = ", ".join(sorted(self.fields))
        return f"Results({held}; method={self.method!r}, passes={self.passes}, batches={self.batches})"

    def _repr_html_(self) -> str:
        """A table by parameter: of every field the sum of its entries; and what is no table of parameters below it."""
        tables = {n: v for n, v in self.fields.items() if isinstance(v, Mapping) and set(v) <= set(self.shapes)}
        head = ["parameter", "shape", *(f"Σ {name}" for name in tables)]
        rows = [
            [name, "×".join(map(str, shape)), *(_short(table.get(name)) for table in tables.values())]
            for name, shape in self.shapes.items()
        ]
        others = [shown for n, v in self.fields.items() if n not in tables for shown in _shown(n, v)]
        return f"<p>{html.escape(repr(self))}</p>" + table_of(head, rows) + "".join(others)


def _mapped(value: Any, f: Callable[[Tensor], Tensor]) -> Any:
    """A function of all tensors of a field; of what has tensors inside, by its own ``mapped``."""
    if isinstance(value, Mapping):
        return {name: _mapped(one, f) for name, one in value.items()}
    if isinstance(value, Tensor):
        return f(value)
    return value.mapped(f) if hasattr(value, "mapped") else value


def _plain(value: Any) -> Any:
    """A field as tensors, numbers and strings."""
    if isinstance(value, Mapping):
        return {name: _plain(one) for name, one in value.items()}
    return value.to_dict() if hasattr(value, "to_dict") else value


def _numbers(value: Any) -> dict[str, float]:
    """What a logger is told of one entry of a field."""
    if isinstance(value, Tensor):
        return {"": float(value.sum())}
    return value.scalars() if hasattr(value, "scalars") else {}


def _short(value: Any) -> str:
    """A tensor's sum, as a cell of a table."""
    return f"{float(value.sum()):.3g}" if isinstance(value, Tensor) else ""


def _shown(name: str, value: Any) -> Iterator[str]:
    """HTML of what is no table of parameters: a tensor, a GGN, several of them or a report."""
    if isinstance(value, Mapping) and value:
        rows = [[str(key), *(f"{number:.3g}" for number in _numbers(one).values())] for key, one in value.items()]
        yield table_of([name, *_numbers(next(iter(value.values())))], rows)
    elif isinstance(value, Tensor):
        yield f"<p>{html.escape(name)}: {list(value.shape)}, sum {_short(value)}</p>"
    elif hasattr(value, "_repr_html_"):
        yield value._repr_html_()


def table_of(head: list[str], rows: list[list[str]]) -> str:
    """An HTML table, the first column to the left, all others to the right."""

    def line(cells: list[str], kind: str) -> str:
        styled = [f'<{kind} style="text-align:{"right" if i else "left"}">' for i in range(len(cells))]
        return "<tr>" + "".join(f"{s}{html.escape(c)}</{kind}>" for s, c in zip(styled, cells, strict=True)) + "</tr>"

    return "<table>" + line(head, "th") + "".join(line(row, "td") for row in rows) + "</table>"
