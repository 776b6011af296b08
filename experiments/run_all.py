"""Run all experiments and write experiments/README.md: every statement with its measured figures and verdict.

    python experiments/run_all.py [--quick] [--seeds 0 1] [--only NAME ...] [--jobs 2] [--out DIR]

Each script runs as its own command, once per seed. With the first seed's figures the README's table is written and its
plots are copied to experiments/figures (neither with --quick or --only); verdicts of further seeds stand beside them.
The exit status is 1 if an acceptance of any run fails.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from lib.statements import CATALOGUE, documented_rows, scripts
from tqdm import tqdm

HERE = Path(__file__).parent
SECTIONS = {
    "D": "The note: structural implications of batch normalization",
    "S": "The thread: derivatives of the moments",
    "W": "Wikipedia",
    "G": "Grokipedia",
    "X": "Beyond the sources",
}
HEAD = """# What BatchNorm does to curvature: every statement of the sources, measured

Written by `python experiments/run_all.py` (`make experiments`), {runs}. Every script is a command of its own:

```sh
python experiments/NAME.py [--quick] [--seed S] [--device D] [--out DIR]
```

It prints its rows, writes `NAME.json` and plots into `experiments/output/`, takes seconds to a minute on two cores
(`--quick`: under 20 s) and ends with status 1 if an acceptance fails. The code they share is in `experiments/lib/`.

**Verdicts.** *holds*: the acceptance is met. *refuted*: the source is wrong, and the row shows what is right. *fails*:
the acceptance is not met, here is the evidence. *not testable here*: no experiment of this size applies, and why.

{counts}

Other commands in this folder: `digits_resnet.py` (the demo, `make demo`); `pruning.py`, `ewc.py`, `influence.py`,
`gauss_newton.py`, `ntk.py` (what it is good for: the gallery in docs/); `readme_figure.py`, `quantity_figures.py`,
`exactness.py`, `growth.py`, `tolerance.py`, `estimator.py`, `memory.py` (tables and figures of README and docs);
`benchmark/` (`make bench`), `zoo/` (`make zoo`).
"""


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, for a smoke test; README.md is left alone")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="the first one's figures are shown")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=scripts(), help="README.md is left alone")
    parser.add_argument("--jobs", type=int, default=2, help="scripts at the same time")
    parser.add_argument("--out", type=Path, default=HERE / "output", help="results of seed S go into OUT/seed_S")
    return parser.parse_args(arguments)


def run_script(name: str, seed: int, out: Path, quick: bool) -> subprocess.CompletedProcess[str]:
    """One script as a command."""
    command = [sys.executable, str(HERE / f"{name}.py"), "--seed", str(seed), "--out", str(out)]
    return subprocess.run([*command, *(["--quick"] if quick else [])], capture_output=True, text=True)


def run_all(names: list[str], args: argparse.Namespace) -> list[str]:
    """All scripts for all seeds, so many at once; returns what failed."""
    failed = []
    with ThreadPoolExecutor(args.jobs) as pool, tqdm(total=len(names) * len(args.seeds), unit="script") as bar:
        futures = {
            pool.submit(run_script, name, seed, args.out / f"seed_{seed}", args.quick): f"{name} (seed {seed})"
            for name in names
            for seed in args.seeds
        }
        for future in as_completed(futures):
            done = future.result()
            bar.update()
            if done.returncode:
                failed.append(futures[future])
                tqdm.write(f"{futures[future]}: status {done.returncode}\n{done.stdout}{done.stderr[-2000:]}")
    return failed


def results(name: str, out: Path) -> dict[str, Any]:
    """What a script wrote."""
    return json.loads((out / f"{name}.json").read_text())


def rows_by_id(names: list[str], out: Path) -> dict[str, dict[str, Any]]:
    """All rows of one seed, each with its script and plots."""
    rows = {row.id: row.as_json() for row in documented_rows()}
    for name in names:
        content = results(name, out)
        for row in content["rows"]:
            rows[row["id"]] = row | {"script": name, "plots": [plot["file"] for plot in content["plots"]]}
    return rows


def table(rows: dict[str, dict[str, Any]], others: list[dict[str, dict[str, Any]]]) -> list[str]:
    """One Markdown table per source."""
    lines = []
    for letter, title in SECTIONS.items():
        lines += ["", f"## {title}", "", "| id | statement | measured | acceptance | verdict | shown by |"]
        lines.append("|---|---|---|---|---|---|")
        for id in (id for id in CATALOGUE if id[0] == letter):
            row = rows[id]
            differing = [f"{other[id]['verdict']} (another seed)" for other in others]
            verdicts = dict.fromkeys([row["verdict"], *(d for d in differing if not d.startswith(row["verdict"]))])
            cells = [id, row["statement"], row["measured"], row["acceptance"], "; ".join(verdicts), shown_by(row)]
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return lines


def shown_by(row: dict[str, Any]) -> str:
    """Links to the script and its plots."""
    if "script" not in row:
        return "documented"
    plots = [f"[plot](figures/{file})" for file in row["plots"]]
    return ", ".join([f"[{row['script']}]({row['script']}.py)", *plots])


def counts(rows: dict[str, dict[str, Any]]) -> str:
    """How many rows have which verdict."""
    verdicts = [row["verdict"] for row in rows.values()]
    said = ", ".join(f"{verdicts.count(v)} {v}" for v in dict.fromkeys(sorted(verdicts, key=verdicts.count)[::-1]))
    return f"{len(rows)} statements: {said}."


def write_readme(names: list[str], args: argparse.Namespace) -> None:
    """experiments/README.md and the plots that it links to."""
    by_seed = [rows_by_id(names, args.out / f"seed_{seed}") for seed in args.seeds]
    (HERE / "figures").mkdir(exist_ok=True)
    first = args.out / f"seed_{args.seeds[0]}"
    for name in names:
        for plot in results(name, first)["plots"]:
            shutil.copyfile(first / plot["file"], HERE / "figures" / plot["file"])
    further = f", verdicts checked with seed {', '.join(map(str, args.seeds[1:]))} too" if args.seeds[1:] else ""
    head = HEAD.format(runs=f"figures of seed {args.seeds[0]}{further}", counts=counts(by_seed[0]))
    (HERE / "README.md").write_text("\n".join([head.rstrip(), *table(by_seed[0], by_seed[1:])]) + "\n")


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    names = args.only or scripts()
    failed = run_all(names, args)
    if (
        not args.quick
        and not args.only
        and all((args.out / f"seed_{seed}" / f"{name}.json").exists() for name in names for seed in args.seeds)
    ):
        write_readme(names, args)
        print(f"wrote {HERE / 'README.md'}")
    print(f"failed: {', '.join(failed)}" if failed else f"all {len(names)} scripts passed")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
