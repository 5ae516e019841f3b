"""The command line: flags to a configuration, and failures to one line and an exit status."""

import argparse
import contextlib
import dataclasses
import io
import os
import re
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO, TypeVar

import torch.distributed as dist
import tyro

from cifar.checkpoint import read_checkpoint
from cifar.config import MAY_CHANGE, TrainConfig, differences, flag, read_config
from cifar.datasets import DATASETS
from cifar.distributed.environment import Launch, accelerate_fields, is_rank_zero
from cifar.distributed.rendezvous import claim_report
from cifar.distributed.runtime import Runtime
from cifar.errors import LocalError, StoppedError, TrainingDivergedError, UserError, out_of_memory
from cifar.models import MODELS
from cifar.output import safe_output
from cifar.recipes import RECIPES, config_from_recipe
from cifar.resume import find_own_run

C = TypeVar("C")

# torchrun ends all ranks as soon as one has left: the others wait for the one that prints the line.
_REPORT_FIRST_SECONDS = 5

# Error messages of gloo, NCCL and torch's store for a peer that is gone; most are plain RuntimeErrors.
_PEER_LOST = re.compile(
    r"Connection (closed|reset) by peer|Timed out waiting \d+ms|Connection refused|Broken pipe|Connection was likely "
    r"closed|remote process exited|wait timeout after|Socket Timeout|NCCL communicator was aborted|NCCL error|"
    r"collective operation timeout",
    re.IGNORECASE,
)


@contextlib.contextmanager
def launch(argv: Sequence[str] | None = None, prog: str = "train_ddp.py") -> Iterator[tuple[TrainConfig, Runtime]]:
    """Parse the flags and join the other ranks; leave them at the end of the block.

    After a restart by torchrun, the configuration is that of the run which this launch began. If it has finished, `Run`
    ends the block, without an error.

    Raises:
        UserError: the command line or the environment is wrong.
        LocalError: the memory of this rank's device or host does not suffice.
    """
    config = parse_args(argv, prog)
    try:
        with Runtime(config) as runtime:
            config = find_own_run(dataclasses.replace(config, precision=runtime.precision), runtime)
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
    """Return the configuration for the flags `argv`, or for those of this process.

    Raises:
        UserError: a value is out of range or, with `--resume`, conflicts with the run's own.
        SystemExit: after `--help`, or after tyro has explained an unknown flag or value (status 2).
    """
    # --recipe, --resume and --evaluate decide the defaults of other flags, so they are parsed first.
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--recipe", default="tutorial")
    first.add_argument("--resume", type=Path)
    first.add_argument("--evaluate", type=Path)
    try:
        early, _ = first.parse_known_args(argv)
    except argparse.ArgumentError:  # a flag without its value, which tyro will explain
        early = argparse.Namespace(recipe="tutorial", resume=None, evaluate=None)
    if early.resume is None:
        own = config_from_recipe(early.recipe if early.recipe in RECIPES else "tutorial")  # tyro will list the choices
        if early.evaluate is not None and _expand(early.evaluate).is_file():
            own = dataclasses.replace(own, **_from_checkpoint(_expand(early.evaluate)))
    else:
        own = read_config(_expand(early.resume))
        for name, choices in _choices().items():
            if getattr(own, name) not in choices:
                raise UserError(f"--resume {early.resume}: this version has no {name} {getattr(own, name)!r}")

    flags = _flags_class()
    parsed = parse_flags(flags, argv, prog, flags(**vars(own) | _from_environment(own, early)))
    config = TrainConfig(**vars(parsed))
    config.check()
    if config.evaluate is not None and not config.evaluate.is_file():  # known before a download
        raise UserError(f"--evaluate {config.evaluate}: there is no such file")
    if config.resume is not None:
        for name, given, recorded in differences(config, own):
            if name not in MAY_CHANGE:
                raise UserError(
                    f"{flag(name)} {given} conflicts with {recorded} of the run in {config.resume}: leave it out, "
                    f"or start a new run without --resume"
                )
    return config


def _from_checkpoint(path: Path) -> dict[str, Any]:
    """Return the fields for testing a checkpoint: its model and its dataset.

    Raises:
        UserError: the file is not a checkpoint.
    """
    content = read_checkpoint(path)
    config = content["config"]
    fields = {"model": config.get("model"), "dataset": content["dataset"]}
    fields = {name: value for name, value in fields.items() if value in _choices()[name]}
    if fields.get("dataset") == "folder" and "data_dir" in config:
        fields["data_dir"] = Path(config["data_dir"])
    return fields


