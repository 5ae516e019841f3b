"""Checkpoints in the background: what is written, what is kept, and what an error costs."""

import errno
import os
import threading

import pytest
import torch

from cifar.checkpoint import (
    CheckpointWriter,
    checkpoint_path,
    checkpoints,
    copy_to_host,
    load_checkpoint,
    save_checkpoint,
)
from tests.helpers.checkpoints import small

TIMEOUT = 30  # seconds


def content(step, best=None):
    """Return the checkpoint of `step`, the best so far unless `best` is given."""
    state = {"model": {"w": torch.full((4,), float(step))}, "step": step, "best_step": step if best is None else best}
    return small() | {"state": state}


@pytest.fixture
def printed():
    """The writer's warnings."""
    return []


@pytest.fixture
def make_writer(tmp_path, printed):
    (tmp_path / "checkpoints").mkdir()
    return lambda keep=9, newest=None: CheckpointWriter(tmp_path, keep, printed.append, newest)


class SlowDisk:
    """A disk that begins to write when `free` is set."""

    def __init__(self):
        self.busy, self.free = threading.Event(), threading.Event()

    def save(self, path, content):
        self.busy.set()
        assert self.free.wait(TIMEOUT)
        save_checkpoint(path, content)


@pytest.fixture
def disk(monkeypatch):
    disk = SlowDisk()
    monkeypatch.setattr("cifar.checkpoint.save_checkpoint", disk.save)
    yield disk
    disk.free.set()


def test_training_goes_on_during_a_write_and_does_not_change_it(tmp_path, make_writer, disk):
    before = checkpoint_path(tmp_path, 0)
    writer = make_writer(newest=before)
    state = content(1)
    state["state"]["running_loss"] = [1.5]
    writer.save(state)  # returns although the disk is blocked
    assert disk.busy.wait(TIMEOUT)
    assert (list(checkpoints(tmp_path)), writer.newest) == ([], before)
    state["state"]["model"]["w"].add_(1)
    state["state"]["running_loss"][0] = 2.5
    state["state"]["step"] = 2
    disk.free.set()
    writer.flush()
    assert (list(checkpoints(tmp_path)), writer.newest) == ([1], checkpoint_path(tmp_path, 1))
    written = load_checkpoint(checkpoint_path(tmp_path, 1))["state"]
    assert torch.equal(written["model"]["w"], torch.ones(4))
    assert (written["step"], written["running_loss"]) == (1, [1.5])


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
        writer.save(content(step, best))
        writer.flush()
        kept.append(sorted(checkpoints(tmp_path)))
    assert kept == [[1], [1, 2], [2, 3], [2, 3, 4], [2, 4, 5], [5, 6], [6, 7]]


def test_retention_ignores_later_steps(tmp_path, make_writer):
    """A run that resumed from an earlier checkpoint, since later ones were corrupt."""
    corrupt, other = checkpoint_path(tmp_path, 9), tmp_path / "checkpoints" / "step-notes.pt"
    writer = make_writer(keep=2)
    corrupt.write_bytes(b"corrupt")
    other.touch()
    for step in range(1, 6):
        writer.save(content(step, best=1))
    writer.flush()
    assert sorted(checkpoints(tmp_path)) == [1, 4, 5, 9]
    assert corrupt.read_bytes() == b"corrupt"
    assert other.exists()


def test_full_disk_costs_one_warning_and_no_earlier_checkpoint(tmp_path, make_writer, printed, monkeypatch):
    writer = make_writer(keep=1)
    writer.save(content(1))
    writer.flush()

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        writer.save(content(2, best=1))
        writer.flush()
    assert printed == [
        "WARNING: no checkpoint at step 2: [Errno 28] No space left on device; earlier checkpoints are unchanged"
    ]
    assert writer.newest == checkpoint_path(tmp_path, 1)
    assert list((tmp_path / "checkpoints").iterdir()) == [writer.newest]
    assert load_checkpoint(writer.newest)["state"]["step"] == 1
    writer.save(content(3))  # there is space again
    writer.flush()
    assert (list(checkpoints(tmp_path)), writer.newest, len(printed)) == ([3], checkpoint_path(tmp_path, 3), 1)


def test_checkpoint_that_cannot_be_removed_is_no_error(tmp_path, make_writer, printed):
    writer = make_writer(keep=1)
    checkpoint_path(tmp_path, 1).mkdir()
    writer.save(content(2))
    writer.flush()
    assert (printed, writer.newest) == ([], checkpoint_path(tmp_path, 2))


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


def test_copy_shares_no_memory_with_the_original():
    weight = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    tensors = [weight, weight[0], torch.zeros((), dtype=torch.int64)]
    original = {"a": [tensors[0], {"b": (tensors[1], "text", None)}], 3: tensors[2], "number": 1.5}
    copy = copy_to_host(original)
    copies = [copy["a"][0], copy["a"][1]["b"][0], copy[3]]
    assert (type(copy), type(copy["a"]), type(copy["a"][1]["b"])) == (dict, list, tuple)
    assert (copy.keys(), copy["a"][1]["b"][1:], copy["number"]) == (original.keys(), ("text", None), 1.5)
    for was, now in zip(tensors, copies, strict=True):
        assert torch.equal(was, now)
        assert (now.dtype, now.device.type, now.requires_grad) == (was.dtype, "cpu", False)
        assert now.untyped_storage().data_ptr() != was.untyped_storage().data_ptr()
