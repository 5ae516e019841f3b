"""The files of launch/, started for real."""

import os
import sys
from pathlib import Path

import pytest

from tests.processes import ROOT, run

LOCAL = ROOT / "launch" / "local.sh"
SHORT = ["--dataset", "synthetic", "--max-steps", "2", "--wandb", "disabled", "--run-dir", "run"]


def launch(*flags, cwd, **environment):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return run([LOCAL, *flags], cwd, 240, PATH=path, CUDA_VISIBLE_DEVICES="", **environment)


@pytest.mark.parametrize(("environment", "processes"), [({}, "1 process on"), ({"NPROC": "2"}, "2 processes on")])
def test_local_starts_what_the_host_has_or_what_it_is_told(tmp_path, environment, processes):
    done = launch(*SHORT, cwd=tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    assert processes in done.stdout
    assert (tmp_path / "run" / "result.json").exists()


def test_local_explains_itself(tmp_path):
    done = launch("--help", cwd=tmp_path)
    assert done.returncode == 0
    assert "NPROC=2 launch/local.sh" in done.stdout


def test_a_mistake_comes_through_with_its_status(tmp_path):
    done = launch("--epochs", "0", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "train_ddp.py: error: --epochs is 0: it must be at least 1\n"
