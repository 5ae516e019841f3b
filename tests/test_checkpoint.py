"""Checkpoints: whole or not at all, verified, never executed; and `--evaluate`, which reads one."""

import errno
import hashlib
import os
import pickle
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train_ddp
from cifar import checkpoint
from cifar.checkpoint import (
    DamagedCheckpointError,
    checkpoint_path,
    load_checkpoint,
    load_net,
    newest_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from cifar.errors import UserError
from cifar.nets import build_net
from tests.processes import clean_environment, result, train


def content(step=1, model="net"):
    torch.manual_seed(step)
    state = {"net": build_net(model).state_dict(), "step": step, "lists": [1.5, "text", {"x": torch.arange(3)}]}
    return {"config": {"model": model}, "dataset": "synthetic", "state": state}


def small():
    return {"config": {"model": "net"}, "dataset": "synthetic", "state": {"x": torch.arange(50.0)}}


def forge(body_of):
    """What torch.save writes of `body_of`, with a checksum as this program makes it."""
    return seal(zip_of(body_of))


def zip_of(thing):
    import io

    buffer = io.BytesIO()
    torch.save(thing, buffer)
    return buffer.getvalue()


def seal(body):
    body = body[:-2] + struct.pack("<H", checkpoint._COMMENT)
    return body + checkpoint._MARK + hashlib.sha256(body).hexdigest().encode()


class Bomb:
    """Pickled, it makes the unpickler run a shell command."""

    def __init__(self, proof):
        self.proof = proof

    def __reduce__(self):
        return os.system, (f"touch {self.proof}",)


def test_what_goes_in_comes_out(tmp_path):
    path = tmp_path / "c.pt"
    saved = content(3)
    save_checkpoint(path, saved)
    loaded = load_checkpoint(path)
    assert loaded["config"] == saved["config"]
    assert loaded["state"]["lists"][:2] == [1.5, "text"]
    assert torch.equal(loaded["state"]["lists"][2]["x"], torch.arange(3))
    for name, tensor in saved["state"]["net"].items():
        assert torch.equal(loaded["state"]["net"][name], tensor)
    assert [file.name for file in tmp_path.iterdir()] == ["c.pt"]


def test_plain_torch_opens_a_checkpoint(tmp_path):
    save_checkpoint(tmp_path / "c.pt", content(3))
    assert torch.load(tmp_path / "c.pt", weights_only=True)["state"]["step"] == 3


def test_every_flipped_bit_shows(tmp_path):
    path = tmp_path / "c.pt"
    save_checkpoint(path, small())
    raw = path.read_bytes()
    places = {*range(0, len(raw), len(raw) // 150), len(raw) - 1, *range(len(raw) - checkpoint._COMMENT - 2, len(raw))}
    for place in sorted(places):
        damaged = bytearray(raw)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(DamagedCheckpointError, match=r"c\.pt"):
            load_checkpoint(path)
    path.write_bytes(raw)
    load_checkpoint(path)


def test_a_file_that_is_cut_short_or_grown_shows(tmp_path):
    path = tmp_path / "c.pt"
    save_checkpoint(path, small())
    raw = path.read_bytes()
    for length in [*range(0, len(raw), len(raw) // 50), len(raw) - 1]:
        path.write_bytes(raw[:length])
        with pytest.raises(DamagedCheckpointError, match=r"c\.pt"):
            load_checkpoint(path)
    path.write_bytes(raw + b"\0")
    with pytest.raises(DamagedCheckpointError):
        load_checkpoint(path)


@pytest.mark.parametrize("form", ["pickle", "zip", "sealed zip", "sealed inside a checkpoint"])
def test_a_malicious_file_is_refused_and_nothing_runs(tmp_path, form):
    proof, path = tmp_path / "proof", tmp_path / "c.pt"
    bomb = Bomb(proof)
    path.write_bytes(
        {
            "pickle": lambda: pickle.dumps(bomb),
            "zip": lambda: zip_of(bomb),
            "sealed zip": lambda: forge(bomb),
            "sealed inside a checkpoint": lambda: forge(small() | {"state": {"net": bomb}}),
        }[form]()
    )
    with pytest.raises(UserError, match="was not run" if "sealed" in form else "not a checkpoint"):
        read_checkpoint(path)
    assert not proof.exists()
    if form == "sealed zip":  # the bomb does go off where nobody is careful
        torch.load(path, weights_only=False)
        assert proof.exists()


@pytest.mark.parametrize(
    "thing", [[1, 2], {}, {"config": [], "state": {}, "dataset": ""}, {"config": {}, "state": 1, "dataset": ""}]
)
def test_a_sealed_file_with_other_content_is_refused(tmp_path, thing):
    (tmp_path / "c.pt").write_bytes(forge(thing))
    with pytest.raises(UserError, match="not a checkpoint of this program"):
        read_checkpoint(tmp_path / "c.pt")


def test_what_is_no_file_is_refused(tmp_path):
    for path, reason in ((tmp_path, "directory"), (tmp_path / "none.pt", "No such file")):
        with pytest.raises(UserError, match=reason):
            read_checkpoint(path)


def test_another_nets_weights_are_refused(tmp_path):
    wide = content(model="net-wide")
    with pytest.raises(UserError, match=r"'net-wide', not a 'net': add --model net-wide"):
        load_net(build_net("net"), wide, "net", tmp_path / "c.pt")
    wide["config"]["model"] = "net"
    with pytest.raises(UserError, match=r"c.pt doesn't fit the net 'net': .*size mismatch") as caught:
        load_net(build_net("net"), wide, "net", tmp_path / "c.pt")
    assert "\n" not in str(caught.value)
    states: tuple[dict, ...] = ({}, {"net": 1}, {"net": {}})
    for state in states:
        with pytest.raises(UserError, match="doesn't fit"):
            load_net(build_net("net"), {"config": {"model": "net"}, "state": state}, "net", tmp_path / "c.pt")


def test_the_newest_that_verifies_wins_and_damaged_ones_are_named(tmp_path):
    paths = [checkpoint_path(tmp_path, step) for step in (5, 99_999_999, 100_000_000)]
    paths[0].parent.mkdir()
    assert newest_checkpoint(tmp_path) == (None, [])
    for step, path in enumerate(paths):
        save_checkpoint(path, content(step))
    found, complaints = newest_checkpoint(tmp_path)
    assert found is not None
    assert (found[0], found[1]["state"]["step"], complaints) == (paths[2], 2, [])

    paths[2].write_bytes(paths[2].read_bytes()[:-100])
    paths[1].write_bytes(b"")
    (tmp_path / "checkpoints" / ".step-99999999.pt.1.tmp").write_bytes(b"half")
    found, complaints = newest_checkpoint(tmp_path)
    assert found is not None
    assert (found[0], found[1]["state"]["step"]) == (paths[0], 0)
    assert [str(paths[2]) in complaints[0], str(paths[1]) in complaints[1], len(complaints)] == [True, True, 2]

    paths[0].unlink()
    with pytest.raises(UserError, match=r"no good checkpoint is there; .*100000000.*; .*99999999"):
        newest_checkpoint(tmp_path)


def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "c.pt"
    save_checkpoint(path, content(1))

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(path, content(2))
    assert [file.name for file in tmp_path.iterdir()] == ["c.pt"]
    assert load_checkpoint(path)["state"]["step"] == 1


INTERRUPTED = """
import os, resource, signal, sys
from pathlib import Path
import torch
from cifar.checkpoint import save_checkpoint

def content(step):
    return {"config": {}, "dataset": "", "state": {"step": step, "x": torch.zeros(200_000)}}

path, how = Path(sys.argv[1]), sys.argv[2]
save_checkpoint(path, content(1))
if how == "limit":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
else:
    # Killed when all is written and nothing is flushed to the disk or renamed.
    os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
try:
    save_checkpoint(path, content(2))
except OSError as error:
    print("refused:", error.strerror)
"""


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A real run of three steps, and two checkpoints."""
    folder = tmp_path_factory.mktemp("evaluate")
    done = train(
        "--dataset", "synthetic", "--local-batch-size", "50", "--max-steps", "4", "--checkpoint-steps", "2",
        "--run-dir", "run", cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.mark.parametrize("how", ["limit", "killed"])
def test_whatever_interrupts_a_write_the_earlier_checkpoint_stays(tmp_path, how):
    path = tmp_path / "c.pt"
    command = [sys.executable, "-c", INTERRUPTED, str(path), how]
    done = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, timeout=120)
    if how == "limit":
        assert done.stdout == "refused: File too large\n"
        assert [file.name for file in tmp_path.iterdir()] == ["c.pt"]
    else:
        assert done.returncode == -signal.SIGKILL
    assert load_checkpoint(path)["state"]["step"] == 1


def test_evaluate_gives_the_accuracy_of_the_run(run_dir):
    path = checkpoint_path(run_dir, 4)
    done = train("--dataset", "synthetic", "--evaluate", path, cwd=run_dir.parent)
    assert done.returncode == 0, done.stderr
    own = result(run_dir)
    assert f"({own['test_correct']:,} of {own['test_total']:,} correct, loss {own['test_loss']:.4f})" in done.stdout
    assert sorted(file.name for file in run_dir.parent.iterdir()) == ["run"]  # it leaves nothing behind


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--model", "net-wide"], r"holds a 'net', not a 'net-wide'"),
        (["--evaluate", "text.pt"], "text.pt is not a checkpoint"),
        (["--evaluate", "bomb.pt"], "bomb.pt holds what no checkpoint of this program holds, and was not run"),
        (["--evaluate", "none.pt"], "none.pt can't be read"),
    ],
)
def test_evaluate_refuses_what_it_cannot_use(run_dir, tmp_path, monkeypatch, synthetic, flags, reason):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("cifar.data.load_data", lambda *_: synthetic)
    Path("text.pt").write_text("text")
    Path("bomb.pt").write_bytes(forge(Bomb(tmp_path / "proof")))
    flags = ["--evaluate", str(checkpoint_path(run_dir, 4)), *flags]
    with pytest.raises(UserError, match=reason) as caught:
        train_ddp.main(["--device", "cpu", "--dataset", "synthetic", *flags])
    assert caught.value.status == 2
    assert not (tmp_path / "proof").exists()


def test_the_program_refuses_a_malicious_file_in_one_line_with_status_2(tmp_path):
    (tmp_path / "bomb.pt").write_bytes(pickle.dumps(Bomb(tmp_path / "proof")))
    done = train("--dataset", "synthetic", "--evaluate", "bomb.pt", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "train_ddp.py: error: bomb.pt is not a checkpoint of this program, or it is incomplete"
    ]
    assert not (tmp_path / "proof").exists()
