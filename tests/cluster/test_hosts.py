"""launch/multi_node.sh on two hosts: network namespaces with an address each, joined by a virtual cable."""

import os
import shutil
import sys
from contextlib import ExitStack, contextmanager

import pytest

from tests.helpers.disturb import FLAGS, Started
from tests.helpers.hosts import ADDRESSES, IPV6_ADDRESSES
from tests.helpers.processes import PATH, ROOT, records, result, torchrun, train

pytestmark = pytest.mark.cluster

# A learning rate at which rounding, which differs with the order of summation, does not grow.
MODEST = ["--lr", "0.0002", "--lr-scaling", "none", "--global-batch-size", "8", "--local-batch-size", "4"]


@contextmanager
def on_both(hosts, nodes, *flags, cwd, roots=(ROOT, ROOT), own_flags=((), ()), restarts=3, address=ADDRESSES[0]):
    """Run the same command on both hosts, with a copy of the program and flags of its own on each."""
    with ExitStack() as started:
        both = []
        for host, (root, own) in enumerate(zip(roots, own_flags, strict=True)):
            command = hosts.on(host, root / "launch" / "multi_node.sh", address, nodes, *flags, *own)
            variables = {"PATH": PATH, "CUDA_VISIBLE_DEVICES": "", "MAX_RESTARTS": str(restarts)}
            path = f"{root}{os.pathsep}{ROOT}"
            host_started = Started(command, cwd / f"host-{host}.txt", PYTHONPATH=path, **variables)
            both.append(started.enter_context(host_started))
        yield both


def statuses(both, timeout=120):
    """Wait for both hosts, and return their exit statuses."""
    return [host.process.wait(timeout) for host in both]


def test_two_hosts_train_as_one_host_with_two_processes(hosts, tmp_path):
    flags = [*FLAGS, *MODEST, "--max-steps", "100"]
    with on_both(hosts, "2", *flags, "--run-dir", tmp_path / "two", cwd=tmp_path) as both:
        assert statuses(both) == [0, 0], both[0].output()
        assert "2 processes on CPU (gloo), 1 thread each, on 2 hosts" in both[0].output()
        assert "loss:" not in both[1].output()
    torchrun(2, *flags, "--run-dir", tmp_path / "one", cwd=tmp_path)
    two, one = (dict(records(tmp_path / name, "train/loss")) for name in ("two", "one"))
    assert two == pytest.approx(one, abs=1e-4)
    assert result(tmp_path / "two")["test_correct"] == pytest.approx(result(tmp_path / "one")["test_correct"], abs=5)


def test_run_continues_while_a_host_is_cut_off_returns_and_is_stopped(hosts, tmp_path):
    """With the same global batches as one undisturbed process, to summation order."""
    flags = [*FLAGS, *MODEST, "--max-steps", "6000", "--timeout", "8", "--run-dir", tmp_path / "run"]
    with on_both(hosts, "1:2", *flags, cwd=tmp_path) as both:
        both[0].until_line("2 processes on CPU")
        both[0].until_line("   100] loss:")
        hosts.cut()
        both[0].until_line("world size 2 -> 1")
        assert "4 local x 1 process x 2 accumulated = 8 global" in both[0].output()
        hosts.mend()
        both[0].until_line("world size 1 -> 2")
        both[0].until_line("loss:", both[0].output().count("loss:") + 2)
        both[1].process.terminate()
        both[0].until_line("world size 2 -> 1", 2)
        assert "on host 1; torchrun restarts the others" in both[0].output()
        assert statuses(both) == [0, 1], both[0].output()
    losses = dict(records(tmp_path / "run", "train/loss"))
    assert list(losses) == list(range(20, 6001, 20)), "a step is missing or recorded twice"
    assert result(tmp_path / "run")["steps"] == 6000
    train(*FLAGS, *MODEST, "--local-batch-size", "8", "--max-steps", "1000", "--run-dir", "alone", cwd=tmp_path)
    alone = dict(records(tmp_path / "alone", "train/loss"))
    assert alone == pytest.approx({step: losses[step] for step in alone}, abs=1e-4)


@pytest.mark.parametrize(
    ("other", "first", "second"),
    [
        ("--seed 1", "error: --seed is 0 for rank 0 on host ", "error: --seed is 0 for rank 0 on host "),
        ("--eppochs 3", "error: Unrecognized options: --eppochs, 3 [rank 1 on host ", "Perhaps you meant:"),
        ("another program", "error: the program is ", "error: the program is "),
    ],
)
def test_hosts_that_would_not_run_the_same_both_say_so(hosts, tmp_path, other, first, second):
    roots = [ROOT, ROOT]
    if other == "another program":
        roots[1] = tmp_path / "copy"
        for part in ("cifar", "launch", "train_ddp.py"):
            (shutil.copytree if (ROOT / part).is_dir() else shutil.copy)(ROOT / part, roots[1] / part)
        with (roots[1] / "cifar" / "loop.py").open("a") as file:
            file.write("# another one\n")
    own_flags = ([], other.split() if other.startswith("--") else [])
    flags = [*FLAGS, "--run-dir", tmp_path / "run"]
    with on_both(hosts, "2", *flags, cwd=tmp_path, roots=roots, own_flags=own_flags, restarts=0) as both:
        assert statuses(both) == [1, 1]
    for host, line in zip(both, (first, second), strict=True):
        assert host.output().count(line) == 1
        report = host.output().partition("Root Cause")[2]
        assert "traceback : cifar.errors.U" in report, "torchrun knows the reason, too"
    assert not (tmp_path / "run").exists()


@contextmanager
def pods(hosts, *flags, cwd):
    """Start the program on each host, as an engine that sets torch's four variables only."""
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": "29500", "GLOO_SOCKET_IFNAME": "cable"}
    with ExitStack() as started:
        both = []
        for rank in (0, 1):
            command = hosts.on(rank, sys.executable, ROOT / "train_ddp.py", *flags)
            both.append(started.enter_context(Started(command, cwd / f"host-{rank}.txt", RANK=str(rank), **place)))
        yield both


def test_engine_that_sets_torchs_four_variables_only(hosts, tmp_path):
    """It starts the pods again after one was killed, at the same port."""
    flags = [*FLAGS, *MODEST, "--max-steps", "20000"]
    with pods(hosts, *flags, "--run-dir", tmp_path / "run", cwd=tmp_path) as both:
        both[0].until_line("2 processes on CPU (gloo), 1 thread each, on 2 hosts")
        both[0].until_line("   100] loss:")
        both[1].process.kill()
        assert both[0].process.wait(60) == 1
    with pods(hosts, "--resume", tmp_path / "run", "--max-steps", "3000", cwd=tmp_path) as both:
        assert statuses(both) == [0, 0], both[0].output()
    assert [step for step, _ in records(tmp_path / "run", "train/loss")] == list(range(20, 3001, 20))


@pytest.mark.parametrize(("asked", "address"), [(0, f"[{IPV6_ADDRESSES[0]}]:29401"), (1, ADDRESSES[0])])
def test_host_that_is_stopped_stops_the_other_without_restarts(hosts, tmp_path, asked, address):
    flags = [*FLAGS, *MODEST, "--max-steps", "60000", "--run-dir", tmp_path / "run"]
    with on_both(hosts, "2", *flags, cwd=tmp_path, restarts=0, address=address) as both:
        both[0].until_line("   100] loss:")
        both[asked].process.terminate()
        assert statuses(both, 60) == [1, 1], "neither has finished"
        assert both[0].output().count("Stopped by SIGTERM after step") == 1
        assert "Stopped by" not in both[1].output()
