"""Real launches by launch/local.sh and accelerate."""

import sys

import pytest

from cifar.checkpoint import checkpoints
from cifar.config import read_config
from tests.helpers.disturb import FLAGS, Log
from tests.helpers.processes import PATH, ROOT, result, run
from tests.helpers.terminal import Terminal

pytestmark = pytest.mark.slow

LOCAL = ROOT / "launch" / "local.sh"
ENVIRONMENT = {"PATH": PATH, "CUDA_VISIBLE_DEVICES": ""}


def test_local_without_a_gpu_returns_the_status_of_one_process(tmp_path):
    """torchrun would turn the 2 into 1."""
    output = run([LOCAL, "--epochs", "0"], tmp_path, status=2, **ENVIRONMENT)
    assert output.stderr == "train_ddp.py: error: --epochs is 0: it must be at least 1\n"


def test_accelerate_launch_of_separate_copies_is_refused(tmp_path):
    """It starts one process and does not say so."""
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    output = run([*accelerate, ROOT / "train_ddp.py", "--max-steps", "1"], tmp_path, status=1)
    complaint = "error: torchrun's variables are incomplete or contradict each other: RANK="
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
    assert [read_config(run_dir).lr for run_dir in sorted(tmp_path.glob("runs/*"))] == [0.01, 0.02, 0.03]
    assert len([*tmp_path.glob("runs/*/result.json")]) == 3
    assert output.stdout.count("2 processes on CPU") == 3


@pytest.mark.parametrize(
    ("command", "trains_on"),
    [
        ([sys.executable, ROOT / "train_ddp.py"], False),
        ([LOCAL], False),
        (["nohup", LOCAL], True),
        (["nohup", ROOT / "launch" / "multi_node.sh", "127.0.0.1", "1"], True),
    ],
    ids=["python", "local.sh", "nohup local.sh", "nohup multi_node.sh"],
)
def test_terminal_closes(command, trains_on, tmp_path):
    steps = 400 if trains_on else 20_000  # many seconds of training left, which the signal ends or does not
    flags = [*FLAGS, "--checkpoint-steps", "5000", "--max-steps", str(steps), "--run-dir", "run"]
    with Terminal([*command, *flags], tmp_path, NPROC="2", **ENVIRONMENT) as terminal:
        Log(tmp_path / "run" / "metrics.jsonl").until_line("train/loss")
        terminal.hang_up()
    (last,) = checkpoints(tmp_path / "run")
    assert last == steps if trains_on else 20 <= last < steps
    assert (tmp_path / "run" / "result.json").exists() == trains_on
    assert not trains_on or result(tmp_path / "run")["world_size"] == 2
