"""Run train_ddp.py several times in one process, so that all runs but the first find a warm device.

    python -m tests.gpu.repeat --runs 5 --out results.jsonl --recipe speed94 --precision bf16 --cuda-graph

The k-th run has --seed k. One line per run, printed and appended to `--out`: its result.json, and its seconds by the
rules of the CIFAR-10 speed records, which add the whitening and the test with views to those of training.
"""

import argparse
import contextlib
import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cifar.run
import train_ddp
from tests.helpers.measuring import now
from tests.helpers.processes import result
from tests.helpers.small import shrink


class Stopwatch:
    """A function that knows the seconds of its last call, with what the device did in them."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function, self.seconds = function, 0.0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        began = now()
        try:
            return self._function(*args, **kwargs)
        finally:
            self.seconds = now() - began


def repeat() -> None:
    """Train, print and record each run."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--small", action="store_true", help="with a small synthetic dataset, for a smoke test")
    args, flags = parser.parse_known_args()
    if args.small:
        shrink()
    # What a record counts besides training: the first layer's whitening, in build_model, and the test with views, which
    # begins with the test without them, made after the last epoch.
    build = train_ddp.build_model = Stopwatch(train_ddp.build_model)
    test = train_ddp.evaluate = Stopwatch(train_ddp.evaluate)
    views_test = cifar.run.evaluate = Stopwatch(cifar.run.evaluate)
    for seed in range(args.runs):
        with tempfile.TemporaryDirectory() as directory:
            run_dir = Path(directory) / "run"
            began = now()
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                train_ddp.main([*flags, "--wandb", "disabled", "--seed", str(seed), "--run-dir", str(run_dir)])
            row = {"flags": flags, "seed": seed, "main_seconds": now() - began, **result(run_dir)}
        row["record_seconds"] = row["train_seconds"] + build.seconds + test.seconds + views_test.seconds
        shown = ("test_accuracy", "test_accuracy_tta", "train_seconds", "record_seconds", "main_seconds")
        print(f"seed {seed}", *(f"{name} {row[name]}" for name in shown), sep=", ", flush=True)
        with args.out.open("a") as file:
            file.write(json.dumps(row) + "\n")


def read_rows(out: Path) -> list[dict[str, Any]]:
    """Return the recorded runs."""
    return [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []


if __name__ == "__main__":
    repeat()
