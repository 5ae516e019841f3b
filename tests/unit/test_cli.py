"""The command line: what it takes, and the one line with which it refuses the rest."""

import dataclasses
import json

import pytest

from cifar import recipes
from cifar.config import TrainConfig, parse_args
from cifar.errors import UserError
from cifar.models import MODELS


def test_the_default_is_the_tutorial():
    config = parse_args([])
    assert (config.recipe, config.model, config.epochs) == ("tutorial", "net", 4)
    assert (config.local_batch_size, config.lr, config.momentum, config.log_steps) == (4, 0.001, 0.9, 2000)
    assert (config.schedule, config.augment, config.weight_decay) == ("constant", "none", 0.0)


def test_flags_override_the_recipe_wherever_they_stand():
    config = parse_args(["--epochs", "3", "--recipe", "wide", "--lr=0.1"])
    wide = recipes.RECIPES["wide"]
    assert (config.epochs, config.lr) == (3, 0.1)
    assert (config.model, config.augment, config.local_batch_size) == (wide.model, wide.augment, wide.local_batch_size)
    assert config.lr_batch_size == wide.local_batch_size


def test_lr_keeps_the_recipes_own_batch_when_the_local_batch_changes():
    assert parse_args(["--local-batch-size", "64"]).lr_batch_size == 4


def test_the_data_folder_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("CIFAR_DATA_DIR", "somewhere")
    assert str(parse_args([]).data_dir) == "somewhere"
    monkeypatch.delenv("CIFAR_DATA_DIR")
    assert str(parse_args([]).data_dir) == "data"
    assert str(parse_args(["--data-dir", "else"]).data_dir) == "else"


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--eppochs", "3"], ["--eppochs"]),
        (["--recipe", "fast"], ["'fast'", "tutorial", "wide"]),
        (["--recipe"], ["--recipe"]),
        (["--model", "vgg"], ["'vgg'", *MODELS]),
        (["--device", "tpu"], ["'tpu'", "--device", "auto", "cpu", "cuda", "mps"]),
        (["--precision", "fp8"], ["'fp8'", "--precision", "fp32", "bf16", "fp16"]),
        (["--dataset", "mnist"], ["'mnist'", "--dataset", "auto", "cifar10", "synthetic"]),
        (["--wandb", "always"], ["'always'", "--wandb", "auto", "online", "offline", "disabled"]),
        (["--epochs", "many"], ["--epochs", "'many'"]),
        (["--lr", "fast"], ["--lr", "'fast'"]),
        (["--epochs", "0"], ["--epochs", "0"]),
        (["--local-batch-size", "-4"], ["--local-batch-size", "-4"]),
        (["--global-batch-size", "0"], ["--global-batch-size", "0"]),
        (["--max-steps", "0"], ["--max-steps", "0"]),
        (["--checkpoint-steps", "0"], ["--checkpoint-steps", "0"]),
        (["--log-steps", "0"], ["--log-steps", "0"]),
        (["--lr", "0"], ["--lr", "0"]),
        (["--lr", "nan"], ["--lr", "nan"]),
        (["--lr", "inf"], ["--lr", "inf"]),
        (["--momentum", "1"], ["--momentum", "1"]),
        (["--warmup-epochs", "5"], ["--warmup-epochs", "5", "4"]),
        (["--weight-decay", "-1"], ["--weight-decay", "-1"]),
        (["--seed", "-1"], ["--seed", "-1"]),
        (["--nesterov", "--momentum", "0"], ["--nesterov", "--momentum"]),
        (["stray"], ["stray"]),
        (["--lr-batch-size", "8"], ["--lr-batch-size"]),
    ],
)
def test_a_mistake_is_one_line_that_names_it(argv, named, capsys):
    with pytest.raises(UserError) as mistake:
        parse_args(argv)
    text = str(mistake.value)
    assert "\n" not in text
    assert "│" not in text
    for word in named:
        assert word in text
    said = capsys.readouterr()
    assert not said.err, "the line is for rank zero alone to print"
    assert not said.out


def test_a_misspelt_flag_is_answered_with_the_likely_one():
    with pytest.raises(UserError, match="--epochs"):
        parse_args(["--epoch", "3"])


def test_help_lists_every_flag_of_the_design(capsys):
    with pytest.raises(SystemExit) as done:
        parse_args(["--help"])
    assert done.value.code == 0
    said = capsys.readouterr().out
    names = [
        "recipe",
        "dataset",
        "data-dir",
        "data-url",
        "model",
        "epochs",
        "max-steps",
        "local-batch-size",
        "global-batch-size",
        "lr",
        "lr-scaling",
        "seed",
        "precision",
        "compile",
        "device",
        "run-dir",
        "resume",
        "checkpoint-steps",
        "wandb",
        "evaluate",
    ]
    for name in names:
        assert f"--{name}" in said


def test_json_holds_the_whole_configuration():
    config = parse_args(["--recipe", "wide", "--run-dir", "runs/a", "--data-dir", "d"])
    assert TrainConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def recorded_run(folder, *argv):
    config = dataclasses.replace(parse_args(argv), run_dir=folder, global_batch_size=8)
    (folder / "config.json").write_text(json.dumps({"config": config.to_json()}))
    return config


def test_resume_takes_the_runs_own_configuration(tmp_path):
    own = recorded_run(tmp_path, "--recipe", "wide", "--lr", "0.3", "--seed", "7")
    config = parse_args(["--resume", str(tmp_path)])
    assert config == dataclasses.replace(own, resume=tmp_path)


def test_resume_lets_the_run_go_on_longer_elsewhere(tmp_path):
    recorded_run(tmp_path)
    config = parse_args(["--resume", str(tmp_path), "--epochs", "9", "--wandb", "disabled", "--device", "cpu"])
    assert (config.epochs, config.wandb, config.device) == (9, "disabled", "cpu")


@pytest.mark.parametrize(
    ("argv", "both"),
    [
        (["--lr", "0.5"], ["--lr", "0.5", "0.001"]),
        (["--seed", "3"], ["--seed", "3", "0"]),
        (["--recipe", "wide"], ["--recipe", "wide", "tutorial"]),
        (["--global-batch-size", "64"], ["--global-batch-size", "64", "8"]),
        (["--run-dir", "other"], ["--run-dir", "other"]),
    ],
)
def test_resume_refuses_a_flag_that_contradicts_the_run(tmp_path, argv, both):
    recorded_run(tmp_path)
    with pytest.raises(UserError) as mistake:
        parse_args(["--resume", str(tmp_path), *argv])
    for word in both:
        assert word in str(mistake.value)


@pytest.mark.parametrize("content", [None, "not json", "[]", '{"config": {"unknown": 1}}'])
def test_resume_of_what_is_no_run(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError) as mistake:
        parse_args(["--resume", str(tmp_path)])
    assert "\n" not in str(mistake.value)
