"""The benchmarks: which command of ours runs against which baseline, and what is compared."""

from collections.abc import Callable

from tests.benchmarks.measure import OURS, Comparison, Metric, Numbers
from tests.benchmarks.runner import FIRST_STEP, Runner, first_reaching
from tests.helpers.measuring import Finished, images_per_second
from tests.helpers.processes import result

LOOP = "tutorial's loop"
TO_ACCURACY = Metric("training", "s"), Metric("test accuracy", "%", "none", 2)


def tutorial(runner: Runner) -> list[Comparison]:
    """the tutorial recipe against the tutorial's loop: equal numbers of steps, one process"""
    steps = 3_000 if runner.quick else 50_000

    def ours(seed: int) -> Numbers:
        _, run_dir = runner.train("--recipe", "tutorial", "--max-steps", steps, "--seed", seed)
        got = result(run_dir)
        return {"training": got["train_seconds"], "test accuracy": 100 * got["test_accuracy"]}

    def loop(seed: int) -> Numbers:
        _, found = runner.baseline("tutorial", "--steps", steps, "--seed", seed)
        return {"training": found["seconds"], "test accuracy": 100 * found["accuracy"]}

    return [Comparison(f"{steps:,} steps of 4 images, one process", {OURS: ours, LOOP: loop}, TO_ACCURACY)]


def batch512(runner: Runner) -> list[Comparison]:
    """the Net at local batch 512 with crop and flip against torchvision's DataLoader pipeline"""
    # An epoch has 97 steps; the second one is measured.
    steps, skip = (60, 20) if runner.quick else (194, 97)

    def ours(seed: int) -> Numbers:
        work = ("--recipe", "wide", "--model", "net", "--local-batch-size", 512, "--lr-scaling", "none", "--epochs", 2)
        _, run_dir = runner.train(*work, "--max-steps", steps, "--log-steps", skip, "--seed", seed)
        return {"images/s": images_per_second(run_dir)}

    def pipeline(workers: int) -> Callable[[int], Numbers]:
        def torchvision(seed: int) -> Numbers:
            work = ("--workers", workers, "--steps", steps, "--skip", skip, "--seed", seed)
            _, found = runner.baseline("pipeline", *work)
            return {"images/s": found["images_per_second"]}

        return torchvision

    programs = {OURS: ours, "torchvision, 0 workers": pipeline(0), "torchvision, 2 workers": pipeline(2)}
    metrics = (Metric("images/s", "1/s", "more", 0),)
    return [Comparison("Net, local batch 512, crop and flip, one process", programs, metrics)]


def sixty(runner: Runner) -> list[Comparison]:
    """training seconds until 60 % test accuracy: the recipe net-fast against the tutorial's loop"""
    target = 0.4 if runner.quick else 0.6

    def ours(seed: int) -> Numbers:
        _, run_dir = runner.train("--recipe", "net-fast", "--seed", seed)
        seconds, accuracy = first_reaching(run_dir, target)
        return {"training": seconds, "test accuracy": 100 * accuracy}

    def loop(seed: int) -> Numbers:
        _, found = runner.baseline("tutorial", "--target", target, "--seed", seed)
        return {"training": found["seconds"], "test accuracy": 100 * found["accuracy"]}

    title = f"training until {100 * target:.0f} % test accuracy, one process, another seed in each round"
    return [Comparison(title, {OURS: ours, LOOP: loop}, TO_ACCURACY)]


def ddp(runner: Runner) -> list[Comparison]:
    """overhead of data and records with 2 processes, against a bare DDP loop over ready tensors"""

    def compare(size: int, augment: str, recipe: tuple[object, ...], steps: int, skip: int) -> Comparison:

        def ours(seed: int) -> Numbers:
            flags = (*recipe, "--lr-scaling", "none", "--max-steps", steps, "--log-steps", skip, "--device", "cpu")
            how = ("--local-batch-size", size, "--seed", seed)
            _, run_dir = runner.train(*flags, *how, processes=2, threads=1)
            return {"a step": 1000 * 2 * size / images_per_second(run_dir)}

        def bare(seed: int) -> Numbers:
            how = ("--local-batch-size", size, "--steps", steps, "--skip", skip, "--seed", seed)
            _, found = runner.baseline("bare", *how, processes=2, threads=1)
            return {"a step": found["ms_per_step"]}

        title = f"2 processes, local batch {size}, {augment}"
        return Comparison(title, {OURS: ours, "bare DDP": bare}, (Metric("a step", "ms", "cost", 3),), rounds=5)

    few, many = ((60, 20), (1_500, 500)) if runner.quick else ((194, 97), (6_000, 1_000))
    return [
        compare(4, "no augmentation", ("--recipe", "tutorial"), *many),
        compare(256, "crop-flip", ("--recipe", "wide", "--model", "net"), *few),
    ]


def start(runner: Runner) -> list[Comparison]:
    """seconds from the start of the process to the first step"""

    def first_step(process: Finished) -> Numbers:
        assert process.mark_seconds is not None, f"the program does not print {FIRST_STEP!r}"
        return {"first step": process.mark_seconds}

    def ours(seed: int) -> Numbers:
        flags = ("--max-steps", 1, "--log-steps", 1, "--seed", seed)
        return first_step(runner.train(*flags, mark=FIRST_STEP)[0])

    def loop(seed: int) -> Numbers:
        return first_step(runner.baseline("tutorial", "--steps", 1, "--seed", seed, mark=FIRST_STEP)[0])

    seconds = Metric("first step", "s", digits=2)
    return [Comparison("from the start of the process", {OURS: ours, LOOP: loop}, (seconds,), rounds=5)]


BENCHMARKS: dict[str, Callable[[Runner], list[Comparison]]] = {
    function.__name__: function for function in (tutorial, batch512, sixty, ddp, start)
}
