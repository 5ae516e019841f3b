"""python -m cifar.predict: picture files of every kind, and its output."""

import os
import re
import struct

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, PngImagePlugin

from cifar.data import normalize
from cifar.datasets.cifar10 import CLASSES
from cifar.errors import UserError
from cifar.models import build_model
from cifar.pictures import read_image
from cifar.predict import main
from tests.helpers.checkpoints import save_weights


def gradient(height=48, width=64):
    """uint8 [height, width, 3]: red grows to the right, green downwards, blue is 40."""
    rows, columns = np.mgrid[0:height, 0:width]
    red, green = columns * 255 // max(width - 1, 1), rows * 255 // max(height - 1, 1)
    return np.stack([red, green, np.full_like(red, 40)], axis=2).astype(np.uint8)


PICTURE = gradient()
SQUARE = gradient(32, 32)
RAMP = np.tile(np.linspace(0, 255, 32).round(), (32, 1))
NEGATIVE = np.where(RAMP < 20, -np.inf, np.where(RAMP > 240, np.inf, RAMP * 0.3 - 20))
LOWER_HALF = np.arange(32)[:, None] >= 16
HOLES = np.dstack([SQUARE, np.where(LOWER_HALF, 0, 255).repeat(32, 1).astype(np.uint8)])


def tensor(pixels):
    return torch.from_numpy(pixels).permute(2, 0, 1)


def read(path, image, **options):
    image.save(path, **options)
    return read_image(path, 32)


def converted(mode):
    """Return the picture in a mode, and as it is to be read."""
    image = Image.fromarray(PICTURE).convert(mode)
    return image, np.array(ImageOps.fit(image.convert("RGB"), (32, 32), Image.Resampling.LANCZOS))


def gray(pixels, wanted, dtype):
    return Image.fromarray(pixels.astype(dtype)), wanted[:, :, None]


@pytest.mark.parametrize(
    ("suffix", "case", "tolerance"),
    [
        ("png", converted("RGB"), 0),
        ("png", converted("L"), 0),
        ("png", converted("P"), 0),
        ("gif", converted("P"), 3),
        ("jpg", converted("CMYK"), 12),
        ("bmp", converted("RGB"), 0),
        ("png", (Image.fromarray(HOLES), np.where(LOWER_HALF[:, :, None], 255, SQUARE)), 0),
        ("png", gray(257 * RAMP, RAMP, np.uint16), 1.2),
        ("tif", gray(257 * RAMP, RAMP, ">u2"), 1.2),
        ("pgm", gray(257 * RAMP, RAMP, np.int32), 1.2),
        ("pgm", gray(40 * RAMP, 40 * RAMP / 257, np.int32), 1.2),
        ("tif", gray(RAMP, RAMP, np.uint16), 1.2),
        ("tif", gray(RAMP, RAMP, np.int32), 1.2),
        ("tif", gray(100_000 * RAMP - 7, RAMP, np.int32), 1.2),
        ("tif", gray(RAMP, RAMP, np.float32), 1.2),
        ("tif", gray(RAMP / 255, RAMP, np.float32), 1.2),
        ("tif", gray(RAMP / 510, RAMP / 2, np.float32), 1.2),
        ("tif", gray(NEGATIVE, ((RAMP - 25) / (239 - 25) * 255).clip(0, 255), np.float32), 1.2),
        ("tif", gray(np.where(RAMP < 100, np.nan, RAMP / 255), np.where(RAMP < 100, 0, RAMP), np.float32), 1.2),
        ("tif", gray(np.zeros((32, 32)), np.zeros((32, 32)), np.float32), 0),
        ("pfm", gray(RAMP / 255, RAMP, np.float32), 1.2),
    ],
)
def test_modes_become_rgb(tmp_path, suffix, case, tolerance):
    """Deep gray is scaled to bytes, and what is transparent is white."""
    image, wanted = case
    pixels = read(tmp_path / f"x.{suffix}", image)
    assert (pixels.shape, pixels.dtype) == ((3, 32, 32), torch.uint8)
    assert np.abs(pixels.permute(1, 2, 0).numpy().astype(float) - wanted).max() <= tolerance


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
    stored = Image.fromarray(SQUARE)
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = UPRIGHT.get(orientation, lambda image: image)(stored)
    assert torch.equal(read(tmp_path / f"x.{suffix}", stored, exif=exif), tensor(np.array(upright)))


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
@pytest.mark.filterwarnings("error")
def test_damaged_exif_is_ignored(tmp_path, suffix):
    endless = struct.pack(">HHIHH", 0x0112, 3, 2**32 - 1, 6, 0)  # an orientation of four billion numbers
    plain = read(tmp_path / f"plain.{suffix}", Image.fromarray(SQUARE))
    for exif in (b"garbage", b"Exif\0\0MM\0*" + struct.pack(">IH", 8, 1) + endless + bytes(4)):
        assert torch.equal(read(tmp_path / f"x.{suffix}", Image.fromarray(SQUARE), exif=exif), plain)


