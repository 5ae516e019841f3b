"""The run directory: new, writable before training starts, and locked by one process at a time."""

import errno
import os
import signal
import time
from datetime import datetime
from types import SimpleNamespace

import pytest
from torch import nn

import train_ddp
from cifar.errors import UserError
from cifar.files import lock
from cifar.records import run_dir
from cifar.records.run_dir import RunLock, check_unused, check_writable, create_run_dir, owners
from tests.helpers.comparing import make_runs_tiny, traces
from tests.helpers.forking import fork, wait

PATIENCE = run_dir._PATIENCE_SECONDS
FLAGS = "--device cpu --dataset synthetic --wandb disabled --local-batch-size 20 --max-steps 2"


@pytest.fixture(autouse=True)
def _short_patience(monkeypatch):
    monkeypatch.setattr(run_dir, "_PATIENCE_SECONDS", 0.3)
    monkeypatch.setattr(run_dir, "_NOTICE_SECONDS", 0.1)


def lock_elsewhere(directory, seconds):
    """Lock a directory in another process, for some seconds; return its process ID."""
    read, write = os.pipe()

    def hold():
        lock = RunLock(directory)
        lock.record_owner([])
        os.write(write, b"locked")
        time.sleep(seconds)

    holder = fork(hold, seconds=20)
    assert os.read(read, 9) == b"locked"
    return holder


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "checkpoints/step-1.pt", "wandb", "report.png"])
def test_directory_that_holds_a_part_of_a_run_is_refused(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    with pytest.raises(UserError, match=r"holds a run \(.*\): name a new directory, or continue it with --autoresume"):
        check_unused(tmp_path)


def test_other_files_and_the_leftovers_of_a_killed_start_are_no_run(tmp_path):
    directory = create_run_dir(tmp_path / "a" / "b", "tutorial")
    for name in ("train.log", ".hidden", ".lock", "launch.json"):
        (directory / name).touch()
    (directory / "checkpoints").mkdir()
    assert create_run_dir(directory, "tutorial") == directory
    check_unused(directory)


def test_runs_of_the_same_second_get_different_names(tmp_path, monkeypatch):
    times = iter([datetime(2026, 1, 2, 12, 0, second) for second in (0, 0, 0, 1)])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_dir, "datetime", SimpleNamespace(now=lambda: next(times)))
    names = [create_run_dir(None, "wide").as_posix() for _ in range(2)]
    assert names == [f"runs/2026-01-02_12-00-0{second}-wide" for second in (0, 1)]


@pytest.mark.parametrize("reserves", [True, False])
def test_room_is_checked_and_leaves_no_trace(tmp_path, monkeypatch, reserves):
    """By reserving it, or by writing zeros where the system cannot; what killed processes have left is removed."""
    if not reserves:
        monkeypatch.delattr(os, "posix_fallocate")
    checkpoints = tmp_path / "old" / "checkpoints"
    checkpoints.mkdir(parents=True)
    for name in (".step-00000002.pt.123.tmp", "step-00000001.pt"):
        (checkpoints / name).touch()
    check_writable(tmp_path / "old", nn.Linear(1, 1))
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")] == ["old/checkpoints/step-00000001.pt"]

    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", fail, raising=False)
    (tmp_path / "new").mkdir()
    with pytest.raises(UserError, match=r"does not take the 4.2 MB of this run: .*No space left on device.*--run-dir"):
        check_writable(tmp_path / "new", nn.Linear(1, 1))
    assert list((tmp_path / "new").iterdir()) == []


def test_file_system_without_locks_costs_a_warning(tmp_path, monkeypatch, capsys):
    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", flock)
    RunLock(tmp_path).release(undo=True)
    assert capsys.readouterr().err.startswith(f"WARNING: {tmp_path} cannot be locked ([Errno 37] No locks available")
    with lock(tmp_path / "lock", "downloads"):
        pass


def test_run_is_neither_overwritten_nor_written_by_two_processes(tmp_path, monkeypatch):
    make_runs_tiny(monkeypatch)
    (tmp_path / "train.log").write_text("tee")
    train_ddp.main([*FLAGS.split(), "--run-dir", str(tmp_path)])
    before = traces(tmp_path)
    with pytest.raises(UserError, match="holds a run"):
        train_ddp.main([*FLAGS.split(), "--run-dir", str(tmp_path)])
    assert traces(tmp_path) == before

    holder = lock_elsewhere(tmp_path, seconds=20)
    before = traces(tmp_path)
    with pytest.raises(UserError) as refused:
        train_ddp.main(["--resume", str(tmp_path), "--max-steps", "3"])
    text = f"{tmp_path} is locked by process {holder} on {os.uname().nodename}: wait for it, or stop it first"
    assert (str(refused.value), refused.value.status) == (text, 2)
    assert traces(tmp_path) == before

    os.kill(holder, signal.SIGKILL)
    assert wait(holder) == -signal.SIGKILL
    train_ddp.main(["--resume", str(tmp_path), "--max-steps", "3"])  # the advice


def test_lock_waits_for_a_process_that_is_exiting_and_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_dir, "_PATIENCE_SECONDS", 20)
    assert PATIENCE > 90, "as long as a file server holds it for a host that is gone"
    holder = lock_elsewhere(tmp_path, seconds=0.3)
    RunLock(tmp_path).release()
    locked = f"{tmp_path} is locked by process {holder} on {os.uname().nodename}"
    assert capsys.readouterr().err == f"{locked}: waiting for it, for 20 s\n"
    assert wait(fork(lambda: RunLock(tmp_path))) == 0


def test_undone_lock_leaves_no_trace_but_an_older_lock_file_stays(tmp_path):
    RunLock(tmp_path).release(undo=True)
    assert traces(tmp_path) == {}
    RunLock(tmp_path).release()
    before = traces(tmp_path)
    RunLock(tmp_path).release(undo=True)
    assert traces(tmp_path) == before != {}


@pytest.mark.parametrize("name", ["file/below", "locked"])
def test_path_that_cannot_be_used_is_refused(tmp_path, name):
    (tmp_path / "file").touch()
    (tmp_path / "locked" / ".lock").mkdir(parents=True)
    with pytest.raises(UserError, match=r"cannot be (created|locked): .*; name another"):
        RunLock(create_run_dir(tmp_path / name, "tutorial"))


def test_run_is_owned_by_the_launches_recorded(tmp_path):
    lock = RunLock(tmp_path)
    for damaged in ('{"launchers": 5}', "[]", "\0", '{"launchers": null}'):
        (tmp_path / "launch.json").write_text(damaged)
        assert owners(tmp_path) == []
    lock.record_owner(["a:1:5.00", "b:2:6.00"])
    assert lock.owned_by(["b:2:6.00", "c:3:7.00"])
    assert not lock.owned_by(["c:3:7.00"])
    assert not lock.owned_by([])  # a run started without torchrun is never restarted by it
    lock.record_owner(["c:3:7.00"])
    assert owners(tmp_path) == ["a:1:5.00", "b:2:6.00", "c:3:7.00"]
    assert lock.owned_by(["a:1:5.00"])  # a program may train a run on, and then be restarted from its beginning
