"""python -m cifar.predict: picture files of every kind, and its output."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from cifar import predict
from cifar.checkpoint import save_checkpoint
from cifar.data import normalize
from cifar.datasets.cifar10 import CLASSES, load_cifar10
from cifar.errors import UserError
from cifar.models import build_model


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return build_model("net", 10).eval()


@pytest.fixture(scope="module")
def checkpoint(net, tmp_path_factory):
    path = tmp_path_factory.mktemp("predict") / "step-00000001.pt"
    save_checkpoint(path, content(net))
    return path


def content(model, name="net", **changes):
    state = {"model": model.state_dict() if model else {}, "running_loss": [0.0]}
    fields = {"format": 2, "config": {"model": name}, "dataset": "cifar10", "classes": list(CLASSES), "state": state}
    return fields | changes


def gradient(height=48, width=64):
    """uint8 [height, width, 3]: red grows to the right, green downwards, blue is 40."""
    rows, columns = np.mgrid[0:height, 0:width]
    red, green = columns * 255 // max(width - 1, 1), rows * 255 // max(height - 1, 1)
    return np.stack([red, green, np.full_like(red, 40)], axis=2).astype(np.uint8)


def read(path, image, **options):
    image.save(path, **options)
    return predict.read_image(path)


@pytest.mark.parametrize(
    ("suffix", "mode"), [("png", "RGB"), ("png", "L"), ("png", "P"), ("gif", "P"), ("jpg", "CMYK"), ("bmp", "RGB")]
)
def test_picture_modes_become_rgb(tmp_path, suffix, mode):
    picture = Image.fromarray(gradient()).convert(mode)
    pixels = read(tmp_path / f"x.{suffix}", picture)
    assert pixels.shape == (3, 32, 32)
    assert pixels.dtype == torch.uint8
    wanted = predict.ImageOps.fit(picture.convert("RGB"), (32, 32), Image.Resampling.LANCZOS)
    difference = pixels.permute(1, 2, 0).int() - torch.from_numpy(np.array(wanted)).int()
    assert difference.abs().max() <= (12 if suffix == "jpg" else 3 if suffix == "gif" else 0)


def test_16_bit_gray_is_scaled(tmp_path):
    levels = np.linspace(0, 65535, 32).astype(np.uint16)
    pixels = read(tmp_path / "x.png", Image.fromarray(np.tile(levels, (32, 1))))
    assert torch.equal(pixels[0, 0], torch.from_numpy((levels >> 8).astype(np.uint8)))


def test_transparent_is_white(tmp_path):
    holes = np.dstack([gradient(32, 32), np.zeros((32, 32), np.uint8)])
    holes[:16, :, 3] = 255
    pixels = read(tmp_path / "x.png", Image.fromarray(holes))
    assert torch.equal(pixels[:, :16], torch.from_numpy(gradient(32, 32)[:16]).permute(2, 0, 1))
    assert bool((pixels[:, 16:] == 255).all())


def test_exif_orientation(tmp_path):
    turned = Image.fromarray(gradient(32, 32)).transpose(Image.Transpose.ROTATE_90)  # the camera lay on its side
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees clockwise to see it upright"
    upright = read(tmp_path / "x.png", turned, exif=exif)
    assert torch.equal(upright, torch.from_numpy(gradient(32, 32)).permute(2, 0, 1))


def test_first_frame_of_an_animation(tmp_path):
    first, second = Image.new("RGB", (40, 40), (200, 0, 0)), Image.new("RGB", (40, 40), (0, 0, 200))
    pixels = read(tmp_path / "x.gif", first, save_all=True, append_images=[second])
    assert pixels[:, 5, 5].tolist() == [200, 0, 0]


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 3000), (3000, 2), (31, 33), (2500, 3500)])
def test_any_size(tmp_path, height, width):
    assert read(tmp_path / "x.png", Image.fromarray(gradient(height, width))).shape == (3, 32, 32)


def test_middle_square(tmp_path):
    wide = np.zeros((32, 96, 3), np.uint8)
    wide[:, 32:64] = 250
    assert bool((read(tmp_path / "x.png", Image.fromarray(wide))[:, :, 4:28] == 250).all())


def bomb():
    """A PNG whose header promises 40,000 x 40,000 pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def half_a_png():
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(file, "png")
    return file.getvalue()[:4000]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"no picture", "not a picture"),
        (b"", "not a picture"),
        (bomb(), "decompression bomb"),
        (half_a_png(), "cannot be read"),
        (None, "No such file"),
        ("folder", "directory"),
    ],
    ids=["text", "empty", "bomb", "cut", "missing", "folder"],
)
def test_unreadable_file_is_one_line(tmp_path, content, reason):
    path = tmp_path / "x.png"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=reason) as caught:
        predict.read_image(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_probabilities_are_the_models(tmp_path, net, checkpoint, real_data, capsys):
    images, _ = load_cifar10(real_data).test
    path = tmp_path / "0.png"
    Image.fromarray(images[0].permute(1, 2, 0).numpy()).save(path)
    assert torch.equal(predict.read_image(path), images[0])
    with torch.no_grad():
        wanted = net(normalize(images[:1])).softmax(1)
    assert torch.equal(predict.predict(net, images[:1]), wanted)

    predict.main([str(checkpoint), str(path)])
    top = wanted[0].topk(3)
    ranking = ", ".join(f"{CLASSES[i]} {100 * p:.1f} %" for p, i in zip(top.values, top.indices, strict=True))
    assert capsys.readouterr().out == f"{path}: {ranking}\n"


def test_mistakes(checkpoint, tmp_path):
    with pytest.raises(UserError, match="no picture is named"):
        predict.main([str(checkpoint)])
    other = tmp_path / "other.pt"
    save_checkpoint(other, content(None, "resnet"))
    with pytest.raises(UserError, match="'resnet'"):
        predict.main([str(other), "x.png"])


def test_synthetic_checkpoint_with_two_classes(tmp_path, capsys):
    model = build_model("net", 2)
    save_checkpoint(tmp_path / "c.pt", content(model, dataset="synthetic", classes=["left", "right"]))
    paths = [tmp_path / "a.png", tmp_path / "b.jpg"]
    for path in paths:
        Image.fromarray(gradient()).save(path)
    predict.main([str(tmp_path / "c.pt"), *map(str, paths)])
    said = capsys.readouterr()
    assert [line.split(": ")[0] for line in said.out.splitlines()] == list(map(str, paths))
    assert all(line.count(" %") == 2 and "left" in line and "right" in line for line in said.out.splitlines())
    assert "synthetic" in said.err
    with pytest.raises(UserError, match=r"a\.png is not a"):
        predict.main([str(paths[0]), str(paths[1])])
