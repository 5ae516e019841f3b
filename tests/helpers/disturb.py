"""Real launches that can be watched, killed, frozen and signalled while they train."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

import psutil

from tests.helpers.processes import ROOT, clean_environment, kill_tree, left_of

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
WARM = [sys.executable, "-u", str(ROOT / "launch" / "warm_torchrun.py")]
# Steps of a few milliseconds, momentum, and checkpoints between log points.
FLAGS = ["--device", "cpu", "--dataset", "synthetic", "--wandb", "disabled", "--log-steps", "20",
         "--checkpoint-steps", "25", "--keep-checkpoints", "4"]  # fmt: skip
RESUMES = "resumes   after step "


class Log:
    """A file that a command prints to, from its present end on."""

    def __init__(self, log: Path):
        self.log, self._offset = log, 0
        self._offset = len(self.output())

    def output(self) -> str:
        """Return what has been printed so far."""
        return self.log.read_text()[self._offset :] if self.log.exists() else ""

    def until(self, reached: Callable[[], bool], what: str, timeout: float = 90) -> float:
        """Wait until `reached()`, and return the seconds."""
        began = time.monotonic()
        while not reached():
            if time.monotonic() - began > timeout:
                raise AssertionError(f"{what}: not within {timeout} s; the end of its output: {self.output()[-2000:]}")
            time.sleep(0.02)
        return time.monotonic() - began

    def until_line(self, text: str, times: int = 1, timeout: float = 90) -> float:
        """Wait until `text` has been printed `times` times."""
        return self.until(lambda: self.output().count(text) >= times, text, timeout)


class Started(Log):
    """A command in the background, with its output in a file; a context manager that kills it at the end."""

    def __init__(self, command: Sequence[object], log: Path, **environment: str):
        super().__init__(log)
        with log.open("a") as output:
            self.process = subprocess.Popen(
                [str(part) for part in command],
                cwd=log.parent, env=clean_environment(**environment), stdin=subprocess.DEVNULL,
                stdout=output, stderr=subprocess.STDOUT,
            )  # fmt: skip
        self.agent = psutil.Process(self.process.pid)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def end(self, timeout: float) -> int:
        """Return the exit status, once the command and its descendants are gone."""
        below = self.agent.children(recursive=True) if self.process.poll() is None else []
        began = time.monotonic()
        try:
            status = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout} s: {self.output()[-2000:]}") from None
        assert left_of(below, timeout - (time.monotonic() - began)) == []
        return status

    def kill(self) -> None:
        """Kill everything that is left after a failure."""
        kill_tree(self.agent)
        self.process.wait()


class Watched(Started):
    """`torchrun ARGUMENTS SCRIPT FLAGS` in the background, whose agent is torchrun, with cold or warm restarts."""

    def __init__(
        self,
        run_dir: Path,
        flags: list[str],
        launcher: list[str],
        log: str = "log.txt",
        script: Sequence[str] = (str(ROOT / "train_ddp.py"),),
        warm: bool = False,
        **environment: str,
    ):
        self.run_dir, self._script = run_dir, script[-1]
        super().__init__(
            [*(WARM if warm else TORCHRUN), *launcher, *script, *flags], run_dir.parent / log, **environment
        )

    def step(self) -> int:
        """Return the last step in metrics.jsonl, or 0."""
        with suppress(OSError, ValueError, IndexError):
            return json.loads((self.run_dir / "metrics.jsonl").read_text().splitlines()[-1])["step"]
        return 0

    def ranks(self) -> list[psutil.Process]:
        """Return the training processes by local rank. Of forked ones, psutil sees the agent's environment."""
        children = self.agent.children()
        if forked := [child for child in children if child.name().startswith("rank ")]:
            return sorted(forked, key=lambda process: process.name())
        found = [child for child in children if self._script in child.cmdline() and "LOCAL_RANK" in child.environ()]
        return sorted(found, key=lambda process: int(process.environ()["LOCAL_RANK"]))

    def until_step(self, step: int, timeout: float = 90) -> float:
        """Wait until `step` is in the records."""
        return self.until(lambda: self.step() >= step, f"step {step}", timeout)

    def until_resumed(self, times: int) -> int:
        """Wait until the run has resumed `times` times, and for a step; return the step after which it has resumed."""
        self.until_line(RESUMES, times)
        begins = int(self.output().rpartition(RESUMES)[2].partition(" of ")[0].replace(",", ""))
        self.until_step(begins + 1)
        return begins


def send(process: psutil.Process, number: signal.Signals) -> None:
    """Send a signal, unless the process has just exited."""
    with suppress(psutil.NoSuchProcess):
        process.send_signal(number)
