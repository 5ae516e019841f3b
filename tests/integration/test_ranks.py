"""Several real ranks: what they agree on, how they speak, and how a mistake ends all of them."""

import hashlib
import sys
import tarfile

import pytest

from cifar.datasets.cifar10 import FOLDER
from tests.helpers.processes import run, train
from tests.test_download import Server, serves

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


def test_two_ranks_at_work(tmp_path):
    output = run([*TORCHRUN, "--nproc_per_node=2", "-m", "tests.helpers.worker"], tmp_path)
    assert output.returncode == 0, output.stderr
    assert output.stdout.count("all is well") == 1


def test_a_mistake_is_said_once_by_three_processes(tmp_path):
    output = train("--epochs", "none", cwd=tmp_path, processes=3)
    assert output.returncode != 0
    lines = [line for line in output.stderr.splitlines() if "train_ddp.py: error:" in line]
    assert len(lines) == 1
    assert "--epochs" in lines[0]
    assert "exitcode  : 2" in output.stderr, "torchrun's report of the rank that ended the run"


def test_separate_copies_are_found_out(tmp_path):
    """accelerate's trap: without cpu=True, both ranks on a host without GPUs take themselves for rank 0 of 1."""
    driver = tmp_path / "driver.py"
    driver.write_text(
        "import functools, torch\n"
        "torch.cuda.is_available = lambda: False\n"
        "from accelerate import Accelerator\n"
        "import cifar.distributed.runtime, cifar.cli, train_ddp\n"
        "cifar.distributed.runtime.Accelerator = lambda cpu, **rest: Accelerator(**rest)\n"
        "with cifar.cli.exit_on_error('driver'):\n"
        "    train_ddp.main(['--dataset', 'synthetic', '--max-steps', '1', '--device', 'cpu', '--wandb', 'disabled'])\n"
    )
    output = run([*TORCHRUN, "--nproc_per_node=2", driver], tmp_path)
    lines = [line for line in output.stderr.splitlines() if "driver: error:" in line]
    assert len(lines) == 1
    assert "started 2 processes but 1 would train together" in lines[0]
    assert not (tmp_path / "runs").exists()


@pytest.fixture(scope="module")
def diverged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("diverged")
    flags = ["--dataset", "synthetic", "--local-batch-size", "50", "--lr-scaling", "none", "--lr", "50",
             "--log-steps", "10", "--max-steps", "100", "--run-dir", folder / "run"]  # fmt: skip
    return folder, train(*flags, cwd=folder, processes=2)


def test_an_infinite_loss_stops_all_ranks(diverged):
    folder, output = diverged
    lines = [line for line in output.stderr.splitlines() if "train_ddp.py: error:" in line]
    assert len(lines) == 1
    for words in ("the loss became ", "step ", "lr 50", "last good checkpoint: none yet"):
        assert words in lines[0]
    assert "exitcode  : 1" in output.stderr
    assert "Traceback" not in output.stderr.split("train_ddp.py: error:")[0]
    assert not (folder / "run" / "result.json").exists()


def test_explain_shows_that_ranks_agree_after_the_all_reduce(tmp_path):
    command = [*TORCHRUN, "--nproc_per_node=2", "-m", "cifar.explain", "--dataset", "synthetic", "--device", "cpu"]
    output = run(command, tmp_path)
    assert output.returncode == 0, output.stderr
    before = next(line for line in output.stdout.splitlines() if "before it, the gradient's norm" in line)
    after = next(line for line in output.stdout.splitlines() if "after it:" in line)
    before, after = (set(line.split(":")[1].replace(" ", "").split(",")) for line in (before, after))
    assert len(before) == 2
    assert len(after) == 1
    assert output.stdout.count("FORWARD") == 1


def test_only_local_rank_zero_downloads(real_data, tmp_path):
    """Two ranks, no data, one source: it is asked once, and both train on the real images."""
    packed = tmp_path / "packed.tar.gz"
    with tarfile.open(packed, "w:gz", compresslevel=0) as tar:
        tar.add(real_data / FOLDER, FOLDER)
    content = packed.read_bytes()
    driver = tmp_path / "driver.py"
    driver.write_text(
        "import dataclasses, sys\n"
        "import cifar.datasets.cifar10, cifar.cli, train_ddp\n"
        "size, sha256, *urls = sys.argv[1:4]\n"
        "changed = dataclasses.replace(cifar.datasets.cifar10.ARCHIVE, size=int(size), sha256=sha256, urls=tuple(urls))\n"
        "cifar.datasets.cifar10.ARCHIVE = changed\n"
        "with cifar.cli.exit_on_error('driver'):\n"
        "    train_ddp.main(sys.argv[4:])\n"
    )
    flags = [
        "--dataset",
        "cifar10",
        "--data-dir",
        "fetched",
        "--max-steps",
        "2",
        "--device",
        "cpu",
        "--wandb",
        "disabled",
    ]
    with Server() as server:
        source = [len(content), hashlib.sha256(content).hexdigest(), server.plays("/a", serves(content))]
        output = run([*TORCHRUN, "--nproc_per_node=2", driver, *source, *flags, "--run-dir", "run"], tmp_path)
        assert output.returncode == 0, output.stderr
        assert server.paths == ["/a"]
    assert output.stdout.count("downloading ") == 1
    assert "dataset     cifar10, from fetched: 50,000 training, 10,000 test" in output.stdout
