"""Run train_ddp.py several times in one process, so that all runs but the first find a warm device.

    python -m tests.gpu.repeat --runs 5 --out results.jsonl --recipe speed94 --precision bf16 --cuda-graph

The k-th run has --seed k. One line per run: accuracy; seconds of training; by the rules of the CIFAR-10 speed records,
which add the whitening and the test with views and leave out a first run; of the whole call of main().
"""

import argparse
import contextlib
import io
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import cifar.run
import train_ddp
from tests.helpers.small import shrink
from train_ddp import main


class Stopwatch:
    """A function that knows the seconds of its last call, with what the device did in them."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function, self.seconds = function, 0.0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        began = self._now()
        try:
            return self._function(*args, **kwargs)
        finally:
            self.seconds = self._now() - began

    def _now(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()


def repeat() -> None:
    """Train, print and record each run."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path)
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
            began = time.perf_counter()
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                main([*flags, "--wandb", "disabled", "--seed", str(seed), "--run-dir", str(run_dir)])
            seconds = time.perf_counter() - began
            result = json.loads((run_dir / "result.json").read_text())
        views = result["test_accuracy_tta"]
        record = result["train_seconds"] + build.seconds + test.seconds + views_test.seconds
        print(
            f"{' '.join(flags)} --seed {seed}: {100 * result['test_accuracy']:.2f} %"
            + (f", {100 * views:.2f} % with views" if views else "")
            + f", {result['train_seconds']:.2f} s of training, {record:.2f} s by the records' rules"
            + f", {seconds:.1f} s in main()",
            flush=True,
        )
        if args.out:
            with args.out.open("a") as file:
                row = {"flags": flags, "seed": seed, "main_seconds": seconds, "record_seconds": record, **result}
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    repeat()
