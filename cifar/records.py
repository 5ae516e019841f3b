"""Reading a run's records: metrics.jsonl, result.json, config.json."""

import json
import math
from pathlib import Path
from typing import Any

Series = list[tuple[float, float]]
"""Points (x, y) of a curve."""


def read_records(run_dir: Path) -> list[dict[str, Any]]:
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
