"""The benchmarks: which command of ours runs against which baseline, and what is compared."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.measure import OURS, Comparison, Metric, Numbers
from tests.benchmarks.runner import baseline, first_reaching, images_per_second, train

LOOP = "tutorial's loop"


@dataclass(frozen=True)
class Settings:
    """Choices of the command line.

    Attributes:
        data_dir: holds cifar-10-batches-py; an absolute path.
        directory: for run directories; an absolute path.
        quick: do little work, too little for numbers worth quoting.
    """

    data_dir: Path
    directory: Path
    quick: bool = False


def tutorial(settings: Settings) -> list[Comparison]:
    """the tutorial recipe against the tutorial's loop: equal numbers of steps, one process"""
    steps = 3_000 if settings.quick else 50_000

    def numbers(seconds: float, process_seconds: float, accuracy: float) -> Numbers:
        return {
            "training": seconds,
            "a step": 1000 * seconds / steps,
            "whole process": process_seconds,
            "test accuracy": 100 * accuracy,
        }

    def ours(seed: int) -> Numbers:
        flags = ("--recipe", "tutorial", "--max-steps", steps, "--seed", seed)
        process, run_dir = train(settings.directory, settings.data_dir, *flags)
        result = json.loads((run_dir / "result.json").read_text())
        return numbers(result["train_seconds"], process.seconds, result["test_accuracy"])

    def loop(seed: int) -> Numbers:
        flags = ("--data-dir", settings.data_dir, "--steps", steps, "--seed", seed)
        process = baseline(settings.directory, "tutorial", *flags)
        result = process.last_json()
        return numbers(result["seconds"], process.seconds, result["accuracy"])

    metrics = (
        Metric("training", "s"),
        Metric("a step", "ms", digits=3),
        Metric("whole process", "s"),
        Metric("test accuracy", "%", "none", 2),
    )
    return [Comparison(f"{steps:,} steps of 4 images, one process", {OURS: ours, LOOP: loop}, metrics)]


def batch512(settings: Settings) -> list[Comparison]:
    """the Net at local batch 512 with crop and flip against torchvision's DataLoader pipeline"""
    # An epoch has 97 steps; the second one is measured.
    steps, skip = (60, 20) if settings.quick else (194, 97)

    def ours(seed: int) -> Numbers:
        flags = ("--recipe", "wide", "--model", "net", "--local-batch-size", 512, "--lr-scaling", "none", "--epochs", 2)
        _, run_dir = train(
            settings.directory, settings.data_dir, *flags, "--max-steps", steps, "--log-steps", skip, "--seed", seed
        )
        return {"images/s": images_per_second(run_dir)}

    def pipeline(workers: int) -> Callable[[int], Numbers]:
        def torchvision(seed: int) -> Numbers:
            flags = ("--data-dir", settings.data_dir, "--workers", workers, "--steps", steps, "--skip", skip)
            result = baseline(settings.directory, "pipeline", *flags, "--seed", seed).last_json()
            return {"images/s": result["images_per_second"]}

        return torchvision

    programs = {OURS: ours, "torchvision, 0 workers": pipeline(0), "torchvision, 2 workers": pipeline(2)}
    metrics = (Metric("images/s", "1/s", "more", 0),)
    return [Comparison("Net, local batch 512, crop and flip, one process", programs, metrics)]


def sixty(settings: Settings) -> list[Comparison]:
    """training seconds until 60 % test accuracy: the recipe net-fast against the tutorial's loop"""
    target = 0.4 if settings.quick else 0.6

    def numbers(seconds: float, epochs: float, accuracy: float) -> Numbers:
        return {"training": seconds, "epochs": epochs, "test accuracy": 100 * accuracy}

    def ours(seed: int) -> Numbers:
        _, run_dir = train(settings.directory, settings.data_dir, "--recipe", "net-fast", "--seed", seed)
        images, seconds, accuracy = first_reaching(run_dir, target)
        return numbers(seconds, round(images / 50_000), accuracy)

    def loop(seed: int) -> Numbers:
        flags = ("--data-dir", settings.data_dir, "--target", target, "--seed", seed)
        result = baseline(settings.directory, "tutorial", *flags).last_json()
        return numbers(result["seconds"], result["epochs"], result["accuracy"])

    metrics = (
        Metric("training", "s"),
        Metric("epochs", "passes over the images", "none", 0),
        Metric("test accuracy", "%", "none", 2),
    )
    title = f"training until {100 * target:.0f} % test accuracy, one process, another seed in each round"
    return [Comparison(title, {OURS: ours, LOOP: loop}, metrics)]


