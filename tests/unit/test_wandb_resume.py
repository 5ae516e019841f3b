"""One W&B run over restarts and resumes, whatever the server does meanwhile."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch

from cifar import wandb_logger as wandb_run
from cifar.config import TrainConfig
from cifar.data import Data, DeviceImages
from cifar.evaluation import Evaluation
from cifar.tracking import Tracking
from cifar.train_state import LogPoint
from tests.helpers.processes import ROOT, clean_environment, left_of, records, run
from tests.helpers.wandb_server import KEY, WandbServer, read_back

SOON = 5 + wandb_run._HURRY_SECONDS  # far less than the 30 seconds after which torchrun kills


@pytest.fixture
def server(wandb, monkeypatch):
    """A W&B server, which this process has a key for."""
    with WandbServer() as started:
        reach(started, monkeypatch)
        yield started
        assert started.mistakes == []


def reach(server, monkeypatch):
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setenv("WANDB_API_KEY", KEY)


@pytest.fixture
def track(runtime, tmp_path, wandb):
    """A function: begins the records of one start of the run, which goes on after `step`."""
    images = DeviceImages(torch.zeros(100, 3, 32, 32, dtype=torch.uint8), torch.arange(100) % 10, runtime.device)
    started = []

    def start(step=0, choice="online"):
        config = TrainConfig(device="cpu", wandb=choice)
        started.append(Tracking(config, runtime, tmp_path, Data("synthetic", images, images), {}, step))
        return started[-1]

    yield start
    for tracking in started:
        tracking.close(1)
    runtime.accelerator.trackers = []


def point(step):
    return LogPoint(step, 1, step, 1 / step, 0.1, 100.0)


def train_steps(tracking, *steps):
    for step in steps:
        tracking.log_train(point(step))


def evaluation():
    labels = torch.arange(100) % 10
    return Evaluation(0.5, labels, labels, torch.full((100,), 0.5, dtype=torch.float64))


def run_id(folder):
    return (folder / "wandb" / "id.txt").read_text().strip()


def losses(rows):
    return [(row["_step"], row["train/loss"]) for row in rows]


def written(folder, pattern="run-*"):
    """The rows in the newest of W&B's files."""
    found = read_back(sorted(folder.glob(f"wandb/{pattern}"))[-1])
    return [(row["item"]["trainer/step"], row["item"]["train/loss"]) for row in found["history"]], found


def expected(*steps):
    return [(step, 1 / step) for step in steps]


def test_a_run_that_is_stopped_and_resumed_is_one_run_without_gaps(server, track, tmp_path):
    first = track()
    train_steps(first, 1, 2, 3)
    first.close(exit_code=1, preempting=True)
    own = run_id(tmp_path)
    assert (server.runs[own].preempting, server.runs[own].exit_code) == (True, 1)
    second = track(step=3)
    assert own in second.describe()
    train_steps(second, 4, 5)
    second.close()
    assert list(server.runs) == [own]
    assert losses(server.runs[own].history) == expected(1, 2, 3, 4, 5)
    assert server.runs[own].exit_code == 0


def test_steps_that_the_server_has_already_are_not_repeated(server, track, tmp_path):
    first = track()
    train_steps(first, 1, 2, 3, 4)
    first.close(exit_code=1)
    second = track(step=2)  # the newest checkpoint was older than the last row
    train_steps(second, 3, 4, 5)
    second.close()
    assert losses(server.runs[run_id(tmp_path)].history) == expected(1, 2, 3, 4, 5)


def test_steps_that_the_server_never_got_are_sent_when_the_run_goes_on(server, track, tmp_path, monkeypatch):
    first = track()
    train_steps(first, 1, 2)
    first.close(exit_code=1)
    second = track(step=2)
    server.close()
    train_steps(second, 3, 4)
    second.close(exit_code=1, preempting=True)
    with WandbServer() as again:
        again.runs = server.runs
        reach(again, monkeypatch)
        third = track(step=4)
        train_steps(third, 5, 6)
        third.close()
        assert losses(again.runs[run_id(tmp_path)].history) == expected(1, 2, 3, 4, 5, 6)


@pytest.mark.parametrize("fails", [WandbServer.close, WandbServer.hang])
def test_the_record_on_disk_is_complete_when_the_server_goes_away(server, track, tmp_path, capfd, fails):
    tracking = track()
    train_steps(tracking, 1, 2)
    fails(server)
    train_steps(tracking, 3, 4)
    began = time.monotonic()
    tracking.close(exit_code=1, preempting=True)
    assert time.monotonic() - began < SOON
    rows, found = written(tmp_path)
    assert rows == expected(1, 2, 3, 4)
    assert found["exit"][-1]["exit_code"] == 1
    cores = [process for process in psutil.Process().children() if "wandb" in process.name()]
    assert left_of(cores, timeout=0) == []
    said = capfd.readouterr()
    assert said.out + said.err == ""


def test_every_offline_record_is_complete_and_the_last_one_is_to_be_uploaded(track, tmp_path):
    for start in (0, 2, 3):
        tracking = track(step=start, choice="offline")
        train_steps(tracking, start + 1, start + 2)
        tracking.close(exit_code=1, preempting=True)
    rows, _ = written(tmp_path, "offline-run-*")
    assert rows == expected(1, 2, 3, 4, 5)
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 1
    assert len(list(tmp_path.glob("wandb/superseded/offline-run-*"))) == 2
    assert all(run_id(tmp_path) in path.name for path in tmp_path.glob("wandb/**/offline-run-*"))


