"""Several real ranks: what they agree on, and how a failure ends all of them."""

import sys

import pytest

from tests.helpers.processes import run, torchrun

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """Return the standard output of tests.helpers.worker."""
    return run([sys.executable, "-m", "tests.helpers.worker"], tmp_path_factory.mktemp("worker")).stdout


def test_two_ranks(two_ranks):
    """The checks in tests/helpers/worker.py."""
    assert two_ranks.count("two ranks passed") == 1


def test_explain_shows_the_all_reduce(two_ranks):
    assert two_ranks.count("FORWARD") == 1
    before, after = (
        next(line for line in two_ranks.splitlines() if words in line).split(":")[1].replace(" ", "").split(",")
        for words in ("before it, the gradient's norm", "after it:")
    )
    assert (len(set(before)), len(set(after))) == (2, 1)


@pytest.mark.parametrize("ranks", ["1", "01"])
def test_out_of_memory_on_some_rank_is_one_line(tmp_path, ranks):
    driver = tmp_path / "driver.py"
    driver.write_text(
        "import os, torch, cifar.command, train_ddp\n"
        "step, steps = train_ddp.train_step, []\n"
        "def train_step(model, batches, *others):\n"
        "    steps.append(None)\n"
        f"    if len(steps) == 5 and os.environ['RANK'] in {ranks!r}:\n"
        "        torch.empty(10**15)\n"
        "    return step(model, batches, *others)\n"
        "train_ddp.train_step = train_step\n"
        "with cifar.command.exit_on_error('driver'):\n"
        "    train_ddp.main()\n"
    )
    output = torchrun(2, "--dataset", "synthetic", "--max-steps", 50, cwd=tmp_path, script=[driver], status=1)
    (line,) = [line for line in output.stderr.splitlines() if "error:" in line]
    assert line.startswith("driver: error: this host is out of memory (4000000000000000 bytes wanted) at a local batch")
    assert "--local-batch-size 2 --global-batch-size 8" in line
    assert any(f"[rank {rank} on host " in line for rank in ranks)
    assert "exitcode  : 2" in output.stderr
    assert "Traceback" not in output.stderr.split(line)[0]
