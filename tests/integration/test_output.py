"""Training goes on when nobody can read what it prints; commands that only print end quietly."""

import sys

import pytest

from tests.helpers.processes import ROOT, records, result, run

pytestmark = pytest.mark.slow

TRAIN = f"{sys.executable} -m tests.helpers.small --dataset synthetic --device cpu --wandb disabled --max-steps 40"
COMPARE = f"{sys.executable} -m cifar.compare run"


@pytest.mark.parametrize(
    ("command", "printed"),
    [
        (f"{TRAIN} --log-steps 10 --run-dir run | head -n 1; exit ${{PIPESTATUS[0]}}", 1),
        (f"{TRAIN} --log-steps 10 --run-dir run >/dev/full 2>/dev/full", 0),
        (f"{TRAIN} --log-steps 10 --run-dir run >&- 2>&- <&-", 0),
    ],
)
def test_training_goes_on_without_a_voice(tmp_path, command, printed):
    done = run(["bash", "-c", command], tmp_path)
    assert (done.stderr, len(done.stdout.splitlines())) == ("", printed)
    assert result(tmp_path / "run")["steps"] == 40
    assert [step for step, _ in records(tmp_path / "run", "train/loss")] == [10, 20, 30, 40]


@pytest.mark.parametrize(
    ("command", "status"),
    [(f"{sys.executable} train_ddp.py --help", 0), (f"{sys.executable} -m cifar.compare nowhere 2>&1", 2)],
)
def test_commands_that_only_print_end_quietly(command, status):
    assert run(["bash", "-c", f"{command} | true; exit ${{PIPESTATUS[0]}}"], ROOT, status=status).stderr == ""