def test_sync_uploads_a_resumed_offline_run_whole(server, track, tmp_path):
    """With W&B's own command, as the banner names it."""
    for start in (0, 3):
        tracking = track(step=start, choice="offline")
        train_steps(tracking, start + 1, start + 2, start + 3)
        if start:
            tracking.log_test(7, 1, evaluation())
            tracking.finish(7, {"test_accuracy": 1.0}, evaluation())
        last = tracking.describe().split("wandb sync ")[1]
        tracking.close(exit_code=0 if start else 1)
    assert server.asked == [], "offline"
    done = run([sys.executable, "-m", "wandb", "sync", last], tmp_path, WANDB_BASE_URL=server.url, WANDB_API_KEY=KEY)
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(server.runs) == [run_id(tmp_path)]
    got = server.runs[run_id(tmp_path)]
    assert losses([row for row in got.history if "train/loss" in row]) == expected(1, 2, 3, 4, 5, 6)
    assert got.summary["test_accuracy"] == 1.0
    assert got.summary["test/accuracy"]["max"] == 1.0
    assert got.config["recipe"]["value"] == "tutorial"
    assert got.exit_code == 0


def test_a_run_that_finds_its_server_gone_goes_on_offline_with_all_of_it(server, track, tmp_path, monkeypatch):
    monkeypatch.setattr(wandb_run, "_INIT_SECONDS", 2)
    first = track()
    train_steps(first, 1, 2)
    first.close(exit_code=1)
    server.close()
    second = track(step=2)
    train_steps(second, 3)
    second.close()
    rows, found = written(tmp_path, "offline-run-*")
    assert rows == expected(1, 2, 3)
    assert found["run"][0]["run_id"] == run_id(tmp_path)


def test_half_a_row_is_never_sent(server, track, tmp_path):
    first = track()
    train_steps(first, 1)
    first.log_train(point(2), test_follows=True)
    first.close(exit_code=1)  # before its evaluation was done
    own = run_id(tmp_path)
    assert losses(server.runs[own].history) == expected(1)
    second = track(step=1)
    second.log_train(point(2), test_follows=True)
    second.log_test(2, 1, evaluation())
    second.close()
    assert losses(server.runs[own].history) == expected(1, 2)
    assert server.runs[own].history[-1]["test/accuracy"] == 1.0
    assert [value for _, value in records(tmp_path, "test/accuracy")] == [1.0]


def test_a_name_that_the_environment_gives_the_run_is_kept(server, track, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "chosen")  # as W&B's sweeps do
    track().close()
    monkeypatch.delenv("WANDB_RUN_ID")
    track(step=0).close()
    assert list(server.runs) == ["chosen"]


@pytest.fixture
def launched(server, tmp_path):
    """A run of two processes under torchrun, online, that has written a checkpoint; what it says is in `said`."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1"]
    flags = "--dataset synthetic --device cpu --local-batch-size 25 --epochs 1 --log-steps 20 --checkpoint-steps 100"
    with open(tmp_path / "said", "w") as said:
        process = subprocess.Popen(
            [*launcher, str(ROOT / "train_ddp.py"), *flags.split(), "--run-dir", "run"], cwd=tmp_path,
            env=clean_environment(WANDB_API_KEY=KEY, WANDB_BASE_URL=server.url), stdout=said, stderr=said,
        )  # fmt: skip
    try:
        wait_until(lambda: list(tmp_path.glob("run/checkpoints/step-*.pt")))
        yield process
    finally:
        process.kill()
        assert "wandb:" not in (tmp_path / "said").read_text()


def test_a_run_that_torchrun_restarts_is_one_run_without_gaps(server, launched, tmp_path):
    """Rank zero is killed, and W&B's process goes with it."""
    zero = rank_zero(launched.pid)
    (core,) = [child for child in zero.children() if "wandb" in child.name()]
    os.kill(zero.pid, signal.SIGKILL)
    assert left_of([core], timeout=10) == []
    assert launched.wait(timeout=120) == 0, (tmp_path / "said").read_text()
    own = run_id(tmp_path / "run")
    assert list(server.runs) == [own]
    history = [row for row in server.runs[own].history if "train/loss" in row]
    assert losses(history) == records(tmp_path / "run", "train/loss")
    assert history[-1]["test/accuracy"] == records(tmp_path / "run", "test/accuracy")[-1][1]
    assert server.runs[own].exit_code == 0


def test_a_silent_server_does_not_keep_a_run_from_stopping_in_time(server, launched, tmp_path):
    below = psutil.Process(launched.pid).children(recursive=True)
    assert any("wandb" in process.name() for process in below)
    server.hang()
    os.kill(launched.pid, signal.SIGTERM)
    assert left_of(below, timeout=10) == []
    launched.wait(timeout=20)
    assert "Stopped by SIGTERM after step" in (tmp_path / "said").read_text()
    assert max(step for step, _ in records(tmp_path / "run", "train/loss")) in dict(written(tmp_path / "run")[0])


def rank_zero(launcher):
    for worker in psutil.Process(launcher).children():
        if worker.environ().get("RANK") == "0":
            return worker
    raise AssertionError("rank zero isn't running")


def wait_until(ready, seconds=120):
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end
        time.sleep(0.05)
