"""python -m cifar.export: the three formats, loaded and run by the guides' own code."""

import contextlib
import io
import json
import sys
from pathlib import Path

import pytest
import torch

from cifar.checkpoint import save_checkpoint
from cifar.data import normalize
from cifar.errors import UserError
from cifar.export import FORMATS, main
from cifar.models import build_model
from tests.helpers.checkpoints import content, save_weights
from tests.helpers.comparing import traces
from tests.helpers.exported import NAME, follow
from tests.helpers.parts import random_images

CLASSES = ["Käfer", 'a "dog"', "ship"]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_model("net", len(CLASSES))


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    """Return a directory with a checkpoint and its exports in all formats, and what was printed."""
    path = tmp_path_factory.mktemp("exported") / f"{NAME}.pt"
    own = {"dataset": "cifar10", "classes": CLASSES, "state": {"model": model.state_dict()}}
    save_checkpoint(path, content() | own)
    with contextlib.redirect_stdout(io.StringIO()) as text:
        for name in FORMATS:
            main([str(path), "--format", name])
    return path.parent, text.getvalue()


def test_one_file_and_one_line_for_each_format(exported):
    folder, text = exported
    assert {path.name for path in folder.iterdir()} == {f"{NAME}.{suffix}" for suffix in ("pt", *FORMATS)}
    for line, name in zip(text.splitlines(), FORMATS, strict=True):
        size = (folder / f"{NAME}.{name}").stat().st_size
        assert line == f"{folder / NAME}.{name}: net, 3 classes of cifar10, {size / 1e6:.1f} MB"


@pytest.mark.parametrize("count", [1, 2, 1000])
@pytest.mark.parametrize("name", FORMATS)
def test_scores_of_any_number_of_images(exported, model, name, count):
    images, _ = random_images(count, seed=count)
    with torch.no_grad():
        wanted = model.eval()(normalize(images))
    scores, classes = follow(name, exported[0], images)
    assert classes == CLASSES
    assert (scores.dtype, scores.requires_grad) == (torch.float32, False)
    if name == "onnx":
        torch.testing.assert_close(scores, wanted, atol=1e-6, rtol=0)
    else:
        assert torch.equal(scores, wanted)


def test_metadata(exported):
    """The same strings in every format; of the configuration, all but the paths of the machine."""
    import onnxruntime
    from safetensors import safe_open

    private = {"data_dir", "data_url", "run_dir", "resume", "evaluate"}
    config = {name: value for name, value in content()["config"].items() if name not in private}
    wanted = {"format_version": "1", "model": "net", "dataset": "cifar10", "classes": CLASSES, "config": config}
    wanted["image_size"] = "32"
    path = exported[0] / NAME
    extra = dict.fromkeys(wanted, "")
    torch.export.load(f"{path}.pt2", extra_files=extra)
    session = onnxruntime.InferenceSession(f"{path}.onnx")
    with safe_open(f"{path}.safetensors", "pt") as file:
        header = file.metadata()
    for metadata in (extra, session.get_modelmeta().custom_metadata_map, header):
        assert metadata | {name: json.loads(metadata[name]) for name in ("classes", "config")} == wanted
    (images,), (scores,) = session.get_inputs(), session.get_outputs()
    assert (images.name, images.shape, images.type) == ("images", ["n", 3, 32, 32], "tensor(uint8)")
    assert (scores.name, scores.shape, scores.type) == ("scores", ["n", 3], "tensor(float)")


def test_out_is_replaced(tmp_path, model, capsys):
    checkpoint = save_weights(tmp_path / "c.pt", model, dataset="synthetic", classes=CLASSES)
    (out := tmp_path / "x.safetensors").write_text("old")
    main([checkpoint, "--format", "safetensors", "--out", str(out)])
    assert out.stat().st_size > 200_000
    assert {path.name for path in tmp_path.iterdir()} == {"c.pt", "x.safetensors"}
    printed = capsys.readouterr()
    assert "3 classes of synthetic" in printed.out
    assert "synthetic dataset is not CIFAR-10" in printed.err


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        ("c.pt --out c.pt", r"to c.pt: name another file with --out, ending in \.pt2"),
        ("c.pt --out x.onnx", r"ending in \.pt2"),
        ("c.pt --format safetensors --out nowhere/x.safetensors", "No such .*: name another file"),
        ("c.safetensors --format safetensors", "to c.safetensors: name another file"),
        ("missing.pt", "No such file"),
        ("unknown.pt", "'resnet', which this version does not have"),
    ],
)
def test_mistakes(tmp_path, monkeypatch, model, argv, reason):
    monkeypatch.chdir(tmp_path)
    for name in ("c.pt", "c.safetensors"):
        save_weights(Path(name), model, classes=CLASSES)
    save_weights(Path("unknown.pt"), model, "resnet", classes=CLASSES)
    before = traces(tmp_path)
    with pytest.raises(UserError, match=reason) as caught:
        main(argv.split())
    assert "\n" not in str(caught.value)
    assert traces(tmp_path) == before


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_missing_package_is_one_line(tmp_path, model, monkeypatch, package):
    for name in [name for name in sys.modules if name.split(".")[0] == "onnxscript"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"{package}.*: pip install -e '.\[export\]'") as caught:
        main([save_weights(tmp_path / "c.pt", model, classes=CLASSES), "--format", "onnx"])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "c.onnx").exists()
