"""The run directory: new, writable before training starts, and locked by one process at a time."""

import errno
import os
import signal
import time
from datetime import datetime
from functools import partial
from pathlib import Path

import pytest
from torch import nn

import train_ddp
from cifar.errors import UserError
from cifar.records import run_dir
from cifar.records.run_dir import RunLock, check_unused, check_writable, create_run_dir, owners
from tests.helpers.comparing import make_runs_tiny, traces
from tests.helpers.forking import fork, wait

PATIENCE = run_dir._PATIENCE_SECONDS


@pytest.fixture(autouse=True)
def _short_patience(monkeypatch):
    monkeypatch.setattr(run_dir, "_PATIENCE_SECONDS", 0.3)
    monkeypatch.setattr(run_dir, "_NOTICE_SECONDS", 0.1)


@pytest.fixture
def lock_elsewhere():
    """A function that locks a directory in another process, and returns its process ID."""
    holders = []

    def start(directory, recorded=True, then=signal.pause):
        read, write = os.pipe()
        holders.append(fork(partial(hold, directory, recorded, then, write)))
        os.close(write)
        with open(read) as pipe:
            assert pipe.readline() == "locked\n"
        return holders[-1]

    yield start
    for holder in holders:
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)


def hold(directory, recorded, then, pipe):
    lock = RunLock(directory)
    if recorded:
        lock.record_owner([])
    os.write(pipe, b"locked\n")
    os.close(pipe)
    then()


def test_named_directory_is_created_with_its_parents(tmp_path):
    assert create_run_dir(tmp_path / "a" / "b", "tutorial").is_dir()
    assert create_run_dir(tmp_path / "a" / "b", "tutorial").is_dir()  # exists, and is still empty


def test_directory_that_holds_a_run_is_refused(tmp_path):
    (tmp_path / "config.json").touch()
    with pytest.raises(UserError, match=r"holds a run: name a new directory, or continue it with --resume"):
        check_unused(tmp_path)


