"""One W&B run over restarts and resumes, whatever its server does."""

import sys
import time

import psutil
import pytest

from cifar.records import wandb_logger
from tests.helpers.disturb import Watched
from tests.helpers.processes import left_of, records, run
from tests.helpers.terminal import Terminal
from tests.helpers.tracking import evaluation, finish, losses, point, read_back, tracking
from tests.helpers.wandb_server import KEY, NOWHERE, WandbServer

pytestmark = pytest.mark.slow


@pytest.fixture
def server(wandb, monkeypatch):
    """A W&B server that this process has a key for."""
    with WandbServer() as started:
        monkeypatch.setenv("WANDB_BASE_URL", started.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        yield started
        assert started.mistakes == []


def train_steps(runtime, run_dir, *steps, choice="online", meanwhile=lambda: None, **close):
    """Track a start of the run that logs `steps`; `meanwhile` is called before the last. Return its description."""
    with tracking(runtime, run_dir, choice, step=steps[0] - 1, **close) as tracked:
        for step in steps:
            if step == steps[-1]:
                meanwhile()
            tracked.log_train(point(step))
    return tracked.describe()


def run_id(run_dir):
    return (run_dir / "wandb" / "id.txt").read_text().strip()


def on_disk(run_dir, pattern="run-*"):
    """Return the losses and all records in W&B's newest file."""
    found = read_back(max(run_dir.glob(f"wandb/{pattern}")))
    return losses(found["history"]), found


def expected(*steps):
    return [(step, 1 / step) for step in steps]


def test_resumed_run_is_one_run(runtime, server, tmp_path, monkeypatch):
    """The checkpoint is older than the last row; then rows are lost while the server is away."""
    train_steps(runtime, tmp_path, 1, 2, 3, choice="auto", exit_code=1, preempting=True)  # there is a key
    own = server.runs[run_id(tmp_path)]
    assert (own.preempting, own.exit_code) == (True, 1)
    monkeypatch.setitem(wandb_logger._SETTINGS, "finish_timeout", 2)
    train_steps(runtime, tmp_path, 2, 3, 4, meanwhile=server.close, exit_code=1)
    with WandbServer() as again:
        again.runs = server.runs
        monkeypatch.setenv("WANDB_BASE_URL", again.url)
        assert run_id(tmp_path) in train_steps(runtime, tmp_path, 5, 6)
    assert list(server.runs) == [run_id(tmp_path)]
    assert losses(own.history) == expected(1, 2, 3, 4, 5, 6)
    assert own.exit_code == 0


def test_a_stop_in_a_sweep_ends_the_trial(runtime, server, tmp_path, monkeypatch):
    """W&B would start a preempted trial again under its ID, from step 0 in another directory."""
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep123")
    monkeypatch.setenv("WANDB_RUN_ID", "trial")  # by its agent
    train_steps(runtime, tmp_path, 1, 2, exit_code=1, preempting=True)
    own = server.runs[run_id(tmp_path)]
    assert (own.preempting, own.exit_code) == (False, 1)


@pytest.mark.parametrize("failure", [WandbServer.close, WandbServer.hang])
def test_lost_server_delays_neither_a_stop_nor_a_resume(runtime, server, tmp_path, monkeypatch, capfd, failure):
    for name in ("init_timeout", "finish_timeout"):
        monkeypatch.setitem(wandb_logger._SETTINGS, name, 2)
    began = []

    def fail():
        failure(server)
        began.append(time.monotonic())

    train_steps(runtime, tmp_path, 1, 2, 3, meanwhile=fail, exit_code=1, preempting=True)
    assert time.monotonic() - began[0] < 2 + 3
    rows, found = on_disk(tmp_path)
    assert rows == expected(1, 2, 3)
    assert found["exit"][-1]["exit_code"] == 1
    assert left_of([child for child in psutil.Process().children() if "wandb" in child.name()], timeout=0) == []
    warning = "W&B's record is incomplete, metrics.jsonl is not: TimeoutError: Timed out finishing run."
    assert capfd.readouterr() == (f"WARNING: {warning}\n", "")

    began = time.monotonic()
    train_steps(runtime, tmp_path, 3, 4)  # the checkpoint is older than the last row
    assert time.monotonic() - began < 8
    (warning,) = capfd.readouterr().out.splitlines()
    assert warning.startswith("WARNING: W&B cannot be reached, recording offline: ")
    rows, found = on_disk(tmp_path, "offline-run-*")
    assert rows == expected(1, 2, 3, 4)
    assert found["run"][0]["run_id"] == run_id(tmp_path)


def test_sync_uploads_a_resumed_offline_run(runtime, server, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path))
    for first in (1, 4):
        train_steps(runtime, tmp_path, first, first + 1, first + 2, choice="offline", exit_code=1)
    with tracking(runtime, tmp_path, step=6) as tracked:
        tracked.log_test(7, 1, evaluation(1))
        finish(tracked, tmp_path, accuracy=1, step=7)
        last = tracked.describe().split("wandb sync ")[1]
    assert server.runs == {}
    run([sys.executable, "-m", "wandb", "sync", last], tmp_path, WANDB_BASE_URL=server.url, WANDB_API_KEY=KEY)
    assert list(server.runs) == [run_id(tmp_path)]
    uploaded = server.runs[run_id(tmp_path)]
    assert losses(uploaded.history) == expected(1, 2, 3, 4, 5, 6)
    assert (uploaded.summary["test_accuracy"], uploaded.summary["test/accuracy"]["max"]) == (1.0, 1.0)
    assert uploaded.config["recipe"]["value"] == "tutorial"
    assert uploaded.exit_code == 0


