"""The run folder: new, proven writable before training, and what a full disk costs during it."""

import errno
import json
import os
import subprocess
from contextlib import suppress
from datetime import datetime
from pathlib import Path

import pytest
import torch

import train_ddp
from cifar import run_dir as run
from cifar.checkpoint import checkpoint_path, checkpoints, load_checkpoint
from cifar.data import Data, DeviceImages
from cifar.errors import UserError
from cifar.run import Run
from tests.helpers.comparing import tiny_data, wait_for_checkpoints
from tests.helpers.processes import records, result, train


def test_a_named_folder_is_made_with_its_parents(tmp_path):
    assert run.create_run_dir(tmp_path / "a" / "b", "tutorial").is_dir()
    assert run.create_run_dir(tmp_path / "a" / "b", "tutorial").is_dir()  # there, and still empty


def test_a_folder_with_anything_in_it_is_refused(tmp_path):
    (tmp_path / ".hidden").touch()
    with pytest.raises(UserError, match=r"is not empty: name a new folder, or continue that run with --resume"):
        run.create_run_dir(tmp_path, "tutorial")


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_path_at_or_below_a_file_is_refused(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"can't be made: .*; name another with --run-dir"):
        run.create_run_dir(tmp_path / name, "tutorial")


def test_runs_of_the_same_second_get_names_of_their_own(tmp_path, monkeypatch):
    class Noon(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2026, 1, 2, 12, 0, 0)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "datetime", Noon)
    names = [run.create_run_dir(None, "wide").as_posix() for _ in range(3)]
    assert names == [f"runs/2026-01-02_12-00-00-wide{suffix}" for suffix in ("", "-2", "-3")]
    for n in range(4, 100):
        Path(f"{names[0]}-{n}").mkdir()
    with pytest.raises(UserError, match="are all taken: name a folder with --run-dir"):
        run.create_run_dir(None, "wide")


