"""A campaign: commands with a limit, results that are printed when known, the verdict."""

import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cifar.distributed.cpu import available_cores
from tests.helpers.measuring import Finished, execute
from tests.helpers.processes import ROOT

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
    """The results of one part.

    Attributes:
        out: directory of what stays.
        work: directory of the runs; the `*.txt` in it stay, too.
        deadline: on the clock of `time.perf_counter`.
        only: words of which one must be in the name of a check that `attempt` runs; empty for all.
        at_once: number of commands that the part runs at once.
        results: by the name of the check; one that has failed begins with FAIL.
        details: what else the part has measured.
    """

    out: Path
    work: Path
    deadline: float
    only: Sequence[str] = ()
    at_once: int = 1
    began: float = field(default_factory=time.perf_counter)
    results: dict[str, str] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)

    def say(self, name: str, verdict: str) -> None:
        """Print and keep a result, with the end of the output of the command `name` if it has failed."""
        self.results[name] = verdict
        print(f"[{time.perf_counter() - self.began:3.0f} s] {name:24} {verdict}", flush=True)
        file = self.work / f"{name}.txt"
        if "FAIL" in verdict and file.exists():
            lines = file.read_text(errors="replace").splitlines()[-12:]
            print("".join(f"      | {line[:300]}\n" for line in lines), end="", flush=True)

    def attempt(self, name: str, check: Callable[[], str], must_pass: bool = True) -> None:
        """Run a check that returns its result; one that raises has failed.

        The result of a check that need not pass is information.
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

    def beside(self, number: int, jobs: Sequence[Callable[[], object]]) -> None:
        """Run jobs, `number` of them at once; one that raises has failed, and the others go on."""
        self.at_once = number
        with ThreadPoolExecutor(number) as pool:
            for future in [pool.submit(job) for job in jobs]:
                if (error := future.exception()) is not None:
                    self.say(type(error).__name__, f"FAIL {error}")
        self.at_once = 1

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
    ) -> Finished:
        """Run a command, whose output stays in `out`, for `at_most` seconds."""
        environment = os.environ | {"PYTHONUNBUFFERED": "1"} | self.threads(processes)
        return execute(command, self.work / f"{name}.txt", environment, cwd, self.left(at_most))

    def expect(
        self,
        name: str,
        command: Sequence[object],
        status: int = 0,
        pattern: str = "Finished Training",
        at_most: float = 150,
        processes: int = 1,
    ) -> Finished:
        """Run a command that must end with `status` and print `pattern`, without a complaint of torch's."""
        finished = self.run(name, command, at_most, processes)
        verdict = "PASS"
        if finished.status != status:
            verdict = f"FAIL status {finished.status}, expected {status} (-1: took too long)"
        elif re.search(pattern, finished.output) is None:
            verdict = f"FAIL no {pattern!r}"
        elif complaint := re.search("destroy_process_group|Guessing device|strides do not match", finished.output):
            verdict = f"FAIL torch complains: {complaint[0]}"
        self.say(name, verdict)
        return finished

    def checks(self, name: str, command: Sequence[object], at_most: float) -> None:
        """Run a command that ends in `checks.run_checks`, and report each of its lines."""
        output = self.run(name, command, at_most).output
        for verdict, check, said in re.findall(r"^(PASS|FAIL)  (.*?) \(\d+ s\): (.*)$", output, re.M):
            self.say(check, f"{verdict} {said}")
        if not re.search(r"^\d+ failed", output, re.M):
            self.say(name, "FAIL did not finish")
