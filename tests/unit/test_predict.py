"""python -m cifar.predict: picture files of every kind, and its output."""

import io
import math
import os
import struct
import warnings

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from cifar.data import normalize
from cifar.datasets.cifar10 import CLASSES
from cifar.errors import UserError
from cifar.models import build_model
from cifar.pictures import FORMATS, SUFFIXES, read_image
from cifar.predict import main, predict
from tests.helpers.checkpoints import save_weights


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


RAMP = np.tile(np.linspace(0, 255, 32).round(), (32, 1))
NEGATIVE = np.where(RAMP < 20, -np.inf, np.where(RAMP > 240, np.inf, RAMP * 0.3 - 20))


@pytest.mark.parametrize(
    ("suffix", "pixels", "wanted"),
    [
        ("png", (257 * RAMP).astype(np.uint16), RAMP),
        ("tif", (257 * RAMP).astype(">u2"), RAMP),
        ("pgm", (257 * RAMP).astype(np.int32), RAMP),
        ("png", (40 * RAMP).astype(np.uint16), 40 * RAMP / 257),
        ("pgm", (40 * RAMP).astype(np.int32), 40 * RAMP / 257),
        ("tif", RAMP.astype(np.uint16), RAMP),
        ("tif", RAMP.astype(np.int32), RAMP),
        ("tif", (100_000 * RAMP - 7).astype(np.int32), RAMP),
        ("tif", RAMP.astype(np.float32), RAMP),
        ("tif", (RAMP / 255).astype(np.float32), RAMP),
        ("tif", (RAMP / 510).astype(np.float32), RAMP / 2),
        ("tif", (RAMP / 100 - 1).astype(np.float32), RAMP),
        ("tif", NEGATIVE.astype(np.float32), ((RAMP - 25) / (239 - 25) * 255).clip(0, 255)),
        ("tif", np.where(RAMP < 100, np.nan, RAMP / 255).astype(np.float32), np.where(RAMP < 100, 0, RAMP)),
        ("tif", np.zeros((32, 32), np.float32), np.zeros((32, 32))),
        ("pfm", (RAMP / 255).astype(np.float32), RAMP),
    ],
)
def test_deep_gray_is_scaled(tmp_path, suffix, pixels, wanted):
    got = read(tmp_path / f"x.{suffix}", Image.fromarray(pixels))
    assert np.abs(got.numpy() - wanted).max() <= 1.2


def test_picture_without_a_finite_pixel_is_refused(tmp_path):
    with pytest.raises(UserError, match="finite"):
        read(tmp_path / "x.tif", Image.fromarray(np.full((9, 9), np.nan, np.float32)))


def test_transparent_is_white(tmp_path):
    holes = np.dstack([gradient(32, 32), np.zeros((32, 32), np.uint8)])
    holes[:16, :, 3] = 255
    pixels = read(tmp_path / "x.png", Image.fromarray(holes))
    assert torch.equal(pixels[:, :16], tensor(gradient(32, 32)[:16]))
    assert bool((pixels[:, 16:] == 255).all())


def test_transparent_level_of_deep_gray_is_white(tmp_path):
    levels = np.full((32, 32), 20_000, np.uint16)
    levels[16:] = 5_000
    pixels = read(tmp_path / "x.png", Image.fromarray(levels), transparency=5_000)
    assert (pixels[:, :15] == 78).all()
    assert (pixels[:, 17:] == 255).all()


# What a viewer does to the picture as it is stored.
UPRIGHT = {
    2: ImageOps.mirror,
    3: lambda image: image.rotate(180),
    4: ImageOps.flip,
    5: lambda image: ImageOps.mirror(image.rotate(-90)),
    6: lambda image: image.rotate(-90),
    7: lambda image: ImageOps.mirror(image.rotate(90)),
    8: lambda image: image.rotate(90),
}


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("orientation", range(10))
def test_exif_orientation(tmp_path, orientation, suffix):
    stored = Image.fromarray(gradient(32, 32))
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = UPRIGHT.get(orientation, lambda image: image)(stored)
    assert torch.equal(read(tmp_path / f"x.{suffix}", stored, exif=exif), tensor(np.array(upright)))


def entry(tag, kind, count, value):
    return struct.pack(">HHI4s", tag, kind, count, value)


TURNED = entry(0x0112, 3, 1, b"\0\6")


