"""Running train_ddp.py or a baseline in a new process."""

import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cifar.compare import seconds_of_training
from cifar.records.metrics import read_metrics, series
from tests.helpers.measuring import Finished, execute
from tests.helpers.processes import ROOT, clean_environment, result

FIRST_STEP = "[1,     1] loss"
"""Text that `train_ddp.py --log-steps 1` and the tutorial's loop print after the first optimizer step."""


class BenchmarkError(Exception):
    """A program failed; the text is one line."""


@dataclass(frozen=True)
class Runner:
    """Starts programs, which write below `directory`.

    Attributes:
        data_dir: holds cifar-10-batches-py; an absolute path.
        directory: an absolute path.
        quick: let the benchmarks do little work, too little for numbers worth quoting.
    """

    data_dir: Path
    directory: Path
    quick: bool = False

    def train(self, *flags: object, **how: Any) -> tuple[Finished, Path]:
        """Run `train_ddp.py FLAGS` on CIFAR-10, without W&B; return the process and its run directory."""
        run_dir = Path(tempfile.mkdtemp(dir=self.directory))
        always = ("--dataset", "cifar10", "--data-dir", self.data_dir, "--wandb", "disabled", "--run-dir", run_dir)
        return self.python(ROOT / "train_ddp.py", *flags, *always, **how), run_dir

    def baseline(self, name: str, *flags: object, **how: Any) -> tuple[Finished, dict[str, float]]:
        """Run `python -m tests.benchmarks.baselines NAME FLAGS`; return the process and the numbers it printed."""
        always = ("--data-dir", self.data_dir)
        finished = self.python("-m", "tests.benchmarks.baselines", name, *flags, *always, **how)
        return finished, last_json(finished)

    def python(self, *arguments: object, processes: int = 1, threads: int | None = None, **watch: Any) -> Finished:
        """Run `python ARGUMENTS`, or torchrun with several processes, and wait for it; a BenchmarkError if it fails.

        Args:
            threads: OMP_NUM_THREADS; by default that of this process, or unset, so that torch decides.
            watch: `mark` of `execute`.
        """
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command = [sys.executable, *(launcher if processes > 1 else []), *arguments]
        environment = clean_environment()
        del environment["OMP_NUM_THREADS"]
        if wanted := threads or os.environ.get("OMP_NUM_THREADS"):
            environment["OMP_NUM_THREADS"] = str(wanted)
        log = self.directory / "output.txt"
        finished = execute(command, log, environment, cwd=self.directory, **watch)
        if finished.status:
            raise BenchmarkError(error_line(finished.output) or f"exit status {finished.status}, and no output")
        return finished


def error_line(output: str) -> str:
    """Return `prog: error: ...`, else an exception's line, else the last line; torchrun appends a page of its own."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for mark in (": error: ", "Error: ") for line in lines if mark in line]
    return (errors + lines[-1:] + [""])[0]


def last_json(finished: Finished) -> dict[str, Any]:
    """Return the last JSON object that a program printed."""
    return json.loads(next(line for line in reversed(finished.output.splitlines()) if line.startswith("{")))


def first_reaching(run_dir: Path, target: float) -> tuple[float, float]:
    """Return (training seconds, test accuracy) at the first test with an accuracy of at least `target`.

    A BenchmarkError names the best accuracy if there is none.
    """
    records = read_metrics(run_dir)
    seconds = dict(seconds_of_training(records, result(run_dir)["global_batch_size"]))
    tests = series(records, "test/accuracy")
    for step, accuracy in tests:
        if accuracy >= target:
            return seconds[step], accuracy
    best = max((accuracy for _, accuracy in tests), default=0.0)
    raise BenchmarkError(f"test accuracy {100 * target:.0f} % was not reached: the best was {100 * best:.2f} %")
