"""The part "several": what one GPU cannot show; without a GPU, a smoke test with three small CPU ranks."""

import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from cifar.compare import seconds_of_training
from tests.gpu.campaign import PLAIN_TORCHRUN, QUICK, Campaign
from tests.gpu.ranks import Ranks
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
    if gpus:
        ranks = Ranks(c, [str(ROOT / "train_ddp.py")], ["--device", "cuda"])
        recipes = {"tutorial": (3_125, 1.0), "resnet18": (200, n / 2)}
    else:
        small = ["-m", "tests.helpers.small"]
        ranks = Ranks(c, small, ["--device", "cpu"], 64, 12, 8, 20, ["--recipe", "net-fast"])
        recipes = {"tutorial": (80, 0.0), "net-fast": (40, 0.0)}
    for recipe, (steps, least) in recipes.items():
        c.attempt(recipe, lambda recipe=recipe, steps=steps, least=least: compare(ranks, recipe, n, steps, least))  # type: ignore[misc]
        if c.results.get(f"{recipe} x {n}", "").startswith("FAIL"):
            return  # and so would the others end
    c.attempt("killed", lambda: ranks.killed(n, RESTART_SECONDS if gpus else 90))
    at_once(c, 5 if gpus else 1, [  # where the clock does not matter
        lambda: c.attempt("stopped", lambda: ranks.stopped(n, torchrun=True)),
        lambda: c.attempt("losses", lambda: ranks.same_losses(sorted({1, 2, n}))),
        lambda: c.attempt("hooks", lambda: ranks.hooks(n)),
        lambda: c.attempt("bits", lambda: ranks.bits(n, nvls=0)),
        *bool(gpus) * [lambda: c.attempt("bits with NVLS", lambda: ranks.bits(n, nvls=1), must_pass=False)],
    ])  # fmt: skip
    at_once(c, 3 if gpus else 1, [  # these wait
        lambda: c.attempt("frozen", lambda: ranks.frozen(n)),
        lambda: c.attempt("asleep", lambda: ranks.asleep(n, 30 if gpus else 4)),
        lambda: c.attempt("network error", lambda: ranks.network_error(n)),
    ])  # fmt: skip


def at_once(c: Campaign, number: int, checks: list[Callable[[], None]]) -> None:
    """Run checks, `number` of them at once."""
    c.at_once = number
    with ThreadPoolExecutor(number) as pool:
        list(pool.map(lambda check: check(), checks))
    c.at_once = 1


def compare(ranks: Ranks, recipe: str, n: int, steps: int, least: float) -> str:
    """Compare the plain commands of `n` processes, of one, and of one that is captured, by their images per second.

    The second half of the steps counts. `n` processes must be `least` times as fast as one, and one on each GPU.
    """
    c, rates, found, verdict = ranks.c, [], [], "PASS"
    captured = [(1, ["--cuda-graph"])] if torch.cuda.is_available() else []
    for processes, flags in [(n, []), (1, []), *captured]:
        name = " ".join([recipe, "x", str(processes), *flags])
        start = [*PLAIN_TORCHRUN, f"--nproc_per_node={processes}"] if processes > 1 else [sys.executable]
        script = [*ranks.script, *QUICK[:4], *ranks.flags, "--recipe", recipe, "--max-steps", steps, *flags]
        command = [*start, *script, "--log-steps", steps // 8, "--run-dir", c.work / name]
        counts: Counter[str] = Counter()
        with ThreadPoolExecutor(1) as pool:
            training = pool.submit(c.expect, name, command, at_most=100, processes=processes)
            while not training.done():
                counts = max(counts, processes_on_gpus(), key=Counter.total)
                time.sleep(1)
        training.result()
        if c.results[name] != "PASS":
            return f"FAIL {name}: see there"
        run = result(c.work / name)
        points = seconds_of_training(c.records(name), run["global_batch_size"])
        (first, began), (last, ended) = next(point for point in points if point[0] >= steps / 2), points[-1]
        rates.append((last - first) * run["global_batch_size"] / (ended - began))
        on_gpus = f" {list(counts.values())} processes on GPUs," if counts else ""  # containers often hide them
        found.append(f"{name}: {rates[-1]:,.0f} images/s,{on_gpus} first step {run['first_step_seconds']:.1f} s")
        if counts and list(counts.values()) != [1] * processes:
            verdict = "FAIL more than a process for each GPU:"
    if rates[0] < least * rates[1]:
        verdict = f"FAIL not {least:g} times as fast as one process:"
    return f"{verdict} {'; '.join(found)}"


def processes_on_gpus() -> Counter[str]:
    """Return the number of processes on each GPU that has any, by the GPU's ID; none where they cannot be seen."""
    if not torch.cuda.is_available():
        return Counter()
    query = ["nvidia-smi", "--query-compute-apps=gpu_uuid", "--format=csv,noheader"]
    return Counter(subprocess.run(query, capture_output=True, text=True, check=True).stdout.split())
