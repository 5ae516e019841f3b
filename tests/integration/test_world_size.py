"""World size changes nothing but speed: real torchrun runs of the same global batch, against each other."""

import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from cifar.checkpoint import checkpoint_path, load_checkpoint, load_model
from cifar.config import parse_args
from cifar.data import EvalLoader, load_data
from cifar.evaluation import evaluate
from cifar.models import build_model
from tests.helpers.processes import ROOT, records, result, run, torchrun, train

STEPS = 50
# Of a checkpoint. There is no other before the last: on a slow disk, some of those between are left out.
MIDDLE = 30
GLOBAL_BATCH = 48
# The tutorial's own rate for such a batch is 0.012. At several times that, one ReLU that a rounding error switches
# grows to 1e-3 within 50 steps, at any two summation orders.
LR = 0.01
# processes: local batch. Two of them accumulate, over 2 and over 4 micro-batches.
RUNS = {1: 12, 2: 24, 3: 8, 4: 12}


@pytest.fixture(scope="module")
def data_flags(request):
    """The real data where it is, the stand-in elsewhere."""
    try:
        return ["--dataset", "cifar10", "--data-dir", request.getfixturevalue("real_data")]
    except pytest.skip.Exception:
        return ["--dataset", "synthetic"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, data_flags):
    """Folder and output of a run of 50 steps, with augmentation, at each world size."""
    folder = tmp_path_factory.mktemp("world")
    flags = ["--recipe", "wide", "--model", "net", "--lr", LR, "--lr-scaling", "none", "--warmup-epochs", 0,
             "--max-steps", STEPS, "--global-batch-size", GLOBAL_BATCH, "--log-steps", 1,
             "--checkpoint-steps", MIDDLE, *data_flags]  # fmt: skip

    def start(processes):
        local, run_dir = RUNS[processes], folder / f"{processes}"
        # torchrun for the one process, too; that a plain `python` does the same is what the resumed run shows.
        output = torchrun(processes, *flags, "--local-batch-size", local, "--run-dir", run_dir, cwd=folder)
        assert output.returncode == 0, output.stderr
        return run_dir, output

    with ThreadPoolExecutor(2) as pool:  # most of their time is start-up, which a few processes spend on one core
        done = dict(zip(RUNS, pool.map(start, RUNS), strict=True))
    return done


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_the_loss_curve_is_that_of_one_process(runs, processes):
    one, several = (records(runs[n][0], "train/loss") for n in (1, processes))
    assert [step for step, _ in several] == list(range(1, STEPS + 1))
    assert dict(several) == pytest.approx(dict(one), abs=1e-4)
    losses = [loss for _, loss in one]
    assert max(losses) - min(losses) > 0.01, "the batches' losses are too alike to tell one order from another"


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_the_weights_are_those_of_one_process(runs, processes):
    one, several = (load_checkpoint(checkpoint_path(runs[n][0], STEPS))["state"] for n in (1, processes))
    for name, weight in one["net"].items():
        assert torch.allclose(weight, several["net"][name], atol=1e-4), name
    torch.manual_seed(0)
    start = build_model("net").state_dict()
    assert not torch.allclose(start["fc3.bias"], one["net"]["fc3.bias"], atol=1e-3), "nothing was trained"
    for mine, theirs in zip(several["optimizer"]["state"].values(), one["optimizer"]["state"].values(), strict=True):
        assert torch.allclose(mine["momentum_buffer"], theirs["momentum_buffer"], atol=1e-3)


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_result_and_banner_say_what_ran(runs, processes):
    folder, output = runs[processes]
    got = result(folder)
    local, accumulated = RUNS[processes], GLOBAL_BATCH // RUNS[processes] // processes
    assert (got["world_size"], got["local_batch_size"], got["global_batch_size"]) == (processes, local, GLOBAL_BATCH)
    assert (got["steps"], got["test_total"]) == (STEPS, 10_000)
    noun = "process" if processes == 1 else "processes"
    assert f"{local} local x {processes} {noun} x {accumulated} accumulated = 48 global" in output.stdout
    assert "(gloo)" in output.stdout or processes == 1


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_only_rank_zero_speaks(runs, processes):
    said = runs[processes][1].stdout
    for line in ("[1,     1] loss: ", "Finished Training", "Accuracy of the network on the 10000 test images: "):
        assert said.count(line) == 1
    assert len(re.findall(r"\[1, +\d+\] loss: \d\.\d{3}\n", said)) == STEPS


