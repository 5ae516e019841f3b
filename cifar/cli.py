"""The command line: flags to a configuration, and failures to one line and an exit status."""

import argparse
import contextlib
import dataclasses
import io
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar, get_args

import torch.distributed as dist
import tyro

from cifar.checkpoint import read_checkpoint
from cifar.config import MAY_CHANGE, Recipe, TrainConfig, differences, flag, read_config
from cifar.datasets import DATASETS
from cifar.distributed.environment import Launch, accelerate_fields, is_local_rank_zero, is_rank_zero
from cifar.distributed.rendezvous import announce, claim_report, has_joined
from cifar.distributed.runtime import Runtime
from cifar.errors import (
    LocalError,
    StoppedError,
    TrainingDivergedError,
    UsageError,
    UserError,
    is_network_error,
    lost_peer,
    one_line,
    out_of_memory,
    without_credentials,
)
from cifar.models import MODELS
from cifar.output import safe_output
from cifar.recipes import RECIPES, config_from_recipe
from cifar.resume import find_own_run

C = TypeVar("C")

# torchrun ends all ranks as soon as one has left: the others wait for the one that prints the line.
_REPORT_FIRST_SECONDS = 5


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
        UsageError: tyro has explained an unknown flag or value.
        SystemExit: after `--help`.
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
    # Absolute, as a run is resumed and a checkpoint evaluated from other directories, too. Links are left as they are:
    # one that names the data may come to lead to another place.
    config = TrainConfig(**vars(parsed) | {"data_dir": parsed.data_dir.absolute()})
    config.check()
    if argv is None:  # W&B records the command line
        sys.argv[1:] = [without_credentials(part) if "://" in part else part for part in sys.argv[1:]]
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
    """Return the fields for testing a checkpoint as its run does: model, precision, views, and where its dataset is."""
    content = read_checkpoint(path)
    config = content["config"]
    fields = {name: config.get(name) for name in ("model", "precision", "tta")} | {"dataset": content["dataset"]}
    choices = _choices() | {name: get_args(Recipe.__annotations__[name]) for name in ("precision", "tta")}
    fields = {name: value for name, value in fields.items() if value in choices[name]}
    data_dir = Path(config.get("data_dir", "data"))
    if fields.get("dataset") == "folder" or data_dir.is_dir():  # CIFAR-10 may be elsewhere on this machine
        fields["data_dir"] = data_dir
    return fields


def _from_environment(own: TrainConfig, early: argparse.Namespace) -> dict[str, Any]:
    """Return the fields that variables decide, unless a flag does; of a run or checkpoint, only those that may change.

    CIFAR_DATA_DIR holds CIFAR-10: it does not replace the folder of pictures that a run or a checkpoint names.
    """
    fields: dict[str, Any] = accelerate_fields()
    recorded = early.resume is not None or early.evaluate is not None
    if (data_dir := os.environ.get("CIFAR_DATA_DIR")) and not (recorded and own.dataset == "folder"):
        fields["data_dir"] = Path(data_dir)
    return {name: value for name, value in fields.items() if not recorded or name in MAY_CHANGE}


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
    """Return a `cls` from the command line; `--help` and tyro's complaints are printed once on every host.

    A `~` at the beginning of a path is the home directory, also where no shell has seen it: `--run-dir=~/run`.

    Raises:
        UsageError: tyro has complained.
        SystemExit: after `--help`.
    """
    default = tyro.MISSING_NONPROP if defaults is None else defaults
    complaint = io.StringIO()
    help_ = contextlib.nullcontext() if is_local_rank_zero() else contextlib.redirect_stdout(io.StringIO())
    try:
        with help_, contextlib.redirect_stderr(complaint):
            parsed = tyro.cli(cls, prog=prog, args=argv, default=default)
    except SystemExit as exit_:
        if not exit_.code:
            raise
        if is_local_rank_zero():
            print(complaint.getvalue(), end="", file=sys.stderr, flush=True)
        # The first part of the frame that tyro draws, below its title.
        reason = complaint.getvalue().partition("\n")[2].partition("│ ─")[0]
        raise UsageError(" ".join(reason.replace("│", "").split())) from None
    return dataclasses.replace(parsed, **{name: _expand(value) for name, value in vars(parsed).items()})  # type: ignore[type-var]


