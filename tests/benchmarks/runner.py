"""Running train_ddp.py or a baseline in a new process, and reading the numbers that it leaves."""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from cifar.compare import seconds_of_training
from cifar.records.metrics import read_metrics, series
from tests.helpers.processes import ROOT, clean_environment

FIRST_STEP = "[1,     1] loss"
"""Start of the line that `train_ddp.py --log-steps 1` and the tutorial's loop print after the first optimizer step."""


class BenchmarkError(Exception):
    """A program failed; the text is one line."""


@dataclass(frozen=True)
class Finished:
    """A process that ended with status 0.

    Attributes:
        seconds: from start to end.
        first_step: seconds from start to the line `FIRST_STEP`, if it was printed.
        peak_mb: peak memory of the process and its children together, in 1e6 bytes, if it was watched.
    """

    stdout: str
    seconds: float
    first_step: float | None
    peak_mb: float | None

    def last_json(self) -> dict[str, Any]:
        """Return the last JSON object that was printed."""
        return json.loads(next(line for line in reversed(self.stdout.splitlines()) if line.startswith("{")))


def python(
    *arguments: object, cwd: Path, processes: int = 1, threads: int | None = None, memory: bool = False
) -> Finished:
    """Run `python ARGUMENTS`, or torchrun with several processes, and wait for it to end.

    Args:
        threads: OMP_NUM_THREADS; by default that of this process, or unset, so that torch decides.
        memory: measure the peak memory, which takes some processor time.

    Raises:
        BenchmarkError: it failed.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *(launcher if processes > 1 else []), *map(str, arguments)]
    environment = clean_environment()
    del environment["OMP_NUM_THREADS"]
    if wanted := threads or os.environ.get("OMP_NUM_THREADS"):
        environment["OMP_NUM_THREADS"] = str(wanted)

    stdout, first_step = [], None
    with tempfile.TemporaryFile("w+") as stderr:
        began = time.perf_counter()
        with subprocess.Popen(
            command, cwd=cwd, env=environment, text=True, bufsize=1,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr,
        ) as process:  # fmt: skip
            watch = MemoryWatch(process.pid) if memory else None
            assert process.stdout is not None
            for line in process.stdout:
                if first_step is None and line.startswith(FIRST_STEP):
                    first_step = time.perf_counter() - began
                stdout.append(line)
            status = process.wait()
        seconds = time.perf_counter() - began
        peak_mb = watch.stop() if watch is not None else None
        if status != 0:
            stderr.seek(0)
            raise BenchmarkError(_error_line(stderr.read()) or f"exit status {status}, and nothing on stderr")
    return Finished("".join(stdout), seconds, first_step, peak_mb)


def _error_line(stderr: str) -> str:
    """Return `prog: error: ...`, else an exception's line, else the last line; torchrun appends a page of its own."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for mark in (": error: ", "Error: ") for line in lines if mark in line]
    return (errors + lines[-1:] + [""])[0]


class MemoryWatch:
    """A thread that samples the memory of a process and its children ten times a second."""

    def __init__(self, pid: int) -> None:
        self._pid, self._peak, self._stopped = pid, 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stopped.wait(0.1):
            total = 0
            with suppress(psutil.Error):  # a process may end while it is sampled
                root = psutil.Process(self._pid)
                for process in [root, *root.children(recursive=True)]:
                    with suppress(psutil.Error):
                        info = process.memory_full_info()
                        # PSS (Linux only) splits pages that forked workers share with their parent, so that the sum
                        # counts each page once.
                        total += getattr(info, "pss", info.uss)
            self._peak = max(self._peak, total)

    def stop(self) -> float:
        """Stop sampling and return the peak in 1e6 bytes."""
        self._stopped.set()
        self._thread.join()
        return self._peak / 1e6


def train(directory: Path, data_dir: Path, *flags: object, **how: Any) -> tuple[Finished, Path]:
    """Run `train_ddp.py FLAGS` on CIFAR-10, without W&B; return the process and its run directory below `directory`."""
    run_dir = Path(tempfile.mkdtemp(dir=directory))
    always = ("--dataset", "cifar10", "--data-dir", data_dir, "--wandb", "disabled", "--run-dir", run_dir)
    return python(ROOT / "train_ddp.py", *flags, *always, cwd=directory, **how), run_dir


def baseline(directory: Path, name: str, *flags: object, **how: Any) -> Finished:
    """Run `python -m tests.benchmarks.baselines NAME FLAGS`."""
    return python("-m", "tests.benchmarks.baselines", name, *flags, cwd=directory, **how)


def read_run(run_dir: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the records of metrics.jsonl and the global batch size."""
    result = json.loads((run_dir / "result.json").read_text())
    return read_metrics(run_dir), result["global_batch_size"]


def images_per_second(run_dir: Path) -> float:
    """Return the training throughput after the first log point; until then, caches and memory are cold."""
    records, batch = read_run(run_dir)
    _, (first, start), *_, (last, end) = seconds_of_training(records, batch)
    return (last - first) * batch / (end - start)


def first_reaching(run_dir: Path, target: float) -> tuple[float, float, float]:
    """Return (images, training seconds, test accuracy) at the first test with an accuracy of at least `target`.

    Raises:
        BenchmarkError: there is none.
    """
    records, batch = read_run(run_dir)
    seconds, tests = dict(seconds_of_training(records, batch)), series(records, "test/accuracy")
    for step, accuracy in tests:
        if accuracy >= target:
            return step * batch, seconds[step], accuracy
    best = max((accuracy for _, accuracy in tests), default=0.0)
    raise BenchmarkError(f"test accuracy {100 * target:.0f} % was not reached: the best was {100 * best:.2f} %")
