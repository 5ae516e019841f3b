"""The command line: flags to a configuration; mistakes to one message on rank zero and exit status 2."""

import dataclasses
import json
import re
import socket
from pathlib import Path

import pytest
import torch

from cifar.checkpoint import save_checkpoint
from cifar.cli import exit_on_error, launch, parse_args
from cifar.config import Recipe, TrainConfig
from cifar.datasets import DATASETS
from cifar.distributed.environment import Launch
from cifar.errors import LocalError, StoppedError, TrainingDivergedError, UserError
from cifar.models import MODELS, build_model
from cifar.recipes import RECIPES
from tests.helpers.checkpoints import save_weights, small
from tests.helpers.processes import rank_variables


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")  # on which no word of a message is broken
    for name in rank_variables(0, 1):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def be_rank(monkeypatch):
    """Take the place of a rank among two."""

    def set_variables(rank):
        for name, value in rank_variables(rank, 2).items():
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


def test_data_dir_flag_wins_over_the_variable(monkeypatch):
    monkeypatch.setenv("CIFAR_DATA_DIR", "somewhere")
    assert str(parse_args([]).data_dir) == "somewhere"
    assert str(parse_args(["--data-dir", "else"]).data_dir) == "else"
    monkeypatch.delenv("CIFAR_DATA_DIR")
    assert str(parse_args([]).data_dir) == "data"


def test_accelerates_configuration_counts(monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    config = parse_args([])
    assert (config.precision, config.device) == ("bf16", "cpu")
    config = parse_args(["--precision", "fp32", "--device", "cuda"])
    assert (config.precision, config.device) == ("fp32", "cuda")
    own = dataclasses.replace(config, run_dir=tmp_path, global_batch_size=8)
    (tmp_path / "config.json").write_text(json.dumps({"config": own.to_json()}))
    config = parse_args(["--resume", str(tmp_path)])
    assert (config.precision, config.device) == ("fp32", "cpu"), "the precision defines a run, its device does not"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(UserError, match="fp8"):
        parse_args([])


def test_checkpoint_to_evaluate_is_missed_at_once(tmp_path):
    with pytest.raises(UserError, match=r"^--evaluate .*: there is no such file$"):
        parse_args(["--evaluate", str(tmp_path)])


def test_a_checkpoint_is_evaluated_as_what_it_is(monkeypatch, tmp_path):
    """Its model and dataset are the defaults; CIFAR_DATA_DIR does not replace the folder that its run has recorded."""
    monkeypatch.setenv("CIFAR_DATA_DIR", "cifar")
    content = small() | {"config": {"model": "net-wide", "data_dir": "pets"}, "dataset": "folder"}
    path = tmp_path / "x.pt"
    save_checkpoint(path, content)

    def parsed(*flags: str) -> tuple[str, str, str]:
        config = parse_args(["--evaluate", str(path), *flags])
        return config.model, config.dataset, str(config.data_dir)

    assert parsed() == ("net-wide", "folder", "pets")
    assert parsed("--data-dir", "elsewhere", "--model", "net") == ("net", "folder", "elsewhere")
    assert parsed("--dataset", "cifar10", "--data-dir", "data") == ("net-wide", "cifar10", "data")
    save_checkpoint(path, content | {"dataset": "cifar100"})
    assert parsed() == ("net-wide", "cifar100", "cifar")
    save_checkpoint(path, content | {"dataset": "made-up"})  # which this version does not have
    assert parsed() == ("net-wide", "auto", "cifar")
    path.write_text("no checkpoint")
    with pytest.raises(UserError, match="not a checkpoint"):
        parsed()


def test_tilde_is_the_home_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CIFAR_DATA_DIR", "~/data")
    save_weights(tmp_path / "x.pt", build_model("net", 10))
    config = parse_args(["--run-dir=~/run", "--evaluate", "~/x.pt"])
    assert (config.run_dir, config.evaluate, config.data_dir) == (
        tmp_path / "run",
        tmp_path / "x.pt",
        tmp_path / "data",
    )
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
    with pytest.raises(SystemExit) as exit_:
        parse_args(flags.split())
    assert exit_.value.code == 2
    out, err = capsys.readouterr()
    assert all(word in out + err for word in named)
    be_rank(1)
    with pytest.raises(SystemExit):
        parse_args(flags.split())
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "flags",
    [
        "--epochs 0", "--local-batch-size -4", "--global-batch-size 0", "--max-steps 0", "--checkpoint-steps 0",
        "--log-steps 0", "--lr 0", "--lr nan", "--lr inf", "--momentum 1", "--warmup-epochs 5", "--weight-decay -1",
        "--seed -1", "--timeout 1", "--cutout 33", "--small-share 1", "--small-size 4",
    ],
)  # fmt: skip
def test_value_out_of_range_is_named_in_one_line(flags):
    with pytest.raises(UserError) as mistake:
        parse_args(flags.split())
    assert re.fullmatch(rf"{flags.replace(' ', ' is ')}(.0)?: it must be [^\n]+", str(mistake.value))


