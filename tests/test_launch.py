"""The files of launch/, started for real."""

import itertools
import os
import shutil
import sys
from pathlib import Path

import pytest

from tests.processes import ROOT, run

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


def sweep(cwd, grid, *flags):
    (cwd / "grid.yaml").write_text(grid)
    return run(
        [ROOT / "launch" / "sweep.sh", *flags], cwd, 240,
        PATH=PATH, CUDA_VISIBLE_DEVICES="", NPROC="1", SWEEP="grid.yaml", FOLDER="runs/sweep",
    )  # fmt: skip


GRID = """
parameters:
  lr: {values: [0.02, 1.0e+30]}
  global-batch-size: {value: 32}
command: ["${program}", --recipe=net-fast, --optimizer=sgd, --lr-scaling=none, --wandb=online, "${args}"]
"""


def test_sweep_ends_with_a_table_and_outlives_a_run_that_fails(tmp_path):
    flags = ["--dataset", "synthetic", "--max-steps", "20", "--log-steps", "10", "--device", "cpu"]
    done = sweep(tmp_path, GRID, *flags)
    assert done.returncode == 1
    assert "sweep.sh: run 2 of 2: --recipe=net-fast --optimizer=sgd --lr-scaling=none --lr=1e+30" in done.stdout
    assert "sweep.sh: failed: lr-1e+30_global-batch-size-32" in done.stdout
    table = done.stdout.split("sweep.sh: failed")[1].splitlines()[1:]
    assert table[0].split()[0] == "accuracy"
    assert table[1].split()[-1] == "lr-0.02_global-batch-size-32"
    assert table[2].endswith("lr-1e+30_global-batch-size-32 (not finished)")
    assert (tmp_path / "runs" / "sweep" / "compare.png").stat().st_size > 10_000
    again = sweep(tmp_path, GRID.replace(", 1.0e+30", ""), *flags)
    assert again.returncode == 0
    assert "sweep.sh: done before" in again.stdout


def test_sweep_refuses_what_is_no_grid(tmp_path):
    done = sweep(tmp_path, "parameters: {lr: 3}\n")
    assert done.returncode == 2
    assert done.stderr.startswith("sweep.sh: error: grid.yaml is no grid: ")
    assert done.stderr.count("\n") == 1


def test_every_command_line_of_the_wandb_sweep_parses():
    """As W&B's agent makes it."""
    import yaml
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    from cifar.config import parse_args

    content = yaml.safe_load((ROOT / "launch" / "sweep.yaml").read_text())
    values = {name: each["values"] for name, each in content["parameters"].items()}
    seen = set()
    for chosen in itertools.product(*values.values()):
        given = {"args": {name: {"value": value} for name, value in zip(values, chosen, strict=True)}}
        args = create_sweep_command_args(given)["args"]
        command = [
            part for part in create_sweep_command(content["command"]) if part not in ("${env}", "${interpreter}")
        ]
        assert command[0] == "${program}"
        assert command[-1] == "${args}"
        config = parse_args([*command[1:-1], *args])
        assert config.wandb == "online"
        seen.add((config.lr, config.global_batch_size))
    assert seen == set(itertools.product(*values.values()))
    assert len(seen) == 9


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
