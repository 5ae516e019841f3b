"""Exported models: each of the registry, and the predictions of trained ones on the real CIFAR-10."""

import re
import sys

import pytest
import torch

from cifar.config import TrainConfig
from cifar.data import load_data, normalize
from cifar.datasets.cifar10 import CLASSES
from cifar.evaluation import evaluate
from cifar.export import FORMATS, main
from cifar.models import MODELS, build_model
from cifar.predict import build_trained_model
from tests.helpers.exported import NAME, follow
from tests.helpers.processes import result, run, train

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("processes", [1, 2])
def test_same_predictions_as_evaluation(real_data, runtime, tmp_path, processes):
    """Of all 10,000 test images, in batches of 1,000: the same classes, and scores to 1e-4."""
    flags = ["--recipe", "net-fast", "--max-steps", 200, "--dataset", "cifar10", "--data-dir", real_data]
    done = train(*flags, "--run-dir", "run", cwd=tmp_path, processes=processes)
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    data = load_data(TrainConfig(dataset="cifar10", data_dir=real_data), runtime)
    model, _ = build_trained_model(checkpoint)
    test = evaluate(model, data.test, runtime)
    assert test.accuracy == result(tmp_path / "run")["test_accuracy"] > 0.3
    with torch.no_grad():
        wanted = torch.cat([model.eval()(images) for images, _ in data.test])
    for name in FORMATS:
        out = tmp_path / f"{NAME}.{name}"
        flags = [str(checkpoint), "--format", name, "--out", str(out)]
        if (processes, name) == (1, "pt2"):  # as a command once: the imports take most of its time
            done = run([sys.executable, "-m", "cifar.export", *flags], tmp_path)
            assert (done.returncode, done.stderr) == (0, "")
            assert re.fullmatch(rf"{out}: net, 10 classes of cifar10, .*\n", done.stdout)
        else:
            main(flags)
        batches = [follow(name, tmp_path, images) for images in data.test.dataset.images.split(1000)]
        assert all(classes == list(CLASSES) for _, classes in batches)
        scores = torch.cat([batch for batch, _ in batches])
        assert torch.equal(scores.argmax(1), test.predicted)
        torch.testing.assert_close(scores, wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_every_model(tmp_path, name):
    torch.manual_seed(0)
    model = build_model(name, 7)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    size = 32 if name.startswith("net") else 40
    images = torch.randint(256, (3, 3, size, size), dtype=torch.uint8)
    metadata = {"model": name, "image_size": str(size), "classes": '["a", "b", "c", "d", "e", "f", "g"]'}
    for format_, convert in FORMATS.items():
        (tmp_path / f"{NAME}.{format_}").write_bytes(convert(model.train(), metadata))
        with torch.no_grad():
            wanted = model.eval()(normalize(images))
        for count in (1, 3):
            scores, _ = follow(format_, tmp_path, images[:count])
            torch.testing.assert_close(scores, wanted[:count], atol=1e-4, rtol=0)
