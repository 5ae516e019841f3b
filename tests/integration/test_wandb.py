"""One W&B run over restarts and resumes, whatever its server does."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from cifar.records import wandb_logger
from tests.helpers.processes import ROOT, clean_environment, left_of, records, run
from tests.helpers.terminal import Terminal
from tests.helpers.tracking import evaluation, offline_runs, point, random_images, read_back, tracking
from tests.helpers.wandb_server import KEY, NOWHERE, WandbServer

pytestmark = pytest.mark.slow


@pytest.fixture
def server(wandb, monkeypatch):
    """A W&B server that this process has a key for."""
    with WandbServer() as started:
        connect(started, monkeypatch)
        yield started
        assert started.mistakes == []


def connect(server, monkeypatch):
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setenv("WANDB_API_KEY", KEY)


def train_steps(runtime, run_dir, *steps, choice="online", meanwhile=lambda: None, **close):
    """Track a start of the run that logs `steps`; `meanwhile` is called before the last. Return its description."""
    with tracking(runtime, run_dir, choice, step=steps[0] - 1) as tracked:
        for step in steps[:-1]:
            tracked.log_train(point(step))
        meanwhile()
        tracked.log_train(point(steps[-1]))
        tracked.close(**close)
        return tracked.describe()


def run_id(run_dir):
    return (run_dir / "wandb" / "id.txt").read_text().strip()


def losses(rows):
    return [(row["_step"], row["train/loss"]) for row in rows if "train/loss" in row]


def on_disk(run_dir, pattern="run-*"):
    """Return the losses and all records in W&B's newest file."""
    found = read_back(max(run_dir.glob(f"wandb/{pattern}")))
    return losses(row["item"] for row in found["history"]), found


def expected(*steps):
    return [(step, 1 / step) for step in steps]


def test_resumed_run_is_one_run(runtime, server, tmp_path):
    """The checkpoint is older than the last row; then rows are lost while the server is away."""
    train_steps(runtime, tmp_path, 1, 2, 3, 4, exit_code=1, preempting=True)
    own = server.runs[run_id(tmp_path)]
    assert (own.preempting, own.exit_code) == (True, 1)
    assert run_id(tmp_path) in train_steps(runtime, tmp_path, 3, 4, 5)
    assert list(server.runs) == [run_id(tmp_path)]
    assert losses(own.history) == expected(1, 2, 3, 4, 5)
    assert own.exit_code == 0


def test_a_stop_in_a_sweep_ends_the_trial(runtime, server, tmp_path, monkeypatch):
    """W&B would start a preempted trial again under its ID, from step 0 in another directory."""
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep123")
    monkeypatch.setenv("WANDB_RUN_ID", "trial")  # by its agent
    train_steps(runtime, tmp_path, 1, 2, exit_code=1, preempting=True)
    own = server.runs[run_id(tmp_path)]
    assert (own.preempting, own.exit_code) == (False, 1)


