"""Real launches by launch/local.sh and accelerate."""

import os
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from cifar.checkpoint import checkpoints
from cifar.config import read_config
from tests.helpers.disturb import FLAGS
from tests.helpers.processes import ROOT, records, run
from tests.helpers.terminal import Terminal

pytestmark = pytest.mark.slow

LOCAL = ROOT / "launch" / "local.sh"
ENVIRONMENT = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": ""}


def test_local_starts_nproc_processes(tmp_path):
    flags = ["--dataset", "synthetic", "--max-steps", "2", "--wandb", "disabled", "--run-dir", "run"]
    output = run([LOCAL, *flags], tmp_path, NPROC="2", **ENVIRONMENT)
    assert output.returncode == 0, output.stderr
    assert "2 processes on" in output.stdout
    assert (tmp_path / "run" / "result.json").exists()


def test_local_without_a_gpu_returns_the_status_of_one_process(tmp_path):
    """torchrun would turn the 2 into 1."""
    output = run([LOCAL, "--epochs", "0"], tmp_path, **ENVIRONMENT)
    assert output.returncode == 2
    assert output.stderr == "train_ddp.py: error: --epochs is 0: it must be at least 1\n"


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        # accelerate starts one process and does not say so.
        (
            "--cpu --num_processes 2",
            "error: torchrun's variables are incomplete or contradict each other: RANK=",
        ),
        ("--use_fsdp --num_processes 1", "error: accelerate's configuration sets ACCELERATE_USE_FSDP=true, which"),
    ],
    ids=["separate copies", "FSDP"],
)
def test_accelerate_launch_that_would_be_ignored_is_refused(options, complaint, tmp_path):
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", *options.split()]
    output = run([*accelerate, ROOT / "train_ddp.py", "--max-steps", "1"], tmp_path)
    assert output.stderr.count(complaint) == 1
    assert "loss" not in output.stdout
    assert not (tmp_path / "runs").exists()


NOTEBOOK = """
import accelerate, train_ddp
from tests.helpers.forking import free_port
from tests.helpers.small import shrink

def train(*rates):
    for rate in rates:
        flags = "--dataset synthetic --device cpu --wandb disabled --max-steps 2 --lr".split()
        train_ddp.main([*flags, rate])

shrink()
for rates in (["0.01"], ["0.02", "0.03"]):
    accelerate.notebook_launcher(train, rates, num_processes=2, use_port=str(free_port()))
"""


def test_every_call_in_a_notebook_trains_with_its_own_flags(tmp_path):
    output = run([sys.executable, "-c", NOTEBOOK], tmp_path)
    assert output.returncode == 0, output.stderr
    assert [read_config(run_dir).lr for run_dir in sorted(tmp_path.glob("runs/*"))] == [0.01, 0.02, 0.03]
    assert len([*tmp_path.glob("runs/*/result.json")]) == 3
    assert output.stdout.count("2 processes on CPU") == 3


@pytest.mark.parametrize(
    ("command", "trains_on"),
    [
        ([sys.executable, ROOT / "train_ddp.py"], False),
        (["nohup", sys.executable, ROOT / "train_ddp.py"], True),
        ([LOCAL], False),
        (["nohup", LOCAL], True),
        (["nohup", ROOT / "launch" / "multi_node.sh", "127.0.0.1", "1"], True),
    ],
    ids=["python", "nohup python", "local.sh", "nohup local.sh", "nohup multi_node.sh"],
)
def test_terminal_closes(command, trains_on, tmp_path):
    steps = 400 if trains_on else 2000  # seconds of training left, which the signal ends or does not
    flags = [*FLAGS, "--checkpoint-steps", "5000", "--max-steps", str(steps), "--run-dir", "run"]
    with Terminal([*command, *flags], tmp_path, NPROC="2", **ENVIRONMENT) as terminal:
        end, losses = time.monotonic() + 60, []
        while not losses:
            assert time.monotonic() < end
            time.sleep(0.05)
            with suppress(OSError):
                losses = records(tmp_path / "run", "train/loss")
        before, _ = losses[-1]
        terminal.hang_up()
    (last,) = checkpoints(tmp_path / "run")
    assert before < steps
    assert last == steps if trains_on else before <= last < steps
    assert (tmp_path / "run" / "result.json").exists() == trains_on
