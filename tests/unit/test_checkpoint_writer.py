"""Checkpoints in the background: what is written, what is kept, and what an error costs."""

import errno
import os
import threading
from types import SimpleNamespace

import pytest
import torch

from cifar.checkpoint import CheckpointWriter, checkpoint_path, checkpoints, load_checkpoint, save_checkpoint
from tests.helpers.checkpoints import small
from tests.helpers.comparing import same

TIMEOUT = 30  # seconds


def content(step, best=None):
    """Return the checkpoint of `step`, the best so far unless `best` is given."""
    model, buffers = {"w": torch.full((4,), float(step))}, [{"mean": torch.full((), float(step))}]
    state = {"model": model, "buffers": buffers, "step": step, "best_step": step if best is None else best}
    return small() | {"state": state}


@pytest.fixture
def printed():
    """The writer's warnings."""
    return []


@pytest.fixture
def make_writer(tmp_path, printed):
    (tmp_path / "checkpoints").mkdir()
    return lambda keep=9, newest=None: CheckpointWriter(tmp_path, keep, printed.append, newest)


def save(writer, *arguments):
    """Write the checkpoint `content(*arguments)`, and wait until it is on disk."""
    writer.save(content(*arguments))
    writer.flush()


@pytest.fixture
def disk(monkeypatch):
    """A disk that is `busy` when it is asked to write, and that writes once `free` is set."""
    disk = SimpleNamespace(busy=threading.Event(), free=threading.Event())

    def save_later(path, content):
        disk.busy.set()
        assert disk.free.wait(TIMEOUT)
        save_checkpoint(path, content)

    monkeypatch.setattr("cifar.checkpoint.save_checkpoint", save_later)
    yield disk
    disk.free.set()


def test_training_goes_on_during_a_write_and_does_not_change_it(tmp_path, make_writer, disk):
    before = checkpoint_path(tmp_path, 0)
    writer = make_writer(newest=before)
    of_training = content(1)
    state = of_training["state"]
    writer.save(of_training)  # returns although the disk is blocked
    assert disk.busy.wait(TIMEOUT)
    assert (list(checkpoints(tmp_path)), writer.newest) == ([], before)
    state["model"]["w"].add_(1)
    state["buffers"][0]["mean"].add_(1)
    state["step"] = 2
    disk.free.set()
    writer.flush()
    assert (list(checkpoints(tmp_path)), writer.newest) == ([1], checkpoint_path(tmp_path, 1))
    assert same(load_checkpoint(writer.newest), content(1))


@pytest.mark.parametrize("wait", ["save", "flush"])
def test_save_and_flush_wait_for_the_previous_write_and_count_the_time(tmp_path, make_writer, disk, wait):
    writer = make_writer()
    writer.flush()
    writer.save(content(1))
    assert 0 < writer.waited_seconds < TIMEOUT / 2
    before = writer.waited_seconds
    threading.Timer(0.3, disk.free.set).start()
    if wait == "save":
        writer.save(content(2))
    else:
        writer.flush()
    assert disk.free.is_set()
    assert writer.waited_seconds - before > 0.25
    writer.flush()
    assert sorted(checkpoints(tmp_path)) == ([1, 2] if wait == "save" else [1])


def test_retention_keeps_the_newest_and_the_best(tmp_path, make_writer):
    writer = make_writer(keep=2)
    kept = []
    for step, best in [(1, 1), (2, 2), (3, 2), (4, 2), (5, 2), (6, 6), (7, 6)]:
        save(writer, step, best)
        kept.append(sorted(checkpoints(tmp_path)))
    assert kept == [[1], [1, 2], [2, 3], [2, 3, 4], [2, 4, 5], [5, 6], [6, 7]]


def test_retention_leaves_later_steps_and_what_cannot_be_removed(tmp_path, make_writer, printed):
    """A run that resumed from an earlier checkpoint, since later ones were corrupt."""
    corrupt, other = checkpoint_path(tmp_path, 9), tmp_path / "checkpoints" / "step-notes.pt"
    writer = make_writer(keep=2)
    corrupt.write_bytes(b"corrupt")
    other.touch()
    checkpoint_path(tmp_path, 2).mkdir()
    for step in (1, 3, 4, 5):
        save(writer, step, 1)
    assert sorted(checkpoints(tmp_path)) == [1, 2, 4, 5, 9]
    assert corrupt.read_bytes() == b"corrupt"
    assert other.exists()
    assert printed == []


def test_full_disk_costs_one_warning_and_no_earlier_checkpoint(tmp_path, make_writer, printed, monkeypatch):
    writer = make_writer(keep=1)
    save(writer, 1)

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        save(writer, 2, 1)
    assert printed == [
        "WARNING: no checkpoint at step 2: [Errno 28] No space left on device; earlier checkpoints are unchanged"
    ]
    assert writer.newest == checkpoint_path(tmp_path, 1)
    assert list((tmp_path / "checkpoints").iterdir()) == [writer.newest]
    save(writer, 3)  # there is space again
    assert (list(checkpoints(tmp_path)), writer.newest, len(printed)) == ([3], checkpoint_path(tmp_path, 3), 1)


def test_program_error_is_raised_in_the_main_thread(make_writer, printed, monkeypatch):
    def broken(*_):
        raise TypeError("broken")

    monkeypatch.setattr("cifar.checkpoint.save_checkpoint", broken)
    writer = make_writer()
    writer.save(content(1))
    with pytest.raises(TypeError, match="broken"):
        writer.save(content(2))
    with pytest.raises(TypeError, match="broken"):
        writer.flush()
    assert printed == []