@pytest.fixture
def small_disk(tmp_path, request):
    """A disk of 4 MB, or of as many as the test says."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={getattr(request, 'param', 4)}m", "tmpfs", str(disk)]
    try:
        subprocess.run(mount, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no small disk can be mounted here: {getattr(error, 'stderr', '') or error}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_is_too_small_is_found_out_before_training(small_disk):
    folder = run.create_run_dir(small_disk / "run", "tutorial")
    with pytest.raises(UserError, match=r"does not take the 8.4 MB .*No space left on device.*--run-dir"):
        run.check_writable(folder, need=8 << 20)
    assert run.create_run_dir(folder, "tutorial") == folder  # as empty as before: the same command works later
    run.check_writable(folder, need=2 << 20)
    assert [path.name for path in folder.iterdir()] == ["checkpoints"]


def test_a_folder_that_is_not_writable_is_found_out_before_training(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "fsync", refuse)  # root may write everywhere, so that permissions prove nothing
    with pytest.raises(UserError, match="Permission denied"):
        run.check_writable(tmp_path, need=1)
    assert list(tmp_path.iterdir()) == []


def test_the_check_clears_away_what_a_killed_process_left(tmp_path):
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    for name in (".step-00000002.pt.123.tmp", "step-00000001.pt"):
        (checkpoints / name).touch()
    run.check_writable(tmp_path, need=1)
    assert [path.name for path in checkpoints.iterdir()] == ["step-00000001.pt"]


def test_a_write_that_fails_half_way_leaves_what_was_there(tmp_path):
    path = tmp_path / "x.json"
    run.write_json(path, {"a": 1})

    def fail(file):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "full")

    with pytest.raises(OSError, match="full"):
        run.write_atomically(path, fail)
    assert json.loads(path.read_text()) == {"a": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["x.json"]


def test_the_content_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    path, seen = tmp_path / "x", []
    monkeypatch.setattr(os, "fsync", lambda _: seen.append(path.exists()))
    run.write_atomically(path, lambda file: file.write(b"1"))
    assert seen[0] is False
    assert path.read_bytes() == b"1"


def test_a_file_system_that_cannot_flush_folders_is_good_enough(tmp_path, monkeypatch):
    flush = os.fsync

    def files_only(number):
        if os.path.isdir(f"/proc/self/fd/{number}"):
            raise OSError(errno.EINVAL, "not here")
        flush(number)

    monkeypatch.setattr(os, "fsync", files_only)
    run.write_atomically(tmp_path / "x", lambda file: file.write(b"1"))
    assert (tmp_path / "x").read_bytes() == b"1"


def test_a_run_whose_disk_fills_up_goes_on_and_keeps_its_checkpoints(tmp_path, monkeypatch, capsys):
    images, labels = torch.randint(0, 256, (200, 3, 32, 32), dtype=torch.uint8), torch.arange(200) % 10
    device = torch.device("cpu")
    data = Data("synthetic", DeviceImages(images, labels, device), DeviceImages(images, labels, device))
    monkeypatch.setattr("cifar.data.load_data", lambda *_: data)
    flush, folder = os.fsync, tmp_path / "run"

    def full_after_the_first_checkpoint(number):
        if checkpoint_path(folder, 2).exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(number)

    monkeypatch.setattr(os, "fsync", full_after_the_first_checkpoint)
    wait_for_checkpoints(monkeypatch)
    flags = "--device cpu --wandb disabled --local-batch-size 20 --checkpoint-steps 2 --epochs 1 --log-steps 1"
    train_ddp.main([*flags.split(), "--run-dir", str(folder)])

    said = capsys.readouterr().out
    assert "WARNING: no checkpoint at step 4: [Errno 28] No space left on device" in said
    assert "WARNING: the result could not be written" in said
    assert "Accuracy of the network on the 200 test images" in said
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000002.pt"]
    assert load_checkpoint(checkpoint_path(folder, 2))["state"]["step"] == 2
    assert [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()][-1] == 10


@pytest.mark.parametrize("small_disk", [8], indirect=True)
def test_a_run_whose_disk_is_full_for_a_while_writes_checkpoints_again(small_disk, monkeypatch, capsys):
    monkeypatch.setattr("cifar.data.load_data", lambda *_: tiny_data())
    monkeypatch.setattr("cifar.report.draw_report", lambda *_: None)
    folder, ballast, save = small_disk / "run", small_disk / "ballast", Run.save

    def save_on_a_disk_that_others_use(run):
        if run._state.step == 16:
            with suppress(OSError), ballast.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(1 << 12))
        elif run._state.step == 56:
            ballast.unlink()
        save(run)

    monkeypatch.setattr(Run, "save", save_on_a_disk_that_others_use)
    wait_for_checkpoints(monkeypatch)
    flags = "--device cpu --wandb disabled --local-batch-size 5 --epochs 2 --log-steps 1 --checkpoint-steps 8"
    train_ddp.main([*flags.split(), "--keep-checkpoints", "2", "--run-dir", str(folder)])

    said = capsys.readouterr().out.splitlines()
    lost = [line for line in said if line.startswith("WARNING: no checkpoint at step")]
    assert [line.split("step ")[1].split(":")[0] for line in lost] == ["16", "24", "32", "40", "48"]
    assert all("No space left on device; the earlier ones are as they were" in line for line in lost)
    assert sorted(checkpoints(folder)) == [72, 80]
    for step, path in checkpoints(folder).items():
        assert load_checkpoint(path)["state"]["step"] == step
    assert sum("metrics.jsonl can't be written" in line for line in said) == 1
    assert result(folder)["steps"] == 80
    # What was logged before the disk was full, and from when there was room again, is all there.
    with_room = [*range(1, 17), *range(57, 81)]
    assert [step for step, _ in records(folder, "train/loss") if step in with_room] == with_room


def test_the_program_says_before_training_that_its_disk_is_full(small_disk):
    (small_disk / "ballast").write_bytes(bytes(3_900_000))
    done = train("--dataset", "synthetic", "--run-dir", "disk/run", cwd=small_disk.parent)
    assert done.returncode == 2
    assert "loss" not in done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith("train_ddp.py: error: the run folder disk/run does not take the ")
    (small_disk / "ballast").unlink()
    assert not list((small_disk / "run").iterdir())
