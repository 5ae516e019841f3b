"""A folder of pictures: which files count, the hold-out, the mistakes, and the cache of the decoded pixels."""

import hashlib
import json
import os
import re
import shutil
import tempfile
import time

import numpy as np
import PIL
import psutil
import pytest
import torch
from filelock import FileLock
from PIL import Image

import train_ddp
from cifar.datasets import folder as folder_module
from cifar.datasets import picture_cache
from cifar.datasets.base import Dataset
from cifar.datasets.folder import list_files, load_folder, prepare_folder
from cifar.errors import UserError
from cifar.files import write_atomically
from cifar.pictures import read_image
from tests.helpers.comparing import traces, wait_for_checkpoints, write_no_report
from tests.helpers.forking import fork, wait
from tests.helpers.processes import left_of, result
from tests.helpers.terminal import shown

CACHE = f".cifar-ddp-pictures-pillow-{PIL.__version__}.npz"
COLORS = {"ant": 40, "bee": 120, "cat": 200}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Keep the user's cache of these tests apart."""
    folder = tmp_path_factory.mktemp("user")
    for name in ("TORCH_HOME", "CIFAR_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


def draw(path, level=0, size=(32, 32), **options):
    """Write a picture whose pixels are `level` and, if they are many, noise."""
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


def load(folder) -> Dataset:
    prepare_folder(folder)
    dataset = load_folder(folder)
    dataset.check("folder")
    return dataset


def contents(split):
    """Return the images of a split, as bytes, with their labels, in any order."""
    images, labels = split
    return sorted((image.numpy().tobytes(), label) for image, label in zip(images, labels.tolist(), strict=True))


def expected(folder, split, names=tuple(COLORS)):
    return sorted(
        (read_image(path).numpy().tobytes(), label)
        for label, name in enumerate(names)
        for path in (folder / split / name).rglob("*.*")
    )


@pytest.fixture
def decodings(monkeypatch):
    """Return how many files each decoding has had, as they come."""
    numbers = []
    decode = picture_cache._decode

    def spy(data_dir, files):
        numbers.append(len(files))
        return decode(data_dir, files)

    monkeypatch.setattr(picture_cache, "_decode", spy)
    return numbers


def test_images_and_labels_in_any_format(tmp_path):
    """As predict reads them: `read_image` itself is tested in test_predict.py."""
    deep = Image.fromarray(np.linspace(0, 65535, 3200).reshape(40, 80).astype(np.uint16))
    turned = Image.Exif()
    turned[0x0112] = 6
    for name in ("one", "two"):
        train = tmp_path / "train" / name
        for k, suffix in enumerate(("png", "jpg", "JPEG", "gif", "webp", "bmp", "tif")):
            draw(train / f"x.{suffix}", 10 * k, size=(50 + k, 33))
        draw(train / "turned.jpg", 5, size=(60, 40), exif=turned)
        draw(train / "deeper" / "still" / "x.png", 7, size=(1, 300))
        deep.save(train / "deep.png")
        draw(tmp_path / "test" / name / "x.png")
    dataset = load(tmp_path)
    assert (dataset.classes, len(dataset.train[0]), dataset.note) == (("one", "two"), 20, "")
    for split in ("train", "test"):
        assert contents(getattr(dataset, split)) == expected(tmp_path, split, ("one", "two"))


def test_files_that_count(folder, tmp_path, capfd):
    ant = folder / "train" / "ant"
    before = contents(load(folder).train)
    assert "ignored" not in capfd.readouterr().out
    for name in ("notes.txt", "table.h5", "drawing.eps"):
        (ant / name).write_text("text")
    (ant / "picture").write_bytes((ant / "0.png").read_bytes())
    os.mkfifo(ant / "pipe.png")
    draw(ant / ".hidden.png")
    draw(ant / ".hidden" / "x.png")
    draw(folder / "train" / ".hidden" / "x.png")
    draw(folder / "train" / "beside.png")
    draw(folder / "elsewhere" / "x.png")
    (ant / "around").symlink_to(ant)
    (ant / "up").symlink_to(folder)
    assert contents(load(folder).train) == before
    lines = capfd.readouterr().out.splitlines()
    assert lines == [f"5 files in {folder} ignored: no supported format of pictures has such a suffix"]
    linked, more = draw(tmp_path / "linked.png", 99), tmp_path / "more"
    draw(more / "x.png", 98)
    (more / "back").symlink_to(ant)  # which leads here
    (ant / "link.png").symlink_to(linked)
    (ant / "more").symlink_to(more)
    added = [(read_image(path).numpy().tobytes(), 0) for path in (linked, more / "x.png")]
    assert contents(load(folder).train) == sorted(before + added)


def test_names_of_classes(tmp_path):
    """As code points sort, in any locale."""
    names = ["a b", "B", "b", "ä", "猫"]
    for split in ("train", "test"):
        for name in reversed(names):
            draw(tmp_path / split / name / "ü 1.png", 3)
    assert load(tmp_path).classes == tuple(sorted(names)) == ("B", "a b", "b", "ä", "猫")


def test_first_images_are_of_all_classes(tmp_path):
    """A model that starts from the first 5,000 images (`Data.sample`) sees a random sample."""
    for name in ("ant", "bee"):
        for k in range(40):
            draw(tmp_path / "train" / name / f"{k}.png", k)
        draw(tmp_path / "test" / name / "0.png")
    assert 8 <= load(tmp_path).train[1][:40].sum() <= 32


# Without test/


def without_test(folder, count):
    shutil.rmtree(folder / "test")
    for name, level in COLORS.items():
        for k in range(count):
            draw(folder / "train" / name / f"{k}.png", level, size=(40, 40 + k % 40))
    return folder


def is_held_out(name):
    return int(hashlib.sha256(name.encode()).hexdigest()[:16], 16) / 2**64 < 0.1


def test_a_tenth_is_held_out_by_the_names(folder, tmp_path):
    without_test(folder, 100)
    before = load(folder)
    assert before.note == "test: a tenth of train/, by a hash of each picture's name, at least one of each class"
    held_out = [f"{k}.png" for k in range(100) if is_held_out(f"{k}.png")]
    assert 5 < len(held_out) < 15
    assert contents(before.test) == sorted(
        (read_image(folder / "train" / name / file).numpy().tobytes(), label)
        for label, name in enumerate(COLORS)
        for file in held_out
    )
    assert sorted(contents(before.train) + contents(before.test)) == expected(folder, "train")
    # Neither new pictures nor another place move any.
    for k in range(100, 130):
        draw(folder / "train" / "ant" / f"{k}.png", k)
    after = load(folder.rename(tmp_path / "moved"))
    assert set(contents(before.train)) < set(contents(after.train))
    assert set(contents(before.test)) < set(contents(after.test))


@pytest.mark.parametrize(("low", "sizes"), [(False, (9, 3)), (True, (3, 9))])
def test_small_classes_have_training_and_test_pictures(folder, low, sizes):
    """Also where no name, or each name, has a hash that holds it out."""
    names = [name for name in map("{}.png".format, range(999)) if is_held_out(name) == low][:4]
    shutil.rmtree(folder / "test")
    shutil.rmtree(folder / "train")
    for label in COLORS:
        for k, name in enumerate(names):
            draw(folder / "train" / label / name, k)
    dataset = load(folder)
    for size, (_, labels) in zip(sizes, (dataset.train, dataset.test), strict=True):
        assert labels.bincount().tolist() == [size // 3] * 3


# Mistakes


def refusal(folder):
    with pytest.raises(UserError) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def broken(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"no picture")


def remove(*paths):
    return lambda folder: [shutil.rmtree(folder / path) for path in paths]


def make(*names):
    return lambda folder: [os.mkdir(os.fsencode(folder / "train") + b"/" + name) for name in names]


def one_picture(folder):
    shutil.rmtree(folder / "test")
    for k in range(1, 6):
        (folder / "train" / "bee" / f"{k}.png").unlink()


def padded(folder, count):
    """Add readable pictures until there are `count`."""
    for k in range(count - 24):
        os.link(folder / "train" / "ant" / "0.png", folder / "train" / "ant" / f"more-{k}.png")


def class_of_unreadable_pictures(folder):
    padded(folder, 300)
    for path in (folder / "test" / "bee").iterdir():
        broken(path)


NUMBER = "{}/train must hold 2 to 1,000 directories of pictures, one for each class, not "
BOTH = "only one of {}/train and {}/test has pictures of "


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shutil.rmtree, "there is no {}/train: --dataset folder reads the pictures in {}/train/CLASS"),
        (remove("train/ant", "train/bee", "train/cat"), NUMBER + "0"),
        (remove("train/ant", "train/cat"), NUMBER + "1"),
        (make(*(b"%d" % k for k in range(1001))), NUMBER + "1,004"),
        (remove("test/bee"), BOTH + "bee: both must"),
        (remove("train/bee"), BOTH + "bee: both must"),
        (lambda folder: (folder / "test" / "bee").rename(folder / "test" / "Bee"), BOTH + "Bee, bee: both must"),
        (lambda folder: [path.unlink() for path in (folder / "test" / "bee").iterdir()],
         "there is no picture in {}/test/bee: add some, or remove the class everywhere"),
        (make(b"a\nb"), "{}/train: rename the class 'a\\nb': its name cannot be printed"),
        (make(b"\xff"), "{}/train: rename the class '\\udcff': its name cannot be printed"),
        (class_of_unreadable_pictures, "there is no readable picture for test of class bee: add pictures"),
        (one_picture, "there is no readable picture for training of class bee: add pictures"),
        (lambda folder: broken(folder / "test" / "bee" / "x.png"),
         "1 of the 25 pictures in {} cannot be read, more than 1 %: remove or replace them: {}/test/bee/x.png is not a "
         "picture in a supported format"),
    ],
)  # fmt: skip
def test_mistakes(folder, change, message):
    change(folder)
    assert refusal(folder) == message.replace("{}", str(folder))


