"""The command line: flags to a configuration; mistakes to one message on rank zero and exit status 2."""

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
from cifar.checkpoint import save_checkpoint
from cifar.cli import launch, parse_args
from cifar.command import exit_on_error
from cifar.config import TrainConfig, differences
from cifar.datasets import DATASETS
from cifar.distributed.environment import Launch
from cifar.distributed.runtime import Runtime
from cifar.errors import LocalError, StoppedError, TrainingDivergedError, UsageError, UserError
from cifar.models import MODELS, build_model
from cifar.recipes import RECIPES
from tests.helpers.checkpoints import save_weights, small
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


def test_default_is_the_tutorial():
    config = parse_args([])
    assert (config.recipe, config.model, config.epochs) == ("tutorial", "net", 4)
    assert (config.local_batch_size, config.lr, config.momentum, config.log_steps) == (4, 0.001, 0.9, 2000)
    assert (config.schedule, config.augment, config.weight_decay) == ("constant", "none", 0.0)


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


def test_what_is_no_checkpoint_is_not_evaluated(tmp_path):
    with pytest.raises(UserError, match=r"^--evaluate .*: there is no such file$"):
        parse_args(["--evaluate", str(tmp_path)])
    (tmp_path / "x.pt").write_text("no checkpoint")
    with pytest.raises(UserError, match="not a checkpoint"):
        parse_args(["--evaluate", str(tmp_path / "x.pt")])


def test_tilde_is_the_home_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CIFAR_DATA_DIR", "~/data")
    save_weights(tmp_path / "x.pt", build_model("net", 10))
    config = parse_args(["--run-dir=~/run", "--evaluate", "~/x.pt"])
    found = [path.relative_to(tmp_path).name for path in (config.run_dir, config.evaluate, config.data_dir)]
    assert found == ["run", "x.pt", "data"]
    assert parse_args(["--run-dir", "~nobody-of-this-name/run"]).run_dir == Path("~nobody-of-this-name/run")


@pytest.mark.parametrize(
    ("flags", "named"),
    [
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
        "--seed -1", "--timeout 1", "--cutout 33",
    ],
)  # fmt: skip
def test_value_out_of_range_is_named_in_one_line(flags):
    with pytest.raises(UserError) as mistake:
        parse_args(flags.split())
    assert re.fullmatch(rf"{flags.replace(' ', ' is ')}(.0)?: it must be [^\n]+", str(mistake.value))


def test_flags_that_do_not_go_together():
    with pytest.raises(UserError, match=r"--nesterov.*--momentum"):
        parse_args(["--nesterov", "--momentum", "0"])
    with pytest.raises(UserError, match=r"--comm-hook powersgd.*--precision bf16"):
        parse_args(["--comm-hook", "powersgd", "--precision", "fp16"])


def test_help_lists_each_flag_with_one_default_and_the_registries(capsys):
    with pytest.raises(SystemExit) as exit_:
        parse_args(["--help"])
    assert exit_.value.code == 0
    help_text = capsys.readouterr().out
    options = dict(re.findall(r"^[│ ]*(--[a-z][\w-]*)(.*?)(?=^[│ ]*--[a-z]|\Z)", help_text, re.M | re.S))
    fields = {field.name.replace("_", "-") for field in dataclasses.fields(TrainConfig)} - {"lr-batch-size"}
    assert set(options) == {f"--{name}" for name in fields}
    for name, text in options.items():
        assert text.count("(default: ") == 1, f"{name} {text}"
    for flag, names in {"recipe": RECIPES, "model": MODELS, "dataset": ("auto", *DATASETS)}.items():
        assert f"--{flag} {{{','.join(names)}}}" in help_text


def test_leftover_rank_silences_nothing(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit):
        parse_args(["--help"])
    assert "--recipe" in capsys.readouterr().out
    with pytest.raises(SystemExit), exit_on_error("prog"):
        Launch.from_environment()
    assert capsys.readouterr().err.startswith("prog: error: torchrun's variables are incomplete ")


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


def test_resume_reads_the_data_where_they_are_now(recorded, tmp_path, monkeypatch):
    monkeypatch.setenv("CIFAR_DATA_DIR", "moved")
    assert parse_args(["--resume", str(tmp_path)]).data_dir == Path("moved").absolute()
    assert parse_args(["--resume", str(tmp_path), "--data-dir", "flag"]).data_dir == Path("flag").absolute()
    record(tmp_path, dataclasses.replace(recorded, dataset="folder", data_dir=Path("/pets")))
    assert parse_args(["--resume", str(tmp_path)]).data_dir == Path("/pets"), "the variable is for CIFAR-10"
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    assert parse_args(["--resume", f"~/{tmp_path.name}"]).resume == tmp_path


