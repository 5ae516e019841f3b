"""A folder of pictures: which files count, the hold-out, the mistakes, and the cache of the decoded pixels."""

import hashlib
import json
import os
import shutil
import time
import unicodedata

import numpy as np
import PIL
import psutil
import pytest
import torch
from PIL import Image

import train_ddp
from cifar.data import DeviceImages
from cifar.datasets import folder as folder_module
from cifar.datasets import picture_cache
from cifar.datasets.base import Dataset
from cifar.datasets.folder import list_files, load_folder, prepare_folder
from cifar.errors import UserError
from cifar.pictures import read_image
from tests.helpers.comparing import traces, wait_for_checkpoints, write_no_report
from tests.helpers.forking import fork, wait
from tests.helpers.processes import left_of, result

CACHE = f".cifar-ddp-pictures-32-pillow-{PIL.__version__}.bin"
COLORS = {"ant": 40, "bee": 120, "cat": 200}


def draw(path, level=0, size=(32, 32), **options):
    """Write a picture of noise, from `level` to `level + 49`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(level).integers(level, level + 50, (size[1], size[0], 3))
    Image.fromarray(pixels.astype(np.uint8)).save(path, **options)
    return path


@pytest.fixture
def folder(tmp_path):
    """Return a folder of three classes with six training and two test pictures each."""
    for name, level in COLORS.items():
        for k in range(6):
            draw(tmp_path / "pets" / "train" / name / f"{k}.png", level + k)
        for k in range(2):
            draw(tmp_path / "pets" / "test" / name / f"{k}.png", level + 10 + k)
    return tmp_path / "pets"


@pytest.fixture
def ant(folder):
    return folder / "train" / "ant"


def load(folder, size=32) -> Dataset:
    prepare_folder(folder, size)
    dataset = load_folder(folder, size)
    dataset.check("folder")
    return dataset


def contents(split):
    """Return the images of a split, as bytes, with their labels, in any order."""
    images, labels = split
    return sorted((image.numpy().tobytes(), label) for image, label in zip(images, labels.tolist(), strict=True))


def expected(folder, split, names=tuple(COLORS), size=32):
    return sorted(
        (read_image(path, size).numpy().tobytes(), label)
        for label, name in enumerate(names)
        for path in (folder / split / name).rglob("*.*")
    )


@pytest.fixture
def decodings(monkeypatch):
    """Return how many files each decoding has had, as they come."""
    numbers, decode = [], picture_cache._decode

    def spy(data_dir, files, image_size):
        numbers.append(len(files))
        return decode(data_dir, files, image_size)

    monkeypatch.setattr(picture_cache, "_decode", spy)
    return numbers


def test_images_and_labels_in_any_format(tmp_path):
    """As predict reads them: `read_image` itself is tested in test_predict.py. Classes are sorted by code point."""
    names = ("B", "a b", "ä", "猫")
    for name in reversed(names):
        for k, suffix in enumerate(("png", "jpg", "JPEG", "gif", "webp", "bmp", "tif")):
            draw(tmp_path / "train" / name / f"ü 1.{suffix}", 10 * k, size=(50 + k, 33))
        draw(tmp_path / "train" / name / "deeper" / "still" / "x.png", 7, size=(1, 300))
        draw(tmp_path / "test" / name / "x.png")
    dataset = load(tmp_path)
    assert (dataset.classes, len(dataset.train[0]), dataset.note) == (names, 32, "")
    for split in ("train", "test"):
        assert contents(getattr(dataset, split)) == expected(tmp_path, split, names)


def test_files_that_count(folder, ant, tmp_path):
    before = contents(load(folder).train)
    (ant / "notes.txt").write_text("text")
    (ant / "drawing.eps").write_text("text")
    (ant / "picture").write_bytes((ant / "0.png").read_bytes())
    os.mkfifo(ant / "pipe.png")
    for place in ("train/ant/.hidden.png", "train/ant/.hidden/x.png", "train/.hidden/x.png", "train/x.png", "x/x.png"):
        draw(folder / place)
    (ant / "around").symlink_to(ant)
    for name, target in {"up": folder, "top": folder.parent, "bees": folder / "train/bee", "tests": folder / "test/ant",
                         "bee.png": folder / "train/bee/0.png", "again.png": ant / "0.png"}.items():  # fmt: skip
        (ant / name).symlink_to(target)
    (folder / "train" / "drone").symlink_to(folder / "train" / "bee")  # not a class
    assert contents(load(folder).train) == before
    linked, more = draw(tmp_path / "linked.png", 99), tmp_path / "more"
    draw(more / "x.png", 98)
    (more / "back").symlink_to(ant)  # which leads here
    (ant / "link.png").symlink_to(linked)
    (ant / "more").symlink_to(more)
    added = [(read_image(path, 32).numpy().tobytes(), 0) for path in (linked, more / "x.png")]
    assert contents(load(folder).train) == sorted(before + added)


@pytest.mark.parametrize(
    ("test", "others", "note"),
    [("val", [], "test: val/"), ("valid", [], "test: valid/"), ("test", ["val"], "test: test/; val/ is not used"),
     ("val", ["validation"], "test: val/; validation/ is not used")],
)  # fmt: skip
def test_a_validation_split_is_the_test_split(folder, test, others, note):
    images = expected(folder, "test")
    (folder / "test").rename(folder / test)
    for other in others:
        draw(folder / other / "dog" / "x.png")
    dataset = load(folder)
    assert (contents(dataset.test), len(dataset.train[0]), dataset.note) == (images, 18, note)


def test_names_of_classes_are_compared_in_composed_form(folder):
    """macOS and Linux may write the same name in different characters."""
    for split, form in (("train", "NFC"), ("test", "NFD")):
        (folder / split / "bee").rename(folder / split / unicodedata.normalize(form, "bée"))
    dataset = load(folder)
    assert dataset.classes == ("ant", "bée", "cat")
    assert len(dataset.test[0]) == 6


def test_images_of_another_size(folder):
    """Each size has its own file, whose pages all processes share."""
    for size in (32, 48):
        assert contents(load(folder, size).train) == expected(folder, "train", size=size)
    images, labels = load(folder, 48).test
    ours = DeviceImages(images, labels, tuple(COLORS), torch.device("cpu")).images
    assert ours.data_ptr() == images.data_ptr()
    assert str(folder / CACHE.replace("-32-", "-48-")) in {file.path for file in psutil.Process().memory_maps()}


# Without test/


def without_test(folder, count):
    shutil.rmtree(folder / "test")
    for name, level in COLORS.items():
        for k in range(count):
            draw(folder / "train" / name / f"{k}.png", level, size=(40, 40 + k % 40))
    return folder


def is_held_out(name):
    return int(hashlib.sha256(name.encode()).hexdigest()[:16], 16) / 2**64 < 0.1


def test_a_tenth_is_held_out_by_the_names(folder, ant, tmp_path):
    before = load(without_test(folder, 100))
    assert before.note == "test: a tenth of train/, by a hash of each picture's name, at least one of each class"
    held_out = [f"{k}.png" for k in range(100) if is_held_out(f"{k}.png")]
    assert 5 < len(held_out) < 15
    assert contents(before.test) == sorted(
        (read_image(folder / "train" / name / file, 32).numpy().tobytes(), label)
        for label, name in enumerate(COLORS)
        for file in held_out
    )
    assert sorted(contents(before.train) + contents(before.test)) == expected(folder, "train")
    # A model that starts from the first images (`Data.sample`) sees a random sample of all classes.
    assert before.train[1][:60].bincount(minlength=3).min() >= 10
    # Neither new pictures nor another place moves any.
    for k in range(100, 130):
        draw(ant / f"{k}.png", k)
    after = load(folder.rename(tmp_path / "moved"))
    assert set(contents(before.train)) < set(contents(after.train))
    assert set(contents(before.test)) < set(contents(after.test))


@pytest.mark.parametrize(("low", "sizes"), [(False, [3, 3, 3, 1, 1, 1]), (True, [1, 1, 1, 3, 3, 3])])
def test_small_classes_have_training_and_test_pictures(tmp_path, low, sizes):
    """Also where no name, or each name, has a hash that holds it out."""
    names = [f"{k}.png" for k in range(999) if is_held_out(f"{k}.png") == low][:4]
    for label in COLORS:
        for k, name in enumerate(names):
            draw(tmp_path / "train" / label / name, k)
    dataset = load(tmp_path)
    assert [*dataset.train[1].bincount().tolist(), *dataset.test[1].bincount().tolist()] == sizes


# Mistakes


def refusal(folder):
    with pytest.raises(UserError) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def broken(path):
    path.write_bytes(b"no picture")


def remove(*names):
    return lambda folder: [shutil.rmtree(folder / name) for name in names]


def padded(folder, count):
    """Add readable pictures until there are `count`."""
    for k in range(count - 24):
        os.link(folder / "train" / "ant" / "0.png", folder / "train" / "ant" / f"more-{k}.png")


NUMBER = "{}/train must hold 2 to 1,000 directories, one for each class, not "


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shutil.rmtree, "there is no {}/train: --dataset folder reads the pictures in {}/train/CLASS"),
        (remove("train/ant", "train/cat"), NUMBER + "1"),
        (lambda folder: [(folder / "train" / f"{k}").mkdir() for k in range(1001)], NUMBER + "1,004"),
        (remove("train/bee"), "only one of train and test in {} has the class 'bee': both must"),
        (lambda folder: [path.unlink() for path in (folder / "test" / "bee").iterdir()],
         "there is no picture in {}/test/bee: add some, or remove the class"),
        (lambda folder: [path.rename(path.with_suffix(".HEIC")) for path in (folder / "test" / "bee").iterdir()],
         "there is no picture in {}/test/bee: convert its 2 files (.HEIC), for example to .jpg, or remove the class"),
        (lambda folder: broken(folder / "test" / "bee" / "x.png"),
         "1 of the 25 pictures in {} cannot be read, more than 1 %: remove or replace them: {}/test/bee/x.png cannot "
         "be read as a picture: cannot identify image file '{}/test/bee/x.png'"),
    ],
)  # fmt: skip
def test_mistakes(folder, change, message):
    change(folder)
    assert refusal(folder) == message.replace("{}", str(folder))


def test_one_percent_is_left_out_and_named_each_time(folder, capfd, decodings, monkeypatch):
    """Whatever the number of workers."""
    monkeypatch.setattr(picture_cache, "available_cores", lambda: 3)
    padded(folder, 298)
    state = torch.get_rng_state()
    broken(folder / "train" / "bee" / "x.png")
    (folder / "train" / "cat" / "y.png").symlink_to("nowhere")
    for _ in range(2):
        dataset = load(folder)
        assert (dataset.note, len(dataset.train[0])) == ("2 unreadable left out", 292)
        assert contents(dataset.test) == expected(folder, "test")
        first, second = [line for line in capfd.readouterr().out.splitlines() if line.startswith("WARNING: left out: ")]
        assert "/bee/x.png cannot be read as a picture: cannot identify" in first
        assert "/cat/y.png cannot be read as a picture: [Errno 2] No such file" in second
    assert decodings == [300]
    assert torch.equal(torch.get_rng_state(), state)
    broken(folder / "train" / "bee" / "w.png")
    broken(folder / "train" / "bee" / "z.png")
    assert refusal(folder).startswith(f"4 of the 302 pictures in {folder} cannot be read, more than 1 %")


# The cache


def change_size(ant):
    before = (ant / "0.png").stat()
    draw(ant / "0.png", 79, size=(33, 33))
    os.utime(ant / "0.png", ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize(
    "change",
    [
        change_size,
        lambda ant: os.utime(ant / "0.png", ns=(0, 1)),
        lambda ant: draw(ant / "new.png", 77),
        lambda ant: (ant / "0.png").unlink(),
        lambda ant: (ant / "0.png").rename(ant / "renamed.png"),
    ],
)
def test_pictures_are_decoded_again_once_one_has_changed(folder, ant, decodings, change):
    load(folder)
    before = traces(folder)
    load(folder)
    assert traces(folder) == before, "written without need"
    assert len(decodings) == 1
    change(ant)
    with pytest.raises(UserError, match="have changed while they were read: start again"):
        load_folder(folder, 32)  # without the preparation of this start
    for _ in range(2):
        assert contents(load(folder).train) == expected(folder, "train")
    assert len(decodings) == 2


def test_killed_worker_is_one_line(folder, monkeypatch):
    monkeypatch.setattr(picture_cache, "read_image", lambda *_: os.kill(os.getpid(), 9))
    assert refusal(folder) == "a process that decodes pictures was killed, maybe for lack of memory"


def test_workers_end_with_the_process_that_is_killed(folder, monkeypatch):
    """Else they would wait for work, and hold its lock, for ever."""
    padded(folder, 200)
    monkeypatch.setattr(picture_cache, "available_cores", lambda: 2)
    monkeypatch.setattr(picture_cache, "read_image", lambda *file: time.sleep(0.1) or read_image(*file))
    process = psutil.Process(fork(lambda: prepare_folder(folder, 32)))
    deadline = time.monotonic() + 30
    while len(process.children()) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    workers = process.children()
    process.kill()
    assert wait(process.pid) == -9
    assert (len(workers), left_of(workers, timeout=10)) == (2, [])


def test_flipped_bits_change_no_pixel(folder, decodings):
    """Nor does a file that is cut, or another one; a bit that means nothing may be flipped."""
    good = load(folder).fingerprint
    files = list_files(folder)
    raw = (folder / CACHE).read_bytes()
    bits = 8 * len(raw)
    damages = [raw[:-1], raw[:-3000], raw[:3000], b"", bytes(100), raw[3072:]]
    for bit in [*range(0, 4000, 37), *range(4000, bits - 4000, 7919), *range(bits - 4000, bits, 37)]:
        flipped = bytearray(raw)
        flipped[bit // 8] ^= 1 << bit % 8
        damages.append(bytes(flipped))
    noticed = 0
    for damaged in damages:
        (folder / CACHE).write_bytes(damaged)
        found = picture_cache.find_pictures(folder, files, 32)
        noticed += found is None
        assert found is None or (found.problems == {} and len(found.pixels) == 24 and found.pixels.tobytes() in raw)
    assert noticed > len(damages) / 2
    (folder / CACHE).write_bytes(raw[:-3072] + bytes(3072))
    for _ in range(2):
        assert load(folder).fingerprint == good
    assert decodings == [24, 24]


@pytest.mark.parametrize("name", ["lock", "write_atomically"])
@pytest.mark.parametrize("error", [OSError(30, "Read-only file system"), NotImplementedError("no locks")])
def test_pixels_are_kept_in_the_users_cache(folder, ant, tmp_path, decodings, monkeypatch, name, error):
    """If they cannot be written beside the pictures, where stale ones do not hide them. Simulated: root may write."""
    work, failing_places = getattr(picture_cache, name), [folder]

    def fail(path, *args):
        if path.parent in failing_places:
            raise error
        return work(path, *args)

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    load(folder)
    draw(ant / "new.png", 9)
    beside = (folder / CACHE).read_bytes()
    monkeypatch.setattr(picture_cache, name, fail)
    for _ in range(2):
        assert contents(load(folder).train) == expected(folder, "train")
    assert (decodings, (folder / CACHE).read_bytes()) == ([24, 25], beside)
    digest = hashlib.sha256(bytes(folder)).hexdigest()[:16]
    place = tmp_path / "torch" / "cifar-ddp" / f"pets-{digest}-32-pillow-{PIL.__version__}.bin"
    place.unlink()
    failing_places.append(place.parent)
    assert refusal(folder) == f"the decoded pictures cannot be written to {folder / CACHE} or {place} ({error})"


# In a run

FLAGS = ["--dataset", "folder", "--device", "cpu", "--wandb", "disabled", "--local-batch-size", "3", "--epochs", "1",
         "--checkpoint-steps", "2", "--log-steps", "3"]  # fmt: skip


@pytest.fixture
def trained(folder, tmp_path, monkeypatch):
    """Return the directory of a run on the folder without test/, stopped after two of five steps."""
    write_no_report(monkeypatch)
    wait_for_checkpoints(monkeypatch)
    without_test(folder, 7)
    monkeypatch.chdir(folder.parent)
    run_dir = tmp_path / "run"
    train_ddp.main([*FLAGS, "--data-dir", folder.name, "--run-dir", str(run_dir), "--max-steps", "2"])
    monkeypatch.chdir("/")  # the relative path is resolved once
    return run_dir


def resume(run_dir, *flags):
    train_ddp.main(["--resume", str(run_dir), *map(str, flags)])


def test_resume_notices_changed_pictures(folder, ant, trained, tmp_path, capfd, monkeypatch):
    """And names the decoders if their pixels differ. A run of an earlier version does not know its pictures."""
    facts = json.loads((trained / "config.json").read_text())
    draw(ant / "new.png", 9)
    with pytest.raises(UserError) as caught:
        resume(trained)
    now = load_folder(folder, 32).fingerprint
    assert str(caught.value) == (
        f"--resume {trained}: the training images have changed since that run began, from "
        f"{facts['images']['training']} to {now['training']}: restore them, or start a new run without --resume"
    )
    assert now["training"].startswith("16 images, SHA-256 ")
    (ant / "new.png").unlink()
    with monkeypatch.context() as patched:
        for module in (picture_cache, folder_module):
            patched.setattr(module, "DECODER", "Pillow 99")
        patched.setattr(picture_cache, "read_image", lambda *file: read_image(*file) // 2)
        with pytest.raises(UserError, match=rf", decoded by Pillow {PIL.__version__} and now by Pillow 99: restore"):
            resume(trained)
    moved = folder.rename(tmp_path / "elsewhere")
    resume(trained, "--data-dir", moved, "--max-steps", 3)
    assert (
        f"dataset   folder, from {moved}: 15 training, 6 test, 3 classes; test: a tenth of train/, by a hash of each "
        f"picture's name, at least one of each class\n"
    ) in capfd.readouterr().out
    facts = json.loads((trained / "config.json").read_text())
    del facts["images"]
    (trained / "config.json").write_text(json.dumps(facts))
    draw(moved / "train" / "ant" / "new.png", 9)
    resume(trained, "--data-dir", moved, "--max-steps", 5)
    assert (result(trained)["steps"], result(trained)["dataset"]) == (5, "folder")
    assert json.loads((trained / "config.json").read_text())["images"]["training"].startswith("16 images")


def test_evaluate_on_another_folder(folder, trained, tmp_path, capfd):
    """With the same classes only."""
    (checkpoint,) = (trained / "checkpoints").iterdir()
    other = folder.rename(tmp_path / "other")
    flags = [*FLAGS, "--data-dir", str(other), "--evaluate", str(checkpoint)]
    train_ddp.main(flags)
    assert "Accuracy of the network on the 6 test images" in capfd.readouterr().out
    (other / "train" / "bee").rename(other / "train" / "dog")
    with pytest.raises(UserError, match=f"folder, with other classes than those of folder in {other}: see"):
        train_ddp.main(flags)
