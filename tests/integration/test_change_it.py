"""README's examples of how to change the program, followed to the letter in a copy of it."""

import re
import shlex
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

from cifar.checkpoint import load_checkpoint
from tests.helpers.processes import ROOT, records, result, run

pytestmark = pytest.mark.slow

TEXT = (ROOT / "README.md").read_text()
COLORS = {"blue": (30, 40, 200), "green": (20, 180, 50), "red": (210, 30, 40)}


@pytest.fixture(scope="module")
def changed(tmp_path_factory):
    """Return a copy of the program with the examples, and arrays of three classes."""
    folder = tmp_path_factory.mktemp("changed")
    shutil.copytree(ROOT / "cifar", folder / "cifar", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "train_ddp.py", folder)
    examples = re.findall(r"```python\n# (\S+?)(?:: (\w+))?\n(.*?)```", TEXT, re.S)
    assert len(examples) == 5
    for path, registry, code in examples:
        place = folder / path
        if not registry:  # a whole file
            assert not place.exists()
            place.write_text(code)
            continue
        lines = code.splitlines(keepends=True)
        imports = "".join(line for line in lines if not line.startswith(" "))
        entry = "".join(line for line in lines if line.startswith(" "))
        text, times = re.subn(rf"(\n{registry}\b.*= {{\n)", lambda found, new=entry: found[1] + new, place.read_text())
        assert times == 1
        place.write_text(text.replace("\nfrom", f"\n{imports}from", 1))
    arrays = {"classes": list(COLORS)}
    for split, count in (("train", 40), ("test", 5)):
        colors = np.array(list(COLORS.values()))[:, None] + np.arange(count)[None, :, None]  # [class, k, channel]
        images = np.broadcast_to(colors.reshape(-1, 3, 1, 1), (3 * count, 3, 32, 32))
        arrays |= {f"{split}_images": images.astype(np.uint8), f"{split}_labels": np.arange(3).repeat(count)}
    (folder / "mine").mkdir()
    np.savez(folder / "mine" / "arrays.npz", **arrays)
    Image.new("RGB", (40, 60), COLORS["red"]).save(folder / "mine" / "red.png")
    return folder


def run_in(folder, *command):
    return run([sys.executable, *command], folder, PYTHONPATH=str(folder)).stdout


def test_readme_command_trains_the_examples(changed):
    """On few images."""
    (command,) = re.findall(r"`python (train_ddp\.py [^`]*--recipe mlp[^`]*)`", TEXT)
    flags = "--run-dir run --device cpu --wandb disabled --local-batch-size 20 --log-steps 1"
    output, run_dir = run_in(changed, *shlex.split(f"{command} {flags}")), changed / "run"
    assert re.search(r"^dataset +arrays, from /\S+/mine: 120 training, 15 test, 3 classes$", output, re.M)
    assert re.search(r"^model +mlp, ", output, re.M)
    assert re.search(r"^recipe +mlp, augmentation crop-flip", output, re.M)
    assert "Accuracy for class: green is 100.0 %" in output
    assert "synthetic" not in output
    assert "WARNING" not in output

    got = result(run_dir)
    assert (got["recipe"], got["model"], got["dataset"], got["test_total"]) == ("mlp", "mlp", "arrays", 15)
    assert got["test_accuracy"] > 0.9
    page = (run_dir / "index.html").read_text()
    assert all(name in page and records(run_dir, f"test_class/{name}") for name in COLORS)
    assert (run_dir / "report.png").exists()

    newest = max((run_dir / "checkpoints").glob("step-*.pt"))
    content = load_checkpoint(newest)
    assert (content["dataset"], list(content["classes"])) == ("arrays", list(COLORS))
    text = run_in(changed, "-m", "cifar.predict", newest, "mine/red.png")
    assert "red" in text
    assert "plane" not in text
