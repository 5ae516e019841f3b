"""metrics.jsonl, written and read."""

import json
import resource

from cifar.files import write_json
from cifar.records.metrics import MetricsFile, read_metrics, series

DAMAGED = (
    b'{"step": 3, "train', b"[3]", b"3", b"null", b'{"train/loss": 1.5}', b'{"step": "3"}', b'{"step": true}',
    b'{"step": NaN}', b'{"step": 3, "x": ' + b"9" * 5_000 + b"}", b'{"step": 3, "x": "\xff\xfe"}',
    b'{"step": 3, "x": 1' + b"0" * 400 + b"}", b"\x00\x00\x00", b"[" * 100_000,
)  # fmt: skip


def test_damaged_lines_are_dropped_with_one_warning(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    good = [{"step": 2, "train/loss": 0.1 + 0.2}, {"step": 4, "train/loss": 1e-7}]
    path.write_bytes(b"\n".join([json.dumps(good[0]).encode(), *DAMAGED, b"", json.dumps(good[1]).encode()]))
    warning = f"WARNING: damaged lines left out of {path}: 13 of 15\n"
    for printed in (warning, ""):
        assert MetricsFile(tmp_path).keep_until(4) == good
        assert capsys.readouterr().out == printed
    assert path.read_text() == "".join(json.dumps(record) + "\n" for record in good)


def test_records_after_the_resumed_step_are_dropped(tmp_path):
    metrics = MetricsFile(tmp_path)
    assert metrics.keep_until(5) == read_metrics(tmp_path) == list(tmp_path.iterdir()) == []
    for step in (2, 4, 6):
        metrics.log(step, {"train/loss": step / 4, "picture": object()})
    assert series(read_metrics(tmp_path), "train/loss") == [(2, 0.5), (4, 1.0), (6, 1.5)]
    assert metrics.keep_until(4) == [{"step": 2, "train/loss": 0.5}, {"step": 4, "train/loss": 1.0}]
    assert read_metrics(tmp_path) == metrics.keep_until(4)


def test_numbers_that_json_does_not_have_are_left_out(tmp_path):
    """Also those that an earlier version has written, when the run is resumed."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "x": NaN, "y": 0.5}\n')
    MetricsFile(tmp_path).log(2, {"x": float("nan"), "y": float("-inf"), "z": 1})
    expected = [{"step": 1, "y": 0.5}, {"step": 2, "z": 1}]
    assert read_metrics(tmp_path) == MetricsFile(tmp_path).keep_until(2) == expected
    assert [json.loads(line) for line in path.read_text().splitlines()] == expected
    write_json(tmp_path / "result.json", {"x": [float("nan"), float("inf"), 1.5]})
    assert json.loads((tmp_path / "result.json").read_text()) == {"x": [None, None, 1.5]}


def test_disk_that_is_full_for_a_while_leaves_no_half_line(tmp_path, capsys):
    """Simulated by a limit on the size of a file, at which a write is cut short, too."""
    metrics, limits = MetricsFile(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    metrics.log(1, {"x": 1})
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len('{"step": 1, "x": 1}') + 9, limits[1]))
        for step in (2, 3):
            metrics.log(step, {"x": 1})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    metrics.log(4, {"x": 1})
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 4]
    warning = f"WARNING: {tmp_path / 'metrics.jsonl'} cannot be written: No space left on device\n"
    assert capsys.readouterr().out == warning
