"""The records of a run: W&B's, read back with W&B's own reader, and metrics.jsonl."""

import json
import re
import socket
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cifar import tracking
from cifar import wandb_logger as wandb_run
from cifar.config import TrainConfig
from cifar.data import Data, DeviceImages
from cifar.datasets import CLASSES
from cifar.evaluation import Evaluation
from cifar.train_state import LogPoint
from tests.helpers.processes import records, result, run, train
from tests.helpers.terminal import Terminal
from tests.helpers.wandb_server import KEY, NOWHERE, WandbServer, read_back


def flat(found, kind, part):
    """All updates of the records of `kind`, the last of each key."""
    return {key: value for record in found[kind] for key, value in record[part].items()}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A run of two processes with --wandb offline: its console output, its folder, its W&B folder and records."""
    folder = tmp_path_factory.mktemp("wandb")
    done = train(
        "--dataset", "synthetic", "--local-batch-size", "100", "--max-steps", "8", "--log-steps", "2",
        "--run-dir", "run", "--wandb", "offline", cwd=folder, processes=2, **NOWHERE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (offline,) = (folder / "run" / "wandb").glob("*run-*/")
    return done, folder / "run", offline, read_back(offline)


def test_two_processes_make_one_offline_run_in_the_run_folder(recorded):
    done, run_dir, offline, found = recorded
    assert offline.name.startswith("offline-run-")
    assert [made["display_name"] for made in found["run"]] == ["run"]
    assert found["exit"][-1]["exit_code"] == 0
    assert f"offline, upload with: wandb sync {offline.relative_to(run_dir.parent)}" in done.stdout


def test_nothing_of_wandbs_own_voice_is_heard(recorded):
    done, *_ = recorded
    assert "wandb:" not in done.stdout + done.stderr


def test_the_configuration_is_recorded(recorded):
    *_, found = recorded
    config = flat(found, "config", "update")
    wanted = {
        "recipe": "tutorial", "local_batch_size": 100, "global_batch_size": 200, "seed": 0, "dataset": "synthetic",
        "world_size": 2, "steps_per_epoch": 250, "torch": torch.__version__, "wandb": "offline",
    }  # fmt: skip
    assert {name: config[name] for name in wanted} == wanted


@pytest.mark.parametrize(
    ("name", "steps"),
    [("train/loss", [2, 4, 6, 8]), ("train/lr", [2, 4, 6, 8]), ("train/images_per_second", [2, 4, 6, 8])]
    + [(name, [8]) for name in ("test/loss", "test/accuracy", *(f"test_class/{label}" for label in CLASSES))],
)
def test_every_metric_is_recorded_as_in_metrics_jsonl(recorded, name, steps):
    _, run_dir, _, found = recorded
    history = [(row["item"]["trainer/step"], row["item"][name]) for row in found["history"] if name in row["item"]]
    assert [step for step, _ in history] == steps
    assert history == records(run_dir, name)


def test_the_accuracies_recorded_are_those_of_the_result(recorded):
    _, run_dir, _, found = recorded
    own, row = result(run_dir), found["history"][-1]["item"]
    assert row["test/accuracy"] == own["test_accuracy"] == own["test_correct"] / own["test_total"]
    assert [row[f"test_class/{name}"] for name in CLASSES] == own["test_class_accuracy"]
    assert row["epoch"] == 1
    summary = flat(found, "summary", "update")
    assert summary["test/accuracy"] == {"max": own["test_accuracy"]}
    assert summary["train/loss"] == {"min": min(loss for _, loss in records(run_dir, "train/loss"))}
    assert summary["train/images_per_second"].keys() == {"mean"}
    assert {name: summary[name] for name in own if name != "test_class_accuracy"} == {
        name: value for name, value in own.items() if name != "test_class_accuracy"
    }


def test_every_chart_has_its_axis_and_every_column_its_summary(recorded):
    *_, found = recorded
    declared = {
        metric.get("name") or metric["glob_name"]: (
            metric.get("step_metric"),
            next(iter(metric.get("summary", {})), None),
            metric["options"].get("hidden", False),
        )
        for metric in found["metric"]
    }
    assert declared == {
        "trainer/step": (None, None, True),
        "epoch": (None, None, True),
        "train/*": ("trainer/step", None, False),
        "train/loss": ("trainer/step", "min", False),
        "train/images_per_second": ("trainer/step", "mean", False),
        "test/*": ("epoch", None, False),
        "test/loss": ("epoch", "min", False),
        "test/accuracy": ("epoch", "max", False),
        "test_class/*": ("epoch", "last", False),
    }


def table(recorded, name):
    _, _, offline, found = recorded
    return json.loads((offline / "files" / found["history"][-1]["item"][f"{name}.path"]).read_text())


def test_the_confusion_matrix_is_recorded(recorded):
    _, run_dir, _, found = recorded
    matrix = table(recorded, "test/confusion_matrix_table")
    assert matrix["columns"] == ["Actual", "Predicted", "nPredictions"]
    assert len(matrix["data"]) == 100
    assert sum(count for truth, guess, count in matrix["data"] if truth == guess) == result(run_dir)["test_correct"]
    assert any("confusion_matrix/v1" in json.dumps(update) for update in found["config"])


def test_the_wrong_images_are_recorded_with_their_pictures(recorded, synthetic):
    _, run_dir, offline, found = recorded
    row = found["history"][-1]["item"]
    wrong = table(recorded, "test/most_confidently_wrong")
    assert wrong["columns"] == ["image", "index", "class", "predicted", "confidence"]
    assert len(wrong["data"]) == 32
    confidences = [line[4] for line in wrong["data"]]
    assert confidences == sorted(confidences, reverse=True)
    files = row["test/most_confidently_wrong_images.filenames"]
    for (_, index, truth, guess, _), name in zip(wrong["data"], files, strict=True):
        assert truth == CLASSES[synthetic.test.labels[index]] != guess
        picture = np.array(Image.open(offline / "files" / name))  # four times the size
        assert np.array_equal(picture[::4, ::4], synthetic.test.images[index].permute(1, 2, 0).numpy())

    # The table's own pictures are uploaded from copies, which have to be in the run folder as well.
    (artifact,) = [a for a in found["artifact"] if "most_confidently_wrong" in a["name"]]
    copies = [Path(entry["local_path"]) for entry in artifact["manifest"]["contents"]]
    assert len(copies) == 32 + 1
    assert all(copy.is_file() and copy.is_relative_to(run_dir.resolve()) for copy in copies)


def start(runtime, folder, choice):
    return wandb_run.start_wandb(TrainConfig(device="cpu", wandb=choice), runtime, folder)


def runs(folder):
    return sorted(path.name.split("-run-")[0] for path in folder.glob("wandb/*run-*/") if not path.is_symlink())


@pytest.mark.parametrize(
    ("choice", "environment", "warnings", "made"),
    [
        ("auto", {}, [], ["offline"]),
        ("offline", {"WANDB_API_KEY": KEY}, [], ["offline"]),
        ("auto", {"WANDB_MODE": "offline", "WANDB_API_KEY": KEY}, [], ["offline"]),
        ("auto", {"WANDB_MODE": "disabled", "WANDB_API_KEY": KEY}, [], []),
        ("online", {}, ["W&B has no key"], ["offline"]),
        ("online", {"WANDB_MODE": "offline"}, ["W&B has no key"], ["offline"]),
        ("auto", {"WANDB_API_KEY": "short"}, ["recording offline: WANDB_API_KEY invalid"], ["offline"]),
        ("auto", {"WANDB_API_KEY": KEY}, ["W&B can't be reached, recording offline: "], ["offline"]),
        ("disabled", {"WANDB_API_KEY": KEY}, [], []),
    ],
)
def test_trouble_costs_one_warning_and_leaves_an_offline_record(
    runtime, tmp_path, wandb, monkeypatch, capfd, choice, environment, warnings, made
):
    monkeypatch.setattr(wandb_run, "_INIT_SECONDS", 2)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    tracker = start(runtime, tmp_path, choice)
    if tracker is not None:
        tracker.tracker.log({"x": 1}, step=1)
        tracker.tracker.finish()
    said = capfd.readouterr()
    lines = [line for line in (said.out + said.err).splitlines() if line]
    assert [any(warning in line for line in lines) for warning in warnings] == [True] * len(warnings)
    assert len(lines) == len(warnings)
    assert runs(tmp_path) == made


def test_the_package_may_be_missing(tmp_path):
    script = """
