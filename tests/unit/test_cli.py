"""The command line: flags to a configuration; mistakes to one message on rank zero and exit status 2."""

import contextlib
import dataclasses
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from cifar import command
from cifar.checkpoint import checkpoint_path, save_checkpoint
from cifar.cli import launch, parse_args
from cifar.command import exit_on_error
from cifar.config import TrainConfig, differences
from cifar.datasets import DATASETS
from cifar.distributed.environment import Launch
from cifar.distributed.preemption import StopRequest
from cifar.distributed.runtime import Runtime
from cifar.errors import LocalError, StoppedError, TrainingDivergedError, UsageError, UserError
from cifar.models import MODELS
from cifar.recipes import RECIPES
from tests.helpers.checkpoints import small
from tests.helpers.forking import fork_ranks
from tests.helpers.processes import rank_variables


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")  # on which no word of a message is broken
    for name in rank_variables(0, 1):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def be_rank(monkeypatch):
    """Take the place of a rank among two, on one host or on one each."""

    def set_variables(rank, alone=False):
        for name, value in rank_variables(rank, 2, alone=alone).items():
            monkeypatch.setenv(name, value)

    return set_variables


def test_flags_win_over_the_recipe():
    config = parse_args(["--epochs", "3", "--recipe", "wide", "--lr=0.1"])
    wide = RECIPES["wide"]
    assert (config.epochs, config.lr) == (3, 0.1)
    assert (config.model, config.augment, config.local_batch_size) == (wide.model, wide.augment, wide.local_batch_size)


def test_data_dir_is_absolute_and_its_flag_wins_over_the_variable(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("elsewhere")
    monkeypatch.setenv("CIFAR_DATA_DIR", "somewhere")
    assert parse_args([]).data_dir == tmp_path / "somewhere"
    assert parse_args(["--data-dir", "link"]).data_dir == tmp_path / "link"
    monkeypatch.delenv("CIFAR_DATA_DIR")
    assert parse_args([]).data_dir == tmp_path / "data"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parse_args(["--run-dir=~/run"]).run_dir == tmp_path / "run"
    assert parse_args(["--run-dir", "~nobody-of-this-name/run"]).run_dir == Path("~nobody-of-this-name/run")


def test_accelerates_configuration_counts(monkeypatch, tmp_path):
    def parsed(*flags):
        config = parse_args(flags)
        return config.precision, config.device

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "False")
    assert parsed() == ("fp32", "auto")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert parsed() == ("bf16", "cpu")
    assert parsed("--precision", "fp32", "--device", "cuda") == ("fp32", "cuda")
    record(tmp_path, TrainConfig(run_dir=tmp_path, global_batch_size=8, device="cuda"))
    assert parsed("--resume", str(tmp_path)) == ("fp32", "cpu"), "the precision defines a run, its device does not"


def record(run_dir, config):
    """Write a configuration as a run does."""
    (run_dir / "config.json").write_text(json.dumps({"config": config.to_json()}))


