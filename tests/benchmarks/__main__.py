"""Compare the speed of train_ddp.py with that of simpler programs, on this machine.

    python -m tests.benchmarks --json benchmarks.json          # all benchmarks: more than an hour on two cores
    python -m tests.benchmarks ddp start --rounds 7
    python -m tests.benchmarks --quick                         # minutes: checks that they run
    python -m tests.benchmarks reproduce --help                # train a row of README's results again

Ours and the baselines run in turn (A B A B ...), each in a new process. The tables give the median and the range of
each, and the ratio of ours to each baseline, round by round. Leave the machine idle meanwhile.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks import reproduce
from tests.benchmarks.measure import Numbers, table
from tests.benchmarks.runner import BenchmarkError, Runner
from tests.benchmarks.suite import BENCHMARKS
from tests.helpers.measuring import machine


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the parsed command line; a mistake in it exits with status 2."""
    parser = argparse.ArgumentParser(
        prog="tests.benchmarks",
        description=__doc__,
        epilog="benchmarks:\n" + "\n".join(f"  {name:10}{make.__doc__}" for name, make in BENCHMARKS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="benchmark to run (default: all)")
    data_dir = Path(os.environ.get("CIFAR_DATA_DIR") or "data")
    parser.add_argument("--data-dir", type=Path, default=data_dir, help="holds cifar-10-batches-py (now: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number to FILE")
    parser.add_argument("--rounds", type=int, help="runs of each program (default: 3 or 5)")
    parser.add_argument("--quick", action="store_true", help="one round of little work: checks that it runs")
    args = parser.parse_args(argv)
    if unknown := set(args.names) - set(BENCHMARKS):
        parser.error(f"unknown benchmarks {unknown}: choose from {', '.join(BENCHMARKS)}")
    if not (args.data_dir / "cifar-10-batches-py").is_dir():
        parser.error(f"no cifar-10-batches-py in {args.data_dir}: set --data-dir or $CIFAR_DATA_DIR")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmarks, or reproduce a result; return the exit status, 1 if one of them failed."""
    words = sys.argv[1:] if argv is None else argv
    if words[:1] == ["reproduce"]:
        return reproduce.main(words[1:])
    args = parse(words)
    record: dict[str, Any] = {"machine": machine(), "quick": args.quick, "benchmarks": {}}
    print(", ".join(f"{key} {value}" for key, value in record["machine"].items()), flush=True)
    failed = False
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as directory:
        runner = Runner(args.data_dir.resolve(), Path(directory), args.quick)
        for name in args.names or BENCHMARKS:
            try:
                record["benchmarks"][name] = measure(name, runner, args.rounds)
            except BenchmarkError as error:
                failed = True
                record["benchmarks"][name] = {"error": str(error)}
                print(f"tests.benchmarks: error: {name}: {error}", file=sys.stderr)
            if args.json is not None:  # after each, so that an interrupt loses only the current one
                args.json.write_text(json.dumps(record, indent=2) + "\n")
    return int(failed)


def measure(name: str, runner: Runner, rounds: int | None) -> list[dict[str, Any]]:
    """Run one benchmark and print its tables; return the measurements of every run."""
    results = []
    for comparison in BENCHMARKS[name](runner):
        count = rounds or (1 if runner.quick else comparison.rounds)
        began = time.perf_counter()
        runs: dict[str, list[Numbers]] = {program: [] for program in comparison.programs}
        for number in range(count):  # in turn, so that other load on the machine affects all programs alike
            for program, work in comparison.programs.items():
                print(f"  round {number + 1}: {program}", file=sys.stderr)
                runs[program].append(work(number))
        seconds = time.perf_counter() - began
        print(f"\n{name}: {comparison.title} ({count} round{'s' if count > 1 else ''}, {seconds:.0f} s)")
        print("\n".join(table(comparison, runs)), flush=True)
        results.append({"title": comparison.title, "rounds": count, "runs": runs})
    return results


if __name__ == "__main__":
    sys.exit(main())
