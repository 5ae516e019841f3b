"""metrics.jsonl: a JSON object per line, with the step and the numbers logged at it."""

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


class MetricsFile:
    """The `metrics.jsonl` of a run in progress."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._warned = False

    def keep_until(self, step: int) -> list[dict[str, Any]]:
        """Drop the records after `step`, which a resumed run logs again, and any that is corrupt.

        Returns:
            The records that are left, in order.
        """
        if not self.path.exists():
            return []
        kept = [record for record in _parse(self.path.read_bytes()) if record["step"] <= step]
        lines = "".join(json.dumps(record) + "\n" for record in kept)
        write_atomically(self.path, lambda file: file.write(lines.encode()))
        return kept

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Append the numbers among `values`. A full disk costs the line and one warning, not the run."""
        numbers = {k: v for k, v in values.items() if isinstance(v, int | float)}
        line = (json.dumps({"step": step, **numbers}) + "\n").encode()
        try:
            with self.path.open("ab", buffering=0) as file:
                end = file.tell()
                if file.write(line) < len(line):
                    file.truncate(end)  # half a line would spoil the next one, too
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            if not self._warned:
                print(f"WARNING: {self.path} cannot be written: {error}", flush=True)
                self._warned = True


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Return the records of `run_dir`'s metrics.jsonl, in order; corrupt lines are left out."""
    path = run_dir / "metrics.jsonl"
    return _parse(path.read_bytes()) if path.exists() else []


def series(records: list[dict[str, Any]], name: str) -> Series:
    """Return (step, value) of the records that hold a finite number `name`."""
    points = ((record["step"], record.get(name)) for record in records)
    return [(step, value) for step, value in points if isinstance(value, int | float) and math.isfinite(value)]


def seconds_of_training(records: list[dict[str, Any]], global_batch_size: int) -> Series:
    """Return (step, seconds of training until then) at the log points, computed from their images per second."""
    points, seconds, before = [(0.0, 0.0)], 0.0, 0.0
    for step, rate in series(records, "train/images_per_second"):
        seconds += (step - before) * global_batch_size / rate
        before = step
        points.append((step, seconds))
    return points


def _parse(content: bytes) -> list[dict[str, Any]]:
    """Return the lines that are JSON objects with an integer step: a full disk may have cut one short."""
    records = []
    for line in content.splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line)
            if isinstance(record, dict) and type(record.get("step")) is int:
                records.append(record)
    return records
