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
from tests.helpers.tracking import CLASSES, evaluation, merged, offline_runs, point, random_images, read_back, tracking
from tests.helpers.wandb_server import KEY, NOWHERE

ACCURACIES = (0.4, 0.7, 0.5)


NAMES = [f"test_class/{name}" for name in CLASSES]


@pytest.fixture(scope="module")
def recorded(runtime, tmp_path_factory):
    """A finished run of three epochs: its directory, its W&B directory, its W&B records, and what it printed."""
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
            tracked.finish(
                30, {"test_accuracy": ACCURACIES[-1]}, evaluation(ACCURACIES[-1]), random_images(), run_dir / "best.pt"
            )
            tracked.close()
    (offline,) = offline_runs(run_dir)
    assert described == f"offline, upload with: wandb sync {offline}"
    return run_dir, offline, read_back(offline)


def test_configuration_is_recorded(recorded):
    run_dir, _, found = recorded
    assert [(run["display_name"], run["project"]) for run in found["run"]] == [(run_dir.name, "cifar-ddp")]
    config = merged(found["config"])
    assert (config["recipe"], config["wandb"], config["world_size"]) == ("tutorial", "offline", 2)
    assert found["exit"][-1]["exit_code"] == 0
    assert "model" not in [artifact["type"] for artifact in found["artifact"]], "WANDB_LOG_MODEL is not set"


def test_history_equals_metrics_jsonl(recorded):
    run_dir, _, found = recorded
    records = read_metrics(run_dir)
    for name in ("train/loss", "train/lr", "train/images_per_second", "test/loss", "test/accuracy", *NAMES):
        history = [(row["item"]["trainer/step"], row["item"][name]) for row in found["history"] if name in row["item"]]
        assert history == series(records, name)
        assert [step for step, _ in history] == ([5, 10, 15, 20, 25, 30] if "train/" in name else [10, 20, 30])
    assert all(row["item"]["_step"] == row["item"]["trainer/step"] for row in found["history"])


def test_summary_holds_the_best_epoch(recorded):
    _, _, found = recorded
    summary = merged(found["summary"])
    assert summary["test/accuracy"] == {"max": 0.7}
    assert summary["test/loss"]["min"] == pytest.approx(0.3)
    assert summary["train/loss"] == {"min": 1 / 30}
    assert summary["train/images_per_second"].keys() == {"mean"}
    assert summary["test_class/sea lion"] == summary["test_class/cat/dog"] == {"last": 0.5}
    assert summary["test_accuracy"] == 0.5


def test_charts_have_their_axis(recorded):
    _, _, found = recorded
    axes = {metric.get("name") or metric["glob_name"]: metric.get("step_metric") for metric in found["metric"]}
    assert axes.pop("trainer/step") is axes.pop("epoch") is None
    assert axes == {
        name: "trainer/step" if name.startswith("train/") else "epoch"
        for name in (
            "train/*", "train/loss", "train/images_per_second", "test/*", "test/loss", "test/accuracy", "test_class/*"
        )
    }  # fmt: skip


def table(recorded, name):
    _, offline, found = recorded
    return json.loads((offline / "files" / found["history"][-1]["item"][f"{name}.path"]).read_text())


def test_confusion_matrix_is_recorded(recorded):
    matrix = table(recorded, "test/confusion_matrix_table")
    assert matrix["columns"] == ["Actual", "Predicted", "nPredictions"]
    assert {truth for truth, _, _ in matrix["data"]} == set(CLASSES)
    assert sum(count for truth, guess, count in matrix["data"] if truth == guess) == 50


def test_wrong_images_are_recorded(recorded, runtime):
    run_dir, offline, found = recorded
    wrong = table(recorded, "test/most_confidently_wrong")
    assert wrong["columns"] == ["image", "index", "class", "predicted", "confidence"]
    assert len(wrong["data"]) == 32
    confidences = [line[4] for line in wrong["data"]]
    assert confidences == sorted(confidences, reverse=True)
    images = random_images()
    files = found["history"][-1]["item"]["test/most_confidently_wrong_images.filenames"]
    for (_, index, truth, guess, _), name in zip(wrong["data"], files, strict=True):
        assert (truth, guess) == (CLASSES[index % 10], CLASSES[(index + 1) % 10])
        picture = np.array(Image.open(offline / "files" / name))  # four times the size
        assert np.array_equal(picture[::4, ::4], images[index].permute(1, 2, 0).numpy())

    # Copies of the table's images wait for their upload in the run directory, too.
    (artifact,) = [a for a in found["artifact"] if "most_confidently_wrong" in a["name"]]
    copies = [Path(entry["local_path"]) for entry in artifact["manifest"]["contents"]]
    assert len(copies) == 32 + 1
    assert all(copy.is_file() and copy.is_relative_to(run_dir.resolve()) for copy in copies)


