"""launch/sweep.yaml and the errors of launch/sweep.sh."""

import itertools
import os
import sys
from pathlib import Path

import pytest
import yaml

from cifar.cli import parse_args
from tests.helpers.processes import ROOT, run


@pytest.mark.slow
def test_every_command_of_the_wandb_sweep_parses():
    """As W&B's agent makes it."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    content = yaml.safe_load((ROOT / "launch" / "sweep.yaml").read_text())
    values = {name: each["values"] for name, each in content["parameters"].items()}
    parsed = set()
    for chosen in itertools.product(*values.values()):
        given = {"args": {name: {"value": value} for name, value in zip(values, chosen, strict=True)}}
        words = create_sweep_command(content["command"])
        program, *fixed, args = [word for word in words if word[2:-1] not in ("env", "interpreter")]
        assert (program, args) == ("${program}", "${args}")
        config = parse_args([*fixed, *create_sweep_command_args(given)["args"]])
        assert config.wandb == "online"
        parsed.add((config.lr, config.global_batch_size))
    assert parsed == set(itertools.product(*values.values()))
    assert len(parsed) == 9


def test_sweep_refuses_a_bad_grid(tmp_path):
    (tmp_path / "grid.yaml").write_text("parameters: {lr: 3}\n")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = run([ROOT / "launch" / "sweep.sh"], tmp_path, PATH=path, SWEEP="grid.yaml")
    assert done.returncode == 2
    assert done.stderr.startswith("sweep.sh: error: grid.yaml is not a grid: ")
    assert done.stderr.count("\n") == 1
