"""The files of launch/, started for real."""

import os
import shutil
import sys
from pathlib import Path

import pytest

from tests.helpers.processes import ROOT, run

PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
LOCAL = ROOT / "launch" / "local.sh"
SHORT = ["--dataset", "synthetic", "--max-steps", "2", "--wandb", "disabled", "--run-dir", "run"]


def launch(*flags, cwd, **environment):
    return run([LOCAL, *flags], cwd, 240, PATH=PATH, CUDA_VISIBLE_DEVICES="", **environment)


def test_local_starts_as_many_processes_as_it_is_told(tmp_path):
    done = launch(*SHORT, cwd=tmp_path, NPROC="2")
    assert done.returncode == 0, done.stderr
    assert "2 processes on" in done.stdout
    assert (tmp_path / "run" / "result.json").exists()


def test_without_a_gpu_it_starts_one_process_whose_status_comes_through(tmp_path):
    """torchrun would have made a 1 of the 2."""
    done = launch("--epochs", "0", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "train_ddp.py: error: --epochs is 0: it must be at least 1\n"


@pytest.mark.parametrize("script", sorted((ROOT / "launch").glob("*.s*")), ids=lambda path: path.name)
def test_scripts_are_strict_and_explain_themselves(script, tmp_path):
    text = script.read_text()
    assert "\nset -euo pipefail\n" in text
    done = run([script, "--help"], tmp_path, PATH=PATH)
    assert done.returncode == 0
    assert f"launch/{script.name}" in done.stdout
    assert "train_ddp.py --help" in done.stdout
    assert "set -euo" not in done.stdout, "the header only"


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing():
    scripts = [*(ROOT / "launch").glob("*.s*"), ROOT / ".ci" / "run"]
    done = run(["shellcheck", *scripts], ROOT)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", [["local.sh"], ["multi_node.sh", "127.0.0.1", "1"]], ids=lambda words: words[0])
def test_a_number_of_processes_that_is_none_is_refused(script, tmp_path):
    done = run([ROOT / "launch" / script[0], *script[1:]], tmp_path, PATH=PATH, NPROC="all")
    assert done.returncode == 2
    assert done.stderr == f"{script[0]}: error: NPROC is 'all': it must be a number of processes such as 2\n"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "say where to meet and how many hosts"),
        (["10.0.0.1"], "say where to meet and how many hosts"),
        (["10.0.0.1", "two"], "'two' is not a number of hosts such as 2, nor a range such as 1:4"),
        (["10.0.0.1", "4:1"], "'4:1': the fewest come first"),
        (["10.0.0.1:x", "2"], "'10.0.0.1:x' is not an address such as 10.0.0.1 or 10.0.0.1:29400"),
        (["no.such.host.invalid", "2"], "no.such.host.invalid:29400 can't be reached from here"),
    ],
)
def test_multi_node_answers_mistakes_with_one_line(arguments, complaint, tmp_path):
    done = run([ROOT / "launch" / "multi_node.sh", *arguments], tmp_path, PATH=PATH, NPROC="1")
    assert done.returncode == 2
    assert done.stderr.startswith(f"multi_node.sh: error: {complaint}")
    assert done.stderr.count("\n") == 1


def test_the_slurm_script_is_for_sbatch_only(tmp_path):
    done = run([ROOT / "launch" / "slurm.sbatch"], tmp_path, PATH=PATH)
    assert done.returncode == 2
    assert done.stderr == "slurm.sbatch: error: submit it to SLURM: sbatch launch/slurm.sbatch [FLAGS]\n"