@pytest.fixture(scope="module")
def whole_test_set(runtime, data_flags):
    """All of it, for one process."""
    return EvalLoader(load_data(parse_args([str(flag) for flag in data_flags]), runtime).test, 0, 1)


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_the_accuracy_is_what_one_process_finds(runs, runtime, whole_test_set, processes):
    """3 doesn't divide 10,000: where DistributedSampler would have repeated an image."""
    net, path = build_model("net"), checkpoint_path(runs[processes][0], STEPS)
    load_model(net, load_checkpoint(path), "net", path)
    test = evaluate(net, whole_test_set, runtime)
    got = result(runs[processes][0])
    assert (got["test_correct"], got["test_total"]) == (test.correct, 10_000)
    assert got["test_loss"] == pytest.approx(test.loss, abs=1e-6)


@pytest.fixture(scope="module")
def accuracy_line(runs, tmp_path_factory):
    """What one process says of the single-process run's last checkpoint on the stand-in's 10,000 test images."""
    output = train(*evaluate_flags(runs), cwd=tmp_path_factory.mktemp("one"))
    assert output.returncode == 0, output.stderr
    return next(line for line in output.stdout.splitlines() if " of 10,000 correct, loss " in line)


def evaluate_flags(runs):
    return ["--evaluate", checkpoint_path(runs[1][0], STEPS), "--dataset", "synthetic"]


# Seven copies of one process that has loaded torch, with the variables that a launcher would give them.
SEVEN = """
import os, socket, sys
import torch._dynamo, train_ddp  # the former is what DistributedDataParallel would have each of them load
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
ranks = []
for rank in range(7):
    ranks.append(os.fork())
    if ranks[-1] == 0:
        os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": "7", "LOCAL_WORLD_SIZE": "7",
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}
        train_ddp.main(sys.argv[1:])
        sys.exit()
sys.exit(any([os.waitpid(rank, 0)[1] for rank in ranks]))
"""


def test_a_checkpoint_has_the_same_accuracy_at_seven_processes(runs, accuracy_line, tmp_path):
    """7 doesn't divide 10,000 either; and here, the weights are the same."""
    output = run([sys.executable, "-c", SEVEN, *evaluate_flags(runs), "--device", "cpu"], tmp_path)
    assert output.returncode == 0, output.stderr
    assert output.stdout.count(accuracy_line) == 1, output.stdout
    assert not (tmp_path / "runs").exists(), "evaluating is no run"


def test_resume_is_exact_at_two_processes(runs, tmp_path, data_flags):
    """From the middle: the checkpoint of the resumed run holds the very bits of the one that was not stopped."""
    folder = tmp_path / "run"
    shutil.copytree(runs[2][0], folder)
    checkpoint_path(folder, STEPS).unlink()
    output = train("--resume", folder, "--wandb", "disabled", cwd=tmp_path, processes=2)
    assert output.returncode == 0, output.stderr
    assert f"after step {MIDDLE} of {STEPS}" in output.stdout
    mine, theirs = (load_checkpoint(checkpoint_path(place, STEPS))["state"] for place in (folder, runs[2][0]))
    for name in mine["net"]:
        assert torch.equal(mine["net"][name], theirs["net"][name])
    assert mine["window_loss"] == theirs["window_loss"]
    assert records(folder, "train/loss") == records(runs[2][0], "train/loss")
    assert result(folder)["test_loss"] == result(runs[2][0])["test_loss"]


def test_resume_with_another_world_size_keeps_the_global_batch(runs, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(runs[2][0], folder)
    checkpoint_path(folder, STEPS).unlink()
    output = train("--resume", folder, "--wandb", "disabled", cwd=tmp_path)
    assert output.returncode == 0, output.stderr
    assert "24 local x 1 process x 2 accumulated = 48 global" in output.stdout
    assert dict(records(folder, "train/loss")) == pytest.approx(dict(records(runs[2][0], "train/loss")), abs=1e-4)


def test_accelerate_launch_trains_the_same_as_torchrun(runs, tmp_path, data_flags):
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    command = [*launcher, "--config_file", ROOT / "launch" / "accelerate.yaml",
               "--num_processes", 2, "--main_process_port", 0, ROOT / "train_ddp.py", "--recipe", "wide",
               "--model", "net", "--lr", LR, "--lr-scaling", "none", "--warmup-epochs", 0, "--max-steps", 10,
               "--global-batch-size", GLOBAL_BATCH, "--local-batch-size", RUNS[2], "--log-steps", 1,
               "--run-dir", tmp_path / "run", "--device", "cpu", "--wandb", "disabled", *data_flags]  # fmt: skip
    output = run(command, tmp_path)
    assert output.returncode == 0, output.stderr
    assert "2 processes on CPU (gloo)" in output.stdout
    assert records(tmp_path / "run", "train/loss") == records(runs[2][0], "train/loss")[:10]