SCRIPT = """
from pathlib import Path
import psutil
from cifar.config import TrainConfig
from cifar.distributed.runtime import Runtime
from tests.helpers.tracking import point, tracking
with tracking(Runtime(TrainConfig(device="cpu")), Path("run"), "online") as tracked:
    for child in psutil.Process().children():
        child.kill()
    for step in range(1, 200):
        tracked.log_train(point(step))
print("done")
"""


def test_neither_a_prompt_at_a_terminal_nor_a_traceback_of_a_killed_service(tmp_path):
    with Terminal([sys.executable, "-c", SCRIPT], tmp_path, **NOWHERE) as terminal:
        assert terminal.end() == 0
    no_key, incomplete, done = terminal.written.splitlines()
    assert no_key == "WARNING: W&B has no key (wandb login): recording offline"
    assert incomplete.startswith("WARNING: W&B's record is incomplete, ")
    assert done == "done"
    assert len(records(tmp_path / "run", "train/loss")) == 199


def test_restarted_run_is_one_run(server, tmp_path):
    """Rank zero of two is killed, and W&B's service with it."""
    flags = "--dataset synthetic --device cpu --local-batch-size 25 --max-steps 200 --log-steps 10 --run-dir run"
    launcher = ["--standalone", "--nproc_per_node=2", "--max-restarts=1"]
    account = {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": server.url}
    with Watched(tmp_path / "run", [*flags.split(), "--checkpoint-steps", "40"], launcher, **account) as launched:
        launched.until(lambda: list(tmp_path.glob("run/checkpoints/step-*.pt")) != [], "a checkpoint", timeout=120)
        zero = launched.ranks()[0]
        (service,) = [child for child in zero.children() if "wandb" in child.name()]
        zero.kill()
        assert left_of([service], timeout=10) == []
        assert launched.end(timeout=120) == 0, launched.output()
    assert "wandb:" not in launched.output()
    assert list(server.runs) == [run_id(launched.run_dir)]
    own = server.runs[run_id(launched.run_dir)]
    assert losses(own.history) == records(launched.run_dir, "train/loss")
    accuracies = [row["test/accuracy"] for row in own.history if "test/accuracy" in row]
    assert accuracies == [accuracy for _, accuracy in records(launched.run_dir, "test/accuracy")]
    assert own.exit_code == 0