def test_every_offline_record_is_complete(runtime, tmp_path, wandb, capfd):
    for step in (0, 2):
        with tracking(runtime, tmp_path, step=step) as tracked:
            tracked.log_train(point(step + 1))
            tracked.log_train(point(step + 2))
            tracked.log_train(point(step + 3), test_follows=True)  # killed before its test: half a row
            tracked.close(exit_code=1, preempting=True)
    (newest,) = offline_runs(tmp_path)  # the only one that `wandb sync` takes
    assert len(list(tmp_path.glob("wandb/superseded-offline-run-*"))) == 1
    found = read_back(newest)
    assert [(row["item"]["trainer/step"], row["item"]["train/loss"]) for row in found["history"]] == [
        (step, 1 / step) for step in (1, 2, 3, 4)
    ]
    assert found["run"][0]["run_id"] == (tmp_path / "wandb" / "id.txt").read_text().strip()
    assert found["exit"][-1]["exit_code"] == 1
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("many", [5, 10])
def test_classes_without_images_and_many_classes(runtime, tmp_path, wandb, monkeypatch, many):
    """NaN is in no record; W&B gets a chart for each class up to a number of them, also from an earlier start."""
    monkeypatch.setattr(wandb_logger, "_MANY_CLASSES", many)
    test = replace(evaluation(0.5), classes=(*CLASSES, "empty"))
    for step in (0, 1):
        with tracking(runtime, tmp_path, step=step) as tracked:
            tracked.log_test(step + 1, 1, test)
            tracked.close()
    for record in read_metrics(tmp_path):
        assert [name for name in record if name.startswith("test_class/")] == NAMES
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    history = read_back(offline_runs(tmp_path)[0])["history"]
    assert len(history) == 2
    for row in history:
        charts = {name for name in row["item"] if name.startswith("test_class/")}
        assert charts == (set(NAMES) if many >= 10 else set())


@pytest.mark.parametrize(
    ("choice", "environment", "warning", "made"),
    [
        ("auto", {}, None, 1),
        ("auto", {"WANDB_MODE": "disabled", "WANDB_API_KEY": KEY}, None, 0),
        ("online", {"WANDB_MODE": "offline"}, "W&B has no key (wandb login): recording offline", 1),
        ("auto", {"WANDB_API_KEY": "short"}, "W&B cannot be reached, recording offline: WANDB_API_KEY invalid", 1),
        ("auto", {"WANDB_API_KEY": KEY}, "W&B cannot be reached, recording offline: ", 1),
        ("disabled", {"WANDB_API_KEY": KEY}, None, 0),
    ],
)
def test_failed_start_costs_one_warning(
    runtime, tmp_path, wandb, monkeypatch, capfd, choice, environment, warning, made
):
    monkeypatch.setattr(wandb_logger, "_INIT_SECONDS", 0.5)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with tracking(runtime, tmp_path, choice) as tracked:
        tracked.close()
    printed = capfd.readouterr()
    lines = (printed.out + printed.err).splitlines()
    assert len(lines) == (warning is not None)
    assert all(warning in line for line in lines)
    assert len(offline_runs(tmp_path)) == made


def test_runs_of_one_process_have_their_own_data_directories(runtime, tmp_path, wandb, monkeypatch):
    monkeypatch.delenv("WANDB_DATA_DIR", raising=False)
    for name in "ab":
        (tmp_path / name).mkdir()
        with tracking(runtime, tmp_path / name) as tracked:
            assert os.environ["WANDB_DATA_DIR"] == str(tmp_path / name / "wandb")
            tracked.close()
    assert "WANDB_DATA_DIR" not in os.environ


def test_environment_names_the_run_and_moves_its_files(runtime, tmp_path, wandb, monkeypatch):
    for name in ("PROJECT", "NAME", "RUN_ID"):
        monkeypatch.setenv(f"WANDB_{name}", name.lower())
    run_dir, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    run_dir.mkdir()
    elsewhere.mkdir()
    monkeypatch.setenv("WANDB_DIR", str(elsewhere))
    other = elsewhere / "wandb" / "offline-run-20200101_000000-another"
    other.mkdir(parents=True)
    for step in (0, 2):
        with tracking(runtime, run_dir, step=step) as tracked:
            tracked.log_train(point(step + 1))
            assert str(elsewhere) in tracked.describe()
            tracked.close()
    newest, _ = offline_runs(elsewhere)[::-1]
    (run,) = read_back(newest)["run"]
    assert (run["project"], run["display_name"], run["run_id"]) == ("project", "name", "run_id")
    assert len(list(elsewhere.glob("wandb/superseded-*"))) == 1
    assert other.exists(), "another run's record is not ours to rename"


