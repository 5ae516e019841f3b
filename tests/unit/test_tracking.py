"""What Tracking records: offline W&B runs, read back with W&B's own reader."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cifar.records import wandb_logger
from cifar.records.metrics import read_metrics, series
from tests.helpers.tracking import CLASSES, IMAGES, evaluation, finish, losses, offline_runs, point, read_back, tracking
from tests.helpers.wandb_server import KEY, NOWHERE

ACCURACIES = (0.4, 0.7, 0.5)
NAMES = [f"test_class/{name}" for name in CLASSES]


@pytest.fixture(scope="module")
def recorded(runtime, tmp_path_factory):
    """A finished run of three epochs: its directory, its W&B directory, and what W&B has recorded there."""
    run_dir = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in NOWHERE.items():
            patch.setenv(name, value)
        patch.setenv("WANDB_DATA_DIR", str(run_dir / "wandb"))
        with tracking(runtime, run_dir, facts={"world_size": 2}) as tracked:
            described = tracked.describe()
            for epoch, accuracy in enumerate(ACCURACIES, start=1):
                tracked.log_train(point(10 * epoch - 5))
                tracked.log_train(point(10 * epoch), test_follows=True)
                tracked.log_test(10 * epoch, epoch, evaluation(accuracy))
            finish(tracked, run_dir, ACCURACIES[-1], step=30)
    (offline,) = offline_runs(run_dir)
    assert described == f"offline, upload with: wandb sync {offline}"
    return run_dir, offline, read_back(offline)


def test_configuration_charts_and_summary(recorded):
    run_dir, _, found = recorded
    assert [(run["display_name"], run["project"]) for run in found["run"]] == [(run_dir.name, "cifar-ddp")]
    config = found["config"]
    assert (config["recipe"], config["wandb"], config["world_size"]) == ("tutorial", "offline", 2)
    assert found["exit"][-1]["exit_code"] == 0
    assert "model" not in [artifact["type"] for artifact in found["artifact"]], "WANDB_LOG_MODEL is not set"

    axes = {metric.get("name") or metric["glob_name"]: metric.get("step_metric") for metric in found["metric"]}
    assert axes == {"epoch": None, "test/*": "epoch", "test/accuracy": "epoch", "test_class/*": "epoch"}

    summary = found["summary"]
    assert summary["test/accuracy"] == {"max": 0.7}, "of the best epoch"
    assert summary["train/loss"] == 1 / 30
    assert summary["test_class/sea lion"] == summary["test_class/cat/dog"] == 0.5
    assert summary["test_accuracy"] == 0.5


def test_history_equals_metrics_jsonl(recorded):
    run_dir, _, found = recorded
    records, rows = read_metrics(run_dir), found["history"]
    for name in ("train/loss", "train/lr", "train/images_per_second", "test/loss", "test/accuracy", *NAMES):
        points = [(row["_step"], row[name]) for row in rows if name in row]
        assert points == series(records, name)
        assert [step for step, _ in points] == ([5, 10, 15, 20, 25, 30] if "train/" in name else [10, 20, 30])


def test_confusion_matrix_and_wrong_images(recorded):
    run_dir, offline, found = recorded
    last = found["history"][-1]
    matrix = json.loads((offline / "files" / last["test/confusion_matrix_table.path"]).read_text())
    assert matrix["columns"] == ["Actual", "Predicted", "nPredictions"]
    assert sum(count for truth, guess, count in matrix["data"] if truth == guess) == 50

    # The table and its images wait for their upload in the run directory.
    (artifact,) = [artifact for artifact in found["artifact"] if "most_confidently_wrong" in artifact["name"]]
    files = {entry["path"]: Path(entry["local_path"]) for entry in artifact["manifest"]["contents"]}
    assert all(file.is_relative_to(run_dir.resolve()) for file in files.values())
    wrong = json.loads(files["test/most_confidently_wrong.table.json"].read_text())
    assert wrong["columns"] == ["image", "index", "class", "predicted", "confidence"]
    confidences = [line[4] for line in wrong["data"]]
    assert confidences == sorted(confidences, reverse=True)
    assert len(wrong["data"]) == 32
    for image, index, truth, guess, _ in wrong["data"]:
        assert (truth, guess) == (CLASSES[index % 10], CLASSES[(index + 1) % 10])
        picture = np.array(Image.open(files[image["path"]]))  # four times the size
        assert np.array_equal(picture[::4, ::4], IMAGES[index].permute(1, 2, 0).numpy())


def test_every_offline_record_is_complete(runtime, tmp_path, wandb, capfd):
    for step in (0, 2):
        with tracking(runtime, tmp_path, step=step, exit_code=1, preempting=True) as tracked:
            tracked.log_train(point(step + 1))
            tracked.log_train(point(step + 2))
            tracked.log_train(point(step + 3), test_follows=True)  # killed before its test: half a row
    (newest,) = offline_runs(tmp_path)  # the only one that `wandb sync` takes
    assert len(list(tmp_path.glob("wandb/superseded-offline-run-*"))) == 1
    found = read_back(newest)
    assert losses(found["history"]) == [(step, 1 / step) for step in (1, 2, 3, 4)]
    assert [row["_step"] for row in found["history"]] == [1, 2, 3, 4]
    assert found["run"][0]["run_id"] == (tmp_path / "wandb" / "id.txt").read_text().strip()
    assert found["exit"][-1]["exit_code"] == 1
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("many", [5, 10])
def test_classes_without_images_and_many_classes(runtime, tmp_path, wandb, monkeypatch, many):
    """NaN is in no record; W&B gets a chart for each class up to a number of them."""
    monkeypatch.setattr(wandb_logger, "_MANY_CLASSES", many)
    with tracking(runtime, tmp_path) as tracked:
        tracked.log_test(1, 1, replace(evaluation(0.5), classes=(*CLASSES, "empty")))
    (record,) = read_metrics(tmp_path)
    assert [name for name in record if name.startswith("test_class/")] == NAMES
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    (row,) = read_back(*offline_runs(tmp_path))["history"]
    assert [name for name in row if name.startswith("test_class/")] == (sorted(NAMES) if many >= 10 else [])


@pytest.mark.parametrize(
    ("choice", "environment", "warning", "made"),
    [
        ("auto", {}, None, 1),
        ("auto", {"WANDB_MODE": "disabled", "WANDB_API_KEY": KEY}, None, 0),
        ("auto", {"WANDB_DISABLED": "true"}, None, 0),
        ("online", {"WANDB_MODE": "offline"}, "W&B has no key (wandb login): recording offline", 1),
        ("auto", {"WANDB_API_KEY": "short"}, "W&B cannot be reached, recording offline: WANDB_API_KEY invalid", 1),
        ("auto", {"WANDB_API_KEY": KEY}, "W&B cannot be reached, recording offline: ", 1),
        ("disabled", {"WANDB_API_KEY": KEY}, None, 0),
    ],
)
def test_start_without_a_server(runtime, tmp_path, wandb, monkeypatch, capfd, choice, environment, warning, made):
    monkeypatch.setitem(wandb_logger._SETTINGS, "init_timeout", 0.5)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with tracking(runtime, tmp_path, choice):
        pass
    lines = "".join(capfd.readouterr()).splitlines()
    assert len(lines) == (warning is not None)
    assert all(warning in line for line in lines)
    assert len(offline_runs(tmp_path)) == made


def test_environment_names_the_run_and_moves_its_files(runtime, tmp_path, wandb, monkeypatch):
    for name in ("PROJECT", "NAME", "RUN_ID"):
        monkeypatch.setenv(f"WANDB_{name}", name.lower())
    elsewhere, run_dir = tmp_path / "elsewhere", tmp_path / "run"
    monkeypatch.setenv("WANDB_DIR", str(elsewhere))
    monkeypatch.delenv("WANDB_DATA_DIR")
    other = elsewhere / "wandb" / "offline-run-20200101_000000-another"
    other.mkdir(parents=True)
    for step in (0, 2):
        with tracking(runtime, run_dir, step=step) as tracked:
            tracked.log_train(point(step + 1))
            assert str(elsewhere) in tracked.describe()
            assert os.environ["WANDB_DATA_DIR"] == str(run_dir / "wandb")
        assert "WANDB_DATA_DIR" not in os.environ, "the next run of this process has another one"
    newest, _ = offline_runs(elsewhere)[::-1]
    (run,) = read_back(newest)["run"]
    assert (run["project"], run["display_name"], run["run_id"]) == ("project", "name", "run_id")
    assert len(list(elsewhere.glob("wandb/superseded-*"))) == 1
    assert other.exists(), "another run's record is not ours to rename"


def test_environment_wins_over_our_settings(runtime, tmp_path, wandb, monkeypatch):
    seen = []
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "33")
    monkeypatch.setenv("WANDB_CONSOLE", "wrap")
    monkeypatch.setattr("wandb.init", lambda settings, **_: seen.append(settings) or 1 / 0)
    with tracking(runtime, tmp_path):
        pass
    assert seen[0].model_fields_set == wandb_logger._SETTINGS.keys() - {"init_timeout", "console"}


@pytest.mark.parametrize(
    ("value", "models"), [("end", 1), ("best", 0), pytest.param("checkpoint", 1, marks=pytest.mark.slow)]
)
def test_best_checkpoint_becomes_a_model_artifact(runtime, tmp_path, wandb, monkeypatch, capfd, value, models):
    """Also after a kill between its record and the end of the run: then the new record replaces the old one."""
    monkeypatch.setenv("WANDB_LOG_MODEL", value)
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "wandb"))
    for _ in range(2):
        with tracking(runtime, tmp_path) as tracked:
            finish(tracked, tmp_path)
        (newest,) = offline_runs(tmp_path)
        artifacts = [artifact for artifact in read_back(newest)["artifact"] if artifact["type"] == "model"]
        assert len(artifacts) == models
        for artifact in artifacts:
            assert artifact["name"] == f"model-{(tmp_path / 'wandb' / 'id.txt').read_text().strip()}"
            assert sorted(artifact["aliases"]) == ["best", "latest"]
            (entry,) = artifact["manifest"]["contents"]
            assert Path(entry["local_path"]).read_bytes() == b"weights"
    lines = capfd.readouterr().out.splitlines()
    assert sum("counts as end" in line for line in lines) == (2 if value == "checkpoint" else 0)


@pytest.mark.parametrize(
    ("name", "logged"),
    [
        ("wandb", None),  # no such package
        ("wandb.Run.define_metric", []),  # at the start
        ("wandb.Run.log", []),
        ("wandb.Image", [(1, 1.0)]),  # at the end
        ("wandb.Run.finish", [(1, 1.0)]),
    ],
)
def test_failing_wandb_costs_one_warning(runtime, tmp_path, wandb, monkeypatch, capsys, name, logged):
    """Nothing raises; what had been recorded before stays, with the mark of its end."""

    def fail(*_, **__):
        raise BrokenPipeError("its process was killed\nsecond line")

    if name == "wandb":
        monkeypatch.setitem(sys.modules, "wandb", None)
    else:
        monkeypatch.setattr(name, fail)
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path))
    with tracking(runtime, tmp_path) as tracked:
        for step in (1, 1):
            tracked.log_train(point(step))
        finish(tracked, tmp_path)
    assert tracked.describe() == "no record"
    (warning,) = [line for line in capsys.readouterr().out.splitlines() if "W&B" in line]
    reason = "BrokenPipeError: its process was killed" if name != "wandb" else "ModuleNotFoundError: "
    assert warning.startswith(f"WARNING: W&B's record is incomplete, metrics.jsonl is not: {reason}")
    assert series(read_metrics(tmp_path), "train/loss") == [(1, 1.0), (1, 1.0)]
    if logged is not None:
        found = read_back(*offline_runs(tmp_path))
        assert losses(found["history"]) == logged
        assert [record["exit_code"] for record in found["exit"]] == [0]
