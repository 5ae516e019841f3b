"""The ways in which a run ends early on purpose; everything else keeps its traceback."""


class UserError(Exception):
    """A mistake of the user's or of the machine's set-up: one line that says what to do, exit status 2."""

    status = 2


class TrainingDivergedError(Exception):
    """The loss became NaN or infinite: one line that says where and what to try, exit status 1."""

    status = 1


class StoppedError(Exception):
    """The run was asked to stop and has: one line that says how to go on. No mistake.

    Attributes:
        status: of the exit; see `session.stop_status`.
    """

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.status = status
