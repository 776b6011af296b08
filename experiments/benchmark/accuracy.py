"""Cells at equal accuracy: passes and seconds to a GGN diagonal whose every tensor and trace is within 10, 1 and 0.1 %.

The errors of draws alone and of curvlinops' Hutchinson fall as 1/sqrt(passes): the constant is measured at a few
budgets, and passes and time are extrapolated with it. XDiag has no such law: its budget is doubled until one does.
A product of curvlinops' counts as two passes.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

from lib.estimates import CE, Case, Estimator, curvlinops_diagonal, error, estimate, mean, worst
from measure import Row, alternate, timed
from meters import quiet_median
from ways import Outcome, Way

from bncurv import DiagGGNExact, DiagGGNMC, curvature

GOALS = 0.1, 0.01, 0.001
BUDGETS = 16, 64, 256  # passes at which a law's constant is measured
MOST = 1024  # passes that XDiag may take
REPEATS = 3
xdiag: Estimator = partial(curvlinops_diagonal, kind="xdiag")
LAWS: dict[str, Estimator] = {
    "draws alone": lambda case, passes: estimate(case, DiagGGNMC(passes))[1].diag_ggn_mc,
    "curvlinops Hutchinson": partial(curvlinops_diagonal, kind="hutchinson_diag"),
}


def ours(case: Case, goal: float) -> Outcome:
    """As a user calls it: it may take the exact way; a goal of 0 is the exact diagonal."""
    res = curvature(case.model, CE, case.batch, DiagGGNMC(rtol=goal) if goal else DiagGGNExact())
    return Outcome(res.diag_ggn_mc if goal else res.diag_ggn_exact, res.passes, note=f"took the {res.method} way")


def budget(case: Case, goal: float, least: int) -> int | None:
    """Passes at which XDiag meets the goal, by doubling."""
    passes = least
    while passes <= MOST and worst(xdiag(case, passes), case.exact) > goal:
        passes *= 2
    return passes if passes <= MOST else None


def competitors(case: Case) -> list[tuple[float, float, Way]]:
    """Of each: the goal, by how much passes and time are to be scaled to it, and what is timed."""

    def at(call: Estimator, passes: int) -> Callable[..., Outcome]:
        return lambda *_: Outcome(call(case, passes), passes)

    found = [(goal, 1.0, Way("bncurv", "ours", lambda *_, goal=goal: ours(case, goal))) for goal in (*GOALS, 0.0)]
    installed = xdiag(case, BUDGETS[0]) is not None
    for name, call in LAWS.items():
        if installed or name == "draws alone":
            constant = mean([error(case, call, B, REPEATS) * B**0.5 for B in BUDGETS])
            way = Way(name, "ours" if name == "draws alone" else "peer", at(call, BUDGETS[1]))
            found += [(goal, (constant / goal) ** 2 / BUDGETS[1], way) for goal in GOALS]
    passes: int | None = 32 if installed else None
    for goal in GOALS:
        passes = passes and budget(case, goal, passes)
        if passes:
            found.append((goal, 1.0, Way("curvlinops XDiag", "peer", at(xdiag, passes))))
    return found


def measure_accuracy(case: Case, settings: Namespace) -> list[Row]:
    """One row per goal and competitor."""
    entries = competitors(case)
    ways, problem = list({id(w): w for _, _, w in entries}.values()), SimpleNamespace(draw=0)
    first = {id(w): timed(partial(w.call, problem), settings) for w in ways}
    for way in ways:
        way.single = way.used = first[id(way)][0]
    alternate(ways, problem, settings.budget / len(ways), settings)
    rows = []
    for goal, scale, way in entries:
        seconds, quiet = quiet_median(way.samples, settings.clock)
        outcome = first[id(way)][1]
        rows.append({
            "job": "accuracy", "net": case.name, "n": len(case.batch[1]), "rtol": goal,
            "competitor": way.name, "kind": way.kind, "seconds": seconds * scale, "samples": len(way.samples),
            "quiet": quiet, "extrapolated": scale != 1.0, "passes": round(outcome.passes * scale),
            "error": worst(outcome.value, case.exact) if scale == 1.0 and goal else None, "note": outcome.note,
        })  # fmt: skip
    return rows