def test_unreadable_folder_is_a_mistake(folder, monkeypatch):
    def scandir(path):
        raise PermissionError(13, "Permission denied", os.fspath(path))

    monkeypatch.setattr(os, "scandir", scandir)
    assert refusal(folder) == f"cannot read {folder / 'train' / 'ant'}: Permission denied"


def warnings_in(text):
    return [line for line in text.splitlines() if line.startswith("WARNING")]


def test_one_percent_is_left_out_and_named_each_time(folder, capfd, decodings, monkeypatch):
    monkeypatch.setattr(folder_module, "_NAMED", 2)
    padded(folder, 297)
    broken(folder / "train" / "bee" / "x.png")
    (folder / "train" / "cat" / "y.png").symlink_to("nowhere")
    broken(folder / "train" / "cat" / "z.png")
    for _ in range(2):
        dataset = load(folder)
        assert dataset.note == "3 unreadable left out"
        assert len(dataset.train[0]) + len(dataset.test[0]) == 297
        assert warnings_in(capfd.readouterr().out) == [
            f"WARNING: left out: {folder}/train/bee/x.png is not a picture in a supported format",
            f"WARNING: left out: {folder}/train/cat/y.png cannot be read as a picture: No such file or directory",
            "WARNING: left out: 1 more",
        ]
    assert decodings == [300]
    broken(folder / "train" / "bee" / "w.png")
    text = refusal(folder)
    assert text.startswith(f"4 of the 301 pictures in {folder} cannot be read, more than 1 %")
    assert all(f"{name}.png" in text for name in ("w", "x", "y"))


