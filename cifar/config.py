"""The configuration of a run: one frozen dataclass, made from a recipe and the command line."""

import argparse
import contextlib
import dataclasses
import io
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from cifar.datasets import DATASETS
from cifar.errors import UserError
from cifar.nets import NETS
from cifar.recipes import RECIPES, Recipe

try:
    import tyro
except ModuleNotFoundError as error:
    raise SystemExit("The command line needs the package tyro: pip install tyro") from error

C = TypeVar("C")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Recipe):
    """Train a net on CIFAR-10 in one process or, under torchrun, in many."""

    recipe: str = "tutorial"
    """The named set of defaults: tutorial, wide, net-fast, resnet18, speed94 or speed96."""
    dataset: str = "auto"
    """cifar10; synthetic, the built-in stand-in; or auto: CIFAR-10 if it is on disk or can be fetched, else the
    stand-in, with a warning."""
    data_dir: Path = Path("data")
    """Folder that holds or receives cifar-10-batches-py/ (default: $CIFAR_DATA_DIR, then data)."""
    data_url: str | None = None
    """URL of cifar-10-python.tar.gz to try before the built-in sources."""
    max_steps: int | None = None
    """End training after this many optimizer steps; evaluation and records follow as usual."""
    seed: int = 0
    """Seed of the weights, the shuffling and the augmentation."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the forward and backward pass; the weights stay fp32."""
    compile: bool = False
    """Compile the net with torch.compile."""
    cuda_graph: bool = False
    """Capture the optimizer step as a CUDA graph and replay it: for one process whose steps are mostly launches."""
    comm_hook: Literal["none", "fp16", "bf16", "powersgd"] = "none"
    """Compression of the gradients that the processes exchange; under powersgd, resuming isn't bit-exact."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: CUDA if there is a GPU, else MPS in a single process, else the CPU."""
    run_dir: Path | None = None
    """Folder of this run, new or empty (default: a fresh one under runs/)."""
    resume: Path | None = None
    """Folder of a run to continue from its newest good checkpoint, with its own configuration."""
    checkpoint_steps: int | None = None
    """Save a checkpoint every so many optimizer steps, besides each epoch's end and the run's."""
    keep_checkpoints: int = 3
    """Checkpoints to keep: so many of the newest, and the one with the best test accuracy."""
    timeout: float = 120
    """Seconds after which a process that doesn't answer ends the run, instead of the default 30 minutes."""
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: online where a W&B key is configured, else offline; never a prompt."""
    evaluate: Path | None = None
    """Print the test accuracy of this checkpoint instead of training."""

    lr_batch_size: Annotated[int, tyro.conf.Suppress] = 4
    """The recipe's own global batch, for which lr is stated."""

    @classmethod
    def from_recipe(cls, name: str, **changes: Any) -> "TrainConfig":
        """The defaults of the recipe `name`, with `changes` applied.

        Raises:
            UserError: there is no such recipe.
        """
        if name not in RECIPES:
            raise UserError(f"unknown recipe {name!r}: choose from {', '.join(RECIPES)}")
        recipe = RECIPES[name]
        size = recipe.global_batch_size or recipe.local_batch_size
        fields = dataclasses.asdict(recipe) | {"recipe": name, "lr_batch_size": size}
        return cls(**(fields | changes))

    def check(self) -> None:
        """Refuse values that no run can have.

        Raises:
            UserError: names the flag, the value and what would do.
        """
        if self.model not in NETS:
            raise UserError(f"unknown model {self.model!r}: choose from {', '.join(NETS)}")
        if self.dataset not in ("auto", *DATASETS):
            raise UserError(f"unknown --dataset {self.dataset!r}: choose from auto, {', '.join(DATASETS)}")
        for name in (
            "epochs", "local_batch_size", "global_batch_size", "max_steps", "log_steps", "checkpoint_steps",
            "keep_checkpoints",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{flag(name)} is {value}: it must be at least 1")
        if not 5 <= self.timeout <= 86_400:
            raise UserError(f"--timeout is {self.timeout:g}: it must be from 5 seconds to a day")
        # Written so that NaN, which compares false with everything, is refused too.
        if not 0 < self.lr < float("inf"):
            raise UserError(f"--lr is {self.lr}: it must be a number above 0")
        for name in ("momentum", "muon_momentum", "label_smoothing"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise UserError(f"{flag(name)} is {value}: it must be at least 0 and below 1")
        for name in ("muon_lr", "bias_lr_scale"):
            value = getattr(self, name)
            if not 0 < value < float("inf"):
                raise UserError(f"{flag(name)} is {value}: it must be a number above 0")
        for name, most in (("crop_padding", 31), ("cutout", 32)):
            value = getattr(self, name)
            if not 0 <= value <= most:
                raise UserError(f"{flag(name)} is {value}: it must be from 0 to {most}")
        if not 0 <= self.weight_decay < float("inf"):
            raise UserError(f"--weight-decay is {self.weight_decay}: it must be at least 0")
        if not 0 <= self.warmup_epochs <= self.epochs:
            raise UserError(f"--warmup-epochs is {self.warmup_epochs:g}: it must be from 0 to --epochs, {self.epochs}")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"--seed is {self.seed}: it must be at least 0 and below 2**63")
        if self.cuda_graph and self.precision == "fp16":
            raise UserError(
                "--cuda-graph goes with --precision fp32 or bf16: fp16 decides at each step whether to update"
            )
        if self.nesterov and self.momentum == 0:
            raise UserError("--nesterov needs a --momentum above 0")

    def to_json(self) -> dict[str, Any]:
        """Every field as JSON has it: paths become strings."""
        return {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "TrainConfig":
        """The inverse of `to_json`.

        Raises:
            UserError: the fields are not those of this version's configuration, or not of their type.
        """
        paths = {k: Path(fields[k]) for k in ("data_dir", "run_dir", "resume", "evaluate") if fields.get(k)}
        try:
            config = cls(**(fields | paths))
        except TypeError as error:
            raise UserError(f"this configuration is from another version of the program: {error}") from error
        for name, hint in get_type_hints(cls).items():
            if not _is_a(getattr(config, name), hint):
                raise UserError(f"{name} is {getattr(config, name)!r}, which is no {hint}")
        return config


def _is_a(value: Any, hint: Any) -> bool:
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_args(hint):  # a union
        return any(_is_a(value, part) for part in get_args(hint))
    return isinstance(value, int | float if hint is float else hint) and (hint is bool or not isinstance(value, bool))


# What a resumed run may be told anew; every other flag has to agree with the run's own configuration.
MAY_CHANGE = frozenset({
    "resume", "epochs", "max_steps", "log_steps", "checkpoint_steps", "keep_checkpoints", "local_batch_size", "timeout",
    "data_dir", "data_url", "device", "compile", "cuda_graph", "tta", "wandb",
})  # fmt: skip


def parse_args(argv: Sequence[str] | None = None, prog: str = "train_ddp.py") -> TrainConfig:
    """The configuration that the command line asks for (`argv`, or that of this process).

    Raises:
        UserError: a flag or value is unknown, impossible or, with `--resume`, contradicts the run's own.
        SystemExit: after `--help`.
    """
    # Two flags decide what the other flags' defaults are, so they are read first.
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--recipe", default="tutorial")
    first.add_argument("--resume", type=Path)
    try:
        early, _ = first.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from error
    if early.resume is None:
        defaults = TrainConfig.from_recipe(early.recipe, data_dir=Path(os.environ.get("CIFAR_DATA_DIR") or "data"))
    else:
        defaults = read_config(early.resume)

    config = run_tyro(TrainConfig, argv, prog, defaults)
    config.check()
    if config.resume is not None:
        for name, asked, own in differences(config, defaults):
            if name not in MAY_CHANGE:
                raise UserError(
                    f"{flag(name)} {asked} contradicts {own} of the run in {config.resume}: leave it out, "
                    f"or start a new run without --resume"
                )
    return config


def read_config(run_dir: Path) -> TrainConfig:
    """The configuration that a run recorded in its folder, with `resume` set to continue it.

    Raises:
        UserError: there is none, or it can't be read.
    """
    path = run_dir / "config.json"
    try:
        return TrainConfig.from_json(json.loads(path.read_text())["config"] | {"resume": str(run_dir)})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--resume {run_dir}: no run is there to continue ({path}: {error})") from error
    except UserError as error:
        raise UserError(f"--resume {run_dir}: {path}: {error}") from error


def differences(a: TrainConfig, b: TrainConfig) -> list[tuple[str, Any, Any]]:
    """(field, value in `a`, value in `b`) of every field in which the two differ."""
    pairs = ((field.name, getattr(a, field.name), getattr(b, field.name)) for field in dataclasses.fields(a))
    return [(name, x, y) for name, x, y in pairs if x != y]


def flag(field: str) -> str:
    """`local_batch_size` as it is written on the command line."""
    return "--" + field.replace("_", "-")


def run_tyro(cls: type[C], argv: Sequence[str] | None, prog: str, defaults: C | None = None) -> C:
    """A `cls` from the command line.

    Raises:
        UserError: what tyro says of the command line, in one line.
        SystemExit: after `--help`.
    """
    # tyro draws a box around its complaint on standard error; caught here, it becomes one line in one voice.
    said = io.StringIO()
    speaks = os.environ.get("RANK", "0") == "0"  # --help, too, is printed once
    default = tyro.MISSING_NONPROP if defaults is None else defaults
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(cls, prog=prog, args=argv, default=default, console_outputs=speaks)
    except SystemExit as exit_:
        if not exit_.code:
            raise
    lines = [line.strip("│╭╮╰╯ ") for line in said.getvalue().splitlines()[1:]]
    text = " ".join(line for line in lines if line.strip("─"))
    text = re.split(r"Argument helptext:|For full helptext", text)[0].strip()
    raise UserError(f"{text} ({prog} --help lists every flag)")
