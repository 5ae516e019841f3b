"""The two ways in which a run ends early on purpose; everything else keeps its traceback."""


class UserError(Exception):
    """A mistake of the user's or of the machine's set-up: one line that says what to do, exit status 2."""

    status = 2


class TrainingDivergedError(Exception):
    """The loss became NaN or infinite: one line that says where and what to try, exit status 1."""

    status = 1
