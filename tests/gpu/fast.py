"""The part "fast": the step times of every recipe, eager, captured and compiled; where the device's time goes.

Each step includes its loader. "host" is the time until the last kernel is launched, "busy" the sum of the kernels'
times: a step near the first is limited by the host, one near the second by the device.
"""

import json
import time
from functools import partial
from typing import Any

import torch

from tests.gpu.campaign import Campaign
from tests.helpers.measuring import now, spread
from tests.helpers.parts import DEVICE, GPU, Parts

STEPS = {"tutorial": 400, "wide": 200, "net-fast": 300, "resnet18": 40, "speed94": 24, "speed96": 24}
WINDOWS = 5
# The most telling first: recipe, precision, mode, and whether cuDNN tries its kernels.
CASES = [
    *[(recipe, "bf16", mode, False) for recipe in ("speed94", "resnet18", "speed96") for mode in ("plain", "graph")],
    *[(recipe, "fp32", mode, False) for recipe in ("tutorial", "net-fast", "wide") for mode in ("plain", "graph")],
    *[(recipe, "bf16", "graph", False) for recipe in ("tutorial", "net-fast", "wide")],
    ("speed94", "fp32", "plain", False),
    *[("speed94", "bf16", mode, True) for mode in ("plain", "graph")],
    *[(recipe, "bf16", "compile", False) for recipe in ("speed94", "resnet18")],
    ("speed94", "bf16", "compile-graph", True),
    ("speed96", "bf16", "compile-graph", True),
    ("resnet18", "fp32", "plain", False),
    ("speed96", "fp32", "plain", False),
    ("resnet18", "bf16", "compile-graph", True),
]


def fast(c: Campaign) -> None:
    """Time the steps."""
    rows: list[dict[str, Any]] = []
    for recipe, precision, mode, benchmark in CASES:
        name = f"{recipe} {precision} {mode}{' cudnn.benchmark' if benchmark else ''}"
        if c.left(30) < 30:
            c.say(name, "left out: no time")
            continue
        c.attempt(name, partial(steps, rows, name, recipe, precision, mode, benchmark))
        (c.out / "timings.json").write_text(json.dumps(rows, indent=1))


def steps(rows: list[dict[str, Any]], name: str, recipe: str, precision: str, mode: str, benchmark: bool) -> str:
    """Add a row with the milliseconds of a step, the median and the range of several windows of steps, to `rows`."""
    torch.backends.cudnn.benchmark = benchmark
    parts = Parts(recipe, DEVICE, precision, graph="graph" in mode, compile="compile" in mode)
    count = STEPS[recipe] if GPU else 2
    began = now()
    parts.steps(1)
    first = now() - began
    parts.steps(max(5, count // 4))
    windows, launched = [], []
    for _ in range(WINDOWS):
        began = now()
        parts.steps(count)
        launched.append(1e3 * (time.perf_counter() - began) / count)
        windows.append(1e3 * (now() - began) / count)
    step, least, most = spread(windows)
    numbers: dict[str, Any] = {
        "case": name, "step_ms": step, "least_ms": least, "most_ms": most, "host_ms": spread(launched)[0],
        "images_per_second": 1e3 * parts.plan.global_batch_size / step, "first_step_s": first,
    }  # fmt: skip
    if GPU:
        numbers |= _profile(parts, max(4, min(20, count // 4)))
        del parts
        torch.cuda.empty_cache()
    rows.append(numbers)
    return "PASS " + ", ".join(f"{key} {value:,.3f}" for key, value in numbers.items() if isinstance(value, float))


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
