"""The part "peers": speed94 beside the record holders' own scripts, which the user downloads: none of theirs is here.

airbench94_muon.py   github.com/KellerJordan/cifar10-airbench
cifar10_speedrun.py  github.com/hiverge/cifar10-speedrun

Both print a table with a row for each run, and read ./cifar10/train.pt and test.pt. All take turns on the same GPU. By
the records' rules, seconds are those of training, whitening and the test with views, after a run that warms up.
"""

import functools
import os
import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from cifar.datasets import DATASETS
from cifar.datasets.base import Dataset
from tests.gpu.campaign import MODULE, Campaign
from tests.gpu.repeat import read_rows
from tests.helpers.measuring import Finished, spread
from tests.helpers.parts import GPU

SCRIPTS = ("airbench94_muon.py", "cifar10_speedrun.py")
# They compile with max-autotune, which took 200 s from a cold start, on 16 cores that had other work.
COMPILE_SECONDS = 300
TURN_SECONDS = 150
Runs = list[tuple[float, float]]
"""Seconds and accuracy, 0 to 1, of each run."""


def peers(c: Campaign) -> None:
    """Compile theirs, then let theirs and ours take turns."""
    runs, turns = (5, 2) if GPU else (1, 1)
    scripts = [c.peers / name for name in SCRIPTS if (c.peers / name).exists()] if c.peers else []
    if not scripts:
        c.say("peers", f"FAIL --peers names no directory with {' or '.join(SCRIPTS)}")
        return
    name = "cifar10" if os.environ.get("CIFAR_DATA_DIR") else "synthetic"
    c.attempt("dataset", lambda: write_dataset(name, c.work / "peers" / "cifar10"))
    found: dict[str, Runs] = {}
    for script in scripts:
        title = f"{script.stem} compiles"
        c.attempt(title, functools.partial(theirs, c, found, script, title, 1, COMPILE_SECONDS))
    compiled = [script for script in scripts if script.stem in found]
    found.clear()  # a run right after compiling is none of the comparison
    for turn in range(1, turns + 1):
        for script in compiled:
            title = f"{script.stem} {turn}"
            c.attempt(title, functools.partial(theirs, c, found, script, title, runs, TURN_SECONDS))
        c.attempt(f"speed94 {turn}", functools.partial(ours, c, found, f"speed94 {turn}", name, runs))
    for who, done in found.items():
        c.say(who, f"{summary(done)}, on {name}")


def theirs(c: Campaign, found: dict[str, Runs], script: Path, title: str, count: int, at_most: float) -> str:
    """Run their script, and add its runs to `found`."""
    # Under the same name each time: some of the compiler's caches look at it.
    place = c.work / "peers"
    (place / script.name).write_text(with_runs(script, count))
    finished = c.run(title, [sys.executable, script.name], at_most, cwd=place)
    return add(found, script.stem, rows(finished.output), count, finished)


def ours(c: Campaign, found: dict[str, Runs], title: str, dataset: str, count: int) -> str:
    """Run speed94, and add its runs but the first, which warms up, to `found`."""
    out = c.work / f"{title}.jsonl"
    flags = ["--recipe", "speed94", "--precision", "bf16", "--cuda-graph"]
    if not GPU:
        flags = ["--small", "--recipe", "tutorial", "--max-steps", "2", "--tta", "flip"]
    command = [*MODULE, "tests.gpu.repeat", f"--runs={count + 1}", f"--out={out}", *flags, "--dataset", dataset]
    finished = c.run(title, command, TURN_SECONDS)
    done = [(row["record_seconds"], row["test_accuracy_tta"]) for row in read_rows(out)[1:]]
    return add(found, "speed94", done, count, finished)


def add(found: dict[str, Runs], who: str, done: Runs, count: int, finished: Finished) -> str:
    """Add the runs to `found`, unless there are fewer than `count`."""
    if finished.status or len(done) < count:
        return f"FAIL status {finished.status} (-1: took too long), {len(done)} of {count} runs"
    found.setdefault(who, []).extend(done)
    return f"{summary(done)}; wall clock {finished.seconds:.1f} s"


def write_dataset(name: str, folder: Path) -> str:
    """Write the dataset `name`, of $CIFAR_DATA_DIR, as the files that their loaders read."""
    dataset: Dataset = DATASETS[name](Path(os.environ.get("CIFAR_DATA_DIR", "data")))
    folder.mkdir(parents=True)
    for split, (images, labels) in (("train", dataset.train), ("test", dataset.test)):
        images = images.permute(0, 2, 3, 1).contiguous()  # uint8 [n, 32, 32, 3]
        torch.save({"images": images, "labels": labels, "classes": list(dataset.classes)}, folder / f"{split}.pt")
    return f"PASS {name}" + (", for want of $CIFAR_DATA_DIR: its accuracies mean nothing" * (name == "synthetic"))


def with_runs(script: Path, count: int) -> str:
    """Return the text of their script with another number of runs; a ValueError if it does not say how many."""
    text, places = re.subn(r"for run in range\(\d+\)", f"for run in range({count})", script.read_text())
    if places != 1:
        raise ValueError(f"{script.name} has {places} times 'for run in range(N)', not once: look for its runs by hand")
    return text


def rows(output: str) -> Runs:
    """Return the runs of their table, without the one that warms up; a table cut short gives the runs before."""
    columns: list[str] = []
    done, run = [], ""
    for line in re.split(r"[\r\n]+", output):
        if not line.startswith("|"):
            continue
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if "time_seconds" in cells:
            columns = cells
        elif len(cells) == len(columns):
            row = dict(zip(columns, cells, strict=True))
            run = row["run"] or run  # only in the first row of a run
            if row["epoch"] == "eval" and run != "warmup":
                done.append((float(row["time_seconds"]), float(row["tta_val_acc"])))
    return done


def summary(done: Sequence[tuple[float, float]]) -> str:
    """Return median and range of the seconds, and the mean accuracy."""
    seconds, accuracies = zip(*done, strict=True)
    median, least, most = spread(seconds)
    accuracy = 100 * statistics.mean(accuracies)
    return f"{median:.3f} s ({least:.3f} to {most:.3f}), {accuracy:.2f} % of {len(done)} runs"