def _expand(value: Any) -> Any:
    if isinstance(value, Path):
        with contextlib.suppress(RuntimeError):  # ~USER of an unknown user: a plain name
            return value.expanduser()
    return type(value)(map(_expand, value)) if isinstance(value, tuple | list) else value


@contextlib.contextmanager
def exit_on_error(prog: str) -> Iterator[None]:
    """Report a failure as one line on stderr, and set the exit status; a program error keeps its traceback.

    Rank zero reports what all ranks know; before they have joined, local rank zero of every host does. What only some
    ranks know, the first of them reports. torchrun's report of the failed processes repeats the reason.
    """
    with safe_output():
        try:
            yield
        except StoppedError as stop:  # Run has said so
            raise SystemExit(stop.status) from None
        except KeyboardInterrupt:  # before training began; during training it becomes a StoppedError
            raise SystemExit(130) from None
        except Exception as error:
            if (status := _report(prog, error)) is None:
                raise
            if dist.is_initialized():
                _leave_at_once(status)
            raise SystemExit(status) from None


def _report(prog: str, error: Exception) -> int | None:
    """Report a failure once, and return the exit status; None for a program error, which Python reports."""
    if isinstance(error, UserError | TrainingDivergedError):
        _tell_torchrun(error.with_traceback(None))
        if isinstance(error, LocalError):
            _print_first(f"{prog}: error: {error}{_place()}")
            return error.status
        speaks = is_rank_zero() if has_joined() else is_local_rank_zero()
        if speaks and not isinstance(error, UsageError):
            print(f"{prog}: error: {error}", file=sys.stderr, flush=True)
        announce(str(error))
        if not speaks:
            time.sleep(_REPORT_FIRST_SECONDS)
        if dist.is_initialized():  # all ranks come here; NCCL's destructor would add a warning of its own
            dist.destroy_process_group()
        return error.status
    if not (isinstance(error, RuntimeError) and is_network_error(error) and "RANK" in os.environ):
        _tell_torchrun(error)
        return None
    if (lost := lost_peer(error)) is None:
        variable = _interface(str(error))
        _tell_torchrun(error.with_traceback(None) if variable else error)
        _print_first(f"{prog}: error: {one_line(str(error))}{variable}{_place()}")
    else:
        _wait_for_the_cause()
        if is_rank_zero() and claim_report():  # else the process with the cause has said why
            reason = f"another process of this run is gone or does not answer ({lost})"
            print(f"{prog}: error: {reason}; the launcher's report names it", file=sys.stderr, flush=True)
    _leave_at_once(1)


def _tell_torchrun(error: Exception) -> None:
    """Write the error that is being handled to the file from which torchrun reports it, if torchrun has started this.

    Without a traceback, an expected failure is one line there, too.
    """
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        if error.__traceback__ is None:
            error.__cause__ = None
        with contextlib.suppress(OSError):
            get_error_handler().record_exception(error)


def _print_first(line: str) -> None:
    """Print `line`, unless another rank has reported a failure: then give it time."""
    if claim_report():
        print(line, file=sys.stderr, flush=True)
    else:
        time.sleep(_REPORT_FIRST_SECONDS)


def _wait_for_the_cause() -> None:
    """Give the process that knows why this run ends time to say so: until torchrun ends this one, but a few seconds."""
    with contextlib.suppress(KeyboardInterrupt):
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        time.sleep(_REPORT_FIRST_SECONDS)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # this process leaves in a moment


def _interface(text: str) -> str:
    """Return the variable that names the network interface of which an error of gloo or NCCL complains, or nothing."""
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        value = os.environ.get(name)
        if value and name[:4] in text.upper() and (value in text or "socket interface" in text):
            return f" ({name}={value} in the environment: correct or unset it)"
    return ""


def _place() -> str:
    """Return the rank and the host of this process, for the end of a line; nothing without other ranks."""
    launch = Launch.from_environment()
    return f" [rank {launch.rank} on host {socket.gethostname()}]" if launch.world_size > 1 else ""


def _leave_at_once(status: int) -> NoReturn:
    """Exit without destructors: those of gloo and NCCL wait for the other processes, or abort this one."""
    sys.stdout.flush()
    os._exit(status)
