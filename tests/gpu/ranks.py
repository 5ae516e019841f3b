"""Checks of several ranks: the same losses and bits; one that is killed, frozen, asleep or stopped."""

import contextlib
import re
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cifar.checkpoint import checkpoint_path, checkpoints, load_checkpoint
from tests.gpu.campaign import LAUNCHER, QUICK, TORCHRUN, Campaign
from tests.helpers.comparing import same
from tests.helpers.disturb import Watched, send
from tests.helpers.processes import left_of

_TOLERANCE = 0.002  # of losses; sums of another order
_HOOK_TOLERANCE = 0.02  # of losses with compressed gradients; powersgd's were 0.002 apart on a CPU
_FROZEN_TIMEOUT = 12
_ASLEEP_TIMEOUT = 15
_GONE_SECONDS = 10  # until all ranks have left a killed one; those that only torchrun can end take 20
_RESUMES = "resumes   after step "


@dataclass
class Ranks:
    """Runs of several processes under torchrun.

    Attributes:
        c: the part that they belong to.
        script: what torchrun starts.
        flags: of every run.
        global_batch, steps: of the runs whose losses are compared.
        local_batch: of the long runs that are disturbed; a checkpoint follows every `between` steps.
        bits_flags: of the runs whose bits are compared.
    """

    c: Campaign
    script: Sequence[str]
    flags: Sequence[str] = ()
    global_batch: int = 256
    steps: int = 60
    local_batch: int = 128
    between: int = 100
    bits_flags: Sequence[str] = ("--recipe", "speed94")

    def torchrun(self, processes: int, variable: str = "") -> list[object]:
        """Return the command up to the flags, in an environment with `variable`."""
        return ["env", *filter(None, [variable]), *TORCHRUN, f"--nproc_per_node={processes}", *self.script]

    def train(self, name: str, processes: int, *flags: object) -> None:
        """Train to the end, and print whether it worked."""
        command = [*self.torchrun(processes), *QUICK, *self.flags, "--run-dir", self.c.work / name, *flags]
        self.c.expect(name, command, processes=processes)

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
        close = max(losses) - min(losses) < _TOLERANCE
        return f"{'PASS' if close else 'FAIL'} {losses} with {', '.join(map(str, counts))} processes"

    def hooks(self, n: int) -> str:
        """Train with each communication hook; compare the losses with that of no hook."""
        losses = {}
        for hook in ("none", "fp16", "bf16", "powersgd"):
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
        """Kill a rank, then rank zero; torchrun starts all again, and a step must follow within `limit` seconds."""
        found, passed = [], True
        with self.started("killed", n, "--timeout", "600", restarts=2) as run:
            for victim in (min(2, n - 1), 0):
                ranks, starts, began = run.ranks(), run.output().count(_RESUMES), time.monotonic()
                send(ranks[victim], signal.SIGKILL)
                late = left_of(ranks, limit)
                gone = time.monotonic() - began
                _until_training(run, starts + 1)
                seconds = time.monotonic() - began
                passed = passed and not late and gone < _GONE_SECONDS and seconds < limit
                found.append(f"rank {victim}: all gone after {gone:.1f} s, next step after {seconds:.1f} s")
        return f"{'PASS' if passed else 'FAIL'} {'; '.join(found)} (limits {_GONE_SECONDS} and {limit:g})"

    def asleep(self, n: int, seconds: float) -> str:
        """Let a rank sleep in Python; the others end, say where it is, and nothing may end what is started then."""
        awake = replace(self, script=["-m", "tests.gpu.asleep"])
        with awake.started("asleep", n, "--timeout", _ASLEEP_TIMEOUT, restarts=1) as run:
            ranks = run.ranks()
            run.until_line("falls asleep")
            began = time.monotonic()
            late = left_of(ranks, _ASLEEP_TIMEOUT + 10)
            ended = time.monotonic() - began
            frames = run.output().count("frame #")
            place = re.search(rf"rank {n - 1} is at \S*asleep.py:\d+", run.output())
            _until_training(run, 1)
            for _ in range(2):  # it must train in each half
                at = run.step()
                time.sleep(seconds / 2)
                if run.process.poll() is not None or run.step() <= at or run.output().count(_RESUMES) > 1:
                    return f"FAIL started again, it did not train on for {seconds:g} s after step {at}"
        said = f"said: {place[0] if place else 'not where it is'}, and {frames} frames of C++"
        return f"{'PASS' if place and not late else 'FAIL'} {len(late)} left after {ended:.1f} s, {said}; trains on"

    def network_error(self, n: int) -> str:
        """Name an interface that does not exist; one line must have the library's own error and the variable."""
        variable = f"{'NCCL' if 'cuda' in self.flags else 'GLOO'}_SOCKET_IFNAME=nonsense"
        command, began = [*self.torchrun(n, variable), *QUICK, *self.flags], time.monotonic()
        status, output = self.c.run("network error", [*command, "--run-dir", self.c.work / "error"], 60, n)
        lines = re.findall(r"^train_ddp.py: error: .*", output, re.MULTILINE)
        passed = status == 1 and len(lines) == 1 and f"({variable} in the environment" in lines[0]
        return f"{'PASS' if passed else 'FAIL'} status {status} after {time.monotonic() - began:.0f} s: {lines}"

    def bits(self, n: int, nvls: int) -> str:
        """Compare the states of a run, of another one, and of one that resumed the first halfway."""
        half, end, states = self.steps // 3, self.steps // 3 * 2, []
        new = [*QUICK, *self.flags, *self.bits_flags, "--max-steps", end, "--checkpoint-steps", half, "--run-dir"]
        for which in ("one", "other", "resumed"):
            name = f"bits {nvls} {which}"
            run_dir = self.c.work / name
            if which == "resumed":
                shutil.copytree(self.c.work / f"bits {nvls} one", run_dir)
                checkpoint_path(run_dir, end).unlink()
                (run_dir / "result.json").unlink()
            flags = ["--resume", run_dir] if which == "resumed" else [*new, run_dir]
            status, _ = self.c.run(name, [*self.torchrun(n, f"NCCL_NVLS_ENABLE={nvls}"), *flags], processes=n)
            if status:
                self.c.show(name)
                return f"FAIL status {status} of {name} (-1: took too long)"
            states.append(load_checkpoint(checkpoint_path(run_dir, end))["state"])
        differing = [_differing(states[0], state) or "none" for state in states[1:]]
        verdict = "PASS" if differing == ["none", "none"] else "FAIL"
        return f"{verdict} step {end}, parts with other bits: in another run {differing[0]}, resumed {differing[1]}"

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


def _until_training(run: Watched, starts: int) -> None:
    """Wait until the run has started again `starts` times, and for a step after that."""
    run.until_line(_RESUMES, starts)
    begins = int(run.output().rpartition(_RESUMES)[2].partition(" of ")[0].replace(",", ""))
    run.until(lambda: run.step() > begins, "a step after it")


def _differing(one: dict[str, Any], other: dict[str, Any]) -> str:
    """Return the names of the parts of two states that have not the same bits."""
    return ", ".join(name for name in one if not same({name: one[name]}, {name: other[name]}))