@pytest.mark.parametrize(
    ("flags", "recorded_value"),
    [("--lr 0.5", "0.3"), ("--seed 3", "7"), ("--recipe tutorial", "wide"), ("--global-batch-size 64", "8"),
     ("--run-dir other", "")],
)  # fmt: skip
@pytest.mark.usefixtures("recorded")
def test_resume_refuses_conflicting_flags(tmp_path, flags, recorded_value):
    with pytest.raises(UserError, match=f"^{flags} conflicts with {recorded_value}.*without --resume$"):
        parse_args(["--resume", str(tmp_path), *flags.split()])


@pytest.mark.parametrize("content", [None, "not json", "[]", '{"config": {"unknown": 1}}'])
def test_resume_without_a_run(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"^--resume [^\n]*$"):
        parse_args(["--resume", str(tmp_path)])


# exit_on_error


@pytest.mark.parametrize(
    ("error", "status", "printed"),
    [
        (UserError("oh"), 2, "prog: error: oh\n"),
        (TrainingDivergedError("no"), 1, "prog: error: no\n"),
        (StoppedError("Stopped by SIGTERM", 143), 143, ""),  # Run has printed it
        (KeyboardInterrupt(), 130, ""),  # before training
    ],
)
def test_expected_failure_is_one_line_and_a_status(error, status, printed, capsys):
    with pytest.raises(SystemExit) as exit_, exit_on_error("prog"):
        raise error
    assert exit_.value.code == status
    assert capsys.readouterr() == ("", printed)


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("error", [UserError("oh"), UsageError("oh")])
def test_other_host_hears_of_a_mistake_before_the_ranks_have_joined(error, joined, capsys, monkeypatch, be_rank):
    be_rank(1, alone=True)
    heard = []
    monkeypatch.setattr("cifar.command.announce", lambda text: heard.append((text, capsys.readouterr().err)))
    monkeypatch.setattr("cifar.command.has_joined", lambda: joined)
    monkeypatch.setattr("torch.distributed.destroy_process_group", lambda: None)
    monkeypatch.setattr("os._exit", lambda status: None)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(SystemExit), exit_on_error("prog"):
        raise error
    own = "prog: error: oh\n" if type(error) is UserError and not joined else ""
    assert heard == [("oh", own)], "it has been printed first, by exit_on_error or tyro"


@pytest.mark.parametrize("error", [UserError("oh"), UsageError("oh")])
def test_other_ranks_wait_for_rank_zero_to_print(error, capsys, monkeypatch, be_rank):
    waits = []
    be_rank(1)
    monkeypatch.setattr("time.sleep", waits.append)
    with pytest.raises(SystemExit, match="2"), exit_on_error("prog"):
        raise error
    assert capsys.readouterr() == ("", "")
    assert waits, "torchrun ends rank zero as soon as another rank has exited"


GPU = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 3.12 GiB is"


def fail(error):
    """Raise `error` or, for None, what torch raises when the host's memory does not suffice."""
    if error is None:
        torch.empty(10**15, dtype=torch.uint8)
    raise error


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
    with pytest.raises(SystemExit) as exit_, exit_on_error("prog"), launch(["--device", "cpu"]):
        fail(error)
    assert exit_.value.code == 2
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
def statuses(monkeypatch):
    """Return the exit statuses of processes that leave at once; nothing takes time."""
    found = []

    def leave(status):
        found.append(status)
        raise SystemExit(status)

    monkeypatch.setattr("os._exit", leave)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr("signal.signal", lambda number, handler: None)
    return found


