"""Hosts that leave a run and return, as two torchruns on this host."""

import functools
import signal

import pytest

from tests.helpers.disturb import FLAGS, Watched, send
from tests.helpers.forking import free_port
from tests.helpers.processes import records, result, train

pytestmark = pytest.mark.cluster

# A rate at which rounding, which differs with the world size, does not grow.
MODEST = ["--lr", "0.0002", "--lr-scaling", "none"]


def test_run_continues_while_a_host_leaves_and_returns(tmp_path):
    """The second of two torchruns is asked to stop, and started again."""
    run_dir, alone = tmp_path / "run", tmp_path / "alone"
    launcher = ["--nnodes=1:2", "--nproc_per_node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}",
                "--max-restarts=3", "--rdzv-conf", "last_call_timeout=1,keep_alive_interval=1"]  # fmt: skip
    flags = [*FLAGS, *MODEST, "--local-batch-size", "4", "--global-batch-size", "8", "--max-steps", "4000",
             "--timeout", "30", "--run-dir", str(run_dir)]  # fmt: skip
    # torch 2.14: with the shared store, which is the default, a host that joins a run waits forever.
    start = functools.partial(Watched, run_dir, flags, launcher, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    with start("first.txt") as first:
        first.until_line("loss:")
        with start("second.txt") as second:
            first.until_line("2 processes on CPU")
            first.until_step(first.step() + 40)
            send(second.agent, signal.SIGTERM)
            second.end(20)
        first.until_line("changed   world size 2 -> 1")
        first.until_step(first.step() + 40)
        with start("second.txt") as second:
            first.until_line("2 processes on CPU", 2)
            assert (first.end(120), second.end(60)) == (0, 0)
    text = first.output()
    assert text.count("8 global") == 4, "alone, together, alone, together"
    assert text.count("4 local x 1 process x 2 accumulated = 8 global") == 2
    assert "on host 1; torchrun restarts the others" in text
    assert "changed   world size 1 -> 2" in text
    assert result(run_dir)["steps"] == 4000
    # The same global batches as one undisturbed process, to summation order.
    train(*FLAGS, *MODEST, "--local-batch-size", "8", "--max-steps", "1000", "--run-dir", alone, cwd=tmp_path)
    theirs = {step: loss for step, loss in records(run_dir, "train/loss") if step <= 1000}
    assert theirs == pytest.approx(dict(records(alone, "train/loss")), abs=1e-4)
