"""Measure this program against its plain peers, in turns, on this machine.

    python -m tests.benchmarks --list
    python -m tests.benchmarks --json benchmarks.json          # all of them: more than an hour on two cores
    python -m tests.benchmarks ddp start --rounds 7
    python -m tests.benchmarks --quick                         # minutes: do they run?

Ours and each peer run alternately (A B A B ...), each in a process of its own. A table has the median, mean and range
of each, and how ours compares, round by round. Don't use the machine for anything else meanwhile.
"""

import argparse
import dataclasses
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from tests.benchmarks.children import ContenderError
from tests.benchmarks.measure import alternate, machine, summarize, table
from tests.benchmarks.suite import BENCHMARKS, Settings


class Parser(argparse.ArgumentParser):
    """argparse's, whose complaint is one line."""

    def error(self, message: str) -> NoReturn:
        """Say it and leave with status 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; a mistake in it is one line and exit status 2."""
    parser = Parser(prog="tests.benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)} (default: all)")
    parser.add_argument("--data-dir", type=Path, default=Path(os.environ.get("CIFAR_DATA_DIR") or "data"))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number there")
    parser.add_argument("--rounds", type=int, help="how often each contender runs (default: the benchmark's own)")
    parser.add_argument("--steps", type=int, help="optimizer steps of the benchmark tutorial (default: 50,000)")
    parser.add_argument("--quick", action="store_true", help="one round of little work: shows that all of it runs")
    parser.add_argument("--list", action="store_true", help="name the benchmarks and leave")
    args = parser.parse_args(argv)
    for name in args.names:
        if name not in BENCHMARKS:
            parser.error(f"unknown benchmark {name!r}: choose from {', '.join(BENCHMARKS)}")
    for name in ("rounds", "steps"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}: it must be at least 1")
    if not args.list and not (args.data_dir / "cifar-10-batches-py").is_dir():
        parser.error(f"no cifar-10-batches-py in {args.data_dir}: name its folder with --data-dir or $CIFAR_DATA_DIR")
    if args.json is not None and not args.json.resolve().parent.is_dir():
        parser.error(f"--json {args.json}: there is no such folder")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the command line asks for.

    Returns:
        The exit status: 1 if a contender failed.
    """
    args = parse(argv)
    if args.list:
        for name, function in BENCHMARKS.items():
            print(f"{name:10}{function.__doc__}")
        return 0

    record: dict[str, Any] = {"machine": machine(), "quick": args.quick, "benchmarks": {}}
    print(", ".join(f"{key} {value}" for key, value in record["machine"].items()), flush=True)
    failed = False
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as folder:
        settings = Settings(args.data_dir.resolve(), Path(folder), args.quick, args.steps)
        for name in args.names or BENCHMARKS:
            try:
                record["benchmarks"][name] = measure(name, settings, args.rounds)
            except ContenderError as error:
                failed = True
                record["benchmarks"][name] = {"error": str(error)}
                print(f"tests.benchmarks: error: {name}: {error}", file=sys.stderr)
            if args.json is not None:  # after each: an hour's numbers outlive what comes after them
                args.json.write_text(json.dumps(record, indent=2) + "\n")
    return int(failed)


def measure(name: str, settings: Settings, rounds: int | None) -> list[dict[str, Any]]:
    """Run one benchmark and print its tables.

    Returns:
        For each of its races the title, what every run measured, and the table's rows.
    """
    done = []
    for race in BENCHMARKS[name](settings):
        count = rounds or (1 if settings.quick else race.rounds)
        began = time.perf_counter()
        runs = alternate(race, count, lambda who, number: print(f"  round {number + 1}: {who}", file=sys.stderr))
        rows = summarize(race, runs)
        took = time.perf_counter() - began
        print(f"\n{name}: {race.title} ({count} round{'s' if count > 1 else ''}, {took:.0f} s)")
        print("\n".join(table(race, rows)), flush=True)
        done.append({"title": race.title, "rounds": count, "runs": runs, "rows": [dataclasses.asdict(r) for r in rows]})
    return done


if __name__ == "__main__":
    sys.exit(main())
