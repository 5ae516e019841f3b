"""The acceptance checks of tests/gpu run without a GPU, too, as far as they need none."""

import json
import re
import sys

import pytest

from tests.helpers.processes import ROOT, run

pytestmark = pytest.mark.slow
BITS = """
import torch
from tests.gpu.variants import Trial
today, changed = (Trial(changes).steps(4).weights() for changes in ([], ["half", "images", "pool"]))
assert torch.equal(today, changed)
fixed = Trial(["fixed bias"], epochs=2).steps(2)
biases = [fixed.steps(count).model.whiten.bias.clone() for count in (0, 3)]
assert torch.equal(*biases)
"""


def test_checks_run_on_the_cpu():
    assert run([sys.executable, "-m", "tests.gpu.checks"], ROOT).stdout.count("PASS") == 3


def test_captured_and_variants_run_without_a_gpu(tmp_path):
    for part, lines, found in (("captured", 6, "PASS same bits after"), ("variants", 8, r", seed 0 +[\d.]+ ms a step")):
        output = run([sys.executable, "-m", "tests.gpu", part, "--out", tmp_path], ROOT).stdout
        assert f"{part}: PASS" in output
        assert len(re.findall(found, output)) == lines, output


def test_variants_that_only_save_time_have_todays_bits():
    run([sys.executable, "-c", BITS], ROOT)  # in a process of its own, in which Triton interprets


def test_several_runs_on_three_cpu_ranks(tmp_path):
    only = ["net-fast", "stopped", "network error"]  # the others take minutes: see tests/gpu/README.md
    output = run([sys.executable, "-m", "tests.gpu", "several", "--out", tmp_path, "--only", *only], ROOT)
    assert "several: PASS, 0 of 5 failed" in output.stdout
    found = json.loads((tmp_path / "several.json").read_text())
    rates = r"net-fast x 3: [\d,]+ images/s, first step [\d.]+ s; net-fast x 1: [\d,]+ images/s, first step [\d.]+ s"
    assert re.fullmatch(f"PASS {rates}", found["net-fast"])
    assert re.fullmatch(r"PASS step \d+ saved after [\d.]+ s", found["stopped"])
    assert "GLOO_SOCKET_IFNAME=nonsense in the environment" in found["network error"]