import sys
sys.modules["wandb"] = None
from pathlib import Path
from cifar import wandb_logger as wandb_run
from cifar.config import TrainConfig
from cifar.distributed.runtime import Runtime
config = TrainConfig(device="cpu")
print(wandb_run.start_wandb(config, Runtime(config), Path()))
"""
    done = run([sys.executable, "-c", script], tmp_path)
    warning, none = done.stdout.splitlines()
    assert warning.startswith("WARNING: no W&B record: ")
    assert "pip install wandb" in warning
    assert none == "None"


def test_there_is_no_prompt_even_at_a_terminal(tmp_path):
    script = """
from pathlib import Path
from cifar import wandb_logger as wandb_run
from cifar.config import TrainConfig
from cifar.distributed.runtime import Runtime
for choice in ("auto", "online"):
    config = TrainConfig(device="cpu", wandb=choice)
    wandb_run.start_wandb(config, Runtime(config), Path()).tracker.finish()
print("done")
"""
    with Terminal([sys.executable, "-c", script], tmp_path, **NOWHERE) as terminal:
        assert terminal.end() == 0
        said = terminal.written.splitlines()
    assert said == ["WARNING: W&B has no key (wandb login): recording offline", "done"]


def test_wandbs_terminal_dashboard_shows_an_offline_run(recorded):
    """The README's filter leaves loss, accuracy and throughput."""
    _, run_dir, offline, _ = recorded
    command = [sys.executable, "-m", "wandb", "leet", "run", offline]
    with Terminal(command, run_dir, rows=45, columns=200, **NOWHERE) as terminal:
        terminal.until("Finished")
        terminal.type("/loss|accuracy|images\r")
        terminal.until("/ to change")
        assert re.search(r"\[4/\d+\]", terminal.written), terminal.written
        terminal.type("q")
        assert terminal.end() == 0


