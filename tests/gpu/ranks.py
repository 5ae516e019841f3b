"""Checks of several ranks: the same losses at any number of them; one that is killed, frozen or stopped."""

import contextlib
import random
import re
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cifar.checkpoint import checkpoints
from tests.gpu.campaign import LAUNCHER, QUICK, TORCHRUN, Campaign
from tests.helpers.disturb import Watched, send
from tests.helpers.processes import left_of
from tests.helpers.soak import disturb

_TOLERANCE = 0.002  # of losses; sums of another order
_HOOK_TOLERANCE = 0.02  # of losses with compressed gradients; powersgd's were 0.002 apart on a CPU
_FROZEN_TIMEOUT = 12


@dataclass
class Ranks:
    """Runs of several processes under torchrun.

    Attributes:
        c: the part that they belong to.
        script: what torchrun starts.
        flags: of every run.
        global_batch, steps: of the runs whose losses are compared.
        local_batch: of the long runs that are disturbed; a checkpoint follows every `between` steps.
    """

    c: Campaign
    script: Sequence[str]
    flags: Sequence[str] = ()
    global_batch: int = 256
    steps: int = 60
    local_batch: int = 128
    between: int = 100

    def train(
        self, name: str, processes: int, *flags: object, run_dir: bool = True, pattern: str = "Finished Training"
    ) -> str:
        """Train to the end, print whether it worked, and return the output."""
        place = ["--run-dir", self.c.work / name] if run_dir else []
        command = [*TORCHRUN, f"--nproc_per_node={processes}", *self.script, *QUICK, *place, *self.flags, *flags]
        return self.c.expect(name, command, pattern=pattern, processes=processes)

    def _wide(self, micro_batches: int) -> list[object]:
        local = self.global_batch // micro_batches
        # With the recipe's warm-up the loss would hardly move in 60 steps; at its rate, sums of another order are 0.03
        # apart after them. At 0.02 they are 4e-5 apart, and a doubled gradient shows as 0.4 (2 ranks on a CPU).
        return ["--recipe", "wide", "--lr", 0.02, "--lr-scaling", "none", "--warmup-epochs", 0, "--local-batch-size",
                local, "--global-batch-size", self.global_batch, "--max-steps", self.steps,
                "--log-steps", self.steps // 3]  # fmt: skip

    def same_losses(self, counts: Sequence[int]) -> str:
        """Compare the last losses of the same training with each number of processes."""
        for n in counts:
            self.train(f"ranks {n}", n, *self._wide(counts[-1]))
        losses = [self.c.last_loss(f"ranks {n}") for n in counts]
        same = max(losses) - min(losses) < _TOLERANCE
        return f"{'PASS' if same else 'FAIL'} {losses} with {', '.join(map(str, counts))} processes"

    def hooks(self, n: int, names: Sequence[str] = ("fp16", "bf16", "powersgd")) -> str:
        """Train with each communication hook; compare the losses with that of no hook."""
        losses = {}
        for hook in ("none", *names):
            self.train(f"hook {hook}", n, *self._wide(n), "--comm-hook", hook)
            losses[hook] = self.c.last_loss(f"hook {hook}")
        close = all(abs(loss - losses["none"]) < _HOOK_TOLERANCE for loss in losses.values())
        return f"{'PASS' if close else 'FAIL'} losses {losses}"

    @contextlib.contextmanager
    def started(self, name: str, processes: int, *flags: object, restarts: int = 0) -> Iterator[Watched]:
        """Start a run without end, wait for its first checkpoint, and kill what is left of it after the block."""
        long = ["--recipe", "wide", "--local-batch-size", self.local_batch, "--epochs", 100_000, "--log-steps", 10,
                "--checkpoint-steps", self.between]  # fmt: skip
        run_dir = self.c.work / name
        run = Watched(
            run_dir,
            [str(word) for word in (*QUICK[:4], *self.flags, *long, "--run-dir", run_dir, *flags)],
            [*LAUNCHER, f"--nproc_per_node={processes}", f"--max-restarts={restarts}"],
            f"{name}.txt",
            script=self.script,
            **self.c.threads(processes),
        )
        try:
            run.until(lambda: bool(checkpoints(run_dir)) or run.process.poll() is not None, "step", self.c.left(90))
            if run.process.poll() is not None:
                raise AssertionError(f"ended with status {run.process.returncode} before it was disturbed")
            yield run
        finally:
            run.kill()

    def killed(self, n: int, limit: float) -> str:
        """Kill a rank; torchrun starts them again, and the next step must come within `limit` seconds."""
        with self.started("killed", n, "--timeout", "600", restarts=1) as run:
            _, lost, seconds = disturb(run, "kill", random.Random(0), [])
            found = f"next step after {seconds:.1f} s (limit {limit:g}), {lost} steps lost"
            return f"{'PASS' if seconds < limit else 'FAIL'} {found}"

    def survives(self, n: int, seconds: float) -> str:
        """Kill a rank with a --timeout shorter than the grace of a stop; nothing may kill what is started then."""
        with self.started("killed, timeout 10", n, "--timeout", "10", restarts=1) as run:
            *_, waited = disturb(run, "kill", random.Random(0), [])
            began, at = time.monotonic(), run.step()
            for share in (0.5, 1.0):  # it must train in each half
                while time.monotonic() - began < share * seconds and run.process.poll() is None:
                    time.sleep(0.1)
                if run.process.poll() is not None:
                    return f"FAIL ended {time.monotonic() - began:.0f} s after the restart, which took {waited:.1f} s"
                if run.step() <= at:
                    return f"FAIL no step after {at}, {time.monotonic() - began:.0f} s after the restart"
                at = run.step()
            if (starts := run.output().count("resumes   ")) != 1:
                return f"FAIL was started again {starts} times"
            return f"PASS next step after {waited:.1f} s, then {seconds:g} s of training to step {at}"

    def frozen(self, n: int) -> str:
        """Freeze a rank: all processes must end within the timeout, and the message names it."""
        with self.started("frozen", n, "--timeout", _FROZEN_TIMEOUT) as run:
            ranks, began = run.ranks(), time.monotonic()
            send(ranks[-1], signal.SIGSTOP)
            late = left_of(ranks, _FROZEN_TIMEOUT + 3)
            seconds = time.monotonic() - began
            run.end(self.c.left(40))
            named = f"rank {n - 1} (process {ranks[-1].pid}" in run.output() and "sent no heartbeat" in run.output()
            passed = named and not late
            return f"{'PASS' if passed else 'FAIL'} {len(late)} left after {seconds:.1f} s, named: {named}"

    def stopped(self, n: int, torchrun: bool) -> str:
        """Send SIGTERM to torchrun, or to a rank: all stop after the same step, which is saved."""
        with self.started("stopped", n, "--timeout", "600") as run:
            send(run.agent if torchrun else run.ranks()[-1], signal.SIGTERM)
            began = time.monotonic()
            run.end(self.c.left(40))
            said = re.search(r"Stopped by SIGTERM after step ([\d,]+)", run.output())
            step = int(said[1].replace(",", "")) if said else -1
            newest = next(iter(checkpoints(run.run_dir)), None)
            return f"{'PASS' if newest == step else 'FAIL'} step {step} saved after {time.monotonic() - began:.1f} s"

    def resumed(self, before: int, now: int) -> str:
        """Continue the run that `stopped` left with another number of processes."""
        run_dir = self.c.work / "stopped"
        until = next(iter(checkpoints(run_dir))) + self.between
        flags = ["--resume", run_dir, "--max-steps", until]
        output = self.train(f"resumed on {now}", now, *flags, run_dir=False, pattern=f"world size {before} -> {now}")
        return "PASS" if "Finished Training" in output else "FAIL did not finish"
