"""Rows of the experiments: a statement of the sources, what was measured, the verdict.

`catalogue.CATALOGUE` holds every statement with its acceptance and the one script that shows it. Verdicts:

    holds              the acceptance is met
    refuted            the source's claim is wrong, and the measurement shows what is right
    fails              the acceptance is not met: reported with the evidence, never loosened; exit status 1
    not testable here  no experiment of this size applies, and the row says why
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from lib.catalogue import CATALOGUE, DOCUMENTED, Statement

VERDICTS = ("holds", "refuted", "fails", "not testable here")


@dataclass(frozen=True)
class Row:
    """A statement and its verdict.

    Attributes:
        id: of the statement, e.g. "D16".
        measured: the figures, as a short text.
        verdict: one of `VERDICTS`.
        numbers: the same figures for programs, and what else belongs to the evidence; must fit into JSON.
    """

    id: str
    measured: str
    verdict: str
    numbers: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.id not in CATALOGUE:
            raise KeyError(f"statement {self.id!r} is not in lib/catalogue.py.")
        if self.verdict not in VERDICTS:
            raise ValueError(f"verdict {self.verdict!r} of {self.id}; expected one of {VERDICTS}.")

    @property
    def statement(self) -> str:
        """What the source says."""
        return CATALOGUE[self.id].text

    @property
    def acceptance(self) -> str:
        """What must be measured for the verdict."""
        return CATALOGUE[self.id].acceptance

    def as_json(self) -> dict[str, Any]:
        """All of it, for NAME.json."""
        said = {key: getattr(self, key) for key in ("id", "statement", "measured", "acceptance", "verdict")}
        return said | {"source": CATALOGUE[self.id].source, "numbers": self.numbers}

    def __str__(self) -> str:
        return " · ".join((self.id, self.statement, self.measured, self.acceptance, self.verdict))


def check(id: str, accepted: bool, measured: str, **numbers: Any) -> Row:
    """The row of a claim that should hold: ``accepted`` says whether the acceptance is met."""
    return Row(id, measured, "holds" if accepted else "fails", numbers)


def refute(id: str, shown: bool, measured: str, **numbers: Any) -> Row:
    """The row of a claim that is wrong: ``shown`` says whether the measurement shows what is right instead."""
    return Row(id, measured, "refuted" if shown else "fails", numbers)


def untestable(id: str, why: str) -> Row:
    """The row of a claim that cannot be measured on this machine."""
    return Row(id, why, "not testable here")


def listed(numbers: Iterable[float], spec: str = ".3g") -> str:
    """Numbers in one line, for the measured figures of a row."""
    return ", ".join(f"{number:{spec}}" for number in numbers)


def statements_of(script: str) -> list[str]:
    """The ids that a script shows, in the catalogue's order."""
    return [s.id for s in CATALOGUE.values() if s.script == script]


def scripts() -> list[str]:
    """All scripts of the catalogue, in order of appearance."""
    return list(dict.fromkeys(s.script for s in CATALOGUE.values() if s.script))


def documented_rows() -> list[Row]:
    """The rows of the statements to which no experiment applies."""
    return [Row(id, reason, verdict) for id, (verdict, reason) in DOCUMENTED.items()]


__all__ = [
    "CATALOGUE",
    "DOCUMENTED",
    "VERDICTS",
    "Row",
    "Statement",
    "check",
    "documented_rows",
    "listed",
    "refute",
    "scripts",
    "statements_of",
    "untestable",
]