def _from_environment(own: TrainConfig, early: argparse.Namespace) -> dict[str, Any]:
    """Return the fields that variables decide, unless a flag does; of a resumed run, only those that may change.

    CIFAR_DATA_DIR holds CIFAR-10: it does not replace the folder of pictures that a run or a checkpoint names.
    """
    fields: dict[str, Any] = accelerate_fields()
    resuming = early.resume is not None
    named = own.dataset == "folder" and (resuming or early.evaluate is not None)
    if (data_dir := os.environ.get("CIFAR_DATA_DIR")) and not named:
        fields["data_dir"] = Path(data_dir)
    return {name: value for name, value in fields.items() if not resuming or name in MAY_CHANGE}


def _choices() -> dict[str, tuple[str, ...]]:
    return {"recipe": tuple(RECIPES), "model": tuple(MODELS), "dataset": ("auto", *DATASETS)}


def _flags_class() -> type[TrainConfig]:
    """Return TrainConfig as tyro should see it: choices from the registries, and derived defaults explained."""
    hints = {
        "global_batch_size": "(default: local batch x world size)",
        "data_dir": "(default: $CIFAR_DATA_DIR, then data)",
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


def parse_flags(cls: type[C], argv: Sequence[str] | None, prog: str, defaults: C | None = None) -> C:
    """Return a `cls` from the command line; `--help` and tyro's complaints are printed by rank zero only.

    A `~` at the beginning of a path is the home directory, also where no shell has seen it: `--run-dir=~/run`.

    Raises:
        SystemExit: after `--help` (status 0) or a complaint (status 2).
    """
    default = tyro.MISSING_NONPROP if defaults is None else defaults
    main = is_rank_zero()
    # tyro 1.0 prints its complaints about values even without console_outputs.
    with contextlib.nullcontext() if main else contextlib.redirect_stderr(io.StringIO()):
        parsed = tyro.cli(cls, prog=prog, args=argv, default=default, console_outputs=main)
    return dataclasses.replace(parsed, **{name: _expand(value) for name, value in vars(parsed).items()})  # type: ignore[type-var]


def _expand(value: Any) -> Any:
    if isinstance(value, Path):
        with contextlib.suppress(RuntimeError):  # ~USER of an unknown user: a plain name
            return value.expanduser()
    return type(value)(map(_expand, value)) if isinstance(value, tuple | list) else value


@contextlib.contextmanager
def exit_on_error(prog: str) -> Iterator[None]:
    """Report an expected failure as one line on stderr, and set the exit status.

    Rank zero reports what all ranks know, and of a LocalError the first rank that has it.
    """
    with safe_output():
        try:
            yield
        except StoppedError as stop:  # Run has said so
            raise SystemExit(stop.status) from None
        except LocalError as error:
            if claim_report():
                print(f"{prog}: error: {error}{_place()}", file=sys.stderr, flush=True)
            else:
                time.sleep(_REPORT_FIRST_SECONDS)
            if dist.is_initialized():
                _leave_at_once(error.status)
            raise SystemExit(error.status) from None
        except (UserError, TrainingDivergedError) as error:
            _print0(f"{prog}: error: {error}", sys.stderr)
            _wait_for_rank_zero()
            if dist.is_initialized():  # all ranks come here; NCCL's destructor would add a warning of its own
                dist.destroy_process_group()
            raise SystemExit(error.status) from None
        except SystemExit as exit_:  # tyro's, which has printed its complaint on rank zero
            if exit_.code:
                _wait_for_rank_zero()
            raise
        except RuntimeError as error:
            lost = _PEER_LOST.search(str(error))
            if lost is None or "RANK" not in os.environ:
                raise
            reason = f"another process of this run is gone or does not answer ({lost[0]})"
            if is_rank_zero() and claim_report():  # else that process has said why
                print(f"{prog}: error: {reason}; the launcher's report names it", file=sys.stderr, flush=True)
            _leave_at_once(1)
        except KeyboardInterrupt:  # before training began; during training it becomes a StoppedError
            raise SystemExit(130) from None


def _print0(text: str, file: TextIO) -> None:
    if is_rank_zero():
        print(text, file=file, flush=True)


def _place() -> str:
    """Return the rank and the host of this process, for the end of a line; nothing without other ranks."""
    launch = Launch.from_environment()
    return f" [rank {launch.rank} on host {socket.gethostname()}]" if launch.world_size > 1 else ""


def _leave_at_once(status: int) -> None:
    """Exit without destructors: those of gloo and NCCL wait for the other processes, or abort this one."""
    sys.stdout.flush()
    os._exit(status)


def _wait_for_rank_zero() -> None:
    if not is_rank_zero():
        time.sleep(_REPORT_FIRST_SECONDS)
