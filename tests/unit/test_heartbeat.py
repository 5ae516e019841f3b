"""A rank that stops answering is named and ended; one that has taken leave, or was frozen itself, is left alone."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from tests.helpers.processes import clean_environment

RANK = """
import json, os, sys, time
from datetime import timedelta
import torch.distributed as dist
from cifar.distributed import heartbeat
rank, port, owner = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
store = dist.TCPStore("127.0.0.1", port, is_master=rank == 0 and owner == "zero", wait_for_workers=False,
                      timeout=timedelta(seconds=60))
rounds = iter(range(9))

def gather(value):
    name = next(rounds)
    store.set(f"{name}/{rank}", json.dumps(value))
    return [json.loads(store.get(f"{name}/{other}")) for other in range(2)]

beat = heartbeat.Heartbeat(rank, 2, 2.0, ("127.0.0.1", port), owner == "zero", gather)
print("ready", flush=True)
if sys.stdin.readline() == "leave\\n":
    beat.stop()
    print("left", flush=True)
sys.stdin.readline()
"""


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture
def ranks(request):
    """Two ranks with a timeout of two seconds; whose store it is, is the test's parameter."""
    owner, port, store = request.param, free_port(), None
    if owner == "launcher":
        import torch.distributed as dist

        store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    started = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(port), owner], env=clean_environment(), text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]  # fmt: skip
    for process in started:
        assert process.stdout.readline() == "ready\n", process.stderr.read()
    yield started
    for process in started:
        process.kill()
        process.communicate()
    del store


@pytest.mark.parametrize(("ranks", "victim"), [("launcher", 1), ("launcher", 0), ("zero", 0)], indirect=["ranks"])
def test_a_frozen_rank_is_named_and_killed_and_the_others_leave(ranks, victim):
    frozen, other = ranks[victim], ranks[1 - victim]
    os.kill(frozen.pid, signal.SIGSTOP)
    assert other.wait(timeout=10) == 1
    assert frozen.wait(timeout=10) == -signal.SIGKILL
    said = other.stderr.read().splitlines()
    assert said[-1] == (
        f"error: rank {victim} (process {frozen.pid} on {socket.gethostname()}) gave no sign of life for 2 s "
        f"(--timeout 2): the run ends here; --resume continues it"
    )
    assert sum("no sign of life" in line for line in said) == 1


@pytest.mark.parametrize("ranks", ["launcher"], indirect=True)
def test_a_rank_that_has_taken_leave_is_not_missed(ranks):
    zero, one = ranks
    one.stdin.write("leave\n")
    one.stdin.flush()
    assert one.stdout.readline() == "left\n"
    time.sleep(2.5)
    assert zero.poll() is None
    assert one.poll() is None
