"""Reading a run's records: metrics.jsonl, result.json, config.json."""

import contextlib
import errno
import json
import math
import os
from pathlib import Path
from typing import Any

from cifar.files import write_atomically

Series = list[tuple[float, float]]
"""Points (x, y) of a curve."""


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; one that a full disk cut short is left out."""
    path = run_dir / "metrics.jsonl"
    records = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def series(records: list[dict[str, Any]], name: str) -> Series:
    """(step, value) of the records of `name` that can be drawn."""
    return [(record["step"], record[name]) for record in records if math.isfinite(record.get(name, math.nan))]


def seconds_of_training(records: list[dict[str, Any]], global_batch_size: int) -> Series:
    """(step, seconds of training until then) at the log points, from the images/s between them."""
    points, seconds, before = [(0.0, 0.0)], 0.0, 0.0
    for step, rate in series(records, "train/images_per_second"):
        seconds += (step - before) * global_batch_size / rate
        before = step
        points.append((step, seconds))
    return points


class MetricsFile:
    """`metrics.jsonl`: a JSON object per line, with the step and the numbers logged at it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._complained = False

    def keep_until(self, step: int) -> list[dict[str, Any]]:
        """Drop the lines after `step`, which a resumed run is about to write again, and any that is cut short.

        Returns:
            What the lines that are kept hold.
        """
        if not self.path.exists():
            return []
        kept, rows = [], []
        for line in self.path.read_text().splitlines():
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                if row["step"] <= step:
                    kept.append(line + "\n")
                    rows.append(row)
        write_atomically(self.path, lambda file: file.write("".join(kept).encode()))
        return rows

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Append the numbers among `values`. A full disk costs the line and one warning, not the run."""
        numbers = {k: v for k, v in values.items() if isinstance(v, int | float)}
        line = (json.dumps({"step": step, **numbers}) + "\n").encode()
        try:
            with self.path.open("ab", buffering=0) as file:
                end = file.tell()
                if file.write(line) < len(line):
                    file.truncate(end)  # half a line would spoil the next one too
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            if not self._complained:
                print(f"WARNING: {self.path} can't be written: {error}", flush=True)
                self._complained = True