@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoints/step-00000001.pt", "wandb", "report.png"])
def test_directory_that_holds_part_of_a_run_is_refused(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    with pytest.raises(UserError, match=r"already holds .*, but no config.json: name a new directory$"):
        check_unused(tmp_path)


def test_other_files_and_the_leftovers_of_a_killed_start_are_no_run(tmp_path):
    for name in ("train.log", ".hidden", ".lock", "launch.json", ".space-probe"):
        (tmp_path / name).touch()
    (tmp_path / "checkpoints").mkdir()
    assert create_run_dir(tmp_path, "tutorial") == tmp_path
    check_unused(tmp_path)


@pytest.mark.parametrize("content", ['{"launchers": 5}', "[]", "\0", '{"launchers": null}'])
def test_damaged_owner_is_no_owner(tmp_path, content):
    (tmp_path / "launch.json").write_text(content)
    assert owners(tmp_path) == []
    lock = RunLock(tmp_path)
    assert not lock.owned_by(["agent"])
    lock.release()


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_path_at_or_below_a_file_is_refused(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot be created: .*; name another with --run-dir"):
        create_run_dir(tmp_path / name, "tutorial")


def test_runs_of_the_same_second_get_different_names(tmp_path, monkeypatch):
    class Noon(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2026, 1, 2, 12, 0, 0)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_dir, "datetime", Noon)
    names = [create_run_dir(None, "wide").as_posix() for _ in range(3)]
    assert names == [f"runs/2026-01-02_12-00-00-wide{suffix}" for suffix in ("", "-2", "-3")]
    for n in range(4, 100):
        Path(f"{names[0]}-{n}").mkdir()
    with pytest.raises(UserError, match="are all taken: name a directory with --run-dir"):
        create_run_dir(None, "wide")


def test_check_writable_removes_what_killed_processes_left(tmp_path):
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    for name in (".step-00000002.pt.123.tmp", "step-00000001.pt"):
        (checkpoints / name).touch()
    check_writable(tmp_path, nn.Linear(1, 1))
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")] == ["checkpoints/step-00000001.pt"]


def test_check_writable_leaves_no_trace_if_it_fails(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"does not take the 4.2 MB of this run: .*No space left on device.*--run-dir"):
        check_writable(tmp_path, nn.Linear(1, 1))
    assert list(tmp_path.iterdir()) == []


def test_new_run_beside_a_log_but_not_over_another_run(tmp_path, monkeypatch):
    make_runs_tiny(monkeypatch)
    flags = [
        "--device",
        "cpu",
        "--dataset",
        "synthetic",
        "--wandb",
        "disabled",
        "--local-batch-size",
        "20",
        "--max-steps",
        "2",
    ]
    (tmp_path / "train.log").write_text("tee")
    train_ddp.main([*flags, "--run-dir", str(tmp_path)])
    before = traces(tmp_path)
    with pytest.raises(UserError, match="holds a run"):
        train_ddp.main([*flags, "--run-dir", str(tmp_path)])
    assert traces(tmp_path) == before
    train_ddp.main(["--resume", str(tmp_path), "--max-steps", "3"])  # the advice


def test_locked_run_is_refused_in_one_line_and_not_changed(tmp_path, lock_elsewhere, monkeypatch):
    make_runs_tiny(monkeypatch)
    run = tmp_path / "run"
    flags = "--device cpu --dataset synthetic --wandb disabled --local-batch-size 20 --max-steps 2 --checkpoint-steps 1"
    train_ddp.main([*flags.split(), "--run-dir", str(run)])
    holder = lock_elsewhere(run)
    before = traces(run)
    assert ".lock" in before
    with pytest.raises(UserError) as refused:
        train_ddp.main(["--resume", str(run), "--max-steps", "3"])
    text = f"{run} is locked by process {holder} on {os.uname().nodename}: wait for it, or stop it first"
    assert (str(refused.value), refused.value.status) == (text, 2)
    assert traces(run) == before

    os.kill(holder, signal.SIGKILL)
    os.waitid(os.P_PID, holder, os.WEXITED | os.WNOWAIT)
    began = time.monotonic()
    RunLock(run).release()
    assert time.monotonic() - began < 0.3  # the kernel has released it


def test_holder_that_is_not_recorded_yet_is_refused_too(tmp_path, lock_elsewhere):
    lock_elsewhere(tmp_path, recorded=False)
    with pytest.raises(UserError, match=r"locked by process \? on \?"):
        RunLock(tmp_path)


def test_lock_waits_for_a_process_that_is_exiting_and_says_so(tmp_path, lock_elsewhere, monkeypatch, capsys):
    monkeypatch.setattr(run_dir, "_PATIENCE_SECONDS", 20)
    holder = lock_elsewhere(tmp_path, then=partial(time.sleep, 0.5))
    RunLock(tmp_path).release()
    locked = f"{tmp_path} is locked by process {holder} on {os.uname().nodename}"
    assert capsys.readouterr().err == f"{locked}: waiting for it, for 20 s\n"


def test_lock_waits_as_long_as_a_file_server_holds_it_for_a_host_that_is_gone():
    assert PATIENCE > 90


def test_released_lock_can_be_acquired_by_another_process(tmp_path):
    RunLock(tmp_path).release()
    assert wait(fork(lambda: RunLock(tmp_path))) == 0


def test_undone_lock_leaves_no_trace(tmp_path):
    lock = RunLock(tmp_path)
    assert list(tmp_path.iterdir()) != []
    lock.release(undo=True)
    assert list(tmp_path.iterdir()) == []

    RunLock(tmp_path).release()
    before = traces(tmp_path)
    RunLock(tmp_path).release(undo=True)
    assert traces(tmp_path) == before != {}


def test_undone_lock_never_removes_the_lock_of_another_process(tmp_path, monkeypatch):
    first = RunLock(tmp_path)
    release, others = first._lock.release, []

    def release_and_be_overtaken():
        release()
        others.append(RunLock(tmp_path))

    monkeypatch.setattr(first._lock, "release", release_and_be_overtaken)
    first.release(undo=True)
    with pytest.raises(UserError, match="is locked by process"):
        RunLock(tmp_path)


def test_directory_that_cannot_be_locked_is_refused_in_one_line(tmp_path):
    (tmp_path / ".lock").mkdir()
    with pytest.raises(UserError, match=r"cannot be locked: .*; name another") as refused:
        RunLock(tmp_path)
    assert "\n" not in str(refused.value)


def test_run_is_owned_by_the_launches_recorded(tmp_path):
    lock = RunLock(tmp_path)
    assert not lock.owned_by(["a:1:5.00"])
    lock.record_owner(["a:1:5.00", "b:2:6.00"])
    assert owners(tmp_path) == ["a:1:5.00", "b:2:6.00"]
    assert lock.owned_by(["b:2:6.00", "c:3:7.00"])
    assert not lock.owned_by(["c:3:7.00"])
    assert not lock.owned_by([])  # a run started without torchrun is never restarted by it
    lock.record_owner(["c:3:7.00"])
    assert owners(tmp_path) == ["a:1:5.00", "b:2:6.00", "c:3:7.00"]
    assert lock.owned_by(["a:1:5.00"])  # a program may train a run on, and then be restarted from its beginning