def report(error):
    """Handle `error` as `exit_on_error` does."""
    with pytest.raises((SystemExit, RuntimeError)), exit_on_error("prog"):
        raise error


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError(GLOO), "Connection closed by peer"),
        (RuntimeError("[gloo/pair.cc:78] Timed out waiting 5000ms for"), "Timed out waiting 5000ms"),
        (dist.DistNetworkError(STORE), "Connection was likely closed"),
        (dist.DistStoreError("wait timeout after 5000ms, keys: /x"), "wait timeout after"),
        (dist.DistBackendError(REMOTE), r"socketProgress: Connection closed by remote peer b<4711>"),
        (dist.DistBackendError("Watchdog caught collective operation timeout:"), "collective operation timeout"),
    ],
)  # fmt: skip
def test_lost_peer_is_one_line_of_rank_zero(error, reason, capsys, monkeypatch, be_rank, statuses):
    be_rank(0)
    report(error)
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(rf"prog: error: another process .*\({reason}\); the launcher's report names it", line)
    monkeypatch.setattr("cifar.command.claim_report", lambda: False)  # it has said why
    report(error)
    be_rank(1)
    monkeypatch.setattr("cifar.command.claim_report", lambda: True)
    report(error)
    assert capsys.readouterr().err == ""
    assert statuses == [1, 1, 1]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (LocalError("oh"), "oh"),
        (dist.DistBackendError(SYSTEM), r"NCCL error in: .*No space left on device \(28\)"),
        (dist.DistNetworkError(PORT), re.escape(PORT)),
        (RuntimeError(INTERFACE), r"\[enforce fail at .*: eth9 \(GLOO_SOCKET_IFNAME=eth9 in the environment: .*\)"),
    ],
    ids=["memory", "NCCL", "store", "gloo"],
)
@pytest.mark.parametrize("first", [True, False])
def test_what_others_may_not_know_is_reported_by_the_first_rank_that_has_it(
    error, expected, first, capsys, monkeypatch, be_rank, statuses
):
    be_rank(1)
    waits = []
    monkeypatch.setattr("time.sleep", waits.append)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth9")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth0")
    monkeypatch.setattr("cifar.command.claim_report", lambda: first)
    with pytest.raises(SystemExit, match="2" if isinstance(error, LocalError) else "1"), exit_on_error("prog"):
        raise error
    place = rf" \[rank 1 on host {socket.gethostname()}\]"
    assert re.fullmatch(f"prog: error: {expected}{place}\n" if first else "", capsys.readouterr().err)
    assert bool(waits) != first, "torchrun ends the other rank as soon as this one has exited"


@pytest.mark.parametrize(
    ("error", "rank"),
    [
        (ZeroDivisionError("oh"), 0),
        (RuntimeError("CUDA error: device-side assert triggered"), 0),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"), 0),
        (RuntimeError(GLOO), None),  # without other ranks
    ],
)
def test_program_errors_keep_their_traceback(error, rank, be_rank, statuses):
    if rank is not None:
        be_rank(rank)
    with pytest.raises(type(error), match=re.escape(str(error))), exit_on_error("prog"):
        raise error
    assert statuses == []


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


def test_rank_that_torchrun_ends_says_at_once_why(capfd):
    """Rank one is killed, and torchrun sends SIGTERM to the other one, which had lost its peer."""

    def start():
        runtime = Runtime(TrainConfig(device="cpu"))
        if runtime.rank == 1:
            os._exit(0)
        began, exit_ = time.monotonic(), os._exit
        os._exit = lambda status: exit_(status - 1 + (time.monotonic() - began > 4))
        threading.Timer(1, os.kill, [os.getpid(), signal.SIGTERM]).start()
        with exit_on_error("prog"):
            runtime.gather(None)

    fork_ranks(2, start)
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "error:" in line]
    assert line.startswith("prog: error: another process of this run is gone or does not answer (Connection ")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (UserError("oh"), r"cifar\.errors\.UserError: oh\n"),
        (UsageError("oh"), r"cifar\.errors\.UsageError: oh\n"),
        (LocalError("oh"), r"cifar\.errors\.LocalError: oh\n"),
        (TrainingDivergedError("oh"), r"cifar\.errors\.TrainingDivergedError: oh\n"),
        (ZeroDivisionError("oh"), r"OSError: cause\n.*Traceback .*test_cli.py.*\nZeroDivisionError: oh\n"),
        (dist.DistBackendError("NCCL oh"), r"OSError: cause\n.*Traceback .*DistBackendError: NCCL oh\n"),
        (RuntimeError(GLOO), None),  # the cause is elsewhere
        (StoppedError("oh", 0), None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_torchruns_report_carries_the_reason(error, expected, monkeypatch, tmp_path, be_rank, statuses):
    be_rank(0)
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    with pytest.raises((SystemExit, Exception)), exit_on_error("prog"):
        raise error from OSError("cause")
    assert file.exists() == (expected is not None)
    if expected is not None:
        assert re.fullmatch(expected, json.loads(file.read_text())["message"]["extraInfo"]["py_callstack"], re.DOTALL)