def test_picture_that_can_be_read_later_is_decoded(folder, decodings, monkeypatch):
    """Such as one whose permissions have been mended: its size and time are the same."""

    def fail_once(path):
        if path.name == "more-0.png":
            raise UserError(f"{path} cannot be read as a picture: Permission denied")
        return read_image(path)

    padded(folder, 200)
    with monkeypatch.context() as patched:
        patched.setattr(picture_cache, "read_image", fail_once)
        assert load(folder).note == "1 unreadable left out"
    assert load(folder).note == ""
    assert decodings == [200, 200]


# The cache


def ant(folder, name="0.png"):
    return folder / "train" / "ant" / name


def change_size(folder):
    times = ant(folder).stat()
    draw(ant(folder), 79, size=(33, 33))
    os.utime(ant(folder), ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize(
    "change",
    [
        change_size,
        lambda folder: os.utime(ant(folder), ns=(0, 1)),
        lambda folder: draw(ant(folder, "new.png"), 77),
        lambda folder: ant(folder).unlink(),
        lambda folder: ant(folder).rename(ant(folder, "renamed.png")),
    ],
)
def test_pictures_are_decoded_again_once_one_has_changed(folder, decodings, change):
    load(folder)
    before = traces(folder)
    load(folder)
    assert traces(folder) == before, "written without need"
    assert len(decodings) == 1
    change(folder)
    for _ in range(2):
        assert contents(load(folder).train) == expected(folder, "train")
    assert len(decodings) == 2


def test_progress_in_plain_lines_and_on_a_terminal(folder, capfd):
    padded(folder, 2100)
    prepare_folder(folder)
    lines = [f"decoding 2,100 pictures in {folder}", "  1,000 of 2,100 pictures", "  2,000 of 2,100 pictures"]
    assert capfd.readouterr().out.splitlines() == lines
    (folder / CACHE).unlink()
    assert re.search(r"decoding: +100%\|.*2100/2100 .*pictures/s", shown(lambda: prepare_folder(folder)))


@pytest.mark.parametrize("cores", [1, 3])
def test_workers_change_nothing(folder, monkeypatch, cores):
    padded(folder, 200)
    broken(folder / "train" / "bee" / "x.png")
    monkeypatch.setattr(picture_cache, "available_cores", lambda: cores)
    state = torch.get_rng_state()
    dataset = load(folder)
    assert torch.equal(torch.get_rng_state(), state)
    assert contents(dataset.test) == expected(folder, "test")
    assert len(dataset.train[0]) == 200 - 6


def test_killed_worker_is_one_line(folder, monkeypatch):
    padded(folder, 200)
    monkeypatch.setattr(picture_cache, "read_image", lambda path: os.kill(os.getpid(), 9))
    assert refusal(folder) == "a process that decodes pictures was killed, maybe for lack of memory"


def test_workers_end_with_the_process_that_is_killed(folder, monkeypatch):
    """Else they would wait for work, and hold its lock, for ever."""
    padded(folder, 500)
    monkeypatch.setattr(picture_cache, "available_cores", lambda: 2)
    child = fork(lambda: prepare_folder(folder))
    process, deadline = psutil.Process(child), time.monotonic() + 30
    while len(process.children()) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    workers = process.children()
    process.suspend()
    time.sleep(0.5)
    process.kill()
    assert wait(child) == -9
    left = left_of(workers, timeout=10)
    for worker in left:
        worker.kill()
    assert (len(workers), left) == (2, [])
    assert contents(load(folder).test) == expected(folder, "test")


def test_flipped_bits_change_no_pixel(folder, decodings, capfd):
    """Nor does a file that is cut, or another one; a bit that means nothing may be flipped."""
    good = load(folder)
    files, _ = list_files(folder)
    raw = (folder / CACHE).read_bytes()
    bits = 8 * len(raw)
    headers = [*range(0, 4000, 37), *range(bits - 4000, bits, 37)]
    damages = [raw[:-1], raw[:-3000], raw[:3000], b"", bytes(100), np.arange(9).tobytes()]
    for bit in [*headers, *range(4000, bits - 4000, 7919)]:
        flipped = bytearray(raw)
        flipped[bit // 8] ^= 1 << bit % 8
        damages.append(bytes(flipped))
    noticed = 0
    for damaged in damages:
        (folder / CACHE).write_bytes(damaged)
        found = picture_cache.find_pictures(folder, files)
        noticed += found is None
        assert found is None or (found.problems == {} and found.pixels.tobytes() in raw)
    assert noticed > len(damages) / 2
    assert warnings_in(capfd.readouterr().out) == []
    (folder / CACHE).write_bytes(raw.replace(good.train[0][0].numpy().tobytes(), bytes(3072)))
    assert load(folder).fingerprint == good.fingerprint
    assert decodings == [24, 24]
    (line,) = warnings_in(capfd.readouterr().out)
    assert line.startswith(f"WARNING: {folder / CACHE} is damaged (Bad CRC-32 ")
    assert load(folder).fingerprint == good.fingerprint
    assert warnings_in(capfd.readouterr().out) == []


def upgrade(monkeypatch):
    """Take the place of another Pillow, whose pixels differ."""
    monkeypatch.setattr(picture_cache, "DECODER", "Pillow 99")
    monkeypatch.setattr(folder_module, "DECODER", "Pillow 99")
    monkeypatch.setattr(picture_cache, "read_image", lambda path: read_image(path) // 2)


def test_each_pillow_has_its_own_pixels(folder, decodings, monkeypatch):
    """So two can share a folder."""
    own = load(folder)
    with monkeypatch.context() as patched:
        upgrade(patched)
        prepare_folder(folder)
        assert load_folder(folder).decoder == "Pillow 99"
    assert load(folder).fingerprint == own.fingerprint
    assert len(decodings) == 2


def test_pictures_that_change_meanwhile(folder):
    prepare_folder(folder)
    draw(folder / "train" / "ant" / "new.png")
    with pytest.raises(UserError, match="have changed while they were read: start again"):
        load_folder(folder)


def test_what_a_killed_process_leaves_is_removed(folder):
    """Not another decoder's, which may be at work."""
    left = fork(lambda: write_atomically(folder / CACHE, lambda file: os.kill(os.getpid(), 9)))
    assert wait(left) == -9
    other = folder / f".{CACHE}".replace(".npz", ".dev.npz.0123456789abcdef.tmp")
    other.touch()
    assert len(list(folder.glob(".*.tmp"))) == 2
    prepare_folder(folder)
    assert list(folder.glob(".*.tmp")) == [other]


# Where the pixels are kept


def test_read_only_folder(folder, own_cache, capfd):
    """Its pixels are read, and new ones kept in the user's cache. Nothing is read-only for root, who becomes nobody."""
    reader = os.geteuid() or 65534

    def start():
        os.environ["XDG_CACHE_HOME"] = str(user)
        os.setuid(reader)
        if user.stat().st_uid == reader:
            assert contents(load(moved).train) == expected(moved, "train")
        else:
            assert "the decoded pictures cannot be written to " in refusal(moved)

    def output():
        capfd.readouterr()
        moved.chmod(0o555)
        assert wait(fork(start)) == 0
        moved.chmod(0o755)
        return capfd.readouterr().out

    with tempfile.TemporaryDirectory(dir="/tmp") as open_to_all:
        os.chmod(open_to_all, 0o755)
        moved, user = folder.rename(f"{open_to_all}/pets"), own_cache.rename(f"{open_to_all}/user")
        load(moved)
        os.chown(user, reader, -1)
        assert (output(), list(user.iterdir())) == ("", [])
        draw(moved / "train" / "ant" / "new.png", 9)
        before = traces(moved)
        assert output() == f"decoding 25 pictures in {moved}\n"
        assert output() == "", "the stale pixels beside the pictures hide the user's"
        assert traces(moved) == before
        name = f"pets-{hashlib.sha256(bytes(moved)).hexdigest()[:16]}-pillow-{PIL.__version__}.npz"
        assert {path.name for path in (user / "torch" / "cifar-ddp").iterdir()} == {name, f"{name}.lock"}
        if reader != os.geteuid():
            shutil.rmtree(user / "torch")
            os.chown(user, 0, -1)
            output()


def test_full_disk_is_not_the_end(folder, own_cache, decodings, monkeypatch):
    """The next place is used, and found the next time."""
    write = picture_cache.write_atomically

    def fail_beside(path, fill):
        if path.parent == folder:
            raise OSError(28, "No space left on device")
        write(path, fill)

    monkeypatch.setattr(picture_cache, "write_atomically", fail_beside)
    for _ in range(2):
        assert contents(load(folder).test) == expected(folder, "test")
    assert not (folder / CACHE).exists()
    assert len(list((own_cache / "torch" / "cifar-ddp").glob("*.npz"))) == 1
    assert decodings == [24]


def test_launches_take_turns(folder, capfd):
    """The second waits for the first, says so, and decodes nothing."""
    files, _ = list_files(folder)
    place = picture_cache._places(folder)[0]
    with FileLock(f"{place}.lock"):
        child, text = fork(lambda: prepare_folder(folder), seconds=30), ""
        while "waiting for another process" not in text and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
            text += capfd.readouterr().out
            time.sleep(0.05)
        picture_cache._write(place, files, picture_cache._decode(folder, files))
    assert wait(child) == 0
    assert (text + capfd.readouterr().out).count("decoding ") == 1


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
    train(folder.name, tmp_path / "run", "--max-steps", 2)
    monkeypatch.chdir("/")  # the relative path is resolved once
    return tmp_path / "run"


def train(folder, run_dir, *flags):
    train_ddp.main([*FLAGS, "--data-dir", str(folder), "--run-dir", str(run_dir), *map(str, flags)])


def resume(run_dir, *flags):
    train_ddp.main(["--resume", str(run_dir), "--max-steps", "5", *map(str, flags)])


def test_resume_notices_changed_pictures(folder, trained, tmp_path, capfd):
    facts = json.loads((trained / "config.json").read_text())
    new = folder / "train" / "ant" / "new.png"
    draw(new, 9)
    with pytest.raises(UserError) as caught:
        resume(trained)
    now = load_folder(folder).fingerprint
    assert str(caught.value) == (
        f"--resume {trained}: the training images have changed since that run began, from "
        f"{facts['images']['training']} to {now['training']}: restore them, or start a new run without --resume"
    )
    assert now["training"].startswith("16 images, SHA-256 ")
    new.unlink()
    moved = folder.rename(tmp_path / "elsewhere")
    resume(trained, "--data-dir", moved)
    assert (result(trained)["steps"], result(trained)["dataset"]) == (5, "folder")
    assert (
        f"dataset   folder, from {moved}: 15 training, 6 test, 3 classes; test: a tenth of train/, by a hash of each "
        f"picture's name, at least one of each class\n"
    ) in capfd.readouterr().out


def test_resume_names_the_decoders(trained, monkeypatch):
    """If their pixels differ."""
    upgrade(monkeypatch)
    with pytest.raises(UserError, match=rf", decoded by Pillow {PIL.__version__} and now by Pillow 99: restore them"):
        resume(trained)


def test_run_of_an_earlier_version_resumes(folder, trained):
    facts = json.loads((trained / "config.json").read_text())
    del facts["images"]
    (trained / "config.json").write_text(json.dumps(facts))
    draw(folder / "train" / "ant" / "new.png", 9)
    resume(trained)
    assert json.loads((trained / "config.json").read_text())["images"]["training"].startswith("16 images")


def test_evaluate_on_another_folder(folder, trained, tmp_path, capfd):
    (checkpoint,) = (trained / "checkpoints").iterdir()
    train_ddp.main(["--device", "cpu", "--evaluate", str(checkpoint)])
    assert "Accuracy of the network on the 6 test images" in capfd.readouterr().out
    other = shutil.copytree(folder, tmp_path / "other")
    for name, level in COLORS.items():
        draw(other / "test" / name / "0.png", level)
    flags = [*FLAGS, "--data-dir", str(other), "--evaluate", str(checkpoint)]
    train_ddp.main(flags)
    assert "Accuracy of the network on the 3 test images" in capfd.readouterr().out
    for split in ("train", "test"):
        (other / split / "bee").rename(other / split / "dog")
    with pytest.raises(UserError, match=r"\(ant, bee, cat\), not on those of folder here \(ant, cat, dog\)$"):
        train_ddp.main(flags)
