"""A folder of pictures in real processes: decoded once per host, and the same at 1, 2 and 3 processes."""

import re
import socket
import subprocess
import sys

import numpy as np
import PIL
import pytest
import torch
from PIL import Image

from cifar.checkpoint import checkpoint_path, load_checkpoint
from cifar.datasets.folder import prepare_folder
from tests.helpers.processes import ROOT, clean_environment, rank_variables, records, result, train

pytestmark = pytest.mark.slow

STEPS = 40
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


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return the directory and the output of a run by the number of processes; each has decoded the pictures."""
    found = {}
    for processes in (1, 2, 3):
        folder = tmp_path_factory.mktemp(f"{processes}")
        flags = [*FLAGS, "--data-dir", draw(folder / "pets"), "--run-dir", folder / "run"]
        output = train(*flags, cwd=folder, processes=processes)
        assert output.returncode == 0, output.stderr
        found[processes] = folder / "run", output.stdout
    return found


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_decoded_once_and_announced_once(runs, processes):
    run_dir, text = runs[processes]
    assert text.count("decoding 333 pictures in ") == 1
    assert "decoding" not in text.replace("decoding 333 pictures", "")
    assert len(re.findall(r"^dataset +folder, .*: 300 training, 33 test, 3 classes$", text, re.M)) == 1
    assert result(run_dir)["test_total"] == 33


@pytest.mark.parametrize("processes", [2, 3])
def test_same_curve_and_accuracy_as_one_process(runs, processes):
    one, several = (records(runs[n][0], "train/loss") for n in (1, processes))
    assert [step for step, _ in several] == list(range(1, STEPS + 1))
    assert dict(several) == pytest.approx(dict(one), abs=1e-4)
    losses = [loss for _, loss in one]
    assert max(losses) - min(losses) > 0.01, "the losses are too alike to tell one order from another"
    one, several = (load_checkpoint(checkpoint_path(runs[n][0], STEPS))["state"]["model"] for n in (1, processes))
    assert all(torch.allclose(one[name], several[name], atol=1e-4) for name in one)
    assert result(runs[processes][0])["test_loss"] == pytest.approx(result(runs[1][0])["test_loss"], abs=1e-3)


def test_resume_at_another_number_of_processes(runs, tmp_path):
    """And not with other pictures."""
    folder = draw(tmp_path / "pets")
    prepare_folder(folder)
    run_dir = tmp_path / "run"
    flags = [*FLAGS, "--data-dir", folder, "--run-dir", run_dir, "--max-steps", STEPS - 10]
    assert train(*flags, cwd=tmp_path, processes=2).returncode == 0
    new = folder / "train" / "ant" / "new.png"
    Image.new("RGB", (9, 9)).save(new)
    flags = ["--resume", run_dir, "--max-steps", STEPS]
    refused = train(*flags, cwd=tmp_path, CIFAR_DATA_DIR=str(folder))
    assert refused.returncode == 2
    assert "the training images have changed since that run began, from 300 images, " in refused.stderr
    new.unlink()
    output = train(*flags, cwd=tmp_path, CIFAR_DATA_DIR=str(folder))
    assert output.returncode == 0, output.stderr
    assert dict(records(run_dir, "train/loss")) == pytest.approx(dict(records(runs[1][0], "train/loss")), abs=1e-4)


def test_two_hosts_with_other_pictures_are_refused(tmp_path):
    """Each decodes its own folder. (Both are this machine.)"""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in (0, 1):
        folder = draw(tmp_path / f"host-{rank}" / "pets", seed=rank)
        place = rank_variables(rank, 2, port) | {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
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
