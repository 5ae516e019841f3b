"""Checks of several ranks: the same losses and bits; one that is killed, frozen, asleep or stopped."""

import contextlib
import re
import shutil
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from cifar.checkpoint import checkpoint_path, checkpoints, load_checkpoint
from tests.gpu.campaign import LAUNCHER, QUICK, TORCHRUN, Campaign
from tests.helpers.comparing import same
from tests.helpers.disturb import RESUMES, Watched, send
from tests.helpers.processes import left_of, records

_GONE_SECONDS = 10  # until all ranks have left a killed one; those that only torchrun can end take 20


@dataclass
class Ranks:
    """Runs of several processes under torchrun.

    Attributes:
        c: the part that they belong to.
        script: the arguments of torchrun that name the program.
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

    def torchrun(self, processes: int, *variables: str) -> list[object]:
        """Return the command up to the flags, in an environment with `variables`."""
        return ["env", *variables, *TORCHRUN, f"--nproc_per_node={processes}", *self.script]

    def same_losses(self, counts: Sequence[int]) -> str:
        """Compare the last losses of the same training with each number of processes; sums have another order."""
        return self._compare({f"ranks {n}": (n, "none") for n in counts}, counts[-1], 0.002)

    def hooks(self, n: int) -> str:
        """Compare the last losses with each communication hook; powersgd's were 0.002 apart on a CPU."""
        return self._compare({f"hook {hook}": (n, hook) for hook in ("none", "fp16", "bf16", "powersgd")}, n, 0.02)

    def _compare(self, runs: Mapping[str, tuple[int, str]], micro_batches: int, tolerance: float) -> str:
        # With the recipe's warm-up the loss would hardly move in 60 steps; at its rate, sums of another order are 0.03
        # apart after them. At 0.02 they are 4e-5 apart, and a doubled gradient shows as 0.4 (2 ranks on a CPU).
        flags = ["--recipe", "wide", "--lr", 0.02, "--lr-scaling", "none", "--warmup-epochs", 0, "--local-batch-size",
                 self.global_batch // micro_batches, "--global-batch-size", self.global_batch,
                 "--max-steps", self.steps, "--log-steps", self.steps // 3]  # fmt: skip
        losses = {}
        for name, (processes, hook) in runs.items():
            command = [*self.torchrun(processes), *QUICK, *self.flags, "--run-dir", self.c.work / name, *flags]
            self.c.expect(name, [*command, "--comm-hook", hook], processes=processes)
            losses[name] = records(self.c.work / name, "train/loss")[-1][1]
        reference = next(iter(losses.values()))
        close = all(abs(loss - reference) < tolerance for loss in losses.values())
        return f"{'PASS' if close else 'FAIL'} losses {losses}"

    def bits(self, n: int, nvls: int) -> str:
        """Compare the states of a run, of another one, and of one that resumed the first halfway."""
        half, end = self.steps // 3, self.steps // 3 * 2
        new = [*QUICK, *self.flags, *self.bits_flags, "--max-steps", end, "--checkpoint-steps", half, "--run-dir"]
        one, other, resumed = (self.c.work / f"bits {nvls} {which}" for which in ("one", "other", "resumed"))
        states = []
        for run_dir, flags in ((one, [*new, one]), (other, [*new, other]), (resumed, ["--resume", resumed])):
            if run_dir is resumed:
                shutil.copytree(one, resumed)
                checkpoint_path(resumed, end).unlink()
                (resumed / "result.json").unlink()
            command = [*self.torchrun(n, f"NCCL_NVLS_ENABLE={nvls}"), *flags]
            if status := self.c.run(run_dir.name, command, processes=n).status:
                return f"FAIL status {status} of {run_dir.name} (-1: took too long)"
            states.append(load_checkpoint(checkpoint_path(run_dir, end))["state"])
        differing = [
            [name for name in states[0] if not same({name: states[0][name]}, {name: state[name]})]
            for state in states[1:]
        ]
        verdict = "PASS" if differing == [[], []] else "FAIL"
        return f"{verdict} step {end}, parts with other bits: in another run {differing[0]}, resumed {differing[1]}"

    @contextlib.contextmanager
    def started(self, name: str, processes: int, *flags: object, restarts: int = 0) -> Iterator[Watched]:
        """Start a run without end, wait for its first checkpoint, and kill what is left of it after the block."""
        run_dir = self.c.work / name
        long = ["--recipe", "wide", "--local-batch-size", self.local_batch, "--epochs", 100_000, "--log-steps", 10,
                "--checkpoint-steps", self.between, "--run-dir", run_dir]  # fmt: skip
        with Watched(
            run_dir,
            [str(word) for word in (*QUICK[:4], *self.flags, *long, *flags)],
            [*LAUNCHER, f"--nproc_per_node={processes}", f"--max-restarts={restarts}"],
            f"{name}.txt",
            script=self.script,
            **self.c.threads(processes),
        ) as run:
            run.until(lambda: bool(checkpoints(run_dir)) or run.process.poll() is not None, "step", self.c.left(90))
            assert run.process.poll() is None, f"ended with status {run.process.returncode} before it was disturbed"
            yield run

    def killed(self, n: int, limit: float) -> str:
        """Kill a rank, then rank zero; torchrun starts all again, and a step must follow within `limit` seconds."""
        found, passed = [], True
        with self.started("killed", n, "--timeout", "600", restarts=2) as run:
            for victim in (min(2, n - 1), 0):
                ranks, starts, began = run.ranks(), run.output().count(RESUMES), time.monotonic()
                send(ranks[victim], signal.SIGKILL)
                late = left_of(ranks, limit)
                gone = time.monotonic() - began
                run.until_resumed(starts + 1)
                seconds = time.monotonic() - began
                passed = passed and not late and gone < _GONE_SECONDS and seconds < limit
                found.append(f"rank {victim}: all gone after {gone:.1f} s, next step after {seconds:.1f} s")
        return f"{'PASS' if passed else 'FAIL'} {'; '.join(found)} (limits {_GONE_SECONDS} and {limit:g})"

    def frozen(self, n: int) -> str:
        """Freeze a rank: all processes must end within the timeout, and the message names it."""
        timeout = 12
        with self.started("frozen", n, "--timeout", timeout) as run:
            ranks, began = run.ranks(), time.monotonic()
            send(ranks[-1], signal.SIGSTOP)
            late = left_of(ranks, timeout + 3)
            seconds = time.monotonic() - began
            run.end(self.c.left(40))
            named = f"rank {n - 1} (process {ranks[-1].pid}" in run.output() and "sent no heartbeat" in run.output()
        return f"{'PASS' if named and not late else 'FAIL'} {len(late)} left after {seconds:.1f} s, named: {named}"

    def asleep(self, n: int, seconds: float) -> str:
        """Let a rank sleep in Python; the others end, say where it is, and nothing may end what is started then."""
        timeout = 15
        awake = replace(self, script=["-m", "tests.gpu.asleep"])
        with awake.started("asleep", n, "--timeout", timeout, restarts=1) as run:
            ranks = run.ranks()
            run.until_line("falls asleep")
            began = time.monotonic()
            late = left_of(ranks, timeout + 10)
            ended = time.monotonic() - began
            frames = run.output().count("frame #")
            place = re.search(rf"rank {n - 1} is at \S*asleep.py:\d+", run.output())
            run.until_resumed(1)
            step = run.step()
            time.sleep(seconds)
            alive = run.process.poll() is None and run.output().count(RESUMES) == 1
            trains_on = alive and run.step() > step
        said = f"said: {place[0] if place else 'not where it is'}, and {frames} frames of C++"
        passed = place and not late and trains_on
        return f"{'PASS' if passed else 'FAIL'} {len(late)} left after {ended:.1f} s, {said}; trains on: {trains_on}"

    def stopped(self, n: int) -> str:
        """Send SIGTERM to torchrun: all stop after the same step, which is saved."""
        with self.started("stopped", n, "--timeout", "600") as run:
            send(run.agent, signal.SIGTERM)
            began = time.monotonic()
            run.end(self.c.left(40))
            said = re.search(r"Stopped by SIGTERM after step ([\d,]+)", run.output())
            step = int(said[1].replace(",", "")) if said else -1
            newest = next(iter(checkpoints(run.run_dir)), None)
        return f"{'PASS' if newest == step else 'FAIL'} step {step} saved after {time.monotonic() - began:.1f} s"

    def network_error(self, n: int) -> str:
        """Name an interface that does not exist; one line must have the library's own error and the variable."""
        variable = f"{'NCCL' if 'cuda' in self.flags else 'GLOO'}_SOCKET_IFNAME=nonsense"
        command = [*self.torchrun(n, variable), *QUICK, *self.flags, "--run-dir", self.c.work / "error"]
        finished = self.c.run("network error", command, 60, n)
        lines = re.findall(r"^train_ddp.py: error: .*", finished.output, re.MULTILINE)
        passed = finished.status == 1 and len(lines) == 1 and f"({variable} in the environment" in lines[0]
        return f"{'PASS' if passed else 'FAIL'} status {finished.status} after {finished.seconds:.0f} s: {lines}"
