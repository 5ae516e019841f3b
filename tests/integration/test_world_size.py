"""World size changes nothing but speed: runs of the same global batch, compared with each other."""

import functools
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from cifar.checkpoint import checkpoint_path, load_checkpoint, save_checkpoint
from cifar.cli import parse_args
from cifar.data import load_data
from cifar.evaluation import evaluate
from cifar.models import build_model
from tests.helpers.comparing import same
from tests.helpers.processes import ROOT, records, result, run, torchrun, train

pytestmark = pytest.mark.slow

STEPS = 50
MIDDLE = 30  # the only checkpoint before the last: on a slow disk, some of several are left out
GLOBAL_BATCH = 46  # which neither three nor four processes divide
# The tutorial's rate for such a batch is 0.012. At several times that, one ReLU that a rounding error switches grows to
# 1e-3 within 50 steps, at any two summation orders.
LR = 0.01
RUNS = {1: 12, 2: 23, 3: 8, 4: 6}  # local batch by world size
FLAGS = ["--recipe", "wide", "--model", "net", "--lr", LR, "--lr-scaling", "none", "--warmup-epochs", 0,
         "--global-batch-size", GLOBAL_BATCH, "--log-steps", 1]  # fmt: skip


def train_forked(*flags, cwd, processes, small=False):
    """Run `processes` copies of one process that has loaded torch, which is most of what starting a process costs."""
    script = (
        "import sys, train_ddp\n"
        "from tests.helpers.forking import fork_ranks\n"
        "from tests.helpers.small import shrink\n"
        f"{'shrink()' if small else ''}\n"
        "fork_ranks(int(sys.argv[1]), lambda: train_ddp.main(sys.argv[2:]))\n"
    )
    return run([sys.executable, "-c", script, processes, *flags, "--device", "cpu", "--wandb", "disabled"], cwd)


@pytest.fixture(scope="module")
def data_flags(request):
    """Return the flags of the real dataset if it is there, else of the synthetic one."""
    try:
        return ["--dataset", "cifar10", "--data-dir", request.getfixturevalue("real_data")]
    except pytest.skip.Exception:
        return ["--dataset", "synthetic"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, data_flags):
    """Return directory and output of a run of 50 steps, with augmentation, by world size."""
    folder = tmp_path_factory.mktemp("world")
    flags = [*FLAGS, "--max-steps", STEPS, "--checkpoint-steps", MIDDLE, *data_flags]

    def start(processes):
        run_dir = folder / f"{processes}"
        own = [*flags, "--local-batch-size", RUNS[processes], "--run-dir", run_dir]
        output = train_forked(*own, cwd=folder, processes=processes)
        return run_dir, output.stdout

    with ThreadPoolExecutor(2) as pool:  # most of their time is start-up, much of it on one core
        return dict(zip(RUNS, pool.map(start, RUNS), strict=True))


def state_of(run_dir):
    return load_checkpoint(checkpoint_path(run_dir, STEPS))["state"]


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_losses_weights_and_momentum_equal_those_of_one_process(runs, processes):
    one, several = (records(runs[n][0], "train/loss") for n in (1, processes))
    assert [step for step, _ in several] == list(range(1, STEPS + 1))
    assert dict(several) == pytest.approx(dict(one), abs=1e-4)
    losses = [loss for _, loss in one]
    assert max(losses) - min(losses) > 0.01, "the losses are too alike to tell one order from another"
    one, several = state_of(runs[1][0]), state_of(runs[processes][0])
    for name, weight in one["model"].items():
        assert torch.allclose(weight, several["model"][name], atol=1e-4), name
    for mine, theirs in zip(several["optimizer"]["state"].values(), one["optimizer"]["state"].values(), strict=True):
        assert torch.allclose(mine["momentum_buffer"], theirs["momentum_buffer"], atol=1e-3)


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_each_test_image_counts_once(runs, runtime, data_flags, processes):
    """As in one process. Three does not divide 10,000: DistributedSampler would repeat an image."""
    run_dir, text = runs[processes]
    net = build_model("net", 10)
    net.load_state_dict(state_of(run_dir)["model"])
    test = evaluate(net, load_data(parse_args([str(flag) for flag in data_flags]), runtime).test, runtime)
    got = result(run_dir)
    assert (got["test_correct"], got["test_total"]) == (test.correct, 10_000)
    assert got["test_loss"] == pytest.approx(test.loss, abs=1e-6)
    assert (got["world_size"], got["local_batch_size"], got["steps"]) == (processes, RUNS[processes], STEPS)
    assert text.count("Accuracy of the network on the 10000 test images: ") == 1, "rank zero speaks"


