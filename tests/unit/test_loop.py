"""A run in one process: its log points, checkpoints and records, and how it ends."""

import json
import math
import sys
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

import train_ddp
from cifar.checkpoint import checkpoint_path, checkpoints, load_checkpoint
from cifar.data import TrainLoader
from cifar.errors import LocalError, TrainingDivergedError
from tests.helpers.comparing import make_runs_tiny
from tests.helpers.processes import records, result

# Ten steps an epoch, with accumulation, augmentation, warm-up and a schedule.
FLAGS = ["--dataset", "synthetic", "--device", "cpu", "--wandb", "disabled", "--recipe", "wide", "--model", "net",
         "--local-batch-size", "10", "--global-batch-size", "20", "--lr-scaling", "none"]  # fmt: skip

pytestmark = pytest.mark.usefixtures("tiny_runs")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return the directory of a run of one epoch and a half."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patched:
        make_runs_tiny(patched)
        flags = ["--epochs", "2", "--max-steps", "15", "--log-steps", "3", "--checkpoint-steps", "4"]
        train_ddp.main([*FLAGS, *flags, "--keep-checkpoints", "9", "--run-dir", str(run_dir)])
    return run_dir


def test_records(finished):
    got = result(finished)
    assert got.items() >= {
        "recipe": "wide", "model": "net", "dataset": "synthetic", "epochs": 2, "seed": 0, "precision": "fp32",
        "device": "cpu", "world_size": 1, "local_batch_size": 10, "global_batch_size": 20, "steps": 15,
        "test_total": 200, "test_accuracy": got["test_correct"] / 200,
    }.items()  # fmt: skip
    assert got["images_per_second"] == pytest.approx(300 / got["train_seconds"])
    assert math.isfinite(got["test_loss"])
    assert records(finished, "test/accuracy")[-1] == (15, got["test_accuracy"])
    recorded = json.loads((finished / "config.json").read_text())
    config = recorded["config"]
    assert (config["global_batch_size"], config["lr"], config["run_dir"]) == (20, 0.05, str(finished))
    assert {"version", "git_commit", "torch", "python"} <= recorded.keys()


def test_log_points_end_with_the_epoch(finished):
    assert [step for step, _ in records(finished, "train/loss")] == [3, 6, 9, 10, 13, 15]
    for step, lr in records(finished, "train/lr"):
        assert lr == pytest.approx(0.05 * min(1, step / 10) * (1 + math.cos(math.pi * (step - 1) / 20)) / 2)


def test_checkpoints_at_their_steps_and_epoch_ends(finished):
    assert sorted(checkpoints(finished)) == [4, 8, 10, 12, 15]
    content = load_checkpoint(checkpoint_path(finished, 12))
    assert (content["format"], content["dataset"], len(content["classes"])) == (2, "synthetic", 10)
    assert (content["state"]["step"], content["state"]["running_steps"]) == (12, 2)


@pytest.fixture
def clock(monkeypatch):
    """Let 1 s pass in a step, 10 s more in a process's first, and 100 s when an epoch's random numbers are drawn."""
    passed = SimpleNamespace(seconds=0.0, first=True, reads=0, reads_before=[])
    step, set_epoch, item = train_ddp.train_step, TrainLoader.set_epoch, torch.Tensor.item

    def train_step(*args):
        passed.seconds += 11 if passed.first else 1
        passed.first = False
        passed.reads_before.append(passed.reads)
        return step(*args)

    def draw(*args, **kwargs):
        passed.seconds += 100
        set_epoch(*args, **kwargs)

    def read(tensor):
        passed.reads += 1
        return item(tensor)

    monkeypatch.setattr("cifar.loop.time", SimpleNamespace(perf_counter=lambda: passed.seconds))
    monkeypatch.setattr(train_ddp, "train_step", train_step)
    monkeypatch.setattr(TrainLoader, "set_epoch", draw)
    monkeypatch.setattr(torch.Tensor, "item", read)
    return passed


