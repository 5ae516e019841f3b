"""The part "right": numbers, command line, ranks that share the GPU, NCCL with one rank; nothing is timed."""

import re
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from tests.gpu.campaign import QUICK, TORCHRUN, TRAIN, Campaign
from tests.gpu.ranks import Ranks


def right(c: Campaign) -> None:
    """Check numbers, command line, ranks and NCCL, beside each other."""
    gpus = torch.cuda.device_count()
    gpu = gpus > 0

    def trained(name: str, *flags: str, command: Sequence[str] = TRAIN, **expected: object) -> Callable[[], str]:
        full = [*command, *QUICK, "--run-dir", c.work / name, *flags]
        return lambda: c.expect(name, full, **expected)  # type: ignore[arg-type]

    def moves() -> None:
        trained("cpu", "--device", "cpu", "--max-steps", "100", pattern="1 process on CPU")()
        for name, device, steps in (("cpu to gpu", "cuda" if gpu else "cpu", "300"), ("gpu to cpu", "cpu", "350")):
            resume = ["--resume", c.work / "cpu", "--device", device, "--max-steps", steps]
            c.expect(name, [*TRAIN, *resume], pattern="changed .*--device" if gpu else "resume")
        checkpoint = c.work / "cpu" / "checkpoints" / "step-00000350.pt"
        c.expect(
            "evaluate", [*TRAIN, "--dataset", "synthetic", "--evaluate", checkpoint], pattern="Accuracy of the network"
        )

    def graphs() -> None:
        trained("graph", "--max-steps", "600", "--cuda-graph")()
        c.expect("graph goes on", [*TRAIN, "--resume", c.work / "graph", "--max-steps", "700"], pattern="resume")

    one = [*TORCHRUN, "--nproc_per_node=1", "train_ddp.py"]

    def nccl() -> None:
        trained("nccl", "--max-steps", "100", command=one)()
        trained("nccl graph", "--max-steps", "100", "--cuda-graph", command=one)()
        c.expect("nccl mistake", [*one, *QUICK, "--run-dir", c.work / "nccl"], 1, "error: ")
        trained(
            "nccl diverged", "--lr", "1e9", "--max-steps", "100", command=one, status=1, pattern="the loss became"
        )()

    ranks = Ranks(c, ["-m", "tests.gpu.shared_gpu"])

    def disturbed() -> None:
        # One after another: a frozen rank is looked for by the clock.
        c.attempt("killed", lambda: ranks.killed(2, limit=60))
        c.attempt("frozen", lambda: ranks.frozen(2))
        c.attempt("stopped", lambda: ranks.stopped(2, torchrun=False))

    def pytest() -> None:
        files = [f"tests/unit/test_{name}.py" for name in ("cuda_graph", "optim", "augment", "train_step", "precision")]
        c.expect("pytest", [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files], pattern="passed")

    def checks() -> None:
        _, output = c.run("checks", [sys.executable, "-m", "tests.gpu.checks"], at_most=300)
        for verdict, name, said in re.findall(r"^(PASS|FAIL)  (.*?) \(\d+ s\): (.*)$", output, re.M):
            c.say(name, f"{verdict} {said}")
        if not re.search(r"^\d+ failed", output, re.M):
            c.say("checks", f"FAIL did not finish: {output[-300:]}")

    jobs: list[Callable[[], object]] = [
        checks, nccl, moves, graphs, pytest, disturbed,
        lambda: c.attempt("losses", lambda: ranks.same_losses((1, 2, 4))),
        lambda: c.attempt("hooks", lambda: ranks.hooks(2)),
    ]  # fmt: skip
    if gpu:
        jobs += [
            lambda: c.expect(
                "nccl hooks", [*TORCHRUN, "--nproc_per_node=1", "-m", "tests.gpu.nccl_one_rank"], pattern="buckets fit"
            ),
            lambda: c.expect(
                "too many ranks",
                [*TORCHRUN, f"--nproc_per_node={gpus + 1}", "train_ddp.py", *QUICK],
                status=1,
                pattern=f"which has {gpus} GPU",
            ),
        ]
    jobs += [
        trained("auto", "--max-steps", "200", pattern="1 process on NVIDIA" if gpu else "1 process on"),
        trained("fp16", "--recipe", "wide", "--precision", "fp16", "--max-steps", "200"),
        trained("fp16 muon", "--recipe", "net-fast", "--precision", "fp16", "--max-steps", "100"),
        trained("compile", "--recipe", "speed94", "--precision", "bf16", "--compile", "--max-steps", "30"),
        trained("compile graph", "--recipe", "speed94", "--compile", "--cuda-graph", "--max-steps", "30"),
        lambda: c.expect("explain", [sys.executable, "-m", "cifar.explain", *QUICK[:2]], pattern="(?i)zero_grad"),
    ]  # fmt: skip
    c.at_once = 8
    with ThreadPoolExecutor(c.at_once) as pool:
        for future in [pool.submit(job) for job in jobs]:
            try:
                future.result()
            except Exception as error:
                c.say(f"{type(error).__name__}", f"FAIL {error}")
