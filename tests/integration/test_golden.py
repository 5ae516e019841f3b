"""The first losses of all recipes, in one process and in several, and net-fast in full."""

import json
import sys

import pytest

from tests.helpers.golden_losses import CASES, CORRECT_TOLERANCE, FILE, assert_golden, golden, net_fast_correct
from tests.helpers.processes import run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def losses(tmp_path_factory):
    command = [sys.executable, "-m", "tests.helpers.golden_losses", *CASES]
    done = run(command, tmp_path_factory.mktemp("golden"), timeout=800)
    return json.loads(done.stdout.split("LOSSES")[-1])


@pytest.mark.parametrize(
    ("name", "world_size"), [(name, size) for name, case in CASES.items() for size in case.world_sizes]
)
def test_golden_losses(losses, name, world_size):
    assert_golden(name, world_size, losses[name][str(world_size)])


def test_net_fast_accuracy(real_data):
    """Seed 0 on CIFAR-10: as many images as ever on a machine of golden.json, about as many elsewhere."""
    entry, exact = golden()
    entries = [entry] if exact else json.loads(FILE.read_text())
    correct = net_fast_correct(real_data)
    differences = [abs(correct - each["net-fast correct"]) for each in entries]
    assert min(differences) <= (0 if exact else CORRECT_TOLERANCE)
