"""Time the training steps of every recipe on a GPU: python -m tests.gpu.timings --json FILE; one line per case.

Each step includes its loader. "host" is the time until the last kernel is launched, "busy" the sum of the kernels'
times: a step near the first is limited by the host, one near the second by the device.
"""

import argparse
import contextlib
import json
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from cifar.checkpoint import copy_to_host
from cifar.data import DeviceImages, EvalLoader
from cifar.evaluation import evaluate
from tests.gpu.parts import CLASSES, RECIPES, Parts, random_images

STEPS = {"tutorial": 400, "wide": 200, "net-fast": 300, "resnet18": 40, "speed94": 24, "speed96": 24}
WINDOWS = 5


def now() -> float:
    """Return seconds, once the device has done everything."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(parts: Parts, steps: int) -> dict[str, Any]:
    """Return the milliseconds of a step: the median and the range of several windows of `steps` steps."""
    began = now()
    parts.steps(1)
    first = now() - began
    parts.steps(max(5, steps // 4))
    windows, launched = [], []
    for _ in range(WINDOWS):
        began = now()
        parts.steps(steps)
        launched.append((time.perf_counter() - began) / steps)
        windows.append((now() - began) / steps)
    step = statistics.median(windows)
    numbers: dict[str, Any] = {
        "step_ms": 1e3 * step, "least_ms": 1e3 * min(windows), "most_ms": 1e3 * max(windows),
        "host_ms": 1e3 * statistics.median(launched), "images_per_second": parts.plan.global_batch_size / step,
        "first_step_s": first,
    }  # fmt: skip
    return numbers | (_profile(parts, max(4, min(20, steps // 4))) if torch.cuda.is_available() else {})


def _profile(parts: Parts, count: int) -> dict[str, Any]:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        parts.steps(count)
        torch.cuda.synchronize()
    totals: dict[str, list[float]] = {}
    for event in seen.events():
        if str(event.device_type).endswith("CUDA"):
            totals.setdefault(event.name, []).append(event.device_time_total / 1e3 / count)
    top = sorted(((sum(each), len(each) / count, name[:100]) for name, each in totals.items()), reverse=True)
    return {
        "kernels": sum(len(each) for each in totals.values()) / count,
        "busy_ms": sum(sum(each) for each in totals.values()),
        "top": top[:15],
    }


def others(recipe: str) -> dict[str, float]:
    """Return the milliseconds of what is not a step: evaluation, a checkpoint's copy, an epoch's tables, an update."""
    parts = Parts(recipe, "cuda" if torch.cuda.is_available() else "cpu", "bf16").steps(3)
    test = EvalLoader(DeviceImages(*random_images(10_000, 1), CLASSES, parts.runtime.device), 0, 1)
    jobs: dict[str, Callable[[], Any]] = {
        "evaluation": lambda: evaluate(parts.model, test, parts.runtime),
        "evaluation with views": lambda: evaluate(parts.model, test, parts.runtime, "crop"),
        "checkpoint copy": lambda: copy_to_host(parts.state.state_dict([parts.state.rank_state()])),
        "epoch's permutation and augmentation": lambda: parts.loader.set_epoch(1),
        "1,024 images": lambda: parts.train[torch.arange(1024, device=parts.runtime.device)],
        "optimizer": parts.optimizer.step,
    }
    numbers = {}
    for name, job in jobs.items():
        job()
        times = []
        for _ in range(5):
            began = now()
            job()
            times.append(now() - began)
        numbers[f"{recipe}: {name}"] = 1e3 * statistics.median(times)
    return numbers


@contextlib.contextmanager
def variant(name: str) -> Iterator[None]:
    """Run a block with a change that is under consideration."""
    if name == "cudnn.benchmark":
        torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = False


CASES = [
    *[(recipe, "bf16", mode, "") for recipe in ("speed94", "resnet18", "speed96") for mode in ("plain", "graph")],
    *[(recipe, "fp32", mode, "") for recipe in ("tutorial", "net-fast", "wide") for mode in ("plain", "graph")],
    *[(recipe, "bf16", "graph", "") for recipe in ("tutorial", "net-fast", "wide")],
    ("speed94", "fp32", "plain", ""),
    *[("speed94", "bf16", mode, "cudnn.benchmark") for mode in ("plain", "graph")],
    *[(recipe, "bf16", "compile", "") for recipe in ("speed94", "resnet18")],
    ("speed94", "bf16", "compile-graph", "cudnn.benchmark"),
    ("speed96", "bf16", "compile-graph", "cudnn.benchmark"),
    ("resnet18", "fp32", "plain", ""),
    ("speed96", "fp32", "plain", ""),
    ("resnet18", "bf16", "compile-graph", "cudnn.benchmark"),
]


def main() -> None:
    """Time the cases, the most telling first, until `--seconds` have passed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--recipe", nargs="*", default=list(RECIPES))
    parser.add_argument("--seconds", type=float, default=480, help="begin no case after that long")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of steps")
    args = parser.parse_args()
    began, results = time.perf_counter(), []
    print(f"{'':44} {'step':>9} {'range':>17} {'host':>8} {'kernels':>8} {'busy':>8} {'images/s':>11} {'first':>7}")
    for recipe, precision, mode, changed in CASES:
        name = " ".join(filter(None, (recipe, precision, mode, changed)))
        if recipe not in args.recipe:
            continue
        if time.perf_counter() - began > args.seconds:
            print(f"{name:44} left out: no time")
            continue
        try:
            with variant(changed):
                parts = Parts(recipe, args.device, precision, graph="graph" in mode, compile="compile" in mode)
                numbers = measure(parts, max(2, int(STEPS[recipe] * args.scale)))
        except Exception as error:
            traceback.print_exc()
            print(f"{name:44} FAILED {type(error).__name__}: {str(error)[:150]}")
            continue
        results.append({"case": name, **numbers})
        print(
            f"{name:44} {numbers['step_ms']:6.3f} ms {numbers['least_ms']:7.3f} to {numbers['most_ms']:6.3f} "
            f"{numbers['host_ms']:5.3f} ms {numbers.get('kernels', 0):8.0f} {numbers.get('busy_ms', 0):5.2f} ms "
            f"{numbers['images_per_second']:11,.0f} {numbers['first_step_s']:5.1f} s",
            flush=True,
        )
        del parts
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if args.json:
            args.json.write_text(json.dumps(results, indent=1))
    for recipe in ("tutorial", "speed94", "resnet18"):
        if recipe in args.recipe and time.perf_counter() - began < args.seconds:
            numbers = others(recipe)
            results.append({"case": f"{recipe} others", **numbers})
            for name, value in numbers.items():
                print(f"{name:52} {value:9.3f} ms", flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
