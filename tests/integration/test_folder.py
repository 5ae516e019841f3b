"""A folder of pictures in real processes: decoded once per host, and the same at 1, 2 and 3 processes."""

import re
import subprocess
import sys

import numpy as np
import PIL
import pytest
from PIL import Image

from tests.helpers.forking import free_port
from tests.helpers.processes import ROOT, clean_environment, rank_variables, records, result, train

pytestmark = pytest.mark.slow

STEPS = 30
GLOBAL_BATCH = 12
FLAGS = ["--dataset", "folder", "--recipe", "wide", "--model", "net", "--lr", 0.01, "--lr-scaling", "none",
         "--warmup-epochs", 0, "--global-batch-size", GLOBAL_BATCH, "--log-steps", 1, "--max-steps", STEPS,
         "--local-batch-size", 2]  # fmt: skip


def draw(folder, seed=0):
    """Write three classes of 100 training and 11 test pictures, of 111 sizes; 33 is odd, for shards of two ranks."""
    random = np.random.default_rng(seed)
    for label, name in enumerate(("ant", "bee", "cat")):
        for split, count in (("train", 100), ("test", 11)):
            (folder / split / name).mkdir(parents=True)
            for k in range(count):
                pixels = random.integers(0, 160, (30 + k, 40, 3)) + 45 * label
                Image.fromarray(pixels.astype(np.uint8)).save(folder / split / name / f"{k}.png")
    return folder


def test_same_curve_at_any_number_of_processes(tmp_path):
    """The pictures are decoded once; a run is resumed by other processes, and with the same pictures only."""
    one, several = tmp_path / "one", tmp_path / "several"
    for run_dir, processes, steps in ((one, 1, STEPS), (several, 3, STEPS - 10)):
        folder = draw(tmp_path / f"pets-{processes}")
        flags = [*FLAGS, "--data-dir", folder, "--run-dir", run_dir, "--max-steps", steps]
        done = train(*flags, cwd=tmp_path, processes=processes)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("decoding ") == done.stdout.count("decoding 333 pictures in ") == 1
        assert len(re.findall(r"^dataset +folder, .*: 300 training, 33 test, 3 classes$", done.stdout, re.M)) == 1
    new, flags = folder / "train" / "ant" / "new.png", ["--resume", several, "--max-steps", STEPS]
    Image.new("RGB", (9, 9)).save(new)
    refused = train(*flags, cwd=tmp_path)
    assert refused.returncode == 2
    assert "the training images have changed since that run began, from 300 images, " in refused.stderr
    new.unlink()
    done = train(*flags, cwd=tmp_path, processes=2)
    assert done.returncode == 0, done.stderr
    losses, same_losses = (dict(records(run_dir, "train/loss")) for run_dir in (one, several))
    assert list(losses) == list(range(1, STEPS + 1))
    assert same_losses == pytest.approx(losses, abs=1e-4)
    assert max(losses.values()) - min(losses.values()) > 0.01, "the losses are too alike to tell one order from another"
    assert result(several)["test_total"] == 33
    assert result(several)["test_loss"] == pytest.approx(result(one)["test_loss"], abs=1e-3)


def test_two_hosts_with_other_pictures_are_refused(tmp_path):
    """Each decodes its own folder. (Both are this machine.)"""
    port, ranks = free_port(), []
    for rank in (0, 1):
        folder = draw(tmp_path / f"host-{rank}" / "pets", seed=rank)
        place = rank_variables(rank, 2, port, alone=True)
        command = [sys.executable, ROOT / "train_ddp.py", *FLAGS, "--data-dir", folder, "--run-dir", tmp_path / "run",
                   "--device", "cpu", "--wandb", "disabled"]  # fmt: skip
        ranks.append(subprocess.Popen([str(part) for part in command], cwd=tmp_path, env=clean_environment(**place),
                                      stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))  # fmt: skip
    (_, error), (other_out, other_error) = (rank.communicate(timeout=200) for rank in ranks)
    assert list((tmp_path / "host-1" / "pets").glob(".cifar-ddp-pictures-pillow-*"))
    assert other_out.startswith(f"decoding 333 pictures in {tmp_path / 'host-1'}")
    assert [rank.returncode for rank in ranks] == [2, 2]
    (line,) = error.splitlines()
    assert "dataset folder: the hosts have different training images: 300 images, SHA-256 " in line
    assert line.count(f" (Pillow {PIL.__version__})") == 2
    assert "train_ddp.py: error:" not in other_error
