"""The scripts of launch/: --help and mistakes. Real launches are in tests/integration and tests/cluster."""

import os
import sys

import pytest

from tests.helpers.processes import ROOT, run

SCRIPTS = sorted((ROOT / "launch").glob("*.s*"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_help_is_the_header(script, tmp_path):
    output = run([script, "--help"], tmp_path)
    assert f"launch/{script.name}" in output.stdout
    assert "train_ddp.py --help" in output.stdout
    assert "set -euo pipefail" not in output.stdout
    assert "\nset -euo pipefail\n" in script.read_text()


@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        (["local.sh"], "NPROC is 'all': set it to a number of processes, such as 2"),
        *((["multi_node.sh", address, "1"], "NPROC is 'all': set it to a number of processes, such as 2")
          for address in ("127.0.0.1", "::1", "[::1]", "[::1]:29400")),
        (["multi_node.sh"], "missing arguments: launch/multi_node.sh HOST[:PORT] NODES [FLAGS]"),
        (["multi_node.sh", "10.0.0.1"], "missing arguments: launch/multi_node.sh HOST[:PORT] NODES [FLAGS]"),
        (["multi_node.sh", "10.0.0.1", "two"], "'two' is not a number of hosts, such as 2, or a range, such as 1:4"),
        (["multi_node.sh", "10.0.0.1", "4:1"], "'4:1': write the range as MIN:MAX"),
        *((["multi_node.sh", wrong, "2"], f"'{wrong}' is not an address, such as 10.0.0.1, 10.0.0.1:29400 or "
          "[fd00::1]:29400") for wrong in ("10.0.0.1:x", "[fd00::1", "[fd00::1]:x", ":29400")),
        (["slurm.sbatch"], "submit it to SLURM: sbatch launch/slurm.sbatch [FLAGS]"),
    ],
)  # fmt: skip
def test_mistake_is_one_line_and_status_2(command, complaint, tmp_path):
    output = run([ROOT / "launch" / command[0], *command[1:]], tmp_path, status=2, NPROC="all")
    assert output.stderr == f"{command[0]}: error: {complaint}\n"


@pytest.mark.parametrize("command", [["local.sh"], ["multi_node.sh", "127.0.0.1", "1"]], ids=lambda command: command[0])
def test_restarts_and_threads(command, tmp_path):
    """OMP_NUM_THREADS is set for several ranks, as torchrun would do after torch has been imported."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\n[ "$1" = -u ] || exec {sys.executable} "$@"\necho "$OMP_NUM_THREADS $*"\n')
    python.chmod(0o755)
    variables = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "NPROC": "2", "OMP_NUM_THREADS": ""}
    for restarts in ({}, {"MAX_RESTARTS": "9"}):
        shown = run([ROOT / "launch" / command[0], *command[1:]], tmp_path, **variables, **restarts).stdout
        assert shown.startswith(f"1 -u {ROOT / 'launch' / 'warm_torchrun.py'} ")
        default = 0 if command == ["local.sh"] else 3
        assert f" --max-restarts={restarts.get('MAX_RESTARTS', default)} " in shown


def test_unreachable_host(tmp_path):
    output = run([ROOT / "launch" / "multi_node.sh", "no.such.host.invalid", "2"], tmp_path, status=2, NPROC="1")
    assert output.stderr.startswith("multi_node.sh: error: cannot reach no.such.host.invalid:29400 from this host: ")
    assert output.stderr.count("\n") == 1
