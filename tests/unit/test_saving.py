"""Checkpoints in the background: what is written, what is left out, what is kept, and what an error costs."""

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

SOON = 30  # seconds within which a thread has surely done what it was allowed to do


def content(step, best=None):
    """What a session saves at `step`; with the best accuracy so far, unless `best` was better."""
    # Weights first, as there: two checkpoints must never be compared, for tensors are neither equal nor not.
    state = {"net": {"w": torch.full((4,), float(step))}, "step": step, "best_step": step if best is None else best}
    return {"config": {}, "dataset": "synthetic", "state": state}


@pytest.fixture
def said():
    """What the writer has warned of."""
    return []


@pytest.fixture
def writer(tmp_path, said):
    """A function that makes a writer of the run in `tmp_path`."""
    (tmp_path / "checkpoints").mkdir()
    return lambda keep=9, newest=None: CheckpointWriter(tmp_path, keep, said.append, newest)


class Disk:
    """Writes a checkpoint only when told to."""

    def __init__(self):
        self.busy, self.free = threading.Event(), threading.Event()

    def save(self, path, content):
        self.busy.set()
        assert self.free.wait(SOON)
        save_checkpoint(path, content)


@pytest.fixture
def disk(monkeypatch):
    """A disk that is busy from the first checkpoint on, until it is set free."""
    disk = Disk()
    monkeypatch.setattr("cifar.checkpoint.save_checkpoint", disk.save)
    yield disk
    disk.free.set()


def steps(run_dir):
    return sorted(checkpoints(run_dir))


def test_what_is_written_is_the_state_at_the_time_of_saving(tmp_path, writer, disk):
    state = content(1)
    state["state"]["windows"] = [1.5]
    writer = writer()
    writer.save(state)
    # The disk hasn't begun with it, or has at least not read it, when training goes on.
    state["state"]["net"]["w"].add_(1)
    state["state"]["windows"][0] = 2.5
    state["state"]["step"] = 2
    disk.free.set()
    writer.flush()
    assert steps(tmp_path) == [1]
    written = load_checkpoint(checkpoint_path(tmp_path, 1))["state"]
    assert torch.equal(written["net"]["w"], torch.ones(4))
    assert (written["step"], written["windows"]) == (1, [1.5])


def test_training_goes_on_while_a_checkpoint_is_being_written(tmp_path, writer, disk):
    before = checkpoint_path(tmp_path, 0)
    writer = writer(newest=before)
    writer.save(content(1))  # which would wait here for ever
    assert disk.busy.wait(SOON)
    assert not disk.free.is_set()
    assert (steps(tmp_path), writer.newest) == ([], before)
    assert 0 < writer.waited_seconds < SOON
    disk.free.set()
    writer.flush()
    assert (steps(tmp_path), writer.newest) == ([1], checkpoint_path(tmp_path, 1))


def test_a_slow_disk_costs_the_checkpoints_between_but_never_the_best(tmp_path, writer, said, disk):
    writer = writer()
    writer.save(content(1))
    assert disk.busy.wait(SOON)
    writer.save(content(2, best=1))
    assert said == []
    writer.save(content(3))  # takes the place of 2, and is the best
    assert said == ["WARNING: the disk is slower than the checkpoints: none of step 2"]
    writer.save(content(4, best=3))
    assert len(said) == 1
    writer.save(content(5, best=3))
    assert said[1:] == ["WARNING: the disk is slower than the checkpoints: none of step 4"]
    disk.free.set()
    writer.flush()
    assert steps(tmp_path) == [1, 3, 5]
    assert writer.newest == checkpoint_path(tmp_path, 5)
    assert len(said) == 2


