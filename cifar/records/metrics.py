"""metrics.jsonl: a JSON object per line, with the step and the numbers logged at it."""

import contextlib
import errno
import itertools
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cifar.files import write_atomically

OF_A_START = ("world_size", "device", "version", "git_commit", "python", "torch", "accelerate")

Series = list[tuple[float, float]]
"""Points (x, y) of a curve."""


@dataclass(frozen=True)
class LogPoint:
    """Training metrics at a logging step."""

    step: int  # optimizer steps since the run began
    epoch: int  # from 1
    epoch_step: int  # optimizer steps since the epoch began
    loss: float  # mean cross-entropy since the last log point, over all ranks
    lr: float  # of the last update
    # Of all ranks together, since the last log point or checkpoint. A process's first value includes its first step,
    # and an epoch's first the drawing of its permutation.
    images_per_second: float


class MetricsFile:
    """The metrics.jsonl of a run in progress. A file that cannot be read or written costs one warning, not the run."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / "metrics.jsonl"
        self._warned = False

    def keep_until(self, step: int) -> list[dict[str, Any]]:
        """Drop damaged records and those after `step`, which a resumed run logs again; return the others, in order."""
        records: list[dict[str, Any]] = []
        try:
            records += (record for record in read_metrics(self._path.parent) if record["step"] <= step)
            lines = "".join(json.dumps(record) + "\n" for record in records)
            if self._path.exists():
                write_atomically(self._path, lambda file: file.write(lines.encode()))
        except OSError as error:
            self._warn(error)
        return records

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Append the finite numbers among `values`."""
        line = (json.dumps({"step": step, **numbers(values)}) + "\n").encode()
        try:
            with self._path.open("ab", buffering=0) as file:
                end = file.tell()
                if file.write(line) < len(line):
                    file.truncate(end)  # half a line would spoil the next one, too
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._warn(error)

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            print(f"WARNING: {self._path} cannot be written: {error.strerror}", flush=True)
            self._warned = True


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Return the records of a run's metrics.jsonl, in order; damaged lines are left out, with one warning.

    There are none if there is no such file; one that cannot be read is an OSError.
    """
    path = run_dir / "metrics.jsonl"
    try:
        lines = [line for line in path.read_bytes().split(b"\n") if line.strip()]
    except FileNotFoundError:
        return []
    records = [record for record in map(_parse, lines) if record is not None]
    if len(records) < len(lines):
        print(f"WARNING: damaged lines left out of {path}: {len(lines) - len(records):,} of {len(lines):,}", flush=True)
    return records


def _parse(line: bytes) -> dict[str, Any] | None:
    """Return the record in a line, or None if a crash, a full disk or a flipped bit has damaged it."""
    with contextlib.suppress(ValueError, RecursionError, OverflowError):
        record = json.loads(line)
        if isinstance(record, dict) and type(record.get("step")) is int:
            return numbers(record)  # earlier versions wrote NaN
    return None


def numbers(values: dict[str, Any]) -> dict[str, Any]:
    """Return the finite numbers among `values`: JSON has no others."""
    return {name: value for name, value in values.items() if isinstance(value, int | float) and math.isfinite(value)}


def series(records: list[dict[str, Any]], name: str) -> Series:
    """Return (step, value) of the records, of `read_metrics`, that hold a number `name`."""
    return [(record["step"], record[name]) for record in records if name in record]


def starts(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the starts of a run from its config.json, in order: the step after which each began, and on what.

    Of a run of an earlier version, only the last start is known; it counts for the whole run.
    """
    return facts.get("starts", [{"step": 0} | {name: facts.get(name) for name in OF_A_START}])


def parts(facts: dict[str, Any], steps: int, *names: str) -> list[tuple[Any, ...]]:
    """Return `names` of each start that has trained a part of the first `steps` steps; equal neighbours count once."""
    values = (tuple(start[name] for name in names) for start in starts(facts) if start["step"] < max(steps, 1))
    return [value for value, _ in itertools.groupby(values)]
