"""Public architectures with random weights, in train mode with their dropout on: exact, and how fast?

    make zoo                                          (in its own environment)
    python experiments/zoo/run.py [--only NAME ...] [--quick] [--seed S] [--write]

The GGN diagonal and the components' norms by the coupled way, in float64, beside plain autograd (`bncurv.reference`).
`--write` puts the tables into experiments/zoo/README.md and, by family, into docs/architectures.md. Exit status 1 if
anything is wrong.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import warnings
from dataclasses import asdict
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402
from zoo.measure import Architecture, Measured, measure  # noqa: E402
from zoo.table import by_family, insert, one_by_one  # noqa: E402

FAMILIES = ("vision", "graphs", "sequences")
OUT = HERE.parent / "output"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", default=[], help="architectures whose names begin like this"
    )
    parser.add_argument("--quick", action="store_true", help="every sixth architecture")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT, help="folder for zoo.json")
    parser.add_argument("--write", action="store_true", help="put the tables into both pages")
    return parser.parse_args(arguments)


def chosen(only: list[str], quick: bool) -> list[Architecture]:
    every = [one for family in FAMILIES for one in importlib.import_module(f"zoo.models.{family}").ARCHITECTURES]
    every = [one for one in every if not only or one.name.startswith(tuple(only))]
    return every[::6] if quick else every


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    if args.write and (args.quick or args.only):
        sys.exit("--write takes all architectures")
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        architectures = chosen(args.only, args.quick)
    rows: list[Measured] = []
    for one in (bar := tqdm(architectures, unit="net")):
        bar.set_description(one.name)
        rows.append(measure(one, args.seed))
    print(one_by_one(rows))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "zoo.json").write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    print(f"wrote {args.out / 'zoo.json'}")
    if args.write:
        for table, page in (
            (by_family(rows), HERE.parents[1] / "docs/architectures.md"),
            (one_by_one(rows), HERE / "README.md"),
        ):
            insert(table, page)
            print(f"wrote {page}")
    wrong = [row for row in rows if row.problem]
    for row in wrong:
        print(f"WRONG: {row.name}: {row.problem}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