def test_a_disk_that_hangs_does_not_fill_the_memory_with_checkpoints_that_were_the_best_once(
    tmp_path, writer, said, disk
):
    writer = writer()
    for step in range(1, 6):  # each better than all before it, as in the first epochs of most runs
        writer.save(content(step))
        assert disk.busy.wait(SOON)
    disk.free.set()
    writer.flush()
    assert steps(tmp_path) == [1, 5]
    assert [line.rsplit(" ", 1)[1] for line in said] == ["2", "3", "4"]


def test_flushing_waits_for_what_is_being_written_and_for_what_waits(tmp_path, writer, disk):
    writer = writer()
    writer.flush()  # nothing was saved: nothing to wait for
    writer.save(content(1))
    assert disk.busy.wait(SOON)
    writer.save(content(2))
    flushing = threading.Thread(target=writer.flush, daemon=True)
    flushing.start()
    flushing.join(0.2)
    assert flushing.is_alive()
    disk.free.set()
    flushing.join(SOON)
    assert not flushing.is_alive()
    assert steps(tmp_path) == [1, 2]


def test_the_newest_and_the_best_are_kept(tmp_path, writer):
    writer = writer(keep=2)
    kept = []
    for step, best in [(1, 1), (2, 2), (3, 2), (4, 2), (5, 2), (6, 6), (7, 6)]:
        writer.save(content(step, best))
        writer.flush()
        kept.append(steps(tmp_path))
    assert kept == [[1], [1, 2], [2, 3], [2, 3, 4], [2, 4, 5], [5, 6], [6, 7]]


def test_checkpoints_of_later_steps_neither_count_nor_go(tmp_path, writer):
    """A resumed run has passed over those that were damaged, and goes on from one before them."""
    damaged, forgotten = checkpoint_path(tmp_path, 9), tmp_path / "checkpoints" / "step-notes.pt"
    writer = writer(keep=2)
    save_checkpoint(checkpoint_path(tmp_path, 8), content(8))
    damaged.write_bytes(b"damaged")
    forgotten.touch()
    for step in range(1, 6):
        writer.save(content(step, best=1))
        writer.flush()
    assert steps(tmp_path) == [1, 4, 5, 8, 9]
    assert damaged.read_bytes() == b"damaged"
    assert forgotten.exists()
    assert load_checkpoint(checkpoint_path(tmp_path, 8))["state"]["step"] == 8


def test_a_full_disk_costs_one_warning_and_no_earlier_checkpoint(tmp_path, writer, said, monkeypatch):
    writer = writer(keep=1)
    writer.save(content(1))
    writer.flush()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr("cifar.checkpoint.save_checkpoint", full)
        writer.save(content(2, best=1))
        writer.flush()
    assert said == [
        "WARNING: no checkpoint at step 2: [Errno 28] No space left on device; the earlier ones are as they were"
    ]
    assert (steps(tmp_path), writer.newest) == ([1], checkpoint_path(tmp_path, 1))
    writer.save(content(3))  # there is room again
    writer.flush()
    assert (steps(tmp_path), writer.newest, len(said)) == ([3], checkpoint_path(tmp_path, 3), 1)


def test_an_old_checkpoint_that_cannot_be_removed_is_no_missing_checkpoint(tmp_path, writer, said):
    writer = writer(keep=1)
    checkpoint_path(tmp_path, 1).mkdir()  # which no unlink removes
    writer.save(content(2))
    writer.flush()
    assert load_checkpoint(checkpoint_path(tmp_path, 2))["state"]["step"] == 2
    assert [line for line in said if "no checkpoint at step 2" in line] == []


def test_an_error_of_the_program_comes_out_in_the_main_thread(writer, said, monkeypatch):
    def broken(*_):
        raise TypeError("broken")

    monkeypatch.setattr("cifar.checkpoint.save_checkpoint", broken)
    writer = writer()
    writer.save(content(1))
    with pytest.raises(TypeError, match="broken"):
        writer.flush()
    with pytest.raises(TypeError, match="broken"):
        writer.save(content(2))
    assert said == []


def test_a_copy_shares_no_memory_with_what_it_was_made_of():
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
