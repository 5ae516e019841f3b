"""Running a contender in a fresh process, and reading what it leaves."""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.helpers.processes import ROOT, clean_environment

FIRST_STEP = "[1,     1] loss"
"""How the line of the first optimizer step begins, of `train_ddp.py --log-steps 1` and of the tutorial's loop."""


class ContenderError(Exception):
    """A contender failed; the text is one line."""


@dataclass(frozen=True)
class Child:
    """What a process said and took.

    Attributes:
        seconds: from its start to its end; `first_step` to the line of the first optimizer step, if it wrote one.
        peak_mb: most memory that it and its own children held at once, in 1e6 bytes, if that was asked for.
    """

    said: str
    seconds: float
    first_step: float | None
    peak_mb: float | None

    def last_json(self) -> dict[str, Any]:
        """The JSON of the last line that is some."""
        line = next(line for line in reversed(self.said.splitlines()) if line.startswith("{"))
        return json.loads(line)


def python(
    *arguments: object, cwd: Path, processes: int = 1, threads: int | None = None, memory: bool = False
) -> Child:
    """`python ARGUMENTS` or, with several processes, torchrun of them; waits until it has ended.

    Args:
        threads: OMP_NUM_THREADS; by default the caller's own, or none, which leaves it to torch.
        memory: watch its memory, which takes some of the machine's time.

    Raises:
        ContenderError: it failed.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *(launcher if processes > 1 else []), *map(str, arguments)]
    environment = clean_environment()
    wanted = threads or os.environ.get("OMP_NUM_THREADS")
    environment.pop("OMP_NUM_THREADS")
    if wanted:
        environment["OMP_NUM_THREADS"] = str(wanted)

    said, first_step = [], None
    with tempfile.TemporaryFile("w+") as errors:
        began = time.perf_counter()
        with subprocess.Popen(
            command, cwd=cwd, env=environment, text=True, bufsize=1,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors,
        ) as process:  # fmt: skip
            watch = MemoryWatch(process.pid) if memory else None
            assert process.stdout is not None
            for line in process.stdout:
                if first_step is None and line.startswith(FIRST_STEP):
                    first_step = time.perf_counter() - began
                said.append(line)
            status = process.wait()
        seconds = time.perf_counter() - began
        peak = watch.close() if watch is not None else None
        if status != 0:
            errors.seek(0)
            raise ContenderError(complaint(errors.read()) or f"exit status {status} and not a word")
    return Child("".join(said), seconds, first_step, peak)


def complaint(errors: str) -> str:
    """The line of a process's standard error that says most: `prog: error: ...`, else a last word."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    # torchrun adds a page of its own after what the ranks said.
    return next(
        (line for line in lines if ": error: " in line),
        next((x for x in lines if "Error: " in x), lines[-1:] and lines[-1]) or "",
    )


class MemoryWatch:
    """Looks several times a second at the memory of a process and all that it has started."""

    def __init__(self, pid: int) -> None:
        self._pid, self._peak, self._done = pid, 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        import psutil

        while not self._done.wait(0.1):
            total = 0
            # A process may go while it is looked at.
            with suppress(psutil.Error):
                root = psutil.Process(self._pid)
                for process in [root, *root.children(recursive=True)]:
                    with suppress(psutil.Error):
                        info = process.memory_full_info()
                        # PSS shares out the pages that forked workers have in common with their parent, so that
                        # the sum counts each page once; only Linux has it.
                        total += getattr(info, "pss", info.uss)
            self._peak = max(self._peak, total)

    def close(self) -> float:
        """Stop looking.

        Returns:
            The most that was seen, in 1e6 bytes.
        """
        self._done.set()
        self._thread.join()
        return self._peak / 1e6


def train(folder: Path, data_dir: Path, *flags: object, **how: Any) -> tuple[Child, Path]:
    """Run `train_ddp.py FLAGS` on the real data in a new run folder below `folder`, without W&B.

    Returns:
        The process, and the run folder.
    """
    run_dir = Path(tempfile.mkdtemp(dir=folder))
    always = ("--dataset", "cifar10", "--data-dir", data_dir, "--wandb", "disabled", "--run-dir", run_dir)
    return python(ROOT / "train_ddp.py", *flags, *always, cwd=folder, **how), run_dir


def peer(folder: Path, name: str, *flags: object, **how: Any) -> Child:
    """Run `python -m tests.benchmarks.peers NAME FLAGS`."""
    return python("-m", "tests.benchmarks.peers", name, *flags, cwd=folder, **how)


@dataclass(frozen=True)
class Window:
    """A log window of a run: how long training took for its images, and the test accuracy at its end, if known."""

    step: int
    images: int
    seconds: float
    accuracy: float | None


def windows(metrics: Sequence[dict[str, Any]], global_batch_size: int) -> list[Window]:
    """The log windows of a run's metrics.jsonl, in order."""
    accuracies = {line["step"]: line["test/accuracy"] for line in metrics if "test/accuracy" in line}
    found, before = [], 0
    for line in metrics:
        if "train/images_per_second" in line:
            step, images = line["step"], (line["step"] - before) * global_batch_size
            found.append(Window(step, images, images / line["train/images_per_second"], accuracies.get(step)))
            before = step
    return found


def run_windows(run_dir: Path) -> list[Window]:
    """The log windows of the run in `run_dir`."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    result = json.loads((run_dir / "result.json").read_text())
    return windows([json.loads(line) for line in lines], result["global_batch_size"])


def steady(found: Sequence[Window]) -> float:
    """Images/s of all windows but the first, in which caches and memory are new."""
    return sum(window.images for window in found[1:]) / sum(window.seconds for window in found[1:])


def seconds_until(found: Sequence[Window], target: float) -> Window:
    """All training up to the first evaluation that reaches `target`, as one window.

    Raises:
        ContenderError: none does.
    """
    for count, window in enumerate(found, start=1):
        if window.accuracy is not None and window.accuracy >= target:
            upto = found[:count]
            return Window(window.step, sum(w.images for w in upto), sum(w.seconds for w in upto), window.accuracy)
    best = max((window.accuracy for window in found if window.accuracy is not None), default=0.0)
    raise ContenderError(f"test accuracy {100 * target:.0f} % was never reached: the best was {100 * best:.2f} %")
