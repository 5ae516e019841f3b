"""Start and end each command of this program: its flags, one line for a failure, and the exit status."""

import contextlib
import dataclasses
import io
import itertools
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO, TypeVar

import torch.distributed as dist
import tyro

from cifar.distributed.environment import interface_advice, known_launch
from cifar.distributed.rendezvous import announce, claim_report, has_joined
from cifar.errors import (
    LocalError,
    StoppedError,
    TrainingDivergedError,
    UsageError,
    UserError,
    is_network_error,
    lost_peer,
    one_line,
)

C = TypeVar("C")

# torchrun ends all ranks as soon as one has left: the others wait for the one that prints the line.
_REPORT_FIRST_SECONDS = 5


def parse_flags(cls: type[C], argv: Sequence[str] | None, prog: str, defaults: C | None = None) -> C:
    """Return a `cls` from the command line; `--help` and tyro's complaints are printed once on every host.

    A `~` at the beginning of a path is the home directory, also where no shell has seen it: `--run-dir=~/run`. If tyro
    has complained, a UsageError has its reason.
    """
    default = tyro.MISSING_NONPROP if defaults is None else defaults
    complaint = io.StringIO()
    is_first = known_launch().local_rank == 0
    out = sys.stdout if is_first else io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(complaint):
            parsed = tyro.cli(cls, prog=prog, args=argv, default=default)
    except SystemExit as exit_:
        if not exit_.code:  # after --help
            raise
        if is_first:
            print(complaint.getvalue(), end="", file=sys.stderr, flush=True)
        # Of the frame that tyro draws, the part between the title and the next rule.
        lines = [line.strip(" │|") for line in complaint.getvalue().splitlines()[1:]]
        parts = itertools.groupby(lines, key=lambda line: line.strip("─-") != "")
        reason = next((" ".join(part) for is_text, part in parts if is_text), "")
        raise UsageError(reason) from None
    return dataclasses.replace(parsed, **{name: expand_home(value) for name, value in vars(parsed).items()})  # type: ignore[type-var]


def expand_home(value: Any) -> Any:
    """Return a path, or a collection of them, with the home directory for `~`; any other value as it is."""
    if isinstance(value, Path):
        with contextlib.suppress(RuntimeError):  # ~USER of an unknown user: a plain name
            return value.expanduser()
    return type(value)(map(expand_home, value)) if isinstance(value, tuple | list) else value


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
        except (UserError, TrainingDivergedError) as error:
            _record_for_torchrun(error.with_traceback(None))
            _report_failure(prog, error)
            # Before the torchrun of another host leaves, and takes its store along, this one's has to see why.
            if known_launch().world_size > 1:
                _leave_at_once(error.status)
            raise SystemExit(error.status) from None
        except Exception as error:
            if is_network_error(error) and known_launch().world_size > 1:
                _report_network_error(prog, error)
                _leave_at_once(1)
            _record_for_torchrun(error)
            raise


def _report_failure(prog: str, error: UserError | TrainingDivergedError) -> None:
    if isinstance(error, LocalError):
        _print_first(f"{prog}: error: {error}")
        return
    launch = known_launch()
    speaks = (launch.rank if has_joined() else launch.local_rank) == 0
    if speaks and not isinstance(error, UsageError):
        print(f"{prog}: error: {error}", file=sys.stderr, flush=True)
    announce(str(error))
    if not speaks:
        time.sleep(_REPORT_FIRST_SECONDS)
    if dist.is_initialized():  # all ranks come here; NCCL's destructor would add a warning of its own
        dist.destroy_process_group()


def _report_network_error(prog: str, error: Exception) -> None:
    """Print the text of an error of NCCL, gloo or the store, or that another process is gone."""
    if (lost := lost_peer(error)) is None:
        _record_for_torchrun(error)
        _print_first(f"{prog}: error: {one_line(str(error))}{interface_advice(str(error))}")
        return
    # The process that knows why has time to say so: until torchrun ends this one, but a few seconds.
    if signal.getsignal(signal.SIGTERM) != signal.SIG_IGN:  # `StopRequest` has not seen its signal
        with contextlib.suppress(KeyboardInterrupt):
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            time.sleep(_REPORT_FIRST_SECONDS)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # this process leaves in a moment
    if known_launch().rank == 0 and claim_report():
        reason = f"another process of this run is gone or does not answer ({lost})"
        print(f"{prog}: error: {reason}; the launcher's report names it", file=sys.stderr, flush=True)


def _record_for_torchrun(error: Exception) -> None:
    """Write `error` to the file from which torchrun reports it: one line if it has no traceback."""
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    if error.__traceback__ is None:
        error.__cause__ = None
    with contextlib.suppress(OSError):
        get_error_handler().record_exception(error)


def _print_first(line: str) -> None:
    """Print `line` and where this is, unless another rank has reported a failure: then give it time."""
    launch = known_launch()
    if claim_report():
        place = f" [rank {launch.rank} on host {socket.gethostname()}]" if launch.world_size > 1 else ""
        print(f"{line}{place}", file=sys.stderr, flush=True)
    else:
        time.sleep(_REPORT_FIRST_SECONDS)


def _leave_at_once(status: int) -> NoReturn:
    """Exit without destructors: those of gloo and NCCL wait for the other processes, or abort this one."""
    sys.stdout.flush()
    os._exit(status)


@contextlib.contextmanager
def safe_output() -> Iterator[None]:
    """Run a block in which what cannot be written to stdout or stderr is dropped: no reader, a full disk, no terminal.

    What replaces the streams in a notebook or a test is left alone.
    """
    _occupy_standard_descriptors()
    before = sys.stdout, sys.stderr
    if sys.stdout is sys.__stdout__:
        sys.stdout = _safe_stream(1, sys.stdout)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _safe_stream(2, sys.stderr)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = before


class _SafeFile(io.FileIO):
    """A file that drops what it cannot write."""

    def write(self, data: Any, /) -> int:
        """Return the number of bytes that were written or dropped."""
        with contextlib.suppress(OSError):
            return super().write(data) or len(data)  # None if a non-blocking pipe is full
        return len(data)


def _safe_stream(descriptor: int, stream: TextIO | None) -> TextIO:
    """Return a stream to a descriptor, in the encoding of `stream`; that is None if the descriptor was closed."""
    file = io.BufferedWriter(_SafeFile(descriptor, "w", closefd=False))
    return io.TextIOWrapper(file, stream.encoding if stream else None, "backslashreplace", line_buffering=True)


def _occupy_standard_descriptors() -> None:
    """Open the null device as each of the descriptors 0 to 2 that is closed: a checkpoint must not become stdout."""
    descriptor = os.open(os.devnull, os.O_RDWR)
    while descriptor <= 2:
        descriptor = os.open(os.devnull, os.O_RDWR)
    os.close(descriptor)
