"""The part "several": what one GPU cannot show; without a GPU, a smoke test with three small CPU ranks."""

import sys
from functools import partial

import torch

from tests.gpu.campaign import PLAIN_TORCHRUN, QUICK, Campaign
from tests.gpu.ranks import Ranks
from tests.helpers.measuring import images_per_second
from tests.helpers.parts import GPU
from tests.helpers.processes import ROOT, result

# A rank that is killed costs a new start of all: 16 s over gloo, to which CUDA's contexts and NCCL's connections come.
RESTART_SECONDS = 40


def several(c: Campaign) -> None:
    """Train with one process for each GPU: by the plain commands, then with all that may go wrong."""
    gpus = torch.cuda.device_count()
    if gpus == 1:
        c.say("GPUs", "FAIL this host has 1 GPU, and several needs 2: see right")
        return
    n = gpus or 3
    if GPU:
        ranks = Ranks(c, [str(ROOT / "train_ddp.py")], ["--device", "cuda"])
        recipes = {"tutorial": (3_125, 1.0), "resnet18": (200, n / 2)}
    else:
        small = ["-m", "tests.helpers.small"]
        ranks = Ranks(c, small, ["--device", "cpu"], 64, 12, 8, 20, ["--recipe", "net-fast"])
        recipes = {"tutorial": (80, 0.0), "net-fast": (40, 0.0)}
    for recipe, (steps, least) in recipes.items():
        c.attempt(recipe, partial(compare, ranks, recipe, n, steps, least))
        if c.results.get(f"{recipe} x {n}", "").startswith("FAIL"):
            return  # and so would the others end
    c.attempt("killed", partial(ranks.killed, n, RESTART_SECONDS if GPU else 90))
    timeless = [
        partial(c.attempt, "stopped", partial(ranks.stopped, n)),
        partial(c.attempt, "losses", partial(ranks.same_losses, sorted({1, 2, n}))),
        partial(c.attempt, "hooks", partial(ranks.hooks, n)),
        partial(c.attempt, "bits", partial(ranks.bits, n, nvls=0)),
    ]
    if GPU:
        timeless.append(partial(c.attempt, "bits with NVLS", partial(ranks.bits, n, nvls=1), must_pass=False))
    waiting = [
        partial(c.attempt, "frozen", partial(ranks.frozen, n)),
        partial(c.attempt, "asleep", partial(ranks.asleep, n, 30 if GPU else 4)),
        partial(c.attempt, "network error", partial(ranks.network_error, n)),
    ]
    c.beside(5 if GPU else 1, timeless)
    c.beside(3 if GPU else 1, waiting)


def compare(ranks: Ranks, recipe: str, n: int, steps: int, least: float) -> str:
    """Compare the plain commands of `n` processes, of one, and of one that is captured, by their images per second.

    The second half of the steps counts. `n` processes must be `least` times as fast as one.
    """
    c, rates, found = ranks.c, [], []
    captured = [(1, ["--cuda-graph"])] if GPU else []
    for processes, flags in [(n, []), (1, []), *captured]:
        name = " ".join([recipe, "x", str(processes), *flags])
        start = [*PLAIN_TORCHRUN, f"--nproc_per_node={processes}"] if processes > 1 else [sys.executable]
        script = [*ranks.script, *QUICK[:4], *ranks.flags, "--recipe", recipe, "--max-steps", steps, *flags]
        command = [*start, *script, "--log-steps", steps // 8, "--run-dir", c.work / name]
        c.expect(name, command, at_most=100, processes=processes)
        if c.results[name] != "PASS":
            return f"FAIL {name}: see there"
        rates.append(images_per_second(c.work / name, after=steps / 2))
        first = result(c.work / name)["first_step_seconds"]
        found.append(f"{name}: {rates[-1]:,.0f} images/s, first step {first:.1f} s")
    verdict = "PASS" if rates[0] >= least * rates[1] else f"FAIL not {least:g} times as fast as one process:"
    return f"{verdict} {'; '.join(found)}"
