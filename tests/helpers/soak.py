"""A run of several processes that is disturbed at random many times, compared with an undisturbed one.

python -m tests.helpers.soak --disturbances 50 --ranks 3 --seed 1 --folder runs/soak
"""

import argparse
import random
import signal
import time
from pathlib import Path
from typing import Any

from cifar.checkpoint import checkpoint_path, load_checkpoint
from tests.helpers.comparing import numbers, same
from tests.helpers.disturb import FLAGS, Watched, damage_newest, send

TIMEOUT = 8
STEPS_BETWEEN = (60, 250)
KINDS = ("kill", "damage", "stop rank", "stop torchrun", "freeze", "kill torchrun")


def soak(folder: Path, disturbances: int, seed: int, seconds: float, ranks: int) -> dict[str, Any]:
    """Disturb a run of `ranks` processes `disturbances` times, or for `seconds`, and compare it with a quiet one.

    Return "steps" and "disturbances": the kind, the steps lost and the seconds until the first step after it, of each.
    """
    chance = random.Random(seed)
    launcher = ["--standalone", f"--nproc_per_node={ranks}", "--max-restarts=1000"]
    steps = STEPS_BETWEEN[1] * (disturbances + 1)
    epochs = 1 + steps * 4 * ranks // 50_000
    flags = [*FLAGS, "--timeout", str(TIMEOUT), "--max-steps", str(steps), "--epochs", str(epochs)]
    plain, disturbed = folder / "plain", folder / "disturbed"
    quiet = Watched(plain, [*flags, "--run-dir", str(plain)], launcher, "plain.txt")
    assert quiet.end(60 + steps / 20) == 0, quiet.output()

    began, done = time.monotonic(), []
    run = Watched(disturbed, [*flags, "--run-dir", str(disturbed)], launcher, "disturbed.txt")
    try:
        while len(done) < disturbances and time.monotonic() - began < seconds:
            run.until_step(run.step() + chance.randint(*STEPS_BETWEEN))
            # Every kind once, in random order, then at random.
            seen = {kind for kind, *_ in done}
            kind = chance.choice([kind for kind in KINDS if kind not in seen] or KINDS)
            run, lost, waited = disturb(run, kind, chance, launcher)
            done.append((kind, lost, round(waited, 1)))
            print(f"{len(done):3d}. {kind}: {lost} steps lost, {waited:.1f} s to the first step after it", flush=True)
        assert run.end(60 + steps / 20) == 0, run.output()[-3000:]
    finally:
        run.kill()

    mine, theirs = (load_checkpoint(checkpoint_path(place, steps))["state"] for place in (disturbed, plain))
    for part in theirs:
        assert same({part: mine[part]}, {part: theirs[part]}), f"{part} differs"
    assert numbers(disturbed) == numbers(plain)
    return {"steps": steps, "disturbances": done}


def disturb(run: Watched, kind: str, chance: random.Random, launcher: list[str]) -> tuple[Watched, int, float]:
    """Disturb the run; return the launch that continues, the steps lost, and the seconds until its first step."""
    ranks = run.ranks()
    victim = chance.choice(ranks)
    resumes = run.output().count("resumes   ")
    reached, began = run.step(), time.monotonic()
    if kind in ("kill", "damage"):
        send(victim, signal.SIGKILL)
        if kind == "damage":
            damage_newest(run.run_dir, chance.random())
    elif kind == "freeze":
        send(victim, signal.SIGSTOP)
    else:
        number = chance.choice([signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
        send(run.agent if "torchrun" in kind else victim, signal.SIGKILL if "kill" in kind else number)
        run.end(10)
        run = Watched(run.run_dir, ["--resume", str(run.run_dir)], launcher, run.log.name)
        resumes = 0
    run.until_line("resumes   ", resumes + 1)
    begins = int(run.output().split("resumes   after step ")[-1].split(" of ")[0].replace(",", ""))
    run.until(lambda: run.step() > begins, "a step after it")
    if "stop" in kind:
        assert begins >= reached, f"{kind} lost steps: {reached} was reached, {begins} saved"
    return run, max(0, reached - begins), time.monotonic() - began


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--disturbances", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--folder", type=lambda text: Path(text).resolve(), required=True)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True)
    report = soak(**vars(arguments))
    lost = sorted(lost for _, lost, _ in report["disturbances"])
    waited = sorted(waited for *_, waited in report["disturbances"])
    print(f"the same weights, optimizer and metrics after {report['steps']:,} steps and {len(lost)} disturbances")
    print(f"steps lost: median {lost[len(lost) // 2]}, most {lost[-1]}")
    print(f"seconds to the first step: median {waited[len(waited) // 2]}, most {waited[-1]}")
