"""The command line of train_ddp.py: flags to a configuration, and the start of the processes."""

import argparse
import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import tyro

from cifar.augment import AUGMENTATIONS
from cifar.checkpoint import checkpoint_file, load_checkpoint
from cifar.command import expand_home, parse_flags
from cifar.config import MAY_CHANGE, Recipe, TrainConfig, differences, flag, read_config
from cifar.datasets import DATASETS
from cifar.datasets.folder import IMAGE_SIZE
from cifar.distributed.device import resolve
from cifar.distributed.rendezvous import locate
from cifar.distributed.runtime import Runtime
from cifar.errors import LocalError, StoppedError, UserError, out_of_memory, without_credentials
from cifar.models import MODELS
from cifar.recipes import RECIPES, config_from_recipe
from cifar.resume import find_own_run


@contextlib.contextmanager
def launch(argv: Sequence[str] | None = None, prog: str = "train_ddp.py") -> Iterator[tuple[TrainConfig, Runtime]]:
    """Parse the flags and join the other ranks; leave them at the end of the block.

    After a restart by torchrun, the configuration is that of the run which this launch began. If it has finished, `Run`
    ends the block, without an error.
    """
    config = parse_args(argv, prog)
    place = locate()
    place.check()
    resolved = resolve(config, place)
    try:
        with Runtime(resolved) as runtime:
            config = find_own_run(dataclasses.replace(config, precision=resolved.precision), runtime)
            if config.precision != runtime.precision:
                raise UserError(
                    f"{config.resume} trains in {config.precision}, not in {runtime.precision}: --resume it"
                )
            yield config, runtime
    except StoppedError as stop:
        if stop.status:
            raise
        runtime.print0(str(stop))  # before a restart, this launch has finished the run: on to what follows
    except RuntimeError as error:
        if (lack := out_of_memory(error)) is None:
            raise
        # In a training step, train_epoch names a better remedy.
        reason = f"{lack} outside of a training step, where no batch size matters: end the other programs that use it"
        raise LocalError(reason) from error


def parse_args(argv: Sequence[str] | None = None, prog: str = "train_ddp.py") -> TrainConfig:
    """Return the configuration for the flags `argv`, or for those of this process."""
    words = _spell_booleans(sys.argv[1:] if argv is None else argv)
    named = _flags_that_decide_defaults(words)
    base = _base_config(named)
    flags = _flags_class()
    parsed = parse_flags(flags, words, prog, flags(**vars(base) | _from_environment(base, named)))
    # Absolute, as a run is resumed and a checkpoint evaluated from other directories, too. Links are left as they are:
    # one that names the data may come to lead to another place.
    paths = {"data_dir": parsed.data_dir.absolute(), "evaluate": named.evaluate}
    config = TrainConfig(**vars(parsed) | paths)
    config.check()
    if config.autoresume and named.resume is not None:
        # The run may have been recorded under another path, of another mount, and has chosen its precision.
        precision = base.precision if config.precision == "auto" else config.precision
        config = dataclasses.replace(config, run_dir=base.run_dir, resume=named.resume, precision=precision)
    if argv is None:  # W&B records the command line
        sys.argv[1:] = [without_credentials(part) if "://" in part else part for part in sys.argv[1:]]
    if config.evaluate is not None and not config.evaluate.is_file():  # known before a download
        raise UserError(f"--evaluate {config.evaluate}: there is no such file")
    if config.resume is not None:
        for name, given, recorded in differences(config, base):
            if name not in MAY_CHANGE:
                raise UserError(
                    f"{flag(name)} {given} conflicts with {recorded} of the run in {config.resume}: leave it out, "
                    f"or start a new run"
                )
    return config


def _spell_booleans(argv: Sequence[str]) -> list[str]:
    """Return `argv` with --flag=True or --flag 1 as --flag, and --flag=False as --no-flag, which is what tyro takes.

    W&B's agents, SageMaker and launch/sweep.sh write a value for every flag.
    """
    booleans = {flag(name) for name, hint in get_type_hints(TrainConfig).items() if hint is bool}
    values = {"true": "--", "1": "--", "false": "--no-", "0": "--no-"}
    words: list[str] = []
    for word in argv:
        name, equals, value = word.partition("=")
        if words and words[-1] in booleans and word.lower() in values:
            name, equals, value = words.pop(), "=", word
        name = name.replace("_", "-")
        prefix = values.get(value.lower()) if equals else "--"
        words.append(name.replace("--", prefix, 1) if name in booleans and prefix else word)
    return words