@pytest.mark.parametrize(("variable", "value"), [("WANDB_INIT_TIMEOUT", "33"), ("WANDB_CONSOLE", "wrap")])
def test_environment_wins_over_our_settings(runtime, tmp_path, wandb, monkeypatch, variable, value):
    seen = []
    monkeypatch.setenv(variable, value)
    monkeypatch.setattr("wandb.init", lambda settings, **_: seen.append(settings) or 1 / 0)
    with tracking(runtime, tmp_path):
        pass
    name = variable.removeprefix("WANDB_").lower()
    assert name not in seen[0].model_fields_set
    assert "finish_timeout" in seen[0].model_fields_set


@pytest.mark.parametrize(
    ("value", "models", "counts_as"),
    [("end", 1, None), ("best", 0, "false"), pytest.param("checkpoint", 1, "end", marks=pytest.mark.slow)],
)
def test_best_checkpoint_becomes_a_model_artifact(
    runtime, tmp_path, wandb, monkeypatch, capfd, value, models, counts_as
):
    """Also after a kill between its record and the end of the run: then the new record replaces the old one."""
    monkeypatch.setenv("WANDB_LOG_MODEL", value)
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "wandb"))
    (tmp_path / "step-7.pt").write_bytes(b"weights")
    for _ in range(2):
        with tracking(runtime, tmp_path) as tracked:
            tracked.finish(1, {"best_accuracy": 0.5}, evaluation(0.5), random_images(), tmp_path / "step-7.pt")
            tracked.close()
        (newest,) = offline_runs(tmp_path)
        artifacts = [artifact for artifact in read_back(newest)["artifact"] if artifact["type"] == "model"]
        assert len(artifacts) == models
        for artifact in artifacts:
            assert artifact["name"] == f"model-{(tmp_path / 'wandb' / 'id.txt').read_text().strip()}"
            assert sorted(artifact["aliases"]) == ["best", "latest"]
            (entry,) = artifact["manifest"]["contents"]
            assert Path(entry["local_path"]).read_bytes() == b"weights"
    warning = f"WARNING: WANDB_LOG_MODEL={value} counts as {counts_as}"
    lines = [line for line in capfd.readouterr().out.splitlines() if "no report" not in line]
    assert lines == ([warning, warning] if counts_as else [])


def test_missing_package_costs_one_warning(runtime, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with tracking(runtime, tmp_path) as tracked:
        assert tracked.describe() == "no record"
        tracked.log_train(point(1))
        tracked.close()
    (warning,) = capsys.readouterr().out.splitlines()
    assert warning.startswith("WARNING: W&B's record is incomplete, metrics.jsonl is not: ModuleNotFoundError: ")
    assert series(read_metrics(tmp_path), "train/loss") == [(1, 1.0)]


@pytest.mark.parametrize(
    ("name", "losses"),
    [
        ("wandb.Run.define_metric", []),  # at the start
        ("wandb.Run.log", []),
        ("wandb.Image", [1.0]),  # at the end
        ("wandb.Run.finish", [1.0]),
    ],
)
def test_failing_wandb_costs_one_warning(runtime, tmp_path, wandb, monkeypatch, capsys, name, losses):
    """Nothing raises; what had been recorded before stays, with the mark of its end."""

    def fail(*_, **__):
        raise BrokenPipeError("its process was killed\nsecond line")

    monkeypatch.setattr(name, fail)
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path))
    with tracking(runtime, tmp_path) as tracked:
        for step in (1, 1):
            tracked.log_train(point(step))
        tracked.finish(1, {"test_accuracy": 0.5}, evaluation(0.5), random_images(), tmp_path / "best.pt")
        tracked.close()
    assert tracked.describe() == "no record"
    assert [line for line in capsys.readouterr().out.splitlines() if "W&B" in line] == [
        "WARNING: W&B's record is incomplete, metrics.jsonl is not: BrokenPipeError: its process was killed"
    ]
    assert series(read_metrics(tmp_path), "train/loss") == [(1, 1.0), (1, 1.0)]
    (offline,) = offline_runs(tmp_path)
    records = read_back(offline)
    assert [row["item"]["train/loss"] for row in records.get("history", []) if "train/loss" in row["item"]] == losses
    assert [record["exit_code"] for record in records["exit"]] == [0]
    if losses:
        assert merged(records["summary"])["test_accuracy"] == 0.5
