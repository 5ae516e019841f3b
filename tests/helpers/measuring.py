"""Run a command and time it; read the speed of a run; medians and ranges."""

import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

from cifar.compare import seconds_of_training
from cifar.records.metrics import read_metrics
from tests.helpers.processes import ROOT, kill_tree, result


@dataclass(frozen=True)
class Finished:
    """A command that has ended.

    Attributes:
        status: the exit status, or -1 if the command was killed at its limit.
        output: standard output and standard error.
        seconds: from start to end.
        mark_seconds: from start until the mark was in the output, or None.
    """

    status: int
    output: str
    seconds: float
    mark_seconds: float | None = None


def execute(
    command: Sequence[object],
    log: Path,
    environment: Mapping[str, str],
    cwd: Path = ROOT,
    limit: float = float("inf"),
    mark: str | None = None,
) -> Finished:
    """Run `command`, with its output in the file `log`, and wait for it to end.

    Args:
        limit: seconds after which it is killed.
        mark: text whose first appearance in the output is timed, to about 10 ms.
    """
    began, mark_seconds = time.perf_counter(), None
    with log.open("w") as output:
        process = subprocess.Popen(
            [str(word) for word in command], cwd=cwd, env=environment, stdin=subprocess.DEVNULL, stdout=output,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
    status = process.poll()
    while status is None:
        if time.perf_counter() - began > limit:
            # With its ranks, which have sessions of their own: they would hold the GPU.
            kill_tree(psutil.Process(process.pid))
            process.wait()
            status = -1
            break
        if mark is not None and mark_seconds is None and mark in log.read_text(errors="replace"):
            mark_seconds = time.perf_counter() - began
        time.sleep(0.01)
        status = process.poll()
    seconds = time.perf_counter() - began
    return Finished(status, log.read_text(errors="replace"), seconds, mark_seconds)


def now() -> float:
    """Return the seconds of a clock, once the GPU has done everything."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Return median, minimum and maximum."""
    return statistics.median(values), min(values), max(values)


def images_per_second(run_dir: Path, after: float = 1) -> float:
    """Return a run's training throughput from its first log point at or after step `after` to its last one.

    Until the first log point, caches and memory are cold.
    """
    batch = result(run_dir)["global_batch_size"]
    points = [point for point in seconds_of_training(read_metrics(run_dir), batch) if point[0] >= after]
    (first, start), (last, end) = points[0], points[-1]
    return (last - first) * batch / (end - start)


def machine() -> dict[str, Any]:
    """Return the date, the hardware and the versions that a measurement depends on."""
    cpuinfo = Path("/proc/cpuinfo")  # on Linux
    model = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": model[1] if model else platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load_before": os.getloadavg()[0],  # well above zero: other programs share the machine
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": version("torchvision"),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
    }
