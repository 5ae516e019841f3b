"""A run of several processes that is disturbed at random many times, compared with an undisturbed one.

python -m tests.helpers.soak --disturbances 50 --ranks 3 --seed 1 --folder runs/soak
python -m tests.helpers.soak --disturbances 5 --warm --kinds kill --folder runs/kill
"""

import argparse
import random
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from cifar.checkpoint import checkpoint_path, checkpoints, load_checkpoint
from tests.helpers.checkpoints import flip_bit
from tests.helpers.comparing import numbers, same
from tests.helpers.disturb import FLAGS, RESUMES, Watched, send
from tests.helpers.fragile import CRASH, HOLD
from tests.helpers.processes import ROOT, left_of

TIMEOUT = 8
STEPS_BETWEEN = (60, 250)
# The signals to a rank.
SIGNALS = {
    **{"kill": signal.SIGKILL, "damage": signal.SIGKILL, "freeze": signal.SIGSTOP},
    **{"segfault": CRASH, "held GIL": HOLD},
}
KINDS = (*SIGNALS, "stop rank", "stop torchrun", "kill torchrun")


class Disturbance(NamedTuple):
    """What was done to a run, and what it cost."""

    kind: str
    lost: int  # steps that were repeated
    noticed: float  # seconds until all ranks had ended
    waited: float  # seconds until the next step


def soak(
    folder: Path, disturbances: int, seed: int, seconds: float, ranks: int, warm: bool, kinds: Sequence[str] = KINDS
) -> dict[str, Any]:
    """Disturb a run of `ranks` processes `disturbances` times, or for `seconds`, and compare it with a quiet one.

    Return "steps", and "disturbances", a list. With `warm`, the disturbed run restarts warm; the quiet one is cold.
    """
    chance = random.Random(seed)
    launcher = ["--standalone", f"--nproc_per_node={ranks}", "--max-restarts=1000"]
    script = [str(ROOT / "tests" / "helpers" / "fragile.py")]
    steps = STEPS_BETWEEN[1] * (disturbances + 1)
    epochs = 1 + steps * 4 * ranks // 50_000
    flags = [*FLAGS, "--timeout", str(TIMEOUT), "--max-steps", str(steps), "--epochs", str(epochs)]
    plain, disturbed = folder / "plain", folder / "disturbed"
    quiet = Watched(plain, [*flags, "--run-dir", str(plain)], launcher, "plain.txt", script)
    assert quiet.end(60 + steps / 20) == 0, quiet.output()

    def start(*which: str) -> Watched:
        return Watched(disturbed, list(which), launcher, "disturbed.txt", script, warm)

    began, done = time.monotonic(), []
    run = start(*flags, "--run-dir", str(disturbed))
    try:
        while len(done) < disturbances and time.monotonic() - began < seconds:
            run.until_step(run.step() + chance.randint(*STEPS_BETWEEN))
            # Every kind once, in random order, then at random.
            seen = {each.kind for each in done}
            kind = chance.choice([kind for kind in kinds if kind not in seen] or list(kinds))
            run, disturbance = disturb(run, kind, chance, lambda: start("--resume", str(disturbed)))
            done.append(disturbance)
            print(f"{len(done):3d}. {describe([disturbance])}", flush=True)
        assert run.end(60 + steps / 20) == 0, run.output()[-3000:]
    finally:
        run.kill()

    mine, theirs = (load_checkpoint(checkpoint_path(place, steps))["state"] for place in (disturbed, plain))
    for part in theirs:
        assert same({part: mine[part]}, {part: theirs[part]}), f"{part} differs"
    assert numbers(disturbed) == numbers(plain)
    return {"steps": steps, "disturbances": done}


def disturb(run: Watched, kind: str, chance: random.Random, resume: Any) -> tuple[Watched, Disturbance]:
    """Disturb the run; return the launch that continues, which `resume` starts if torchrun does not, and the cost."""
    ranks = run.ranks()
    victim = chance.choice(ranks)
    resumes = run.output().count(RESUMES)
    reached, began = run.step(), time.monotonic()
    if kind in SIGNALS:
        send(victim, SIGNALS[kind])
        if kind == "damage":
            with suppress(FileNotFoundError):  # retention may remove it meanwhile
                flip_bit(next(iter(checkpoints(run.run_dir).values())), chance.random())
        assert left_of(ranks, 20) == [], f"{kind} was not noticed"
        noticed = time.monotonic() - began
    else:
        number = chance.choice([signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
        send(run.agent if "torchrun" in kind else victim, signal.SIGKILL if "kill" in kind else number)
        run.end(20)
        noticed = time.monotonic() - began
        run, resumes = resume(), 0
    begins = run.until_resumed(resumes + 1)
    if "stop" in kind:
        assert begins >= reached, f"{kind} lost steps: {reached} was reached, {begins} saved"
    return run, Disturbance(kind, max(0, reached - begins), noticed, time.monotonic() - began)


def describe(disturbances: Sequence[Disturbance]) -> str:
    """Return the number, the kind, and the medians and maxima of disturbances of one kind, in a line."""
    parts = [f"{len(disturbances):4d} {disturbances[0].kind:14s}"]
    for name, text in (("lost", "steps lost"), ("noticed", "s until noticed"), ("waited", "s until the next step")):
        values = [getattr(each, name) for each in disturbances]
        parts.append(f"{median(values):6.1f} (at most {max(values):5.1f}) {text}")
    return ", ".join(parts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--disturbances", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--warm", action="store_true")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--folder", type=lambda text: Path(text).resolve(), required=True)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True)
    report = soak(**vars(arguments))
    everything = report["disturbances"]
    print(f"the same weights, optimizer and metrics after {report['steps']:,} steps and {len(everything)} disturbances")
    for kind in dict.fromkeys(each.kind for each in everything):
        print(describe([each for each in everything if each.kind == kind]))
