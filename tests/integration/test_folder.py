"""A folder of pictures in real processes: decoded once per host, and the same at 1, 2 and 3 processes."""

import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from cifar.pictures import read_image
from tests.helpers.processes import records, result, run, train

pytestmark = pytest.mark.slow

STEPS = 30
GLOBAL_BATCH = 12
FLAGS = ["--dataset", "folder", "--recipe", "wide", "--model", "net", "--lr", 0.01, "--lr-scaling", "none",
         "--warmup-epochs", 0, "--global-batch-size", GLOBAL_BATCH, "--log-steps", 1, "--max-steps", STEPS,
         "--local-batch-size", 2]  # fmt: skip


def draw(folder):
    """Write three classes of 100 training and 11 test pictures, of 111 sizes; 33 is odd, for shards of two ranks."""
    random = np.random.default_rng(0)
    for label, name in enumerate(("ant", "bee", "cat")):
        for split, count in (("train", 100), ("test", 11)):
            (folder / split / name).mkdir(parents=True)
            for k in range(count):
                pixels = random.integers(0, 160, (30 + k, 40, 3)) + 45 * label
                Image.fromarray(pixels.astype(np.uint8)).save(folder / split / name / f"{k}.png")
    return folder


def test_images_of_another_size(tmp_path):
    """Training, resume, evaluation, prediction and export follow."""
    folder, run_dir = draw(tmp_path / "pets"), tmp_path / "run"
    picture, exported = folder / "test" / "ant" / "0.png", tmp_path / "x.pt2"
    data = ["--dataset", "folder", "--data-dir", folder, "--image-size", 48, "--augment", "crop-flip", "--tta", "crop"]
    flags = [*data, "--model", "speed", "--local-batch-size", 30, "--run-dir", run_dir, "--max-steps", 4]
    train(*flags, cwd=tmp_path, processes=2)
    train("--resume", run_dir, "--max-steps", 6, cwd=tmp_path)
    assert f"{100 * result(run_dir)['test_accuracy']:.2f} %" in train("--evaluate", run_dir, cwd=tmp_path).stdout
    (line,) = run([sys.executable, "-m", "cifar.predict", run_dir, picture], tmp_path).stdout.splitlines()
    run([sys.executable, "-m", "cifar.export", run_dir, "--out", exported], tmp_path)
    scores = torch.export.load(exported).module()(read_image(picture, 48)[None])
    best = int(scores.argmax())
    assert f"{picture}: {('ant', 'bee', 'cat')[best]} {100 * scores.softmax(1)[0, best]:.1f} %" in line


def test_same_curve_at_any_number_of_processes(tmp_path):
    """The pictures are decoded once; a run is resumed by other processes."""
    one, several = tmp_path / "one", tmp_path / "several"
    for run_dir, processes, steps in ((one, 1, STEPS), (several, 3, STEPS - 10)):
        folder = draw(tmp_path / f"pets-{processes}")
        flags = [*FLAGS, "--data-dir", folder, "--run-dir", run_dir, "--max-steps", steps]
        done = train(*flags, cwd=tmp_path, processes=processes)
        assert done.stdout.count("decoding ") == done.stdout.count("decoding 333 pictures in ") == 1
        assert len(re.findall(r"^dataset +folder, .*: 300 training, 33 test, 3 classes$", done.stdout, re.M)) == 1
    done = train("--resume", several, "--max-steps", STEPS, cwd=tmp_path, processes=2)
    losses, same_losses = (dict(records(run_dir, "train/loss")) for run_dir in (one, several))
    assert list(losses) == list(range(1, STEPS + 1))
    assert same_losses == pytest.approx(losses, abs=1e-4)
    assert max(losses.values()) - min(losses.values()) > 0.01, "the losses are too alike to tell one order from another"
    assert result(several)["test_total"] == 33
    assert result(several)["test_loss"] == pytest.approx(result(one)["test_loss"], abs=1e-3)