def test_middle_square_of_any_size(tmp_path):
    """And of the first frame."""
    wide = np.zeros((32, 96, 3), np.uint8)
    wide[:, 32:64] = 250
    first, second = Image.fromarray(wide), Image.new("RGB", (96, 32), (0, 0, 200))
    assert bool((read(tmp_path / "x.gif", first, save_all=True, append_images=[second])[:, :, 4:28] == 250).all())
    for height, width in ((1, 1), (1, 3000), (3000, 2), (31, 33)):
        assert read(tmp_path / "x.png", Image.fromarray(gradient(height, width))).shape == (3, 32, 32)


@pytest.mark.filterwarnings("error")
def test_large_picture_is_read_and_bomb_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)  # Pillow warns above, and refuses twice as many
    assert read(tmp_path / "x.png", Image.fromarray(gradient(50, 60))).shape == (3, 32, 32)
    with pytest.raises(UserError, match="decompression bomb"):
        read(tmp_path / "x.png", Image.fromarray(gradient(70, 60)))


def test_picture_with_much_text_is_read(tmp_path):
    text = PngImagePlugin.PngInfo()
    text.add_text("notes", 3_000_000 * "x", zip=True)
    assert read(tmp_path / "x.png", Image.fromarray(gradient()), pnginfo=text).shape == (3, 32, 32)


def test_unreadable_file_is_one_line(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "cut", "png")
    os.truncate(tmp_path / "cut", 4000)
    (tmp_path / "text").write_bytes(b"no picture")
    os.mkfifo(tmp_path / "pipe")
    Image.fromarray(PICTURE).save(tmp_path / "script", "eps")
    Image.fromarray(np.full((9, 9), np.nan, np.float32)).save(tmp_path / "nan", "tiff")
    reasons = {
        "text": "cannot identify", "cut": "truncated", "nowhere": "No such file", ".": "a directory", "pipe": "a pipe",
        "script": "cannot identify", "nan": "zero-size",
    }  # fmt: skip
    for name, reason in reasons.items():
        with pytest.raises(UserError, match=rf"^{tmp_path / name} cannot be read as a picture: .*{reason}.*\Z"):
            read_image(tmp_path / name, 32)


def test_three_most_probable_classes_of_each_picture(tmp_path, capsys):
    """Those that cannot be read leave the others, and status 2."""
    torch.manual_seed(0)
    model = build_model("net", 10)
    bad, wanted, paths = str(tmp_path), [], [str(tmp_path / "a.png"), str(tmp_path / "b.png")]
    for path, pixels in zip(paths, (SQUARE, 255 - SQUARE), strict=True):
        Image.fromarray(pixels).save(path)
        with torch.no_grad():
            top = model.eval()(normalize(tensor(pixels)[None])).softmax(1)[0].topk(3)
        names = [f"{CLASSES[i]} {100 * p:.1f} %" for p, i in zip(top.values, top.indices, strict=True)]
        wanted.append(f"{path}: {', '.join(names)}")
    checkpoint = save_weights(tmp_path / "c.pt", model)
    main([checkpoint, *paths])
    out, err = capsys.readouterr()
    assert (out.splitlines(), err) == (wanted, "")
    with pytest.raises(SystemExit) as exited:
        main([checkpoint, bad, paths[0], bad, paths[1]])
    assert exited.value.code == 2
    out, err = capsys.readouterr()
    reason = f"cifar.predict: error: {bad} cannot be read as a picture: it is a directory, a pipe or a device\n"
    assert (out.splitlines(), err) == (wanted, reason * 2)


def test_synthetic_checkpoint_with_two_classes(tmp_path, capsys):
    Image.fromarray(PICTURE).save(tmp_path / "a.png")
    checkpoint = save_weights(tmp_path / "c.pt", build_model("net", 2), dataset="synthetic", classes=["left", "right"])
    main([checkpoint, str(tmp_path / "a.png")])
    out, err = capsys.readouterr()
    assert re.search(r": (left|right) [\d.]+ %, (left|right) [\d.]+ %\n$", out)
    assert "synthetic" in err


def test_mistakes(tmp_path):
    checkpoint = save_weights(tmp_path / "c.pt", build_model("net", 10), name="resnet")
    for argv, reason in (([checkpoint], "no picture"), ([checkpoint, "x"], "'resnet'"), ([__file__, "x"], "not a che")):
        with pytest.raises(UserError, match=reason):
            main(argv)
