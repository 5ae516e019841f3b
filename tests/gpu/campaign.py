"""What the parts of the campaign share: commands with a limit, lines that are printed when known, the verdict."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from cifar.distributed.cpu import available_cores
from tests.helpers.processes import ROOT, kill_tree

QUICK = ["--dataset", "synthetic", "--wandb", "disabled", "--log-steps", "50"]
LAUNCHER = ["--standalone", "--local-addr=127.0.0.1"]
# As in README, where torchrun asks for this host's name; no variable of __main__ then tells NCCL an interface.
PLAIN_TORCHRUN = ["env", "-u", "GLOO_SOCKET_IFNAME", "-u", "NCCL_SOCKET_IFNAME", sys.executable, "-m",
                  "torch.distributed.run"]  # fmt: skip
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", *LAUNCHER]
TRAIN = [sys.executable, "train_ddp.py"]
MODULE = [sys.executable, "-m"]


@dataclass
class Campaign:
    """What one part has found; every line is printed when it is known.

    Attributes:
        out: directory of what stays.
        work: directory of the runs; the `*.txt` in it stay, too.
        deadline: on the clock of `time.perf_counter`.
        peers: directory of other people's scripts.
        only: words of which one must be in the name of a check that `attempt` runs; empty for all.
        at_once: number of commands that the part runs at once.
    """

    out: Path
    work: Path
    deadline: float
    peers: Path | None = None
    only: Sequence[str] = ()
    at_once: int = 1
    began: float = field(default_factory=time.perf_counter)
    results: dict[str, str] = field(default_factory=dict)

    def say(self, name: str, verdict: str) -> None:
        """Print and keep a result: it has failed if it begins with FAIL."""
        self.results[name] = verdict
        print(f"[{time.perf_counter() - self.began:3.0f} s] {name:24} {verdict}", flush=True)

    def attempt(self, name: str, check: Callable[[], str], must_pass: bool = True) -> None:
        """Run a check that returns its result; one that raises has failed, and the others go on.

        What a check finds that need not pass is information.
        """
        if self.only and not any(word in name for word in self.only):
            return
        try:
            if self.deadline < time.perf_counter():
                raise TimeoutError("no time was left")
            verdict = check()
        except Exception as error:
            verdict = f"FAIL {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        self.say(name, verdict if must_pass else f"information: {verdict}")
        if verdict.startswith("FAIL"):
            self.show(name)

    def show(self, name: str, count: int = 12) -> None:
        """Print the end of the output of the command `name`."""
        file = self.work / f"{name}.txt"
        lines = file.read_text().splitlines()[-count:] if file.exists() else []
        print("".join(f"      | {line[:300]}\n" for line in lines), end="", flush=True)

    def left(self, at_most: float) -> float:
        """Return the seconds that a command may take."""
        return max(1.0, min(at_most, self.deadline - time.perf_counter()))

    def threads(self, processes: int = 1) -> dict[str, str]:
        """Return OMP_NUM_THREADS for a command of `processes`, unless the caller has set it.

        By itself each process takes all cores: three of 16 threads each stalled for minutes on an H200's 16 cores.
        """
        each = max(1, available_cores() // (processes * self.at_once))
        return {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(each))}

    def run(
        self, name: str, command: Sequence[object], at_most: float = 150, processes: int = 1, cwd: Path = ROOT
    ) -> tuple[int, str]:
        """Return status and output of a command, which has a file of its own in `out`; -1 if it took too long."""
        file = self.work / f"{name}.txt"
        with file.open("w") as output:
            process = subprocess.Popen(
                [str(word) for word in command], cwd=cwd, stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, env=os.environ | {"PYTHONUNBUFFERED": "1"} | self.threads(processes),
            )  # fmt: skip
            try:
                status = process.wait(self.left(at_most))
            except subprocess.TimeoutExpired:
                # With its ranks, which have sessions of their own: they would hold the GPU.
                kill_tree(psutil.Process(process.pid))
                process.wait()
                status = -1
        return status, file.read_text(errors="replace")

    def expect(
        self,
        name: str,
        command: Sequence[object],
        status: int = 0,
        pattern: str = "Finished Training",
        at_most: float = 150,
        processes: int = 1,
    ) -> str:
        """Run a command that must end with `status` and print `pattern`, without a complaint of torch's."""
        got, output = self.run(name, command, at_most, processes)
        verdict = "PASS"
        if got != status:
            verdict = f"FAIL status {got}, expected {status}" if got != -1 else "FAIL took too long"
        elif re.search(pattern, output) is None:
            verdict = f"FAIL no {pattern!r}"
        elif complaint := re.search("destroy_process_group|Guessing device|strides do not match", output):
            verdict = f"FAIL torch complains: {complaint[0]}"
        self.say(name, verdict)
        if verdict != "PASS":
            self.show(name)
        return output

    def records(self, run: str) -> list[dict[str, float]]:
        """Return the records of a run in `work`."""
        return [json.loads(line) for line in (self.work / run / "metrics.jsonl").read_text().splitlines()]

    def last_loss(self, run: str) -> float:
        """Return the last training loss of a run in `work`."""
        return [row["train/loss"] for row in self.records(run) if "train/loss" in row][-1]
