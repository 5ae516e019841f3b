"""Checkpoints: written atomically, verified, never executed."""

import io
import os
import pickle
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from cifar.checkpoint import DamagedCheckpointError, checkpoint_path, load_checkpoint, load_weights, save_checkpoint
from cifar.errors import UserError
from cifar.models import build_model
from cifar.resume import newest_checkpoint
from tests.helpers.checkpoints import content, flip_bits, small
from tests.helpers.comparing import same
from tests.helpers.forking import fork, wait


class Bomb:
    """Unpickled, it runs a shell command."""

    def __init__(self, proof):
        self.proof = proof

    def __reduce__(self):
        return os.system, (f"touch {self.proof}",)


@pytest.mark.parametrize("recipe", ["tutorial", "net-fast"])  # SGD and Muon
def test_round_trip(tmp_path, recipe, monkeypatch):
    path = tmp_path / "c.pt"
    saved = content(3, recipe)
    monkeypatch.setattr(time, "time", lambda: 0.0)  # a clock in 1970, before the first date of an archive
    save_checkpoint(path, saved)
    assert same(load_checkpoint(path), saved)
    assert same(torch.load(path, weights_only=True), saved)  # plain torch opens it
    assert [file.name for file in tmp_path.iterdir()] == ["c.pt"]


@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_flipped_bit_never_changes_a_tensor_and_truncation_is_detected(tmp_path, every):
    """One bit of `every` so many bytes."""
    path = tmp_path / "c.pt"
    save_checkpoint(path, small())
    raw = path.read_bytes()
    bits = {8 * place + place % 8 for place in range(0, len(raw), every)}
    # Every bit of the tensor's entry in the directory: one there makes torch.load leave the tensor uninitialized.
    entry = raw.rindex(b"archive/data/0") - 46
    bits |= set(range(8 * entry, 8 * (entry + 60)))
    detected, changed = flip_bits(path, bits)
    assert changed == []
    assert detected > len(bits) // 3  # the rest is alignment, times and the like
    for length in [*range(0, len(raw), 7 * every), len(raw) - 1]:
        path.write_bytes(raw[:length])
        with pytest.raises(DamagedCheckpointError, match=r"c\.pt: corrupt, or not a checkpoint"):
            load_checkpoint(path)


@pytest.mark.parametrize("form", ["pickle", "zip", "checkpoint"])
def test_malicious_file_is_refused_and_not_executed(tmp_path, form):
    proof, path = tmp_path / "proof", tmp_path / "c.pt"
    bomb = Bomb(proof)
    if form == "pickle":
        path.write_bytes(pickle.dumps(bomb))
    else:
        torch.save(small() | {"state": {"x": bomb}} if form == "checkpoint" else bomb, path)
    reason = "not a checkpoint" if form == "pickle" else "more than tensors and plain data; not executed"
    with pytest.raises(UserError, match=reason):
        load_checkpoint(path)
    assert not proof.exists()
    if form == "zip":  # torch.load without weights_only does execute it
        torch.load(path, weights_only=False)
        assert proof.exists()


@pytest.mark.parametrize(
    "value", [[1, 2], {}, *(small() | {key: 1} for key in ("config", "state", "dataset", "classes"))]
)
def test_other_content_is_refused(tmp_path, value):
    torch.save(value, tmp_path / "c.pt")
    with pytest.raises(UserError, match="not a checkpoint of this program"):
        load_checkpoint(tmp_path / "c.pt")


def test_later_format_is_refused(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    save_checkpoint(checkpoint_path(tmp_path, 1), small())
    save_checkpoint(checkpoint_path(tmp_path, 2), small() | {"format": 3})
    with pytest.raises(UserError, match=r"step-00000002.pt has checkpoint format 3: load it with a later version"):
        newest_checkpoint(tmp_path)  # resuming from an earlier one would lose steps


def test_weights_of_another_model_are_refused(tmp_path):
    path = tmp_path / "c.pt"
    saved = content()
    load_weights(build_model("net", 10), saved, "net", path)
    with pytest.raises(UserError, match=r"c.pt holds the model 'net', not 'net-wide': add --model net"):
        load_weights(build_model("net-wide", 10), saved, "net-wide", path)
    with pytest.raises(UserError, match=r"c.pt holds a 'net' of another form .*: .*size mismatch") as refused:
        load_weights(build_model("net", 7), saved, "net", path)
    assert "\n" not in str(refused.value)
    for state in ({}, {"model": 1}, {"model": {}}):
        with pytest.raises(UserError, match="of another form"):
            load_weights(build_model("net", 10), saved | {"state": state}, "net", path)


def newest_of(run_dir):
    """Return the path of the newest valid checkpoint, and the paths of the corrupt ones that are newer."""
    newest, corrupt = newest_checkpoint(run_dir)
    assert newest is not None
    assert same(newest[1], small())
    return newest[0], [Path(reason.split(": ")[0]) for reason in corrupt]


def test_newest_valid_checkpoint_wins_and_corrupt_ones_are_named(tmp_path):
    old, newer, newest = (checkpoint_path(tmp_path, step) for step in (5, 99_999_999, 100_000_000))
    old.parent.mkdir()
    assert newest_checkpoint(tmp_path) == (None, [])
    for path in (old, newer, newest):
        save_checkpoint(path, small())
    assert newest_of(tmp_path) == (newest, [])

    newest.write_bytes(newest.read_bytes()[:-100])
    newer.write_bytes(b"")
    (old.parent / ".step-99999999.pt.1.tmp").write_bytes(b"half")
    assert newest_of(tmp_path) == (old, [newest, newer])


def test_process_killed_between_any_two_system_calls_leaves_a_valid_newest_checkpoint(tmp_path):
    first, second = checkpoint_path(tmp_path, 1), checkpoint_path(tmp_path, 2)
    first.parent.mkdir()
    save_checkpoint(first, small())
    calls = ["open", "write", "fsync", "rename", "open directory", "fsync"]
    moments = [f"{when} {call}" for call in calls for when in ("before", "after")]
    for killed_at in range(len(moments) + 1):
        read, write = os.pipe()
        child = fork(partial(save_and_die, second, killed_at, write))
        os.close(write)
        with open(read) as pipe:
            passed = pipe.read().splitlines()
        last = killed_at == len(moments)
        assert wait(child) == (0 if last else -signal.SIGKILL)
        assert passed == moments[: killed_at + 1]
        assert newest_of(tmp_path) == (second if "after rename" in passed else first, []), passed
        for path in {*first.parent.iterdir()} - {first}:
            path.unlink()


def save_and_die(path, killed_at, pipe):
    """Save a checkpoint; kill this process at a moment before or after a system call; write the moments to `pipe`."""
    count = 0

    def reach(moment):
        nonlocal count
        os.write(pipe, f"{moment}\n".encode())
        if count == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1

    def watch(name, call):
        def watched(*arguments):
            reach(f"before {name}")
            result = call(*arguments)
            reach(f"after {name}")
            return result

        return watched

    class Unbuffered(io.FileIO):
        write = watch("write", io.FileIO.write)

    Path.open = watch("open", Unbuffered)
    os.fsync, os.replace = watch("fsync", os.fsync), watch("rename", os.replace)
    os.open = watch("open directory", os.open)
    save_checkpoint(path, small())
