"""Train a row of the README's results again, and compare: python -m tests.benchmarks reproduce net-fast

Runs the row's command, `python train_ddp.py --recipe ROW --seed N --dataset cifar10`, for each published seed, and
compares the test accuracies with those of tests/benchmarks/results. On the machine of the records and with their torch,
each seed has the same result to the last image. Elsewhere rounding differs, and the means are compared. Exit status: 0
if the row is reproduced, 1 if it is not, 2 if there is nothing to compare.
"""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from math import sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from cifar.errors import UserError, count
from cifar.files import read_json
from cifar.recipes import RECIPES
from cifar.records.run_dir import create_run_dir
from tests.benchmarks.runner import BenchmarkError, error_line
from tests.helpers.measuring import execute, machine
from tests.helpers.processes import result

PROG = "tests.benchmarks reproduce"
RECORDS = Path(__file__).parent / "results"

# 97.5 % quantiles of Student's t distribution with 1 to 10 degrees of freedom; for more, the last is slightly too wide.
STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)

Results = Mapping[int, Mapping[str, Any]]
"""The result.json of each run of a row, by seed."""


def published(row: str) -> Results:
    """Return the recorded results of a row, the lowest seed first; empty if there are none."""
    records = [read_json(file) for file in RECORDS.glob("*/result.json")]
    by_seed = {record["seed"]: record for record in records if record["recipe"] == row}
    return dict(sorted(by_seed.items()))


def accuracy(record: Mapping[str, Any]) -> float:
    """Return the test accuracy in percent; with test-time augmentation if the recipe has it."""
    return 100 * (record["test_accuracy_tta"] or record["test_accuracy"])


def same(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Return whether two runs classified as many images of each class correctly."""
    return all(a[key] == b[key] for key in ("test_correct", "test_class_accuracy", "test_accuracy_tta"))


def verdict(records: Results, here: Results) -> tuple[bool, str]:
    """Return whether the runs here reproduce the published ones, and why.

    The mean of n published runs and that of m other runs of the same program differ by at most
    t * s * sqrt(1 / n + 1 / m) in 95 of 100 cases. s is the standard deviation of the published accuracies, and t
    Student's (1908) for n - 1 degrees of freedom. If one run is published, s and t are those of the runs here.
    """
    if all(seed in records and same(run, records[seed]) for seed, run in here.items()):
        return True, "each seed has the published result to the last image"
    theirs, ours = (list(map(accuracy, runs.values())) for runs in (records, here))
    sample = theirs if len(theirs) > 1 else ours
    if len(sample) == 1:
        return False, "one run against another has no spread, and they differ: name more seeds, such as --seeds 0 1 2"
    t = STUDENT_T[min(len(sample) - 1, len(STUDENT_T)) - 1]
    margin = t * stdev(sample) * sqrt(1 / len(theirs) + 1 / len(ours))
    within = abs(mean(ours) - mean(theirs)) <= margin
    place = "within" if within else "outside"
    interval = f"{mean(ours):.2f} ± {margin:.2f} %"
    return within, f"the published mean is {place} {interval}, the interval of 95 % (Student's t)"


def describe(runs: Results) -> str:
    """Return mean and standard deviation of the accuracies, and how many there are."""
    values = list(map(accuracy, runs.values()))
    deviation = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
    return f"{mean(values):.2f}{deviation} %, {count(len(values), 'seed')}"


def train(row: str, seed: int, folder: Path) -> Mapping[str, Any]:
    """Run the row's command with a seed, in this environment; return its result. A BenchmarkError if it fails."""
    run_dir = folder / f"{row}-{seed}"
    command = ["train_ddp.py", "--recipe", row, "--seed", seed, "--dataset", "cifar10"]
    command += ["--wandb", "disabled", "--run-dir", run_dir]
    print("python", *command, flush=True)
    finished = execute([sys.executable, *command], folder / f"{row}-{seed}.txt", os.environ, Path.cwd())
    if finished.status:
        raise BenchmarkError(error_line(finished.output) or f"exit status {finished.status}, and no output")
    return result(run_dir)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the parsed command line; a mistake in it exits with status 2, or is a BenchmarkError."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog=PROG, description=__doc__, formatter_class=style)
    parser.add_argument("row", metavar="ROW", help="recipe of README's table")
    parser.add_argument("--seeds", type=int, nargs="+", help="seeds to train (default: the published ones)")
    parser.add_argument("--folder", type=Path, help="directory of the runs (default: a new one in runs)")
    args = parser.parse_args(argv)
    if not published(args.row):
        mistake = "has no record to compare with" if args.row in RECIPES else "is not a row of the results"
        rows = ", ".join(name for name in RECIPES if published(name))
        raise BenchmarkError(f"{args.row} {mistake}: choose from {rows}")
    return args


def compare(run: Mapping[str, Any], record: Mapping[str, Any] | None) -> str:
    """Return a run's accuracy beside that of the published run of the same seed, if there is one."""
    shown = f"seed {run['seed']}: {accuracy(run):.2f} %, {run['train_seconds']:.0f} s"
    if record is None:
        return f"{shown}; not published"
    difference = f"{accuracy(run) - accuracy(record):+.2f} points"
    found = "the same to the last image" if same(run, record) else difference
    return f"{shown}; published {accuracy(record):.2f} %: {found}"


def main(argv: Sequence[str]) -> int:
    """Train a row, print each result beside the published one, then the verdict; return the exit status."""
    here = {}
    try:
        args = parse(argv)
        records = published(args.row)
        for name, facts in {"published on": read_json(RECORDS / "machine.json"), "this machine": machine()}.items():
            print(f"{name}:", ", ".join(f"{key} {value}" for key, value in facts.items() if value is not None))
        folder = create_run_dir(args.folder, f"reproduce-{args.row}")
        for seed in args.seeds or records:
            here[seed] = train(args.row, seed, folder)
            print(f"  {compare(here[seed], records.get(seed))}", flush=True)
    except (BenchmarkError, UserError) as error:
        print(f"{PROG}: error: {error}", file=sys.stderr)
        return 2
    reproduced, reason = verdict(records, here)
    print(f"here:      {describe(here)}\npublished: {describe(records)}")
    print(f"{'reproduced' if reproduced else 'NOT reproduced'}: {reason}")
    return int(not reproduced)
