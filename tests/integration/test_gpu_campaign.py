"""The acceptance checks of tests/gpu run without a GPU, too, as far as they need none."""

import sys

import pytest

from tests.helpers.processes import ROOT, run

pytestmark = pytest.mark.slow


def test_checks_run_on_the_cpu(tmp_path):
    names = ["batches", "muon", "resumed", "moves", "captured"]
    output = run([sys.executable, "-m", "tests.gpu.checks", "--only", *names], ROOT)
    assert output.returncode == 0, output.stdout + output.stderr
    assert output.stdout.count("PASS  ") == len(names)
    assert output.stdout.count("skipped: no GPU") == 1
