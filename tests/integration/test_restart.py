"""Nothing lost: real torchrun runs that are killed, signalled and frozen, and hosts that come and go."""

import os
import signal
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from cifar.checkpoint import checkpoint_path, checkpoints, load_checkpoint
from tests.helpers.disturb import FLAGS, Watched, send
from tests.helpers.processes import left_of, records, result, train
from tests.helpers.soak import soak

# A rate at which rounding, which differs with the world size, doesn't grow.
MODEST = ["--lr", "0.0002", "--lr-scaling", "none"]
TWO = ["--standalone", "--nproc_per_node=2"]


@pytest.fixture(scope="module")
def scenarios(tmp_path_factory):
    """All of them, two at a time: most of their time is waiting for processes to start, or for one that is frozen."""
    parts = (short_soak, stopped, frozen)
    with ThreadPoolExecutor(2) as pool:
        yield {part: pool.submit(part, tmp_path_factory.mktemp(part.__name__)) for part in parts}


def short_soak(folder):
    """As many disturbances as SOAK_DISTURBANCES says; by hand: python -m tests.helpers.soak."""
    return soak(folder, int(os.environ.get("SOAK_DISTURBANCES", 3)), seed=1, seconds=600)


def test_a_run_that_is_disturbed_at_random_ends_as_the_undisturbed_one(scenarios):
    report = scenarios[short_soak].result()
    assert len(report["disturbances"]) >= 3


def stopped(folder):
    """SIGUSR1 to rank one."""
    run_dir = folder / "run"
    run = Watched(run_dir, [*FLAGS, "--max-steps", "6000", "--run-dir", str(run_dir)], [*TWO, "--max-restarts=3"])
    try:
        run.until_step(40)
        ranks = run.ranks()
        send(ranks[1], signal.SIGUSR1)
        late = left_of(ranks, 10)
        status = run.end(20)
        return run_dir, run.said(), status, late
    finally:
        run.kill()


def test_a_signal_to_one_rank_stops_all_after_the_same_step_with_a_checkpoint(scenarios):
    run_dir, said, status, late = scenarios[stopped].result()
    assert status == 0, "anything else, and torchrun would start it again"
    assert late == []
    (step,) = [line.split("after step ")[1].split(" of")[0] for line in said.splitlines() if "Stopped by" in line]
    assert f"Stopped by SIGUSR1 after step {step} of 6,000; to go on: --resume {run_dir}" in said
    newest = next(iter(checkpoints(run_dir)))
    assert newest == int(step.replace(",", ""))
    assert load_checkpoint(checkpoint_path(run_dir, newest))["state"]["step"] == newest
    assert "Traceback" not in said
    assert "closing signal" not in said, "torchrun didn't have to end anything"


def frozen(folder):
    """Rank one is stopped, as by a debugger or a machine that swaps."""
    run_dir = folder / "run"
    run = Watched(run_dir, [*FLAGS, "--max-steps", "60000", "--timeout", "8", "--run-dir", str(run_dir)], TWO)
    try:
        run.until_step(40)
        ranks = run.ranks()
        send(ranks[1], signal.SIGSTOP)
        late = left_of(ranks, 8 + 2)
        status = run.end(20)
        return ranks[1].pid, run.said(), status, late
    finally:
        run.kill()


def test_a_frozen_rank_ends_the_run_within_the_timeout_and_is_named(scenarios):
    pid, said, status, late = scenarios[frozen].result()
    assert status == 1
    assert late == []
    named = f"error: rank 1 (process {pid} on {socket.gethostname()}) gave no sign of life for 6 s (--timeout 8)"
    assert said.count(named) == 1
    assert "Traceback" not in said.split("ChildFailedError")[0].split(named)[0]


def hosts(folder):
    """Two torchruns as two hosts: the second leaves, and comes back."""
    run_dir = folder / "run"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["--nnodes=1:2", "--nproc_per_node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}",
                "--max-restarts=3", "--rdzv-conf", "last_call_timeout=1,keep_alive_interval=1"]  # fmt: skip
    flags = [*FLAGS, *MODEST, "--local-batch-size", "4", "--global-batch-size", "8", "--max-steps", "4000",
             "--timeout", "30", "--run-dir", str(run_dir)]  # fmt: skip
    # torch 2.14: with the store shared, which is the default, a host that joins a run waits for good.
    both: dict[str, str] = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    first = Watched(run_dir, flags, launcher, "first.txt", **both)
    second = None
    try:
        first.until_line("loss:")
        second = Watched(run_dir, flags, launcher, "second.txt", **both)
        first.until_line("2 processes on CPU")
        first.until_step(first.step() + 40)
        send(second.agent, signal.SIGTERM)
        second.end(20)
        first.until_line("changed     world size 2 -> 1")
        first.until_step(first.step() + 40)
        second = Watched(run_dir, flags, launcher, "second.txt", **both)
        first.until_line("2 processes on CPU", 2)
        statuses = first.end(120), second.end(60)
        return run_dir, first.said(), statuses
    finally:
        first.kill()
        if second is not None:
            second.kill()


@pytest.mark.cluster
def test_a_run_goes_on_while_a_host_leaves_and_returns(tmp_path):
    run_dir, said, statuses = hosts(tmp_path)
    assert statuses == (0, 0)
    assert said.count("8 global") == 4, "alone, together, alone, together"
    assert said.count("4 local x 1 process x 2 accumulated = 8 global") == 2
    assert "on host 1; the others go on without it" in said
    assert "changed     world size 1 -> 2" in said
    assert result(run_dir)["steps"] == 4000
    # The same global batches as one process that nobody disturbs, to summation order.
    alone = tmp_path / "alone"
    done = train(*FLAGS, *MODEST, "--local-batch-size", "8", "--max-steps", "1000", "--run-dir", alone, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    theirs = {step: loss for step, loss in records(run_dir, "train/loss") if step <= 1000}
    assert theirs == pytest.approx(dict(records(alone, "train/loss")), abs=1e-4)
