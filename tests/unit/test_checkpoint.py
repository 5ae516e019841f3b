"""Checkpoints: whole or not at all, verified, never executed; and `--evaluate`, which reads one."""

import errno
import hashlib
import io
import os
import pickle
import random
import resource
import signal
import struct
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

import train_ddp
from cifar import checkpoint
from cifar.checkpoint import (
    DamagedCheckpointError,
    checkpoint_path,
    load_checkpoint,
    load_model,
    newest_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from cifar.errors import UserError
from cifar.models import build_model
from tests.helpers.comparing import same
from tests.helpers.forking import fork, wait
from tests.helpers.processes import clean_environment, result, train


def content(step=1, model="net"):
    torch.manual_seed(step)
    state = {"net": build_model(model).state_dict(), "step": step, "lists": [1.5, "text", {"x": torch.arange(3)}]}
    return {"config": {"model": model}, "dataset": "synthetic", "state": state}


def small():
    return {"config": {"model": "net"}, "dataset": "synthetic", "state": {"x": torch.arange(50.0)}}


def forge(body_of):
    """What torch.save writes of `body_of`, with a checksum as this program makes it."""
    return seal(zip_of(body_of))


def zip_of(thing):
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
        load_model(build_model("net"), wide, "net", tmp_path / "c.pt")
    wide["config"]["model"] = "net"
    with pytest.raises(UserError, match=r"c.pt doesn't fit the net 'net': .*size mismatch") as caught:
        load_model(build_model("net"), wide, "net", tmp_path / "c.pt")
    assert "\n" not in str(caught.value)
    states: tuple[dict, ...] = ({}, {"net": 1}, {"net": {}})
    for state in states:
        with pytest.raises(UserError, match="doesn't fit"):
            load_model(build_model("net"), {"config": {"model": "net"}, "state": state}, "net", tmp_path / "c.pt")


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


@pytest.fixture
def earlier(tmp_path):
    """A run whose first checkpoint has been written."""
    checkpoint_path(tmp_path, 1).parent.mkdir()
    save_checkpoint(checkpoint_path(tmp_path, 1), content(1))
    return tmp_path


def step_found_after_the_kill(run_dir):
    """Which checkpoint a resumed run would go on from; what the killed process left is cleared away."""
    found, complaints = newest_checkpoint(run_dir)
    assert found is not None
    assert complaints == []  # not so much as a damaged file to pass over
    path, loaded = found
    step = loaded["state"]["step"]
    assert path == checkpoint_path(run_dir, step)
    assert same(loaded, content(step))
    for leftover in path.parent.iterdir():
        if leftover != checkpoint_path(run_dir, 1):
            leftover.unlink()
    return step


def test_a_process_that_is_killed_at_any_byte_leaves_a_whole_newest_checkpoint(earlier):
    path, second = checkpoint_path(earlier, 2), content(2)
    save_checkpoint(path, second)
    size = path.stat().st_size
    path.unlink()

    def write(limit):
        # The kernel ends whoever writes beyond its limit; Python would turn that into an error.
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        save_checkpoint(path, second)

    draw = random.Random(0)
    for limit in [0, 1, size - 1, *(draw.randrange(2, size - 1) for _ in range(40))]:
        assert wait(fork(partial(write, limit))) == -signal.SIGXFSZ
        assert step_found_after_the_kill(earlier) == 1, f"killed at byte {limit} of {size}"
    assert wait(fork(partial(write, size))) == 0
    assert step_found_after_the_kill(earlier) == 2


def test_a_process_that_is_killed_between_any_two_system_calls_leaves_a_whole_newest_checkpoint(earlier):
    calls = ["open", "write", "write", "flush", "rename", "open the folder", "flush"]
    moments = [f"{when} {call}" for call in calls for when in ("before", "after")]
    for killed_at in range(len(moments) + 1):
        read, write = os.pipe()
        child = fork(partial(save_and_die, checkpoint_path(earlier, 2), killed_at, write))
        os.close(write)
        with open(read) as pipe:
            passed = pipe.read().splitlines()
        last = killed_at == len(moments)
        assert wait(child) == (0 if last else -signal.SIGKILL)
        assert passed == moments[: killed_at + 1]  # or it was killed elsewhere than this test says
        assert step_found_after_the_kill(earlier) == (2 if "after rename" in passed else 1), passed


def save_and_die(path, killed_at, pipe):
    """Save step 2; kill this process at that moment before or after a system call. All moments are told to `pipe`."""
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
        """Every write is a system call at once."""

        write = watch("write", io.FileIO.write)

    second = content(2)
    Path.open = watch("open", Unbuffered)
    os.fsync, os.replace = watch("flush", os.fsync), watch("rename", os.replace)
    os.open = watch("open the folder", os.open)
    save_checkpoint(path, second)


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
