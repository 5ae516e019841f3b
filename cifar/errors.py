"""The expected failures, which end a run with one line and an exit status; every other exception is a bug."""


class UserError(Exception):
    """A wrong flag, file or environment: one line that says what to do, exit status 2."""

    status = 2


class TrainingDivergedError(Exception):
    """The loss became NaN or infinite: one line that says where and what to try, exit status 1."""

    status = 1


class RanksDifferError(Exception):
    """The ranks hold different weights: one line that names them and says what to do, exit status 1."""

    status = 1


class StoppedError(Exception):
    """The run stopped because it was asked to: one line that says how to continue.

    Attributes:
        status: the exit status; see `Run.stop`.
    """

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.status = status


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type if it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]
