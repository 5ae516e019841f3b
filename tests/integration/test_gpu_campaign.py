"""The acceptance checks of tests/gpu run without a GPU, too, as far as they need none."""

import json
import re
import sys

import pytest

from tests.gpu.peers import rows, with_runs
from tests.helpers.processes import ROOT, run

pytestmark = pytest.mark.slow


def test_checks_run_on_the_cpu():
    names = ["batches", "muon", "resumed", "moves", "captured"]
    output = run([sys.executable, "-m", "tests.gpu.checks", *names], ROOT)
    assert output.returncode == 0, output.stdout + output.stderr
    assert output.stdout.count("PASS  ") == len(names)
    assert output.stdout.count("skipped: no GPU") == 1


def test_several_runs_on_three_cpu_ranks(tmp_path):
    only = ["net-fast", "stopped", "network error"]  # the others take minutes: see tests/gpu/README.md
    output = run([sys.executable, "-m", "tests.gpu", "several", "--out", tmp_path, "--only", *only], ROOT)
    assert output.returncode == 0, output.stdout + output.stderr
    assert "several: PASS, 0 of 5 failed" in output.stdout
    found = json.loads((tmp_path / "several.json").read_text())
    rates = r"net-fast x 3: [\d,]+ images/s, first step [\d.]+ s; net-fast x 1: [\d,]+ images/s, first step [\d.]+ s"
    assert re.fullmatch(f"PASS {rates}", found["net-fast"])
    assert re.fullmatch(r"PASS step \d+ saved after [\d.]+ s", found["stopped"])
    assert "GLOO_SOCKET_IFNAME=nonsense in the environment" in found["network error"]


# A stand-in for both scripts: cells are left empty as in airbench94_muon.py, text ends in \r as in cifar10_speedrun.py.
STAND_IN = r"""
import torch
for split in ("train", "test"):
    data = torch.load(f"cifar10/{split}.pt", weights_only=True)
    assert data["images"].shape[1:] == (32, 32, 3) and data["images"].dtype == torch.uint8, data["images"].shape
    assert data["labels"].dtype == torch.int64 and len(data["classes"]) == 10
print("|  run     |  epoch  |  train_acc  |  val_acc  |  tta_val_acc  |  time_seconds  |\n" + "-" * 70)
def main(run):
    tta, seconds = (0.95, 2.0) if run == 1 else (0.94, 2.5)
    print(f"|  {run:>6}  |      0  |     0.5000  |   0.5000  |               |        0.5000  |")
    print(f"|          |   eval  |     0.9000  |   0.9300  |       {tta:.4f}  |        {seconds:.4f}  |")
    print("Mean accuracy after this run: 0.940000 | Mean time: 2.5s", end="\r", flush=True)
main("warmup")
for run in range(200):
    main(run)
"""


def test_peers_take_turns_with_speed94(tmp_path):
    (tmp_path / "airbench94_muon.py").write_text(STAND_IN)
    (tmp_path / "cifar10_speedrun.py").write_text(STAND_IN.replace("range(200)", "range(RUNS)"))
    out = tmp_path / "out"
    command = [sys.executable, "-m", "tests.gpu", "peers", "--peers", tmp_path, "--out", out]
    output = run(command, ROOT, CIFAR_DATA_DIR="")
    assert output.returncode == 1, "the second script cannot be given a number of runs"
    found = json.loads((out / "peers.json").read_text())
    assert found["airbench94_muon"] == "2.500 s (2.500 to 2.500), 94.00 % of 1 runs, on synthetic"
    assert "accuracies mean nothing" in found["dataset"]
    assert "for run in range(N)" in found["cifar10_speedrun compiles"]
    assert "cifar10_speedrun 1" not in found
    assert re.fullmatch(r"[\d.]+ s \([\d.]+ to [\d.]+\), [\d.]+ % of 1 runs, on synthetic", found["speed94"])


def test_table_of_the_peers_is_read_without_the_warm_up_and_what_was_cut_off(tmp_path):
    script = tmp_path / "airbench94_muon.py"
    script.write_text(STAND_IN[STAND_IN.index("print") :])
    output = run([sys.executable, "-c", with_runs(script, 3)], tmp_path).stdout
    assert rows(output) == [(2.5, 0.94), (2.0, 0.95), (2.5, 0.94)]
    assert rows(output[: output.rindex("eval")]) == [(2.5, 0.94), (2.0, 0.95)]
    assert rows("Traceback (most recent call last):") == []