def test_evaluate_at_seven_processes(runs, tmp_path, data_flags):
    """Seven does not divide 10,000 either."""
    flags = ["--evaluate", checkpoint_path(runs[1][0], STEPS), *data_flags]
    got = result(runs[1][0])
    line = f"({got['test_correct']:,} of 10,000 correct, loss {got['test_loss']:.4f})"
    output = train_forked(*flags, cwd=tmp_path, processes=7)
    assert output.stdout.count(line) == 1, output.stdout
    assert not (tmp_path / "runs").exists(), "evaluating is not a run"


@pytest.mark.parametrize("processes", [2, 3])
def test_resume_is_exact(runs, tmp_path, processes):
    """With three ranks or more, a sum depends on the rank at which it begins."""
    undisturbed, stopped = runs[processes][0], tmp_path / "run"
    shutil.copytree(undisturbed, stopped)
    checkpoint_path(stopped, STEPS).unlink()
    output = train("--resume", stopped, cwd=tmp_path, processes=processes)
    assert f"after step {MIDDLE} of {STEPS}" in output.stdout
    mine, theirs = state_of(stopped), state_of(undisturbed)
    assert same(mine, theirs)
    assert len(mine["running_loss"]) == processes
    assert records(stopped, "train/loss") == records(undisturbed, "train/loss")
    assert result(stopped)["test_loss"] == result(undisturbed)["test_loss"]


def buffers_of_ranks(state):
    """Return BatchNorm's statistics of rank zero, which are the model's, and of rank one."""
    _, of_rank_one = state["buffers"]
    assert of_rank_one
    return {name: state["model"][name] for name in of_rank_one}, of_rank_one


def test_statistics_of_batchnorm_are_the_ranks_mean_and_resume_exactly(tmp_path):
    """Each rank has its own between two tests, so a checkpoint in an epoch holds those of all."""
    calm, stopped = tmp_path / "calm", tmp_path / "stopped"
    train_small = functools.partial(torchrun, 2, cwd=tmp_path, script=["-m", "tests.helpers.small"])
    flags = ["--recipe", "speed94", "--dataset", "synthetic", "--precision", "fp32", "--tta", "none"]
    train_small(*flags, "--global-batch-size", 16, "--max-steps", 6, "--checkpoint-steps", 3, "--run-dir", calm)
    shutil.copytree(calm, stopped)
    checkpoint_path(stopped, 6).unlink()
    train_small("--resume", stopped)
    middle = load_checkpoint(checkpoint_path(calm, 3))["state"]
    mine, theirs = (load_checkpoint(checkpoint_path(run_dir, 6))["state"] for run_dir in (stopped, calm))
    of_rank_zero, of_rank_one = buffers_of_ranks(middle)
    assert not same(of_rank_zero, of_rank_one), "the ranks have seen the same images"
    of_rank_zero, of_rank_one = buffers_of_ranks(theirs)
    assert same(of_rank_zero, of_rank_one), "they are not averaged"
    assert same(mine, theirs)


@pytest.fixture(scope="module")
def powersgd_runs(tmp_path_factory):
    """Return the directory of a run of 32 steps by its number of ranks; PowerSGD compresses after 20."""
    runs = {processes: tmp_path_factory.mktemp("powersgd") / "run" for processes in (2, 3)}
    flags = ["--dataset", "synthetic", "--global-batch-size", 15, "--local-batch-size", 8, "--comm-hook", "powersgd",
             "--max-steps", 32, "--checkpoint-steps", 8, "--keep-checkpoints", 9]  # fmt: skip
    for processes, run_dir in runs.items():
        train_forked(*flags, "--run-dir", run_dir, cwd=run_dir.parent, processes=processes, small=True)
    return runs


