"""Several real ranks: what they agree on, how they speak, and how a mistake ends all of them."""

import sys

import pytest

from tests.processes import ROOT, run, train

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


def test_two_ranks_at_work(tmp_path):
    output = run([*TORCHRUN, "--nproc_per_node=2", "-m", "tests.distributed.worker"], tmp_path)
    assert output.returncode == 0, output.stderr
    assert output.stdout.count("all is well") == 1


def test_one_process_under_torchrun(tmp_path):
    command = [*TORCHRUN, "--nproc_per_node=1", ROOT / "train_ddp.py", "--dataset", "synthetic", "--max-steps", "2",
               "--wandb", "disabled", "--device", "cpu", "--run-dir", "run"]  # fmt: skip
    output = run(command, tmp_path)
    assert output.returncode == 0, output.stderr
    assert "Finished Training" in output.stdout


def test_a_mistake_is_said_once_by_three_processes(tmp_path):
    output = train("--epochs", "none", cwd=tmp_path, processes=3)
    assert output.returncode != 0
    lines = [line for line in output.stderr.splitlines() if "train_ddp.py: error:" in line]
    assert len(lines) == 1
    assert "--epochs" in lines[0]
    assert "exitcode  : 2" in output.stderr, "torchrun's report of the rank that ended the run"


def test_sizes_that_do_not_divide_are_said_once_and_before_any_run(tmp_path):
    flags = ["--dataset", "synthetic", "--global-batch-size", "10"]
    output = train(*flags, cwd=tmp_path, processes=2)
    lines = [line for line in output.stderr.splitlines() if "train_ddp.py: error:" in line]
    assert len(lines) == 1
    assert "8 or 16" in lines[0]
    assert not (tmp_path / "runs").exists()


def test_separate_copies_are_found_out(tmp_path):
    """accelerate's trap: without cpu=True, both ranks on a host without GPUs take themselves for rank 0 of 1."""
    driver = tmp_path / "driver.py"
    driver.write_text(
        "import functools, torch\n"
        "torch.cuda.is_available = lambda: False\n"
        "from accelerate import Accelerator\n"
        "import cifar.runtime, train_ddp\n"
        "cifar.runtime.Accelerator = lambda cpu, **rest: Accelerator(**rest)\n"
        "with cifar.runtime.one_voice('driver'):\n"
        "    train_ddp.main(['--dataset', 'synthetic', '--max-steps', '1', '--device', 'cpu', '--wandb', 'disabled'])\n"
    )
    output = run([*TORCHRUN, "--nproc_per_node=2", driver], tmp_path)
    lines = [line for line in output.stderr.splitlines() if "driver: error:" in line]
    assert len(lines) == 1
    assert "started 2 processes but 1 would train together" in lines[0]
    assert not (tmp_path / "runs").exists()


@pytest.fixture(scope="module")
def diverged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("diverged")
    flags = ["--dataset", "synthetic", "--local-batch-size", "50", "--lr-scaling", "none", "--lr", "50",
             "--log-steps", "10", "--max-steps", "100", "--run-dir", folder / "run"]  # fmt: skip
    return folder, train(*flags, cwd=folder, processes=2)


def test_an_infinite_loss_stops_all_ranks(diverged):
    folder, output = diverged
    lines = [line for line in output.stderr.splitlines() if "train_ddp.py: error:" in line]
    assert len(lines) == 1
    for words in ("the loss became ", "step ", "lr 50", "last good checkpoint: none yet"):
        assert words in lines[0]
    assert "exitcode  : 1" in output.stderr
    assert "Traceback" not in output.stderr.split("train_ddp.py: error:")[0]
    assert not (folder / "run" / "result.json").exists()


def test_explain_shows_that_ranks_agree_after_the_all_reduce(tmp_path):
    command = [*TORCHRUN, "--nproc_per_node=2", "-m", "cifar.explain", "--dataset", "synthetic", "--device", "cpu"]
    output = run(command, tmp_path)
    assert output.returncode == 0, output.stderr
    before = next(line for line in output.stdout.splitlines() if "before it, the gradient's norm" in line)
    after = next(line for line in output.stdout.splitlines() if "after it:" in line)
    before, after = (set(line.split(":")[1].replace(" ", "").split(",")) for line in (before, after))
    assert len(before) == 2
    assert len(after) == 1
    assert output.stdout.count("FORWARD") == 1
