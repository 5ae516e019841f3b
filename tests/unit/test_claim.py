"""Who writes a run: one process at a time, which the system sees to; and the run that a restart finds again."""

import os
import signal
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

import train_ddp
from cifar import run_dir as claim
from cifar.config import TrainConfig, read_config
from cifar.errors import UserError
from cifar.files import write_json
from cifar.run_dir import RunLock, find_own_run
from tests.helpers.comparing import tiny_data, traces
from tests.helpers.forking import fork, wait


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(claim, "_PATIENCE_SECONDS", 0.3)


@pytest.fixture
def hold():
    """A function that makes another process hold a run, until the test kills it or ends; its process id."""
    holders = []

    def start(run_dir, signed=True, then=signal.pause):
        read, write = os.pipe()
        holders.append(fork(partial(hold_and_tell, run_dir, signed, then, write)))
        os.close(write)
        with open(read) as pipe:
            assert pipe.readline() == "held\n"
        return holders[-1]

    yield start
    for holder in holders:
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)


def hold_and_tell(run_dir, signed, then, pipe):
    held = RunLock(run_dir)
    if signed:
        held.record_owner([])
    os.write(pipe, b"held\n")
    os.close(pipe)
    then()


def kill(holder):
    os.kill(holder, signal.SIGKILL)
    os.waitid(os.P_PID, holder, os.WEXITED | os.WNOWAIT)  # gone; its status is left to the fixture


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two steps, which more steps would continue."""
    folder = tmp_path_factory.mktemp("claim") / "run"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("cifar.data.load_data", lambda *_: tiny_data())
        patched.setattr("cifar.report.draw_report", lambda *_: None)
        flags = "--device cpu --wandb disabled --local-batch-size 20 --max-steps 2 --checkpoint-steps 1"
        train_ddp.main([*flags.split(), "--run-dir", str(folder)])
    return folder


def test_a_run_that_is_being_written_is_refused_in_one_line_and_not_touched(finished, hold, monkeypatch):
    monkeypatch.setattr("cifar.data.load_data", lambda *_: tiny_data())
    holder = hold(finished)
    before = traces(finished)
    assert ".lock" in before
    with pytest.raises(UserError) as refused:
        train_ddp.main(["--resume", str(finished), "--max-steps", "3"])
    host = os.uname().nodename
    assert f"{finished} is being written by another process right now (process {holder} on {host})" in str(
        refused.value
    )
    assert "\n" not in str(refused.value)
    assert refused.value.status == 2
    assert traces(finished) == before

    kill(holder)
    began = time.monotonic()
    RunLock(finished).release()
    assert time.monotonic() - began < 0.3  # at once: nothing is left to wait for


def test_a_holder_that_has_not_signed_yet_is_refused_as_well(tmp_path, hold):
    hold(tmp_path, signed=False)
    with pytest.raises(UserError, match=r"being written by another process right now \(process \? on \?\)"):
        RunLock(tmp_path)


def test_a_holder_that_is_about_to_leave_is_waited_for(tmp_path, hold, monkeypatch):
    monkeypatch.setattr(claim, "_PATIENCE_SECONDS", 20)
    hold(tmp_path, then=partial(time.sleep, 0.5))
    RunLock(tmp_path).release()


def test_a_run_is_released_for_others(tmp_path):
    RunLock(tmp_path).release()
    child = fork(lambda: RunLock(tmp_path))
    assert wait(child) == 0


def test_a_claim_that_is_taken_back_leaves_no_trace(tmp_path):
    held = RunLock(tmp_path)
    assert list(tmp_path.iterdir()) != []
    held.release(undo=True)
    assert list(tmp_path.iterdir()) == []

    RunLock(tmp_path).release()
    before = traces(tmp_path)
    RunLock(tmp_path).release(undo=True)
    assert traces(tmp_path) == before != {}


def test_a_claim_that_is_taken_back_never_takes_another_ones_lock_away(tmp_path, monkeypatch):
    first = RunLock(tmp_path)
    release, others = first._lock.release, []

    def release_and_be_overtaken():
        release()
        others.append(RunLock(tmp_path))

    monkeypatch.setattr(first._lock, "release", release_and_be_overtaken)
    first.release(undo=True)
    with pytest.raises(UserError, match="being written by another process"):
        RunLock(tmp_path)


def test_a_folder_that_cannot_be_locked_is_refused_in_one_line(tmp_path):
    (tmp_path / ".lock").mkdir()
    with pytest.raises(UserError, match=r"can't be locked: .*; name another") as refused:
        RunLock(tmp_path)
    assert "\n" not in str(refused.value)


def test_a_run_knows_the_launchers_that_signed_it_last(tmp_path):
    held = RunLock(tmp_path)
    assert not held.owned_by(["a:1:5.00"])
    held.record_owner(["a:1:5.00", "b:2:6.00"])
    assert held.owned_by(["b:2:6.00", "c:3:7.00"])
    assert not held.owned_by(["c:3:7.00"])
    assert not held.owned_by([])  # without a launcher that starts it again, no run is one's own
    held.record_owner(["c:3:7.00"])
    assert not held.owned_by(["a:1:5.00", "b:2:6.00"])


def launched(agent, local_rank=0, others=()):
    """What `find_own_run` asks of a runtime."""
    return SimpleNamespace(
        launch=SimpleNamespace(agent=lambda: agent), local_rank=local_rank, gather=lambda own: [*others, own]
    )


@pytest.fixture
def agent():
    """The name of a torchrun that has just been started."""
    return f"host:1234:{time.time():.2f}"


def begin(run_dir, *launchers, **config):
    """A run of `launchers`, as far as a restart looks at it."""
    run_dir.mkdir(parents=True)
    write_json(run_dir / "config.json", {"config": TrainConfig(run_dir=run_dir, **config).to_json()})
    write_json(run_dir / "launch.json", {"host": "host", "pid": 1, "launchers": list(launchers)})
    return run_dir


def test_a_restart_finds_the_run_of_its_own_launcher(tmp_path, monkeypatch, agent):
    monkeypatch.chdir(tmp_path)
    begin(Path("runs/a"), "other:1234:5.00")
    Path("runs/b").mkdir()  # no run at all
    Path("runs/file").touch()
    own = begin(Path("runs/c"), "other:1:5.00", agent, epochs=7)
    found = find_own_run(TrainConfig(epochs=1), launched(agent))
    assert found == read_config(own)
    assert (found.resume, found.epochs) == (own, 7)


@pytest.mark.parametrize("flag", ["run_dir", "resume"])
def test_a_restart_looks_into_the_folder_that_it_was_given(tmp_path, monkeypatch, agent, flag):
    monkeypatch.chdir(tmp_path)
    begin(Path("runs/a"), agent)  # the launch doesn't change its mind: this can't be its own
    own = begin(tmp_path / "elsewhere", agent, epochs=7)
    named = TrainConfig(**{flag: own})
    assert find_own_run(named, launched(agent)) == read_config(own)
    another = begin(tmp_path / "another", "host:99:5.00")
    named = TrainConfig(**{flag: another})
    assert find_own_run(named, launched(agent)) is named
    named = TrainConfig(**{flag: tmp_path / "new"})
    assert find_own_run(named, launched(agent)) is named


def test_the_runs_of_other_launchers_are_not_continued(tmp_path, monkeypatch, agent):
    monkeypatch.chdir(tmp_path)
    config = TrainConfig()
    assert find_own_run(config, launched(agent)) is config  # there isn't even a runs/
    host, pid, started = agent.split(":")
    same_pid_earlier = f"{host}:{pid}:{float(started) - 60:.2f}"
    for number, other in enumerate((same_pid_earlier, f"other:{pid}:{started}", f"{host}:99:{started}")):
        begin(Path(f"runs/{number}"), other)
    begin(Path("runs/no launcher"))
    assert find_own_run(config, launched(agent)) is config
    assert find_own_run(config, launched(None)) is config  # nothing starts this process again


def test_all_ranks_continue_what_any_host_has_found(tmp_path, monkeypatch, agent):
    monkeypatch.chdir(tmp_path)
    own = begin(Path("runs/a"), agent)
    config = TrainConfig()
    # Only one process of a host looks; the others, and the hosts that don't see the folder of rank zero, are told.
    assert find_own_run(config, launched(agent, local_rank=1)) is config
    found = find_own_run(config, launched(agent, local_rank=1, others=[None, own]))
    assert found == read_config(own)