def resume_powersgd(run_dir, step, processes, *flags):
    """Continue a run after `step`; return its last state and the banner's line of changes."""
    for later in range(step + 8, 33, 8):
        checkpoint_path(run_dir, later).unlink()
    output = train_forked("--resume", run_dir, *flags, cwd=run_dir.parent, processes=processes, small=True)
    return load_checkpoint(checkpoint_path(run_dir, 32))["state"], re.findall("^changed +(.*)$", output.stdout, re.M)


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("step", [8, 24])
def test_powersgd_resumes_exactly(powersgd_runs, tmp_path, processes, step):
    """From the first steps, whose gradients are sent whole, and from later ones, when each rank keeps an error."""
    calm = powersgd_runs[processes]
    mine, changed = resume_powersgd(shutil.copytree(calm, tmp_path / "run"), step, processes)
    theirs = load_checkpoint(checkpoint_path(calm, 32))["state"]
    errors = {memory["error_dict"][0].norm().item() for memory in theirs["hook"]}
    assert len(errors - {0.0}) == processes
    assert same(mine, theirs)
    assert changed == []


@pytest.mark.parametrize(
    ("processes", "flags", "words"),
    [(3, (), "world size 2 -> 3, "), (2, ("--local-batch-size", 4), "--local-batch-size 8 -> 4, "), (2, (), "")],
    ids=["other ranks", "other memory format", "file of an earlier version"],
)
def test_powersgd_begins_again(powersgd_runs, tmp_path, processes, flags, words):
    """With whole gradients, as in a new run."""
    run_dir = shutil.copytree(powersgd_runs[2], tmp_path / "run")
    if not words:
        saved = load_checkpoint(checkpoint_path(run_dir, 24))
        del saved["state"]["hook"]
        save_checkpoint(checkpoint_path(run_dir, 24), saved)
    state, changed = resume_powersgd(run_dir, 24, processes, *flags)
    assert changed == [f"{words}PowerSGD begins again"]
    assert [(memory["iter"], memory["error_dict"]) for memory in state["hook"]] == [(1 + 8, {})] * processes


@pytest.mark.parametrize("flags", [[], ["--precision", "bf16", "--local-batch-size", 12]], ids=["fp32", "bf16"])
def test_processes_that_come_and_go_keep_the_global_batch(tmp_path, data_flags, flags):
    """Four, three, four: as one process that is never stopped."""
    common = ["--recipe", "net-fast", "--log-steps", 1, *data_flags, *flags]
    calm, resumed = tmp_path / "calm", tmp_path / "resumed"
    train_forked(*common, "--max-steps", 30, "--run-dir", calm, cwd=tmp_path, processes=1)
    start = [*common, "--run-dir", resumed]
    for steps, processes in ((10, 4), (20, 3), (30, 4)):
        output = train_forked(*start, "--max-steps", steps, cwd=tmp_path, processes=processes)
        assert re.search(r"\b64 global\b.*; 781 steps an epoch", output.stdout)
        start = ["--resume", resumed]
    tolerance = 2e-2 if flags else 5e-4
    assert dict(records(resumed, "train/loss")) == pytest.approx(dict(records(calm, "train/loss")), abs=tolerance)


def test_accelerate_launch_trains_the_same(runs, tmp_path, data_flags):
    launcher = ["accelerate.commands.launch", "--config_file", ROOT / "launch" / "accelerate.yaml",
                "--num_processes", 2, "--main_process_port", 0]  # fmt: skip
    flags = [*FLAGS, "--local-batch-size", RUNS[2], "--max-steps", 10, "--run-dir", tmp_path / "run",
             "--device", "cpu", "--wandb", "disabled", *data_flags]  # fmt: skip
    output = run([sys.executable, "-m", *launcher, ROOT / "train_ddp.py", *flags], tmp_path)
    assert "2 processes on CPU (gloo)" in output.stdout
    assert records(tmp_path / "run", "train/loss") == records(runs[2][0], "train/loss")[:10]