def ddp(settings: Settings) -> list[Comparison]:
    """overhead of data and records with 2 processes, against a bare DDP loop over ready tensors"""
    import torch

    device = "auto" if torch.cuda.device_count() > 1 else "cpu"  # two processes need two GPUs

    def compare(size: int, augment: str, recipe: tuple[object, ...], steps: int, skip: int) -> Comparison:
        work = ("--local-batch-size", size, "--device", device, "--log-steps", skip)

        def ours(seed: int) -> Numbers:
            flags = (*recipe, *work, "--lr-scaling", "none", "--max-steps", steps, "--seed", seed)
            _, run_dir = train(settings.directory, settings.data_dir, *flags, processes=2, threads=1)
            return {"a step": 1000 * 2 * size / images_per_second(run_dir)}

        def bare(seed: int) -> Numbers:
            flags = (*work, "--steps", steps, "--skip", skip, "--seed", seed)
            process = baseline(settings.directory, "bare", *flags, processes=2, threads=1)
            return {"a step": process.last_json()["ms_per_step"]}

        title = f"2 processes, local batch {size}, {augment}"
        return Comparison(title, {OURS: ours, "bare DDP": bare}, (Metric("a step", "ms", "cost", 3),), rounds=5)

    few, many = ((60, 20), (1_500, 500)) if settings.quick else ((194, 97), (6_000, 1_000))
    return [
        compare(4, "no augmentation", ("--recipe", "tutorial"), *many),
        compare(256, "crop-flip", ("--recipe", "wide", "--model", "net"), *few),
    ]


def start(settings: Settings) -> list[Comparison]:
    """seconds from the start of the process to the first step, and the peak memory of a tutorial run"""
    data = ("--data-dir", settings.data_dir)

    def first_step(seed: int) -> Numbers:
        flags = ("--max-steps", 1, "--log-steps", 1, "--seed", seed)
        process, _ = train(settings.directory, settings.data_dir, *flags)
        assert process.first_step is not None, "train_ddp.py does not print the line FIRST_STEP"
        return {"first step": process.first_step}

    def loop_first_step(seed: int) -> Numbers:
        process = baseline(settings.directory, "tutorial", *data, "--steps", 1, "--seed", seed)
        assert process.first_step is not None, "baselines.py does not print the line FIRST_STEP"
        return {"first step": process.first_step}

    steps = 500 if settings.quick else 3_000  # through the test, which takes more memory than training

    def memory(seed: int) -> Numbers:
        flags = ("--max-steps", steps, "--seed", seed)
        return {"peak memory": train(settings.directory, settings.data_dir, *flags, memory=True)[0].peak_mb or 0.0}

    def loop_memory(seed: int) -> Numbers:
        flags = (*data, "--steps", steps, "--seed", seed)
        return {"peak memory": baseline(settings.directory, "tutorial", *flags, memory=True).peak_mb or 0.0}

    seconds, megabytes = Metric("first step", "s", digits=2), Metric("peak memory", "MB", digits=0)
    return [
        Comparison("from the start of the process", {OURS: first_step, LOOP: loop_first_step}, (seconds,), rounds=5),
        Comparison("with all worker processes", {OURS: memory, LOOP: loop_memory}, (megabytes,)),
    ]


BENCHMARKS: dict[str, Callable[[Settings], list[Comparison]]] = {
    function.__name__: function for function in (tutorial, batch512, sixty, ddp, start)
}
