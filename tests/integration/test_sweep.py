"""launch/sweep.yaml, and launch/sweep.sh: a bad grid, a failing run, a sweep that is continued, Ctrl-C."""

import itertools

import pytest
import yaml
from PIL import Image

from cifar.cli import parse_args
from tests.helpers.processes import PATH, ROOT, run
from tests.helpers.terminal import Terminal

pytestmark = pytest.mark.slow

SWEEP = ROOT / "launch" / "sweep.sh"
ENVIRONMENT = {
    "PATH": PATH, "CUDA_VISIBLE_DEVICES": "", "NPROC": "1", "SWEEP": "grid.yaml", "FOLDER": "runs/sweep",
}  # fmt: skip
FLAGS = ("--dataset", "folder", "--data-dir", "pictures", "--log-steps", "10", "--device", "cpu")
GRID = """
parameters:
  lr: {values: [0.02, 1.0e+30]}
  global_batch_size: {value: 32}
command: ["${program}", --recipe=net-fast, --optimizer=sgd, --lr-scaling=none, --wandb=online, "${args}"]
"""


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


@pytest.fixture
def folder(tmp_path):
    """Return a directory with the grid and two classes of pictures, which are decoded at once."""
    (tmp_path / "grid.yaml").write_text(GRID)
    for number, path in enumerate(f"{split}/{name}" for split in ("train", "test") for name in ("ant", "bee")):
        (tmp_path / "pictures" / path).mkdir(parents=True)
        for k in range(32):
            Image.new("RGB", (32, 32), (k, 60 * number, 0)).save(tmp_path / "pictures" / path / f"{k}.png")
    return tmp_path


def test_sweep_refuses_a_bad_grid(tmp_path):
    (tmp_path / "grid.yaml").write_text("parameters: {lr: 3}\n")
    done = run([SWEEP], tmp_path, status=2, **ENVIRONMENT)
    assert done.stderr.startswith("sweep.sh: error: grid.yaml is not a grid: ")


def test_sweep_survives_a_failing_run_and_skips_finished_ones(folder):
    flags = [*FLAGS, "--epochs", "10", "--max-steps", "20"]
    done = run([SWEEP, *flags], folder, status=1, **ENVIRONMENT)
    assert "sweep.sh: run 2 of 2: --recipe=net-fast --optimizer=sgd --lr-scaling=none --lr=1e+30" in done.stdout
    assert "sweep.sh: failed: lr-1e+30_global_batch_size-32" in done.stdout
    table = done.stdout.split("sweep.sh: failed")[1].splitlines()[1:]
    assert table[0].split()[0] == "accuracy"
    assert table[1].split()[-1] == "lr-0.02_global_batch_size-32"
    assert table[2].endswith("lr-1e+30_global_batch_size-32 (not finished)")
    assert (folder / "runs" / "sweep" / "compare.png").stat().st_size > 10_000

    (folder / "grid.yaml").write_text(GRID.replace(", 1.0e+30", ""))
    again = run([SWEEP, *flags], folder, **ENVIRONMENT)
    assert "the run in runs/sweep/lr-0.02_global_batch_size-32 has finished" in again.stdout


def test_ctrl_c_stops_the_sweep(folder):
    (folder / "grid.yaml").write_text(GRID.replace("1.0e+30", "0.03"))
    flags = [*FLAGS, "--epochs", "20000"]
    with Terminal([SWEEP, *flags], folder, **ENVIRONMENT) as terminal:
        terminal.until("[40, ")
        terminal.type("\x03")
        assert terminal.end() == 130
        printed = terminal.written
    assert "Stopped by SIGINT after step" in printed
    assert f"sweep.sh: stopped; to continue: FOLDER=runs/sweep {SWEEP} {' '.join(flags)}" in printed
    assert "run 2 of 2" not in printed
    assert len({path.parent for path in folder.glob("runs/sweep/*/checkpoints/*.pt")}) == 1
