"""A folder of pictures in real processes: decoded once per host, and the same at 1, 2 and 3 processes."""

import re

import numpy as np
import pytest
from PIL import Image

from tests.helpers.processes import records, result, train

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