def test_seconds_of_the_first_step_and_of_the_rest(tmp_path, clock, capsys):
    """Of 13 steps, only the first and those of the log points wait for the device."""
    run_dir = tmp_path / "run"
    train_ddp.main([*FLAGS, "--epochs", "2", "--log-steps", "5", "--max-steps", "13", "--run-dir", str(run_dir)])
    got = result(run_dir)
    assert (got["train_seconds"], got["first_step_seconds"]) == (100 + 11 + 9 + 100 + 3, 100 + 11)
    text = capsys.readouterr().out
    assert "Finished Training\n(223.00 s of training: 111.00 s for the first step, 112.00 s for the rest)\n" in text
    rates = dict(records(run_dir, "train/images_per_second"))
    assert rates == {5: pytest.approx(100 / 115), 10: pytest.approx(100 / 5), 13: pytest.approx(60 / 103)}
    waited_after = [step for step, (a, b) in enumerate(pairwise(clock.reads_before), 1) if b > a]
    assert waited_after == [1, 5, 10]
    clock.first = True
    train_ddp.main(["--resume", str(run_dir), "--max-steps", "15"])
    got = result(run_dir)
    assert (got["train_seconds"], got["first_step_seconds"]) == (223 + 100 + 11 + 1, 111 + 111)


ACCUMULATE = "use --local-batch-size 5 --global-batch-size 20, which accumulates gradients over the same global batch"


@pytest.mark.parametrize(("local", "remedy"), [("10", ACCUMULATE), ("1", "use a smaller model")])
def test_out_of_memory_names_a_smaller_batch(tmp_path, monkeypatch, local, remedy):
    run_dir, step, batches = tmp_path / "run", train_ddp.train_step, []

    def train_step(model, micro_batches, *args):
        batches.append(len(micro_batches))
        if len(batches) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return step(model, micro_batches, *args)

    monkeypatch.setattr(train_ddp, "train_step", train_step)
    flags = ["--epochs", "1", "--checkpoint-steps", "2", "--run-dir", str(run_dir)]
    with pytest.raises(LocalError) as lack:
        train_ddp.main([*FLAGS, *flags, "--local-batch-size", local])
    assert str(lack.value) == (
        f"the GPU is out of memory (2.00 GiB wanted) at a local batch of {local}: {remedy}, or end the other "
        "programs that use it"
    )
    if local != "1":
        train_ddp.main(["--resume", str(run_dir), *remedy.removeprefix("use ").split(",")[0].split()])
        assert batches == [2, 2, 2, *[4] * 8]


def fail(*_):
    raise MemoryError("no room\nsecond line")


@pytest.mark.parametrize(
    ("report", "reason"), [(SimpleNamespace(write_report=fail), "MemoryError: no room"), (None, "ModuleNotFound")]
)
def test_failing_report_costs_one_warning(tmp_path, monkeypatch, capsys, report, reason):
    monkeypatch.setitem(sys.modules, "cifar.records.report", report)
    train_ddp.main([*FLAGS, "--run-dir", str(tmp_path / "run"), "--max-steps", "1"])
    text = capsys.readouterr().out
    assert text.splitlines()[-1].startswith(f"WARNING: no report in {tmp_path / 'run'}: {reason}")
    for words in ("[1,     1] loss: ", "Finished Training", "Accuracy of the network on the 200 test images: "):
        assert text.count(words) == 1
    assert result(tmp_path / "run")["steps"] == 1


@pytest.mark.parametrize("checkpoint_steps", [1, 1000])
def test_infinite_loss_ends_the_run(tmp_path, checkpoint_steps):
    run_dir = tmp_path / "run"
    flags = ["--lr", "1e9", "--warmup-epochs", "0", "--log-steps", "4", "--checkpoint-steps", str(checkpoint_steps)]
    with pytest.raises(TrainingDivergedError) as diverged:
        train_ddp.main([*FLAGS, *flags, "--run-dir", str(run_dir)])
    text = str(diverged.value)
    newest = sorted((run_dir / "checkpoints").glob("step-*"))
    assert ("the loss became " in text, "\n" in text, "try a lower --lr" in text) == (True, False, True)
    assert f"last good checkpoint: {newest[-1] if newest else 'none'};" in text
    assert bool(newest) == (checkpoint_steps == 1)
    for path in newest:
        load_checkpoint(path)
    assert not (run_dir / "result.json").exists()
