"""The part "peers": speed94 beside the record holders' own scripts, which the user downloads: none of theirs is here.

airbench94_muon.py   github.com/KellerJordan/cifar10-airbench
cifar10_speedrun.py  github.com/hiverge/cifar10-speedrun

Both print a table with a row for each run, and read ./cifar10/train.pt and test.pt. All take turns on the same GPU. By
the records' rules, seconds are those of training, whitening and the test with views, after a run that warms up.
"""

import json
import os
import re
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from cifar.datasets import DATASETS
from cifar.datasets.base import Dataset
from tests.gpu.campaign import MODULE, Campaign

SCRIPTS = ("airbench94_muon.py", "cifar10_speedrun.py")
# They compile with max-autotune, which took 200 s from a cold start, on 16 cores that had other work.
COMPILE_SECONDS = 300
TURN_SECONDS = 150
Runs = list[tuple[float, float]]
"""Seconds and accuracy, 0 to 1, of each run."""


def peers(c: Campaign) -> None:
    """Compile theirs, then let theirs and ours take turns."""
    gpu = torch.cuda.is_available()
    runs, turns = (5, 2) if gpu else (1, 1)
    scripts = [c.peers / name for name in SCRIPTS if (c.peers / name).exists()] if c.peers else []
    if not scripts:
        c.say("peers", f"FAIL --peers names no directory with {' or '.join(SCRIPTS)}")
        return
    place, name = c.work / "peers", "cifar10" if os.environ.get("CIFAR_DATA_DIR") else "synthetic"
    c.attempt("dataset", lambda: write_dataset(name, place / "cifar10"))
    found: dict[str, Runs] = {}

    def theirs(script: Path, title: str, count: int, at_most: float) -> str:
        # Under the same name each time: some of the compiler's caches look at it.
        (place / script.name).write_text(with_runs(script, count))
        began = time.perf_counter()
        status, output = c.run(title, [sys.executable, script.name], at_most, cwd=place)
        return verdict(script.stem, rows(output), count, status, time.perf_counter() - began)

    def ours(title: str) -> str:
        out = c.work / f"{title}.jsonl"
        flags = ["--recipe", "speed94", "--precision", "bf16", "--cuda-graph"]
        if not gpu:
            flags = ["--small", "--recipe", "tutorial", "--max-steps", "2", "--tta", "flip"]
        command = [*MODULE, "tests.gpu.repeat", f"--runs={runs + 1}", f"--out={out}", *flags, "--dataset", name]
        began = time.perf_counter()
        status, _ = c.run(title, command, TURN_SECONDS)
        lines = out.read_text().splitlines() if out.exists() else []
        warm = [json.loads(line) for line in lines[1:]]
        done = [(row["record_seconds"], row["test_accuracy_tta"]) for row in warm]
        return verdict("speed94", done, runs, status, time.perf_counter() - began)

    def verdict(who: str, done: Runs, count: int, status: int, wall: float) -> str:
        if status or len(done) < count:
            how = f"status {status}" if status != -1 else "was ended by the limit"
            return f"FAIL {how} after {wall:.0f} s, {len(done)} of {count} runs"
        found.setdefault(who, []).extend(done)
        return f"{summary(done)}; wall clock {wall:.1f} s"

    for script in scripts:
        title = f"{script.stem} compiles"
        c.attempt(title, lambda s=script, t=title: theirs(s, t, 1, COMPILE_SECONDS))  # type: ignore[misc]
    compiled = [script for script in scripts if script.stem in found]
    found.clear()  # a run right after compiling is none of the comparison
    for turn in range(1, turns + 1):
        for script in compiled:
            title = f"{script.stem} {turn}"
            c.attempt(title, lambda s=script, t=title: theirs(s, t, runs, TURN_SECONDS))  # type: ignore[misc]
        c.attempt(f"speed94 {turn}", lambda title=f"speed94 {turn}": ours(title))  # type: ignore[misc]
    for who, done in found.items():
        c.say(who, f"{summary(done)}, on {name}")


def write_dataset(name: str, folder: Path) -> str:
    """Write the dataset `name`, of $CIFAR_DATA_DIR, as the files that their loaders read."""
    dataset: Dataset = DATASETS[name](Path(os.environ.get("CIFAR_DATA_DIR", "data")))
    folder.mkdir(parents=True)
    for split, (images, labels) in (("train", dataset.train), ("test", dataset.test)):
        images = images.permute(0, 2, 3, 1).contiguous()  # uint8 [n, 32, 32, 3]
        torch.save({"images": images, "labels": labels, "classes": list(dataset.classes)}, folder / f"{split}.pt")
    return f"PASS {name}" + (", for want of $CIFAR_DATA_DIR: its accuracies mean nothing" * (name == "synthetic"))


def with_runs(script: Path, count: int) -> str:
    """Return the text of their script with another number of runs.

    Raises:
        ValueError: it has no place, or several, that says how many.
    """
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
    return (
        f"{statistics.median(seconds):.3f} s ({min(seconds):.3f} to {max(seconds):.3f}), "
        f"{100 * statistics.mean(accuracies):.2f} % of {len(done)} runs"
    )