def test_nesterov_needs_momentum():
    with pytest.raises(UserError, match=r"--nesterov.*--momentum"):
        parse_args(["--nesterov", "--momentum", "0"])


@pytest.fixture
def help_text(capsys):
    with pytest.raises(SystemExit) as exit_:
        parse_args(["--help"])
    assert exit_.value.code == 0
    return capsys.readouterr().out


def test_help_lists_each_flag_with_one_default(help_text):
    options = dict(re.findall(r"^[│ ]*(--[a-z][\w-]*)(.*?)(?=^[│ ]*--[a-z]|\Z)", help_text, re.M | re.S))
    fields = {field.name.replace("_", "-") for field in dataclasses.fields(TrainConfig)} - {"lr-batch-size"}
    assert set(options) == {f"--{name}" for name in fields}
    for name, text in options.items():
        assert text.count("(default: ") == 1, f"{name} {text}"


def test_help_lists_the_registries(help_text):
    for flag, names in {"recipe": RECIPES, "model": MODELS, "dataset": ("auto", *DATASETS)}.items():
        assert f"--{flag} {{{','.join(names)}}}" in help_text


def test_leftover_rank_silences_nothing(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit):
        parse_args(["--help"])
    assert "--recipe" in capsys.readouterr().out
    with pytest.raises(SystemExit), exit_on_error("prog"):
        Launch.from_environment()
    assert capsys.readouterr().err.startswith("prog: error: the environment has RANK, but not WORLD_SIZE, ")


def test_new_registry_entries_are_choices(monkeypatch):
    monkeypatch.setitem(MODELS, "mine", MODELS["net"])
    monkeypatch.setitem(DATASETS, "ours", DATASETS["synthetic"])
    monkeypatch.setitem(RECIPES, "fast", Recipe(model="mine"))
    # One at a time: tyro accepts a default that is no choice.
    assert parse_args(["--model", "mine"]).model == "mine"
    assert parse_args(["--dataset", "ours"]).dataset == "ours"
    assert parse_args(["--recipe", "fast"]).model == "mine"


def test_json_round_trip():
    config = parse_args(["--recipe", "wide", "--run-dir", "runs/a", "--data-dir", "d"])
    assert TrainConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


@pytest.fixture
def recorded(tmp_path):
    """Return the configuration that a run has recorded."""
    flags = ["--recipe", "wide", "--lr", "0.3", "--seed", "7"]
    config = dataclasses.replace(parse_args(flags), run_dir=tmp_path, global_batch_size=8)
    (tmp_path / "config.json").write_text(json.dumps({"config": config.to_json()}))
    return config


def test_resume_takes_the_recorded_configuration(recorded, tmp_path):
    assert parse_args(["--resume", str(tmp_path)]) == dataclasses.replace(recorded, resume=tmp_path)
    config = parse_args(["--resume", str(tmp_path), "--epochs", "12", "--wandb", "disabled", "--device", "cpu"])
    assert (config.epochs, config.wandb, config.device, config.lr) == (12, "disabled", "cpu", 0.3)


def test_resume_reads_the_data_where_they_are_now(recorded, tmp_path, monkeypatch):
    monkeypatch.setenv("CIFAR_DATA_DIR", "moved")
    assert parse_args(["--resume", str(tmp_path)]).data_dir == Path("moved")
    assert parse_args(["--resume", str(tmp_path), "--data-dir", "flag"]).data_dir == Path("flag")
    config = dataclasses.replace(recorded, dataset="folder", data_dir=Path("pets"))
    (tmp_path / "config.json").write_text(json.dumps({"config": config.to_json()}))
    assert parse_args(["--resume", str(tmp_path)]).data_dir == Path("pets"), "the variable is for CIFAR-10"
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


@pytest.mark.parametrize(("error", "status"), [(UserError("oh"), 2), (TrainingDivergedError("no"), 1)])
def test_expected_failure_is_one_line_and_a_status(error, status, capsys):
    with pytest.raises(SystemExit) as exit_, exit_on_error("prog"):
        raise error
    assert exit_.value.code == status
    assert capsys.readouterr() == ("", f"prog: error: {error}\n")


@pytest.mark.parametrize("error", [UserError("oh"), SystemExit(2)])
def test_other_ranks_wait_for_rank_zero_to_print(error, capsys, monkeypatch, be_rank):
    waits = []
    be_rank(1)
    monkeypatch.setattr("time.sleep", waits.append)
    with pytest.raises(SystemExit) as exit_, exit_on_error("prog"):
        raise error
    assert exit_.value.code == 2
    assert capsys.readouterr() == ("", "")
    assert waits, "torchrun ends rank zero as soon as another rank has exited"


