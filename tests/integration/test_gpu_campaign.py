"""The acceptance checks of tests/gpu run without a GPU, too, as far as they need none."""

import json
import re
import sys

import pytest

from tests.helpers.processes import ROOT, run

pytestmark = pytest.mark.slow


def test_checks_run_on_the_cpu():
    names = ["batches", "muon", "resumed", "moves"]
    output = run([sys.executable, "-m", "tests.gpu.checks", *names], ROOT)
    assert output.stdout.count("PASS  ") == len(names)


def test_several_runs_on_three_cpu_ranks(tmp_path):
    only = ["net-fast", "stopped", "network error"]  # the others take minutes: see tests/gpu/README.md
    output = run([sys.executable, "-m", "tests.gpu", "several", "--out", tmp_path, "--only", *only], ROOT)
    assert "several: PASS, 0 of 5 failed" in output.stdout
    found = json.loads((tmp_path / "several.json").read_text())
    rates = r"net-fast x 3: [\d,]+ images/s, first step [\d.]+ s; net-fast x 1: [\d,]+ images/s, first step [\d.]+ s"
    assert re.fullmatch(f"PASS {rates}", found["net-fast"])
    assert re.fullmatch(r"PASS step \d+ saved after [\d.]+ s", found["stopped"])
    assert "GLOO_SOCKET_IFNAME=nonsense in the environment" in found["network error"]