def test_steps_of_another_run_under_the_same_id_are_no_secret(runtime, server, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    for name in "ab":
        (tmp_path / name).mkdir()
        train_steps(runtime, tmp_path / name, 1, 2)
    (warning,) = capsys.readouterr().out.splitlines()
    assert "W&B's run mine already holds another run, up to step 2" in warning
    train_steps(runtime, tmp_path / "b", 3)  # resumed: its own steps
    assert capsys.readouterr().out == ""


def test_lost_steps_are_sent_after_a_resume(runtime, server, tmp_path, monkeypatch):
    monkeypatch.setattr(wandb_logger, "_FINISH_SECONDS", 2)
    train_steps(runtime, tmp_path, 1, 2, exit_code=1)
    train_steps(runtime, tmp_path, 3, 4, meanwhile=server.close, exit_code=1, preempting=True)
    with WandbServer() as again:
        again.runs = server.runs
        connect(again, monkeypatch)
        train_steps(runtime, tmp_path, 5, 6)
        assert losses(again.runs[run_id(tmp_path)].history) == expected(1, 2, 3, 4, 5, 6)


@pytest.mark.parametrize("failure", [WandbServer.close, WandbServer.hang])
def test_stop_does_not_wait_for_the_server(runtime, server, tmp_path, monkeypatch, capfd, failure):
    monkeypatch.setattr(wandb_logger, "_FINISH_SECONDS", 2)
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
    printed = capfd.readouterr()
    assert printed.err == ""
    warning = "W&B's record is incomplete, metrics.jsonl is not: TimeoutError: Timed out finishing run."
    assert printed.out == f"WARNING: {warning}\n"


@pytest.mark.parametrize("failure", [WandbServer.close, WandbServer.hang])
def test_resume_without_the_server_is_offline_and_complete(runtime, server, tmp_path, monkeypatch, capfd, failure):
    monkeypatch.setattr(wandb_logger, "_INIT_SECONDS", 2)
    train_steps(runtime, tmp_path, 1, 2, exit_code=1)
    failure(server)
    began = time.monotonic()
    train_steps(runtime, tmp_path, 3, 4)
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
        tracked.finish(7, {"test_accuracy": 1.0}, evaluation(1), random_images(), tmp_path / "best.pt")
        last = tracked.describe().split("wandb sync ")[1]
        tracked.close()
    assert server.requests == 0
    done = run([sys.executable, "-m", "wandb", "sync", last], tmp_path, WANDB_BASE_URL=server.url, WANDB_API_KEY=KEY)
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(server.runs) == [run_id(tmp_path)]
    uploaded = server.runs[run_id(tmp_path)]
    assert losses(uploaded.history) == expected(1, 2, 3, 4, 5, 6)
    assert (uploaded.summary["test_accuracy"], uploaded.summary["test/accuracy"]["max"]) == (1.0, 1.0)
    assert uploaded.config["recipe"]["value"] == "tutorial"
    assert uploaded.exit_code == 0


START = """
import sys
from pathlib import Path
from cifar.config import TrainConfig
from cifar.distributed.runtime import Runtime
from tests.helpers.tracking import point, tracking
runtime = Runtime(TrainConfig(device="cpu"))
"""


def test_login_makes_auto_online(tmp_path):
    script = START + "with tracking(runtime, Path(), 'auto') as tracked: print(tracked.describe()); tracked.close()"
    with WandbServer() as server:
        account = {**NOWHERE, "WANDB_BASE_URL": server.url, "NETRC": str(tmp_path / "netrc")}
        for command in (["-m", "wandb", "login", KEY], ["-c", script]):
            done = run([sys.executable, *command], tmp_path, **account)
            assert done.returncode == 0, done.stdout + done.stderr
        assert server.url in done.stdout
        assert [own.exit_code for own in server.runs.values()] == [0]


def test_no_prompt_at_a_terminal(tmp_path):
    script = START + "with tracking(runtime, Path(), 'online') as tracked: tracked.close()\nprint('done')"
    with Terminal([sys.executable, "-c", script], tmp_path, **NOWHERE) as terminal:
        assert terminal.end() == 0
        assert terminal.written.splitlines() == ["WARNING: W&B has no key (wandb login): recording offline", "done"]


def test_killed_service_leaves_no_traceback(tmp_path):
    script = (
        START
        + """
import psutil
with tracking(runtime, Path()) as tracked:
    for child in psutil.Process().children():
        child.kill()
    for step in range(1, 200):
        tracked.log_train(point(step))
    tracked.close()
"""
    )
    done = run([sys.executable, "-c", script], tmp_path, **NOWHERE)
    assert done.returncode == 0
    assert done.stdout.startswith("WARNING: W&B's record is incomplete, ")
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""
    assert len(records(tmp_path, "train/loss")) == 199


@pytest.fixture
def launched(server, tmp_path):
    """A run of two processes under torchrun, online, that has written a checkpoint; its output is in `output`."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1"]
    flags = (
        "--dataset synthetic --device cpu --local-batch-size 25 --max-steps 400 --log-steps 10 "
        "--checkpoint-steps 40 --run-dir run"
    )
    with open(tmp_path / "output", "w") as output:
        process = subprocess.Popen(
            [*launcher, str(ROOT / "train_ddp.py"), *flags.split()], cwd=tmp_path,
            env=clean_environment(WANDB_API_KEY=KEY, WANDB_BASE_URL=server.url), stdout=output, stderr=output,
        )  # fmt: skip
    try:
        end = time.monotonic() + 120
        while not list(tmp_path.glob("run/checkpoints/step-*.pt")):
            assert time.monotonic() < end, (tmp_path / "output").read_text()
            time.sleep(0.05)
        yield process
    finally:
        process.kill()
        assert "wandb:" not in (tmp_path / "output").read_text()


def test_restarted_run_is_one_run(server, launched, tmp_path):
    """Rank zero is killed, and W&B's service with it."""
    (zero,) = [worker for worker in psutil.Process(launched.pid).children() if worker.environ().get("RANK") == "0"]
    (service,) = [child for child in zero.children() if "wandb" in child.name()]
    os.kill(zero.pid, signal.SIGKILL)
    assert left_of([service], timeout=10) == []
    assert launched.wait(timeout=120) == 0, (tmp_path / "output").read_text()
    assert list(server.runs) == [run_id(tmp_path / "run")]
    own = server.runs[run_id(tmp_path / "run")]
    assert losses(own.history) == records(tmp_path / "run", "train/loss")
    accuracies = [row["test/accuracy"] for row in own.history if "test/accuracy" in row]
    assert accuracies == [accuracy for _, accuracy in records(tmp_path / "run", "test/accuracy")]
    assert own.exit_code == 0


def test_silent_server_does_not_delay_a_stop(server, launched, tmp_path):
    below = psutil.Process(launched.pid).children(recursive=True)
    assert any(process.name().startswith("wandb-core") for process in below)
    server.hang()
    os.kill(launched.pid, signal.SIGTERM)
    assert left_of(below, timeout=wandb_logger._FINISH_SECONDS + 6) == []
    launched.wait(timeout=20)
    assert "Stopped by SIGTERM after step" in (tmp_path / "output").read_text()
    rows, _ = on_disk(tmp_path / "run")
    assert records(tmp_path / "run", "train/loss")[-1] in rows
    assert offline_runs(tmp_path / "run") == []
