"""Hosts that leave a run and return, as two torchruns on this host."""

import signal
from contextlib import ExitStack

import pytest

from tests.helpers.disturb import FLAGS, Watched, send
from tests.helpers.forking import free_port
from tests.helpers.processes import records, result, train

pytestmark = pytest.mark.cluster

# A rate at which rounding, which differs with the world size, does not grow.
MODEST = ["--lr", "0.0002", "--lr-scaling", "none"]


def hosts(folder):
    """Run two torchruns as two hosts; the second leaves and returns."""
    run_dir = folder / "run"
    launcher = ["--nnodes=1:2", "--nproc_per_node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}",
                "--max-restarts=3", "--rdzv-conf", "last_call_timeout=1,keep_alive_interval=1"]  # fmt: skip
    flags = [*FLAGS, *MODEST, "--local-batch-size", "4", "--global-batch-size", "8", "--max-steps", "4000",
             "--timeout", "30", "--run-dir", str(run_dir)]  # fmt: skip
    # torch 2.14: with the shared store, which is the default, a host that joins a run waits forever.
    both: dict[str, str] = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with ExitStack() as started:

        def start(name):
            host = Watched(run_dir, flags, launcher, name, **both)
            started.callback(host.kill)
            return host

        first = start("first.txt")
        first.until_line("loss:")
        second = start("second.txt")
        first.until_line("2 processes on CPU")
        first.until_step(first.step() + 40)
        send(second.agent, signal.SIGTERM)
        second.end(20)
        first.until_line("changed   world size 2 -> 1")
        first.until_step(first.step() + 40)
        second = start("second.txt")
        first.until_line("2 processes on CPU", 2)
        statuses = first.end(120), second.end(60)
        return run_dir, first.output(), statuses


def test_run_continues_while_a_host_leaves_and_returns(tmp_path):
    run_dir, text, statuses = hosts(tmp_path)
    assert statuses == (0, 0)
    assert text.count("8 global") == 4, "alone, together, alone, together"
    assert text.count("4 local x 1 process x 2 accumulated = 8 global") == 2
    assert "on host 1; torchrun restarts the others" in text
    assert "changed   world size 1 -> 2" in text
    assert result(run_dir)["steps"] == 4000
    # The same global batches as one undisturbed process, to summation order.
    alone = tmp_path / "alone"
    done = train(*FLAGS, *MODEST, "--local-batch-size", "8", "--max-steps", "1000", "--run-dir", alone, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    theirs = {step: loss for step, loss in records(run_dir, "train/loss") if step <= 1000}
    assert theirs == pytest.approx(dict(records(alone, "train/loss")), abs=1e-4)