def _flags_that_decide_defaults(argv: Sequence[str]) -> argparse.Namespace:
    """Return --recipe, --resume and --evaluate, which decide the defaults of other flags.

    With --autoresume, `resume` is the run in --run-dir if there is one.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--recipe", default="tutorial")
    parser.add_argument("--resume", type=lambda text: expand_home(Path(text)))
    parser.add_argument("--evaluate", type=lambda text: expand_home(Path(text)))
    parser.add_argument("--run-dir", type=lambda text: expand_home(Path(text)))
    parser.add_argument("--autoresume", action=argparse.BooleanOptionalAction)
    try:
        named = parser.parse_known_args(argv)[0]
    except argparse.ArgumentError:  # a flag without its value, which tyro will explain
        return parser.parse_args([])
    named.evaluate = named.evaluate and checkpoint_file(named.evaluate)
    if named.autoresume and named.resume is None and named.run_dir and (named.run_dir / "config.json").exists():
        named.resume = named.run_dir
    return named


def _base_config(named: argparse.Namespace) -> TrainConfig:
    """Return the configuration that the flags change: that of a recipe, of a run to continue, or of a checkpoint."""
    if named.resume is None:
        recipe = named.recipe if named.recipe in RECIPES else "tutorial"  # tyro will list the choices
        is_checkpoint = named.evaluate is not None and named.evaluate.is_file()
        return config_from_recipe(recipe, **(_from_checkpoint(named.evaluate) if is_checkpoint else {}))
    config = read_config(named.resume)
    for name, choices in _choices().items():
        if getattr(config, name) not in choices:
            raise UserError(f"--resume {named.resume}: this version has no {name} {getattr(config, name)!r}")
    return config


def _from_checkpoint(path: Path) -> dict[str, Any]:
    """Return the fields for testing a checkpoint as its run does: model, precision, views, and where its dataset is."""
    content = load_checkpoint(path)
    config = content["config"]
    fields = {name: config.get(name) for name in ("model", "precision", "tta")} | {"dataset": content["dataset"]}
    choices = _choices() | {name: get_args(Recipe.__annotations__[name]) for name in ("precision", "tta")}
    fields = {name: value for name, value in fields.items() if value in choices[name]}
    data_dir = Path(config.get("data_dir", "data"))
    if fields.get("dataset") == "folder" and content["image_size"] != IMAGE_SIZE:
        fields["image_size"] = content["image_size"]
    if fields.get("dataset") == "folder" or data_dir.is_dir():  # CIFAR-10 may be elsewhere on this machine
        fields["data_dir"] = data_dir
    return fields


def _from_environment(base: TrainConfig, named: argparse.Namespace) -> dict[str, Any]:
    """Return the fields that variables decide, unless a flag does; of a run or checkpoint, only those that may change.

    CIFAR_DATA_DIR holds CIFAR-10: it does not replace the folder of pictures that a run or a checkpoint names.
    """
    fields: dict[str, Any] = {}
    is_recorded = named.resume is not None or named.evaluate is not None
    if (data_dir := os.environ.get("CIFAR_DATA_DIR")) and not (is_recorded and base.dataset == "folder"):
        fields["data_dir"] = Path(data_dir)
    if (precision := os.environ.get("ACCELERATE_MIXED_PRECISION", "").lower()) in ("bf16", "fp16"):
        fields["precision"] = precision
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1"):
        fields["device"] = "cpu"
    return {name: value for name, value in fields.items() if not is_recorded or name in MAY_CHANGE}


def _choices() -> dict[str, tuple[str, ...]]:
    return {
        "recipe": tuple(RECIPES),
        "model": tuple(MODELS),
        "augment": tuple(AUGMENTATIONS),
        "dataset": ("auto", *DATASETS),
    }


def _flags_class() -> type[TrainConfig]:
    """Return TrainConfig as tyro should see it: choices from the registries, and derived defaults explained."""
    hints = {
        "global_batch_size": "(default: local batch x world size)",
        "data_dir": "(default: $CIFAR_DATA_DIR, then data)",
        "image_size": f"(default: {IMAGE_SIZE})",
        "run_dir": "(default: a new one in runs/)",
    }
    types: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(TrainConfig)}
    changed: dict[str, Any] = {name: Literal[choices] for name, choices in _choices().items()}
    changed |= {name: Annotated[types[name], tyro.conf.arg(help_behavior_hint=hint)] for name, hint in hints.items()}
    changed["lr_batch_size"] = tyro.conf.Suppress[int]
    fields = [(name, type_, dataclasses.field(default=getattr(TrainConfig, name))) for name, type_ in changed.items()]
    flags = dataclasses.make_dataclass("TrainConfig", fields, bases=(TrainConfig,), frozen=True, kw_only=True)
    flags.__doc__ = TrainConfig.__doc__
    return flags