def test_auto_is_online_after_wandb_login(tmp_path):
    script = """
from pathlib import Path
from cifar import wandb_logger as wandb_run
from cifar.config import TrainConfig
from cifar.distributed.runtime import Runtime
config = TrainConfig(device="cpu")
tracker = wandb_run.start_wandb(config, Runtime(config), Path()).tracker
print(tracker.offline)
tracker.finish()
"""
    with WandbServer() as server:
        account = {**NOWHERE, "WANDB_BASE_URL": server.url, "NETRC": str(tmp_path / "netrc")}
        for command in (["-m", "wandb", "login", KEY], ["-c", script]):
            done = run([sys.executable, *command], tmp_path, **account)
            assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout == "False\n"
        assert [own.exit_code for own in server.runs.values()] == [0]


def test_training_does_not_wait_for_a_server_that_does_not_answer(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:  # accepts, and says nothing
        done = train(
            "--dataset", "synthetic", "--local-batch-size", "10", "--max-steps", "2", "--run-dir", "run",
            "--wandb", "auto", cwd=tmp_path, WANDB_API_KEY=KEY,
            WANDB_BASE_URL=f"http://127.0.0.1:{server.getsockname()[1]}",
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    warnings = [line for line in done.stdout.splitlines() if "W&B" in line and "WARNING" in line]
    assert len(warnings) == 1
    assert "W&B can't be reached, recording offline" in warnings[0]
    assert "wandb:" not in done.stdout + done.stderr
    assert runs(tmp_path / "run") == ["offline"]
    (offline,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    assert read_back(offline)["exit"][-1]["exit_code"] == 0


def evaluation(accuracy):
    labels = torch.arange(100) % 10
    predicted = torch.where(torch.arange(100) < 100 * accuracy, labels, (labels + 1) % 10)
    return Evaluation(1 - accuracy, labels, predicted, torch.full((100,), 0.5, dtype=torch.float64))


@pytest.fixture
def tracked(runtime, tmp_path, wandb):
    """Tracking with an offline W&B run."""
    images = DeviceImages(torch.zeros(100, 3, 32, 32, dtype=torch.uint8), torch.arange(100) % 10, runtime.device)
    config = TrainConfig(device="cpu", wandb="offline")
    records = tracking.Tracking(config, runtime, tmp_path, Data("synthetic", images, images), {"fact": 7})
    yield records
    records.close()
    runtime.accelerator.trackers = []


def test_the_summary_holds_the_best_epoch_not_the_last(tracked, tmp_path):
    for epoch, accuracy in ((1, 0.4), (2, 0.7), (3, 0.5)):
        tracked.log_test(10 * epoch, epoch, evaluation(accuracy))
    tracked.close(exit_code=1)
    (offline,) = tmp_path.glob("wandb/offline-run-*")
    found = read_back(offline)
    summary = flat(found, "summary", "update")
    assert summary["test/accuracy"] == {"max": 0.7}
    assert summary["test/loss"]["min"] == pytest.approx(0.3)
    assert flat(found, "config", "update")["fact"] == 7
    assert found["exit"][-1]["exit_code"] == 1


def test_a_wandb_that_fails_in_the_middle_costs_one_warning(tracked, tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise BrokenPipeError("its process was killed\nsecond line")

    tracked._wandb.run.finish()  # or it would be there in the next test
    monkeypatch.setattr(tracked._wandb, "run", types.SimpleNamespace(log=fail, disabled=False))
    capsys.readouterr()
    for step in (1, 2):
        tracked.log_train(LogPoint(step, 1, step, 2.5, 0.1, 100.0))
    tracked.finish(2, {}, evaluation(0.5))
    tracked.close()
    assert capsys.readouterr().out == "WARNING: W&B's record ends here: BrokenPipeError: its process was killed\n"
    assert records(tmp_path, "train/loss") == [(1, 2.5), (2, 2.5)]
    assert tracked.describe() == "no record"


def test_a_killed_wandb_process_leaves_no_traceback(tmp_path):
    script = """
import os, signal, subprocess, torch
from pathlib import Path
from cifar import tracking
from cifar.config import TrainConfig
from cifar.data import Data, DeviceImages
from cifar.train_state import LogPoint
from cifar.distributed.runtime import Runtime
config = TrainConfig(device="cpu", wandb="offline")
runtime = Runtime(config)
images = DeviceImages(torch.zeros(10, 3, 32, 32, dtype=torch.uint8), torch.arange(10), runtime.device)
records = tracking.Tracking(config, runtime, Path(), Data("synthetic", images, images), {})
for status in Path("/proc").glob("[0-9]*/stat"):
    words = status.read_text().split()
    if words[1].startswith("(wandb-core") and words[3] == str(os.getpid()):
        os.kill(int(words[0]), signal.SIGKILL)
for step in range(1, 200):
    records.log_train(LogPoint(step, 1, step, 2.5, 0.1, 100.0))
records.close()
"""
    done = run([sys.executable, "-c", script], tmp_path, **NOWHERE)
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) == 1
    assert done.stdout.startswith("WARNING: W&B's record ends here: ")
    assert done.stderr == ""
    assert len(records(tmp_path, "train/loss")) == 199


def test_a_resumed_run_drops_the_lines_it_will_write_again(tmp_path, runtime):
    metrics = tracking.MetricsFile(tmp_path / "metrics.jsonl")
    metrics.keep_until(5)
    assert not metrics.path.exists()
    for step in (2, 4, 6):
        metrics.log(step, {"train/loss": 1.5, "picture": object()})
    with metrics.path.open("a") as file:
        file.write('{"step": 3, "train')  # the disk was full
    metrics.keep_until(4)
    assert metrics.path.read_text().splitlines() == [
        '{"step": 2, "train/loss": 1.5}', '{"step": 4, "train/loss": 1.5}'
    ]  # fmt: skip


def test_metrics_that_cannot_be_written_cost_one_warning(tmp_path, runtime, capsys):
    metrics = tracking.MetricsFile(tmp_path / "missing" / "metrics.jsonl")
    for step in (1, 2):
        metrics.log(step, {"x": 1})
    assert capsys.readouterr().out.count("WARNING") == 1