def test_a_checkpoint_is_evaluated_as_what_it_is(monkeypatch, tmp_path):
    """Its run's values are the defaults; CIFAR_DATA_DIR does not replace the folder that its run has recorded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CIFAR_DATA_DIR", "cifar")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    (tmp_path / "pets").mkdir()
    path = tmp_path / "x.pt"
    own = {"model": "net-wide", "precision": "bf16", "tta": "flip", "data_dir": str(tmp_path / "pets")}

    def parsed(*flags, dataset="folder", **changed):
        save_checkpoint(path, small() | {"config": own | changed, "dataset": dataset})
        config = parse_args(["--evaluate", str(path), *flags])
        data_dir = str(config.data_dir.relative_to(tmp_path))
        return config.model, config.dataset, data_dir, config.precision, config.tta

    assert parsed() == ("net-wide", "folder", "pets", "bf16", "flip")
    given = ("--data-dir", "elsewhere", "--model", "net", "--precision", "fp32", "--tta", "none")
    assert parsed(*given) == ("net", "folder", "elsewhere", "fp32", "none")
    assert parsed("--dataset", "cifar10", "--data-dir", "data")[:3] == ("net-wide", "cifar10", "data")
    assert parsed(dataset="cifar100")[:3] == ("net-wide", "cifar100", "cifar")
    monkeypatch.delenv("CIFAR_DATA_DIR")
    assert parsed(dataset="cifar100")[2] == "pets"
    (tmp_path / "pets").rmdir()
    assert parsed(dataset="cifar100")[2] == "data", "of another machine"
    unknown = parsed(dataset="made-up", precision="fp4", tta="all")  # values that this version does not have
    assert unknown == ("net-wide", "auto", "data", "fp32", "none")
    path.write_text("no checkpoint")
    with pytest.raises(UserError, match="not a checkpoint"):
        parse_args(["--evaluate", str(path)])
    with pytest.raises(UserError, match=r"^--evaluate .*: there is no such file$"):
        parse_args(["--evaluate", str(tmp_path)])


def test_a_run_is_evaluated_by_its_best_checkpoint(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    for step in (100, 200):
        content = small() | {"config": {"model": "net"}, "state": {"best_step": 100}}
        save_checkpoint(checkpoint_path(tmp_path, step), content)
    assert parse_args(["--evaluate", str(tmp_path)]).evaluate == checkpoint_path(tmp_path, 100)
    checkpoint_path(tmp_path, 100).unlink()
    assert parse_args(["--evaluate", str(tmp_path)]).evaluate == checkpoint_path(tmp_path, 200)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--nesterov", True), ("--no-nesterov", False), ("--nesterov=True", True), ("--nesterov=false", False),
        ("--nesterov True", True), ("--nesterov 0", False), ("--nesterov=False --nesterov=1", True),
    ],
)  # fmt: skip
def test_yes_or_no_with_or_without_a_value(flags, expected):
    config = parse_args([*flags.split(), "--cuda_graph=False", "--epochs", "1", "--profile", "--cuda_graph", "1"])
    assert (config.nesterov, config.cuda_graph, config.profile, config.epochs) == (expected, True, True, 1)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--nesterov=perhaps", ["perhaps"]),
        ("--eppochs 3", ["--eppochs", "--epochs"]),
        ("--recipe fast", ["fast", *RECIPES]),
        ("--recipe", ["--recipe"]),
        ("--model vgg", ["vgg", *MODELS]),
        ("--dataset mnist", ["mnist", "auto", *DATASETS]),
        ("--device tpu", ["tpu", "--device", "auto", "cpu", "cuda", "mps"]),
        ("--epochs many", ["--epochs", "many"]),
        ("stray", ["stray"]),
        ("--lr-batch-size 8", ["--lr-batch-size"]),  # a field that is not a flag
    ],
)
def test_unknown_flags_and_values(flags, named, capsys, be_rank):
    with pytest.raises(UsageError) as complaint:
        parse_args(flags.split())
    assert named[0] in str(complaint.value)
    assert "\n" not in str(complaint.value)
    out, err = capsys.readouterr()
    assert all(word in out + err for word in named)
    be_rank(1)
    with pytest.raises(UsageError, match=f".*{re.escape(named[0])}"):  # for torchrun's report
        parse_args(flags.split())
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "flags",
    [
        "--epochs 0", "--local-batch-size -4", "--global-batch-size 0", "--max-steps 0", "--checkpoint-steps 0",
        "--log-steps 0", "--lr 0", "--lr nan", "--lr inf", "--momentum 1", "--warmup-epochs 5", "--weight-decay -1",
        "--seed -1", "--timeout 1", "--cutout 257", "--image-size 31",
    ],
)  # fmt: skip
def test_value_out_of_range_is_named_in_one_line(flags):
    with pytest.raises(UserError) as mistake:
        parse_args(flags.split())
    assert re.fullmatch(rf"{flags.replace(' ', ' is ')}(.0)?: it must be [^\n]+", str(mistake.value))


@pytest.mark.parametrize(
    ("flags", "message"),
    [("--nesterov --momentum 0", r"--nesterov.*--momentum"),
     ("--cuda-graph --precision fp16", "--cuda-graph needs --precision fp32 or bf16"),
     ("--comm-hook powersgd --precision fp16", r"--comm-hook powersgd.*--precision bf16"),
     ("--autoresume", "--autoresume needs --run-dir"),
     ("--image-size 32", "--image-size needs --dataset folder")],
)  # fmt: skip
def test_flags_that_do_not_go_together(flags, message):
    with pytest.raises(UserError, match=message):
        parse_args(flags.split())


def test_help_lists_each_flag_with_one_default_and_the_registries(capsys):
    with pytest.raises(SystemExit, match=r"^0$"):
        parse_args(["--help"])
    help_text = capsys.readouterr().out
    options = dict(re.findall(r"^[│ ]*(--[a-z][\w-]*)(.*?)(?=^[│ ]*--[a-z]|\Z)", help_text, re.M | re.S))
    fields = {field.name.replace("_", "-") for field in dataclasses.fields(TrainConfig)} - {"lr-batch-size"}
    assert set(options) == {f"--{name}" for name in fields}
    for name, text in options.items():
        assert text.count("(default: ") == 1, f"{name} {text}"
    for flag, names in {"recipe": RECIPES, "model": MODELS, "dataset": ("auto", *DATASETS)}.items():
        assert f"--{flag} {{{','.join(names)}}}" in help_text


def test_credentials_in_a_url_are_not_recorded(tmp_path, monkeypatch):
    """Nor does W&B see them on the command line; the download has them, and a resumed run is the same with them."""
    url = "https://me:pass%40word@host:8/a.tar.gz?signature=pass"
    monkeypatch.setattr("sys.argv", ["train_ddp.py", "--recipe", "wide", "--run-dir", "runs/a", f"--data-url={url}"])
    config = parse_args()
    assert config.data_url == url
    assert config.to_json()["data_url"] == "https://host:8/a.tar.gz"
    assert "pass" not in str(sys.argv)
    written = TrainConfig.from_json(json.loads(json.dumps(config.to_json())))
    assert differences(config, written) == []
    assert dataclasses.replace(written, data_url=url) == config


@pytest.fixture
def recorded(tmp_path):
    """Return the configuration that a run has recorded."""
    flags = ["--recipe", "wide", "--lr", "0.3", "--seed", "7"]
    config = dataclasses.replace(parse_args(flags), run_dir=tmp_path, global_batch_size=8)
    record(tmp_path, config)
    return config


def test_resume_takes_the_recorded_configuration(recorded, tmp_path):
    assert parse_args(["--resume", str(tmp_path)]) == dataclasses.replace(recorded, resume=tmp_path)
    config = parse_args(["--resume", str(tmp_path), "--epochs", "12", "--wandb", "disabled", "--device", "cpu"])
    assert (config.epochs, config.wandb, config.device, config.lr) == (12, "disabled", "cpu", 0.3)


def test_the_command_that_began_a_run_continues_it_with_autoresume(tmp_path, monkeypatch):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    monkeypatch.chdir(tmp_path)
    command = ["--run-dir", "run", "--autoresume", "--recipe", "wide", "--lr", "0.3", "--precision", "auto"]
    begun = parse_args(command)
    assert (begun.resume, begun.run_dir) == (None, Path("run"))
    # A run resolves its precision and batch, and may be mounted at another place.
    recorded = dataclasses.replace(begun, run_dir=Path("/mnt/run"), precision="bf16", global_batch_size=8)
    record(run_dir, dataclasses.replace(recorded, autoresume=False))
    assert parse_args([*command, "--epochs", "12"]) == dataclasses.replace(recorded, resume=Path("run"), epochs=12)
    for changed in ("--lr 0.5", "--precision fp32"):
        with pytest.raises(UserError, match=f"^{changed} conflicts with .* of the run in run: "):
            parse_args([*command, *changed.split()])


def test_resume_reads_the_data_where_they_are_now(recorded, tmp_path, monkeypatch):
    monkeypatch.setenv("CIFAR_DATA_DIR", "moved")
    assert parse_args(["--resume", str(tmp_path)]).data_dir == Path("moved").absolute()
    assert parse_args(["--resume", str(tmp_path), "--data-dir", "flag"]).data_dir == Path("flag").absolute()
    record(tmp_path, dataclasses.replace(recorded, dataset="folder", data_dir=Path("/pets")))
    assert parse_args(["--resume", str(tmp_path)]).data_dir == Path("/pets"), "the variable is for CIFAR-10"


@pytest.mark.parametrize(
    ("flags", "recorded_value"),
    [("--lr 0.5", "0.3"), ("--seed 3", "7"), ("--recipe tutorial", "wide"), ("--global-batch-size 64", "8"),
     ("--run-dir other", "")],
)  # fmt: skip
@pytest.mark.usefixtures("recorded")
def test_resume_refuses_conflicting_flags(tmp_path, flags, recorded_value):
    with pytest.raises(UserError, match=f"^{flags} conflicts with {recorded_value}.*or start a new run$"):
        parse_args(["--resume", str(tmp_path), *flags.split()])


@pytest.mark.parametrize("content", [None, "not json", "[]", '{"config": {"unknown": 1}}'])
def test_resume_without_a_run(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"^--resume [^\n]*$"):
        parse_args(["--resume", str(tmp_path)])


# exit_on_error


GPU = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 3.12 GiB is"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError(GPU), "the GPU is out of memory (20.00 GiB wanted)"),
        (torch.AcceleratorError("CUDA error: out of memory\nCompile with"), "the GPU is out of memory"),
        (RuntimeError("NCCL error in: X.cpp:7\nCuda failure 2 'out of memory'"), "the GPU is out of memory"),
        (RuntimeError("MPS backend out of memory (MPS allocated: 8 GB)"), "the GPU is out of memory"),
        (None, "this host is out of memory (1000000000000000 bytes wanted)"),
    ],
    ids=["allocator", "context", "NCCL", "MPS", "CPU"],
)
def test_out_of_memory_is_one_line(error, expected, capsys):
    with pytest.raises(SystemExit, match="2"), exit_on_error("prog"), launch(["--device", "cpu"]):
        raise error or torch.empty(10**15, dtype=torch.uint8)  # what torch raises here on the CPU
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"prog: error: {expected} outside of a training step, ")


GLOO = "[../gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:39657. This is typically caused by"
STORE = "failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown or crash?"
SYSTEM = (
    "NCCL error in: /pytorch/ProcessGroupNCCL.cpp:3699, unhandled system error, NCCL version 2.30.7\nLast error:\n"
    "Error while creating shared memory segment, error: No space left on device (28)\nException raised from check"
)
REMOTE = (
    "NCCL error in: NCCLUtils.hpp:77, remote process exited or there was a network error, NCCL version 2.30.7\n"
    "Last error:\nsocketProgress: Connection closed by remote peer b<4711>"
)
INTERFACE = "[enforce fail at third_party/gloo/gloo/transport/tcp/device.cc:84] ifa != nullptr. Unable to find: eth9"
PORT = "The server socket has failed to listen. port: 29500, message: address already in use"


@pytest.fixture
def fail(monkeypatch, capsys, tmp_path, be_rank):
    """Return a function that ends a rank with an error, in `exit_on_error`.

    It returns the exit status (None: the error is raised), what is printed, torchrun's report, and whether it waits.
    """
    waits, report = [], tmp_path / "error.json"
    monkeypatch.setattr("os._exit", sys.exit)
    monkeypatch.setattr("time.sleep", waits.append)
    monkeypatch.setattr("signal.signal", lambda number, handler: None)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(report))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth9")

    def end(error, rank, first=True, alone=False):
        if rank is not None:
            be_rank(rank, alone)
        monkeypatch.setattr("cifar.command.claim_report", lambda: first)
        status = None
        try:
            with exit_on_error("prog"):
                raise error from OSError("cause")
        except SystemExit as exit_:
            status = exit_.code
        except type(error):
            pass
        reason = json.loads(report.read_text())["message"]["extraInfo"]["py_callstack"] if report.exists() else ""
        return status, capsys.readouterr().err, reason, bool(waits)

    return end


LOST = r"another process .*\({}\); the launcher's report names it"
PLACE = rf" \[rank 0 on host {socket.gethostname()}\]"
TRACEBACK = r"OSError: cause\n.*Traceback .*test_cli.py.*\n.*Error: .*"


@pytest.mark.parametrize(
    ("error", "status", "line", "report"),
    [
        (UserError("oh"), 2, "oh", r"cifar\.errors\.UserError: oh\n"),
        (TrainingDivergedError("oh"), 1, "oh", r"cifar\.errors\.TrainingDivergedError: oh\n"),
        (StoppedError("Stopped by SIGTERM", 143), 143, None, ""),  # Run has printed it
        (KeyboardInterrupt(), 130, None, ""),  # before training
        # The cause is elsewhere.
        (RuntimeError(GLOO), 1, LOST.format("Connection closed by peer"), ""),
        (RuntimeError("[gloo/pair.cc:78] Timed out waiting 5ms for"), 1, LOST.format("Timed out waiting 5ms"), ""),
        (dist.DistNetworkError(STORE), 1, LOST.format("Connection was likely closed"), ""),
        (dist.DistStoreError("wait timeout after 5000ms, keys: /x"), 1, LOST.format("wait timeout after"), ""),
        (dist.DistBackendError(REMOTE), 1, LOST.format("socketProgress: Connection closed by .* b<4711>"), ""),
        (dist.DistBackendError("Watchdog caught collective operation timeout:"), 1,
         LOST.format("collective operation timeout"), ""),
        # Others may not know.
        (LocalError("oh"), 2, f"oh{PLACE}", r"cifar\.errors\.LocalError: oh\n"),
        (dist.DistBackendError(SYSTEM), 1, rf"NCCL error in: .*No space left on device \(28\){PLACE}", TRACEBACK),
        (dist.DistNetworkError(PORT), 1, re.escape(PORT) + PLACE, TRACEBACK),
        (RuntimeError(INTERFACE), 1, rf".* eth9 \(GLOO_SOCKET_IFNAME=eth9 in the environment: .*\){PLACE}", TRACEBACK),
        # Mistakes of the program.
        (ZeroDivisionError("oh"), None, None, TRACEBACK),
        (RuntimeError("CUDA error: device-side assert triggered"), None, None, TRACEBACK),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"), None, None, TRACEBACK),
    ],
    ids=str,
)  # fmt: skip
def test_failure_is_one_line_and_a_status_or_keeps_its_traceback(error, status, line, report, fail):
    seen_status, printed, reported, _ = fail(error, rank=0)
    assert seen_status == status
    assert re.fullmatch(f"prog: error: {line}\n" if line else "", printed)
    assert re.fullmatch(report, reported, re.DOTALL)


@pytest.mark.parametrize(
    ("error", "rank", "first", "speaks"),
    [
        (UserError("oh"), 1, True, False),
        (UsageError("oh"), 1, True, False),
        (RuntimeError(GLOO), 1, True, False),
        (RuntimeError(GLOO), 0, False, False),
        (LocalError("oh"), 1, True, True),
        (LocalError("oh"), 1, False, False),
        (dist.DistBackendError(SYSTEM), 1, True, True),
        (dist.DistBackendError(SYSTEM), 1, False, False),
    ],
)
def test_rank_zero_speaks_or_the_first_that_has_the_cause(error, rank, first, speaks, fail):
    _, printed, _, waits = fail(error, rank, first)
    assert bool(printed) == speaks
    assert waits != speaks, "torchrun ends the other rank as soon as this one has exited"


def test_network_error_of_a_single_process_is_its_own(fail):
    assert fail(RuntimeError(GLOO), rank=None)[:2] == (None, "")


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("error", [UserError("oh"), UsageError("oh")])
def test_other_host_hears_of_a_mistake_before_the_ranks_have_joined(error, joined, fail, capsys, monkeypatch):
    heard = []
    monkeypatch.setattr("cifar.command.announce", lambda text: heard.append((text, capsys.readouterr().err)))
    monkeypatch.setattr("cifar.command.has_joined", lambda: joined)
    fail(error, rank=1, alone=True)
    own = "prog: error: oh\n" if type(error) is UserError and not joined else ""
    assert heard == [("oh", own)], "it has been printed first, by exit_on_error or tyro"


def test_rank_with_the_cause_speaks_before_those_that_lost_it(capfd):
    """Rank two fails; gloo tells rank zero at once that it is gone, and torchrun ends the others only later."""

    def start():
        exit_ = os._exit
        os._exit = lambda status: exit_(status - 1)
        command._REPORT_FIRST_SECONDS = 3
        with exit_on_error("prog"):
            runtime = Runtime(TrainConfig(device="cpu"))
            if runtime.rank == 2:
                dist.destroy_process_group(runtime._host_group)  # a library closes its sockets, then tells Python
                time.sleep(1)
                raise dist.DistBackendError(SYSTEM)
            runtime.gather(None)

    fork_ranks(3, start)
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "error:" in line]
    assert "No space left on device (28) [rank 2 on host " in line


@pytest.mark.parametrize("in_step", [False, True])
def test_rank_that_torchrun_ends_says_at_once_why(capfd, in_step):
    """Rank one is killed; torchrun sends SIGTERM to the other one, before or after it learns of that."""

    def start():
        runtime = Runtime(TrainConfig(device="cpu"))
        if runtime.rank == 1:
            time.sleep(2 if in_step else 0)
            os._exit(0)
        began, exit_ = time.monotonic(), os._exit
        os._exit = lambda status: exit_(status - 1 + (time.monotonic() - began > 4))
        threading.Timer(1, os.kill, [os.getpid(), signal.SIGTERM]).start()
        with exit_on_error("prog"), StopRequest(Launch()) if in_step else contextlib.nullcontext():
            runtime.gather(None)

    fork_ranks(2, start)
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "error:" in line]
    assert line.startswith("prog: error: another process of this run is gone or does not answer (Connection ")
