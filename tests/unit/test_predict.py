"""python -m cifar.predict: picture files of every kind, and its output."""

import io
import warnings

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from cifar.checkpoint import save_checkpoint
from cifar.data import normalize
from cifar.datasets.cifar10 import CLASSES
from cifar.errors import UserError
from cifar.models import build_model
from cifar.predict import main, predict, read_image


def gradient(height=48, width=64):
    """uint8 [height, width, 3]: red grows to the right, green downwards, blue is 40."""
    rows, columns = np.mgrid[0:height, 0:width]
    red, green = columns * 255 // max(width - 1, 1), rows * 255 // max(height - 1, 1)
    return np.stack([red, green, np.full_like(red, 40)], axis=2).astype(np.uint8)


def tensor(pixels):
    return torch.from_numpy(pixels).permute(2, 0, 1)


def read(path, image, **options):
    image.save(path, **options)
    return read_image(path)


def save(path, model, name="net", dataset="cifar10", classes=CLASSES):
    state = {"model": model.state_dict(), "running_loss": [0.0]}
    config = {"model": name}
    save_checkpoint(path, {"format": 2, "config": config, "dataset": dataset, "classes": list(classes), "state": state})
    return str(path)


@pytest.mark.parametrize(
    ("suffix", "mode"), [("png", "RGB"), ("png", "L"), ("png", "P"), ("gif", "P"), ("jpg", "CMYK"), ("bmp", "RGB")]
)
def test_picture_modes_become_rgb(tmp_path, suffix, mode):
    picture = Image.fromarray(gradient()).convert(mode)
    pixels = read(tmp_path / f"x.{suffix}", picture)
    assert pixels.shape == (3, 32, 32)
    assert pixels.dtype == torch.uint8
    wanted = ImageOps.fit(picture.convert("RGB"), (32, 32), Image.Resampling.LANCZOS)
    difference = pixels.int() - tensor(np.array(wanted)).int()
    assert difference.abs().max() <= (12 if suffix == "jpg" else 3 if suffix == "gif" else 0)


def test_16_bit_gray_is_scaled(tmp_path):
    levels = np.linspace(0, 65535, 32).astype(np.uint16)
    pixels = read(tmp_path / "x.png", Image.fromarray(np.tile(levels, (32, 1))))
    assert torch.equal(pixels[0, 0], torch.from_numpy((levels >> 8).astype(np.uint8)))


def test_transparent_is_white(tmp_path):
    holes = np.dstack([gradient(32, 32), np.zeros((32, 32), np.uint8)])
    holes[:16, :, 3] = 255
    pixels = read(tmp_path / "x.png", Image.fromarray(holes))
    assert torch.equal(pixels[:, :16], tensor(gradient(32, 32)[:16]))
    assert bool((pixels[:, 16:] == 255).all())


def test_exif_orientation(tmp_path):
    turned = Image.fromarray(gradient(32, 32)).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    assert torch.equal(read(tmp_path / "x.png", turned, exif=exif), tensor(gradient(32, 32)))


def test_first_frame_of_an_animation(tmp_path):
    first, second = Image.new("RGB", (40, 40), (200, 0, 0)), Image.new("RGB", (40, 40), (0, 0, 200))
    pixels = read(tmp_path / "x.gif", first, save_all=True, append_images=[second])
    assert pixels[:, 5, 5].tolist() == [200, 0, 0]


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 3000), (3000, 2), (31, 33)])
def test_any_size(tmp_path, height, width):
    assert read(tmp_path / "x.png", Image.fromarray(gradient(height, width))).shape == (3, 32, 32)


def test_middle_square(tmp_path):
    wide = np.zeros((32, 96, 3), np.uint8)
    wide[:, 32:64] = 250
    assert bool((read(tmp_path / "x.png", Image.fromarray(wide))[:, :, 4:28] == 250).all())


def test_large_picture_is_read_and_bomb_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)  # Pillow warns above, and refuses twice as many
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(tmp_path / "x.png", Image.fromarray(gradient(50, 60))).shape == (3, 32, 32)
    with pytest.raises(UserError, match="decompression bomb"):
        read(tmp_path / "x.png", Image.fromarray(gradient(70, 60)))


def test_unreadable_file_is_one_line(tmp_path):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(file, "png")
    text, cut = tmp_path / "text.png", tmp_path / "cut.png"
    text.write_bytes(b"no picture")
    cut.write_bytes(file.getvalue()[:4000])
    for path, reason in ((text, "not a pic"), (cut, "trunc"), (tmp_path / "x.png", "No such"), (tmp_path, "directory")):
        with pytest.raises(UserError, match=reason) as caught:
            read_image(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_three_most_probable_classes_of_each_picture(tmp_path, capsys):
    torch.manual_seed(0)
    model = build_model("net", 10)
    wanted, paths = [], [str(tmp_path / "a.png"), str(tmp_path / "b.png")]
    for path, pixels in zip(paths, (gradient(32, 32), 255 - gradient(32, 32)), strict=True):
        Image.fromarray(pixels).save(path)
        with torch.no_grad():
            top = model.eval()(normalize(tensor(pixels)[None])).softmax(1)[0].topk(3)
        names = [f"{CLASSES[i]} {100 * p:.1f} %" for p, i in zip(top.values, top.indices, strict=True)]
        wanted.append(f"{path}: {', '.join(names)}")
    main([save(tmp_path / "c.pt", model), *paths])
    out, err = capsys.readouterr()
    assert out.splitlines() == wanted
    assert err == ""


def test_dropout_is_off():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(), torch.nn.Linear(3072, 2))
    images = tensor(gradient(32, 32))[None]
    assert torch.equal(predict(model, images), predict(model, images))


def test_synthetic_checkpoint_with_two_classes(tmp_path, capsys):
    Image.fromarray(gradient()).save(tmp_path / "a.png")
    checkpoint = save(tmp_path / "c.pt", build_model("net", 2), dataset="synthetic", classes=["left", "right"])
    main([checkpoint, str(tmp_path / "a.png")])
    out, err = capsys.readouterr()
    assert out.count(" %") == 2
    assert "left" in out
    assert "right" in out
    assert "synthetic" in err


def test_mistakes(tmp_path):
    checkpoint = save(tmp_path / "c.pt", build_model("net", 10), name="resnet")
    for argv, reason in (([checkpoint], "no picture"), ([checkpoint, "x"], "'resnet'"), ([__file__, "x"], "not a che")):
        with pytest.raises(UserError, match=reason):
            main(argv)
