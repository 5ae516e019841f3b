"""Real launches by launch/local.sh and accelerate."""

import os
import sys
from pathlib import Path

import pytest

from tests.helpers.processes import ROOT, run

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


def test_accelerate_launch_cpu_is_refused(tmp_path):
    """For `--cpu --num_processes 2` accelerate starts one process and does not say so."""
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    output = run([*accelerate, ROOT / "train_ddp.py", "--max-steps", "1"], tmp_path)
    assert "accelerate launch was asked for several processes and started only this one" in output.stderr
    assert "loss" not in output.stdout
    assert not (tmp_path / "runs").exists()
