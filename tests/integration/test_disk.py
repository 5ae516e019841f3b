"""A disk that is really full."""

import subprocess
from contextlib import suppress

import pytest

import train_ddp
from cifar.checkpoint import checkpoints, load_checkpoint
from cifar.run import Run
from tests.helpers.comparing import use_tiny_dataset, wait_for_checkpoints
from tests.helpers.processes import records, result

pytestmark = pytest.mark.slow

FLAGS = "--device cpu --dataset synthetic --wandb disabled"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)]
    try:
        subprocess.run(mount, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no tmpfs can be mounted here: {getattr(error, 'stderr', '') or error}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_run_on_a_full_disk_continues_and_writes_checkpoints_again(small_disk, monkeypatch, capsys):
    use_tiny_dataset(monkeypatch)
    run_dir, ballast, save = small_disk / "run", small_disk / "ballast", Run.save_checkpoint

    def save_on_a_shared_disk(run):
        if run.state.step == 16:
            with suppress(OSError), ballast.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(1 << 12))
        elif run.state.step == 56:
            ballast.unlink()
        save(run)

    monkeypatch.setattr(Run, "save_checkpoint", save_on_a_shared_disk)
    wait_for_checkpoints(monkeypatch)
    flags = f"{FLAGS} --local-batch-size 5 --epochs 2 --log-steps 1 --checkpoint-steps 8 --keep-checkpoints 2"
    train_ddp.main([*flags.split(), "--run-dir", str(run_dir)])

    printed = capsys.readouterr().out.splitlines()
    lost = [line for line in printed if line.startswith("WARNING: no checkpoint at step")]
    assert [line.split("step ")[1].split(":")[0] for line in lost] == ["16", "24", "32", "40", "48"]
    assert all("No space left on device; earlier checkpoints are unchanged" in line for line in lost)
    assert sorted(checkpoints(run_dir)) == [72, 80]
    for step, path in checkpoints(run_dir).items():
        assert load_checkpoint(path)["state"]["step"] == step
    assert sum("metrics.jsonl" in line for line in printed if "WARNING" in line) == 1
    assert result(run_dir)["steps"] == 80
    with_space = [*range(1, 17), *range(57, 81)]  # all records from then are there
    assert [step for step, _ in records(run_dir, "train/loss") if step in with_space] == with_space