GPU = (
    "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 3.12 GiB is "
    "free. Including non-PyTorch memory, this process has 75.00 GiB memory in use. Of the allocated memory 70.00 GiB is"
)


def fail(error):
    """Raise `error` or, for None, what torch raises when the host's memory does not suffice."""
    if error is None:
        torch.empty(10**15, dtype=torch.uint8)
    raise error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError(GPU), "the GPU is out of memory (20.00 GiB wanted, 3.12 GiB of 79.11 GiB free)"),
        (torch.AcceleratorError("CUDA error: out of memory\nCompile with"), "the GPU is out of memory"),
        (RuntimeError("NCCL error in: X.cpp:7\nCuda failure 2 'out of memory'"), "the GPU is out of memory"),
        (RuntimeError("MPS backend out of memory (MPS allocated: 8 GB)"), "the GPU is out of memory"),
        (None, "this host is out of memory (931,322.57 GiB wanted)"),
    ],
    ids=["allocator", "context", "NCCL", "MPS", "CPU"],
)
def test_out_of_memory_is_one_line(error, expected, capsys):
    with pytest.raises(SystemExit) as exit_, exit_on_error("prog"), launch(["--device", "cpu"]):
        fail(error)
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"prog: error: {expected} outside of a training step, ")


@pytest.mark.parametrize("error", ["CUDA error: device-side assert triggered", "CUBLAS_STATUS_ALLOC_FAILED", "sizes"])
def test_other_errors_of_the_device_keep_their_traceback(error):
    with pytest.raises(RuntimeError, match=error), exit_on_error("prog"), launch(["--device", "cpu"]):
        raise RuntimeError(error)


@pytest.mark.parametrize("first", [True, False])
def test_local_error_is_reported_by_the_first_rank_that_has_it(first, capsys, monkeypatch, be_rank):
    waits = []
    be_rank(1)
    monkeypatch.setattr("time.sleep", waits.append)
    monkeypatch.setattr("cifar.cli.claim_report", lambda: first)
    with pytest.raises(SystemExit) as exit_, exit_on_error("prog"):
        raise LocalError("oh")
    assert exit_.value.code == 2
    expected = f"prog: error: oh [rank 1 on host {socket.gethostname()}]\n" if first else ""
    assert capsys.readouterr() == ("", expected)
    assert bool(waits) != first


def test_lost_peer_that_has_said_why_is_no_second_line(capsys, monkeypatch, be_rank):
    be_rank(0)
    statuses = []
    monkeypatch.setattr("os._exit", statuses.append)
    monkeypatch.setattr("cifar.cli.claim_report", lambda: False)
    with exit_on_error("prog"):
        raise RuntimeError(GLOO)
    assert (statuses, capsys.readouterr()) == ([1], ("", ""))


def test_program_error_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError), exit_on_error("prog"):
        print(1 / 0)


def test_stop_is_not_an_error_and_run_has_printed_it(capsys):
    with pytest.raises(SystemExit) as exit_, exit_on_error("prog"):
        raise StoppedError("Stopped by SIGTERM", 143)
    assert exit_.value.code == 143
    assert capsys.readouterr() == ("", "")


def test_interrupt_before_training_prints_nothing(capsys):
    with pytest.raises(SystemExit) as exit_, exit_on_error("prog"):
        raise KeyboardInterrupt
    assert exit_.value.code == 130
    assert capsys.readouterr() == ("", "")


GLOO = "[../gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:39657. This is typically caused by"


@pytest.mark.parametrize(
    ("error", "rank", "lines"),
    [
        (RuntimeError(GLOO), 0, ["Connection closed by peer"]),
        (RuntimeError("[gloo/pair.cc:78] Timed out waiting 5000ms for"), 0, ["Timed out waiting 5000ms"]),
        (RuntimeError("NCCL error in: NCCLUtils.hpp:77, remote process exited"), 0, ["NCCL error"]),
        (RuntimeError("[Rank 0] Watchdog caught collective operation timeout"), 0, ["collective operation timeout"]),
        (RuntimeError(GLOO), 1, []),
        (RuntimeError("shapes differ"), 0, None),
        (RuntimeError(GLOO), None, None),
    ],
)  # fmt: skip
def test_lost_peer_is_one_line_of_rank_zero(error, rank, lines, capsys, monkeypatch, be_rank):
    statuses = []
    monkeypatch.setattr("os._exit", statuses.append)
    if rank is not None:
        be_rank(rank)
    if lines is None:
        with pytest.raises(RuntimeError), exit_on_error("prog"):
            raise error
        assert statuses == []
        return
    with exit_on_error("prog"):
        raise error
    assert statuses == [1]
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == len(lines)
    assert all(re.fullmatch(rf"prog: error: another process .*\({reason}\).*", printed[0]) for reason in lines)
