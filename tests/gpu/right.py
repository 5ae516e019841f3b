"""The part "right": numbers, command line, NCCL with one rank; nothing is timed."""

from functools import partial

from tests.gpu.campaign import MODULE, QUICK, TORCHRUN, TRAIN, Campaign
from tests.helpers.parts import GPU

RUNS = {
    "fp16": "--recipe wide --precision fp16 --max-steps 200",
    "fp16 muon": "--recipe net-fast --precision fp16 --max-steps 100",
    "compile": "--recipe speed94 --compile --cuda-graph --max-steps 30",
}


def right(c: Campaign) -> None:
    """Check numbers, command line and NCCL, beside each other."""
    jobs = [
        partial(c.checks, "checks", [*MODULE, "tests.gpu.checks"], 300),
        partial(nccl, c),
        partial(captured, c),
        *[partial(train, c, name, flags) for name, flags in RUNS.items()],
    ]
    c.beside(8, jobs)


def train(c: Campaign, name: str, flags: str, pattern: str = "Finished Training") -> None:
    """Train in one process, to a run directory of this name."""
    c.expect(name, [*TRAIN, *QUICK, "--run-dir", c.work / name, *flags.split()], pattern=pattern)


def captured(c: Campaign) -> None:
    """Train on the device that the program chooses, and evaluate that run; then train as a CUDA graph, and continue."""
    train(c, "auto", "--max-steps 200", "1 process on NVIDIA" if GPU else "1 process on")
    train(c, "graph", "--max-steps 600 --cuda-graph")
    c.expect("graph goes on", [*TRAIN, "--resume", c.work / "graph", "--max-steps", 700], pattern="resume")
    evaluate = ["--dataset", "synthetic", "--evaluate", c.work / "auto" / "checkpoints" / "step-00000200.pt"]
    c.expect("evaluate", [*TRAIN, *evaluate], pattern="Accuracy of the network")


def nccl(c: Campaign) -> None:
    """Train over NCCL with one rank, eagerly and as a CUDA graph."""
    one = [*TORCHRUN, "--nproc_per_node=1", "train_ddp.py", *QUICK, "--run-dir"]
    c.expect("nccl", [*one, c.work / "nccl", "--max-steps", 100])
    c.expect("nccl graph", [*one, c.work / "nccl graph", "--max-steps", 100, "--cuda-graph"])
