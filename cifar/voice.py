"""How the program ends, whatever ends it: one line in one voice, and an exit status that says which way."""

import contextlib
import os
import re
import sys
import time
from collections.abc import Iterator

from cifar.errors import StoppedError, TrainingDivergedError, UserError

# What gloo, NCCL and torch's store say when another process is gone or doesn't answer; plain RuntimeErrors, mostly.
_LOST = re.compile(
    r"Connection (closed|reset) by peer|Timed out waiting \d+ms|Connection refused|Broken pipe|Connection was likely "
    r"closed|remote process exited|wait timeout after|Socket Timeout|NCCL communicator was aborted",
    re.IGNORECASE,
)


@contextlib.contextmanager
def one_voice(prog: str) -> Iterator[None]:
    """End the program on a mistake with one line on standard error, however many processes there are."""
    speaks = os.environ.get("RANK", "0") == "0"
    try:
        yield
    except StoppedError as stop:
        if speaks:
            print(stop, flush=True)
        raise SystemExit(stop.status) from None
    except (UserError, TrainingDivergedError) as error:
        if speaks:
            print(f"{prog}: error: {error}", file=sys.stderr, flush=True)
        else:
            # A launcher ends all ranks as soon as one has left: rank zero has to have spoken by then.
            time.sleep(5)
        raise SystemExit(error.status) from None
    except RuntimeError as error:
        lost = _LOST.search(str(error))
        if lost is None or "RANK" not in os.environ:
            raise
        if speaks:
            print(
                f"{prog}: error: another process of this run is gone or doesn't answer ({lost[0]}); the launcher's "
                f"report says which",
                file=sys.stderr,
                flush=True,
            )
        # Without its destructors: gloo's threads still wait for that process, and would abort this one.
        sys.stdout.flush()
        os._exit(1)
    except KeyboardInterrupt:  # before training began; during it, that is a StoppedError
        raise SystemExit(130) from None
