"""The files of launch/, started for real."""

import os
import sys
from pathlib import Path

from tests.processes import ROOT, run

LOCAL = ROOT / "launch" / "local.sh"
SHORT = ["--dataset", "synthetic", "--max-steps", "2", "--wandb", "disabled", "--run-dir", "run"]


def launch(*flags, cwd, **environment):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return run([LOCAL, *flags], cwd, 240, PATH=path, CUDA_VISIBLE_DEVICES="", **environment)


def test_local_starts_as_many_processes_as_it_is_told(tmp_path):
    done = launch(*SHORT, cwd=tmp_path, NPROC="2")
    assert done.returncode == 0, done.stderr
    assert "2 processes on" in done.stdout
    assert (tmp_path / "run" / "result.json").exists()


def test_local_explains_itself(tmp_path):
    done = launch("--help", cwd=tmp_path)
    assert done.returncode == 0
    assert "NPROC=2 launch/local.sh" in done.stdout


def test_without_a_gpu_it_starts_one_process_whose_status_comes_through(tmp_path):
    """torchrun would have made a 1 of the 2."""
    done = launch("--epochs", "0", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "train_ddp.py: error: --epochs is 0: it must be at least 1\n"
