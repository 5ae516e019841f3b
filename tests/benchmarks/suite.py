"""The benchmarks: which command of ours runs against which peer, and what is compared."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.children import peer, run_windows, seconds_until, steady, train
from tests.benchmarks.measure import OURS, Numbers, Quantity, Race

LOOP = "tutorial's loop"


@dataclass(frozen=True)
class Settings:
    """What the command line chose.

    Attributes:
        folder: for run folders; an absolute path, as is `data_dir`.
        quick: little enough work for minutes, and too little for numbers worth quoting.
        steps: of the benchmark `tutorial`, or None for its own.
    """

    data_dir: Path
    folder: Path
    quick: bool = False
    steps: int | None = None


def tutorial(settings: Settings) -> list[Race]:
    """the tutorial recipe against the tutorial's loop: as many steps, one process"""
    steps = settings.steps or (3_000 if settings.quick else 50_000)

    def numbers(seconds: float, whole: float, accuracy: float) -> Numbers:
        step = 1000 * seconds / steps
        return {"training": seconds, "a step": step, "whole process": whole, "test accuracy": 100 * accuracy}

    def ours(seed: int) -> Numbers:
        epochs = -(-steps // 12_500)
        flags = ("--recipe", "tutorial", "--epochs", epochs, "--max-steps", steps, "--seed", seed)
        child, run_dir = train(settings.folder, settings.data_dir, *flags)
        result = json.loads((run_dir / "result.json").read_text())
        return numbers(result["train_seconds"], child.seconds, result["test_accuracy"])

    def loop(seed: int) -> Numbers:
        child = peer(settings.folder, "tutorial", "--data-dir", settings.data_dir, "--steps", steps, "--seed", seed)
        result = child.last_json()
        return numbers(result["seconds"], child.seconds, result["accuracy"])

    quantities = (
        Quantity("training", "s"),
        Quantity("a step", "ms", digits=3),
        Quantity("whole process", "s"),
        Quantity("test accuracy", "%", "none", 2),
    )
    return [Race(f"{steps:,} steps of 4 images, one process", {OURS: ours, LOOP: loop}, quantities)]


def batch512(settings: Settings) -> list[Race]:
    """the Net at local batch 512 with crop and flip against torchvision's DataLoader pipeline"""
    # 97 steps are an epoch: the second one is measured.
    steps, skip = (60, 20) if settings.quick else (194, 97)
    name = "images/s"

    def ours(seed: int) -> Numbers:
        flags = ("--recipe", "wide", "--model", "net", "--local-batch-size", 512, "--lr-scaling", "none", "--epochs", 2)
        rest = ("--max-steps", steps, "--log-steps", skip, "--seed", seed)
        _, run_dir = train(settings.folder, settings.data_dir, *flags, "--warmup-epochs", 1, *rest)
        return {name: steady(run_windows(run_dir))}

    def workers(count: int) -> Callable[[int], Numbers]:
        def torchvision(seed: int) -> Numbers:
            flags = ("--data-dir", settings.data_dir, "--workers", count, "--steps", steps, "--skip", skip)
            return {name: peer(settings.folder, "pipeline", *flags, "--seed", seed).last_json()["images_per_second"]}

        return torchvision

    contenders = {OURS: ours, "torchvision, 0 workers": workers(0), "torchvision, 2 workers": workers(2)}
    return [Race("Net, local batch 512, crop and flip, one process", contenders, (Quantity(name, "1/s", "more", 0),))]


def sixty(settings: Settings) -> list[Race]:
    """seconds of training until 60 % test accuracy: the recipe net-fast against the tutorial's loop"""
    target = 0.4 if settings.quick else 0.6

    def numbers(seconds: float, epochs: float, accuracy: float) -> Numbers:
        return {"training": seconds, "epochs": epochs, "test accuracy": 100 * accuracy}

    def ours(seed: int) -> Numbers:
        _, run_dir = train(settings.folder, settings.data_dir, "--recipe", "net-fast", "--seed", seed)
        reached = seconds_until(run_windows(run_dir), target)
        return numbers(reached.seconds, round(reached.images / 50_000), reached.accuracy or 0.0)

    def loop(seed: int) -> Numbers:
        flags = ("--data-dir", settings.data_dir, "--target", target, "--seed", seed)
        result = peer(settings.folder, "tutorial", *flags).last_json()
        return numbers(result["seconds"], result["epochs"], result["accuracy"])

    quantities = (
        Quantity("training", "s"),
        Quantity("epochs", "passes over the images", "none", 0),
        Quantity("test accuracy", "%", "none", 2),
    )
    title = f"training until {100 * target:.0f} % test accuracy, one process, a seed a round"
    return [Race(title, {OURS: ours, LOOP: loop}, quantities)]


def ddp(settings: Settings) -> list[Race]:
    """what data and records cost at 2 processes: against a bare DDP loop over ready tensors"""
    name = "a step"

    def race(size: int, recipe: tuple[object, ...], steps: int, skip: int) -> Race:
        # Two processes need two GPUs; where there are fewer, both contenders stay on the CPU.
        import torch

        device = "auto" if torch.cuda.device_count() > 1 else "cpu"
        work = ("--local-batch-size", size, "--device", device, "--log-steps", skip)

        def ours(seed: int) -> Numbers:
            flags = (*recipe, *work, "--max-steps", steps, "--seed", seed)
            _, run_dir = train(settings.folder, settings.data_dir, *flags, processes=2, threads=1)
            return {name: 1000 * 2 * size / steady(run_windows(run_dir))}

        def bare(seed: int) -> Numbers:
            flags = (*work, "--steps", steps, "--skip", skip, "--seed", seed)
            child = peer(settings.folder, "bare", *flags, processes=2, threads=1)
            return {name: child.last_json()["ms_per_step"]}

        title = f"2 processes, local batch {size}, {recipe[-1]}"
        return Race(title, {OURS: ours, "bare DDP": bare}, (Quantity(name, "ms", "cost", 3),), rounds=5)

    plain = ("--lr-scaling", "none", "--recipe", "tutorial")
    augmented = ("--model", "net", "--recipe", "wide", "--lr-scaling", "none", "--augment", "crop-flip")
    few, many = ((60, 20), (1_500, 500)) if settings.quick else ((194, 97), (6_000, 1_000))
    return [race(4, plain, *many), race(256, augmented, *few)]


def start(settings: Settings) -> list[Race]:
    """seconds from the start of the process to the first step, and peak memory of a tutorial run"""

    def first_step(seed: int) -> Numbers:
        flags = ("--max-steps", 1, "--log-steps", 1, "--seed", seed)
        child, _ = train(settings.folder, settings.data_dir, *flags)
        assert child.first_step is not None, "train_ddp.py has changed its words for the first step"
        return {"first step": child.first_step}

    def loop_first_step(seed: int) -> Numbers:
        flags = ("--data-dir", settings.data_dir, "--steps", 1, "--seed", seed)
        child = peer(settings.folder, "tutorial", *flags)
        assert child.first_step is not None, "peers.py has changed its words for the first step"
        return {"first step": child.first_step}

    steps = 500 if settings.quick else 3_000  # to the end of the test, which for both needs more than training

    def memory(seed: int) -> Numbers:
        flags = ("--max-steps", steps, "--seed", seed)
        return {"peak memory": train(settings.folder, settings.data_dir, *flags, memory=True)[0].peak_mb or 0.0}

    def loop_memory(seed: int) -> Numbers:
        flags = ("--data-dir", settings.data_dir, "--steps", steps, "--seed", seed)
        return {"peak memory": peer(settings.folder, "tutorial", *flags, memory=True).peak_mb or 0.0}

    seconds, megabytes = Quantity("first step", "s", digits=2), Quantity("peak memory", "MB", digits=0)
    return [
        Race("from the start of the process", {OURS: first_step, LOOP: loop_first_step}, (seconds,), rounds=5),
        Race("with all worker processes", {OURS: memory, LOOP: loop_memory}, (megabytes,)),
    ]


BENCHMARKS: dict[str, Callable[[Settings], list[Race]]] = {
    function.__name__: function for function in (tutorial, batch512, sixty, ddp, start)
}
