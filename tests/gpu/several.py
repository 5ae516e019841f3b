"""The part "several": what one GPU cannot show; without a GPU, a smoke test with two small CPU ranks."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from cifar.metrics import seconds_of_training
from tests.gpu.campaign import QUICK, TORCHRUN, Campaign
from tests.gpu.ranks import Ranks
from tests.helpers.processes import ROOT

COUNTS = (1, 2, 4, 8)
# A rank that is killed may cost a new start of the processes, but not the 20 s that a stop may take to be noticed.
RESTART_SECONDS = 20

# Recipe, global batch with n processes, and steps, of which the second half counts.
RATES: dict[str, tuple[str, Callable[[int], int], int]] = {
    "speed94, 2000 in all": ("speed94", lambda n: 2000, 200),
    "speed94, 2000 each": ("speed94", lambda n: 2000 * n, 100),
    "resnet18, 256 each": ("resnet18", lambda n: 256 * n, 200),
}
SMOKE_RATES: dict[str, tuple[str, Callable[[int], int], int]] = {
    "net-fast, 64 in all": ("net-fast", lambda n: 64, 20),
    "net-fast, 64 each": ("net-fast", lambda n: 64 * n, 20),
}


def several(c: Campaign) -> None:
    """Check and time runs of 1, 2, 4 and 8 processes, as many as there are GPUs."""
    gpus = torch.cuda.device_count()
    if gpus == 1:
        c.say("GPUs", "FAIL this host has 1 GPU, and several needs 2: see right")
        return
    if gpus:
        ranks = Ranks(c, [str(ROOT / "train_ddp.py")], ["--device", "cuda"])
    else:
        small = ["-m", "tests.helpers.small"]
        ranks = Ranks(c, small, ["--device", "cpu"], global_batch=64, steps=12, local_batch=8, between=20)
    counts = [n for n in COUNTS if n <= (gpus or 2)]
    most = counts[-1]

    c.attempt("killed", lambda: ranks.killed(most, RESTART_SECONDS if gpus else 90))
    measure(ranks, counts, RATES if gpus else SMOKE_RATES, "bf16" if gpus else "fp32")

    def stopped() -> None:
        c.attempt("stopped", lambda: ranks.stopped(most, torchrun=True))
        c.attempt("resumed", lambda: ranks.resumed(most, most // 2))

    checks: list[Callable[[], None]] = [
        lambda: c.attempt("losses", lambda: ranks.same_losses(counts)),
        lambda: c.attempt("hooks", lambda: ranks.hooks(most)),
        stopped,
    ]
    c.at_once = len(checks) if gpus else 1  # here the clock does not matter
    with ThreadPoolExecutor(c.at_once) as pool:
        list(pool.map(lambda check: check(), checks))
    c.at_once = 1
    c.attempt("frozen", lambda: ranks.frozen(most))
    c.attempt("killed, timeout 10", lambda: ranks.survives(most, 60 if gpus else 6))


def measure(
    ranks: Ranks, counts: Sequence[int], rates: dict[str, tuple[str, Callable[[int], int], int]], precision: str
) -> None:
    """Print images/s of each training with each number of processes, and the efficiency against one process."""
    known: dict[tuple[str, int, int], float] = {}

    def rate(name: str, n: int) -> str:
        recipe, global_batch, steps = rates[name]
        key, alone = (recipe, global_batch(n), n), (recipe, global_batch(1), 1)
        if key not in known:
            known[key] = images_per_second(ranks, f"{name} x {n}", recipe, n, global_batch(n), steps, precision)
        efficiency = f"{100 * known[key] / (n * known[alone]):.0f} %" if alone in known else "unknown"
        return f"{known[key]:,.0f} images/s, efficiency {efficiency}"

    for n in counts:
        for name in rates:
            ranks.c.attempt(f"{name} x {n}", lambda name=name, n=n: rate(name, n))  # type: ignore[misc]


def images_per_second(
    ranks: Ranks, name: str, recipe: str, processes: int, global_batch: int, steps: int, precision: str
) -> float:
    """Train and return the images per second of the second half of the steps, without evaluation and checkpoints.

    Raises:
        RuntimeError: the training did not end well.
    """
    c = ranks.c
    flags = ["--recipe", recipe, "--local-batch-size", global_batch // processes, "--global-batch-size", global_batch,
             "--lr-scaling", "none", "--precision", precision, "--epochs", 1000, "--max-steps", steps,
             "--log-steps", min(25, steps // 4), "--timeout", 100, "--run-dir", c.work / name]  # fmt: skip
    command = [*TORCHRUN, f"--nproc_per_node={processes}", *ranks.script, *QUICK[:4], *ranks.flags, *flags]
    status, _ = c.run(name, command, at_most=100, processes=processes)
    if status:
        raise RuntimeError(f"status {status}" if status > 0 else "took too long")
    points = seconds_of_training(c.records(name), global_batch)
    (first, began), (last, ended) = next(point for point in points if point[0] >= steps / 2), points[-1]
    return (last - first) * global_batch / (ended - began)