@pytest.mark.parametrize(
    ("entries", "turned"),
    [
        (None, False),
        ([entry(0x0112, 2, 2, b"6\0")], False),
        ([entry(0x0112, 99, 1, b"\0\6")], False),
        ([entry(0x0112, 11, 1, struct.pack(">f", math.nan))], False),
        ([entry(0x0112, 3, 2**32 - 1, b"\0\6")], False),
        ([TURNED, entry(0x011A, 2, 4, b"abc")], True),
        ([TURNED, entry(0x8769, 4, 1, b"\xff" * 4)], True),
        ([TURNED, entry(0x010E, 2, 5000, b"\0\0\0\x26")], True),
    ],
)
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_damaged_exif_is_ignored(tmp_path, suffix, entries, turned):
    """`turned`: the orientation is whole, and counts."""
    exif = b"garbage"
    if entries is not None:
        exif = b"Exif\0\0MM\0*" + struct.pack(">IH", 8, len(entries)) + b"".join(entries) + bytes(4)
    image = Image.fromarray(gradient(32, 32))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = read(tmp_path / f"plain.{suffix}", image)
        got = read(tmp_path / f"x.{suffix}", image, exif=exif)
    assert torch.equal(got, plain.rot90(-1, (1, 2)) if turned else plain)


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
    text, cut, pipe, empty, script = (tmp_path / f"{name}.png" for name in ("text", "cut", "pipe", "empty", "script"))
    Image.fromarray(gradient()).save(script, "eps")
    os.mkfifo(pipe)
    empty.touch()
    text.write_bytes(b"no picture")
    cut.write_bytes(file.getvalue()[:4000])
    nowhere, looped = tmp_path / "x.png", tmp_path / "loop.png"
    looped.symlink_to(looped)
    reasons = {
        text: "not a picture", cut: "truncated", empty: "not a picture", nowhere: "No such", looped: "symbolic links",
        tmp_path: "a directory", pipe: "a pipe", script: "not a picture", tmp_path / ("x" * 300): "too long",
    }  # fmt: skip
    for path, reason in reasons.items():
        with pytest.raises(UserError, match=reason) as caught:
            read_image(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_suffixes_are_those_of_supported_formats():
    """MPO, several JPEGs in one file, is opened as a JPEG."""
    registered = Image.registered_extensions()
    assert {registered[suffix].replace("MPO", "JPEG") for suffix in SUFFIXES if suffix in registered} <= FORMATS.keys()
    assert {".jpg", ".png", ".webp"} < SUFFIXES


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
    main([save_weights(tmp_path / "c.pt", model), *paths])
    out, err = capsys.readouterr()
    assert out.splitlines() == wanted
    assert err == ""


def test_unreadable_pictures_leave_the_others(tmp_path, capsys):
    Image.fromarray(gradient()).save(tmp_path / "a.png")
    good, bad = str(tmp_path / "a.png"), str(tmp_path)
    checkpoint = save_weights(tmp_path / "c.pt", build_model("net", 10))
    with pytest.raises(SystemExit) as exited:
        main([checkpoint, bad, good, bad, good])
    assert exited.value.code == 2
    out, err = capsys.readouterr()
    assert [line.split(": ")[0] for line in out.splitlines()] == [good, good]
    assert (
        err.splitlines()
        == [f"cifar.predict: error: {bad} cannot be read as a picture: it is a directory, a pipe or a device"] * 2
    )


def test_dropout_is_off():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(), torch.nn.Linear(3072, 2))
    images = tensor(gradient(32, 32))[None]
    assert torch.equal(predict(model, images), predict(model, images))


def test_synthetic_checkpoint_with_two_classes(tmp_path, capsys):
    Image.fromarray(gradient()).save(tmp_path / "a.png")
    checkpoint = save_weights(tmp_path / "c.pt", build_model("net", 2), dataset="synthetic", classes=["left", "right"])
    main([checkpoint, str(tmp_path / "a.png")])
    out, err = capsys.readouterr()
    assert out.count(" %") == 2
    assert "left" in out
    assert "right" in out
    assert "synthetic" in err


def test_mistakes(tmp_path):
    checkpoint = save_weights(tmp_path / "c.pt", build_model("net", 10), name="resnet")
    for argv, reason in (([checkpoint], "no picture"), ([checkpoint, "x"], "'resnet'"), ([__file__, "x"], "not a che")):
        with pytest.raises(UserError, match=reason):
            main(argv)
