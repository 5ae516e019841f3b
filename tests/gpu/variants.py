"""The part "variants": what makes `speed94` faster, each change alone, and together those that pay.

Trains on CIFAR-10 in $CIFAR_DATA_DIR, all in this process, one seed after another: each epoch is a window of captured
steps, so that those of the variants alternate. After the first seed, only today's recipe, the changes that pay, all of
these together, and fewer epochs with Lookahead go on, while time is left. Without a GPU, steps are eager, and images
few and random.
"""

import functools
import gc
import json
import math
import os
import sys
import time
import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.profiler import ProfilerActivity, profile

from cifar.cuda_graph import CudaGraph
from cifar.data import DeviceImages
from cifar.datasets import cifar10
from cifar.distributed.ddp import unwrap
from cifar.evaluation import evaluate
from cifar.models.speed import SpeedNet
from tests.gpu.campaign import Campaign
from tests.helpers.measuring import now
from tests.helpers.parts import DEVICE, GPU, Parts
from train_ddp import train_step

PAYS = 0.99  # of today's time, or less
MIN_SEEDS, MAX_SEEDS = 3, 10
TRAINED_SHARE = 0.3  # of the epochs, the first ones, in which "fixed bias" trains the bias
SPREAD = 0.16  # standard deviation of the accuracy of ten seeds on an H100, in percent
LOOKAHEAD_STEPS = 5  # from one update of the slow weights to the next
CHANGES = ("half", "pool", "fixed bias", "images")  # see README.md


@dataclass
class Row:
    """A variant, and what is known of it; each list has a number for each seed."""

    changes: list[str]
    epochs: int = 10
    step_ms: list[float] = field(default_factory=list)  # with the loader; median of the epochs but the first
    seconds: list[float] = field(default_factory=list)  # of training, with its captures
    accuracy: list[float] = field(default_factory=list)  # in percent, with views
    profile: dict[str, Any] = field(default_factory=dict)  # of a captured step, its bias fixed if it is to be
    wall: float = 0.0  # seconds of everything in the longest run


class HalfWeights(torch.autograd.Function):
    """Round float32 weights to bfloat16, and their gradients back, each in one kernel."""

    @staticmethod
    def forward(ctx: Any, *weights: Tensor) -> tuple[Tensor, ...]:
        """Return the rounded weights."""
        return _copies(weights, torch.bfloat16)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        """Return the gradients as float32: the optimizer's weights stay float32."""
        return _copies(gradients, torch.float32)


def _copies(tensors: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    copies = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    torch._foreach_copy_(copies, tensors)
    return tuple(copies)


def half_step(model: nn.Module, *others: Any) -> Tensor:
    """Run `train_step` with `HalfWeights`, so that autocast finds nothing to cast; BatchNorm's biases are float32."""
    names = [name for name, weight in model.named_parameters() if weight.requires_grad and "norms" not in name]
    trained = [model.get_parameter(name) for name in names]

    def forward(images: Tensor) -> Tensor:
        weights = dict(zip(names, HalfWeights.apply(*trained), strict=True))
        return functional_call(model, weights, (images.to(torch.bfloat16),))

    return train_step(forward, *others)  # type: ignore[arg-type]


class HalfImages(DeviceImages):
    """Images that are bfloat16 from the start."""

    def __getitem__(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return bfloat16 images and the labels."""
        images, labels = super().__getitem__(indices)
        return images.to(torch.bfloat16), labels


class Lookahead:
    """Slow weights, which every few steps follow the fast ones and replace them (Zhang et al. 2019, arXiv 1907.08610).

    As in K. Jordan 2024 (arXiv 2404.00498), BatchNorm's statistics take part, and the share that the slow weights keep
    grows with the cube of the progress, from nothing to 0.95**5.
    """

    def __init__(self, model: nn.Module, total_steps: int) -> None:
        buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
        self._fast = [*(parameter.detach() for parameter in model.parameters()), *buffers]
        self._slow = [tensor.clone() for tensor in self._fast]
        self._total_steps = total_steps

    def after_step(self, step: int) -> None:
        """Update the weights, if it is time, after step 1, 2, ..."""
        if step % LOOKAHEAD_STEPS == 0:
            kept = 0.95**5 * (step / self._total_steps) ** 3
            torch._foreach_lerp_(self._slow, self._fast, 1 - kept)
            torch._foreach_copy_(self._fast, self._slow)


class Trial(Parts):
    """`speed94` in bf16 with some of the `CHANGES`, or "lookahead"; captured where there is a GPU."""

    def __init__(self, changes: list[str], epochs: int = 10, seed: int = 0) -> None:
        data: dict[str, Any] = {"dataset": "cifar10", "data_dir": Path(os.environ.get("CIFAR_DATA_DIR", "data"))}
        if not GPU:
            data = {"count": 16, "local_batch_size": 4, "global_batch_size": 4}
        super().__init__("speed94", DEVICE, "bf16", epochs=epochs, seed=seed, **data)
        if not GPU:
            torch.set_num_threads(1)
        self.total_steps = self.plan.total_steps(self.config)
        self._bare: Any = unwrap(self.model)
        if "pool" in changes:
            pool_without_indices(self._bare)
        if "images" in changes:
            self.train.__class__ = HalfImages
            self.loader.sampler.chunk = self.plan.steps_per_epoch
        self._step = half_step if "half" in changes else train_step
        self._lookahead = Lookahead(self._bare, self.total_steps) if "lookahead" in changes else None
        self._trained_steps = round(TRAINED_SHARE * self.total_steps) if "fixed bias" in changes else -1
        self.train_step = CudaGraph(self._step) if GPU else self._step

    def steps(self, count: int) -> "Trial":
        """Run `count` training steps from where the state is."""
        for _ in range(count):
            if self.state.step == self._trained_steps:
                self._bare.whiten.bias.requires_grad_(False)
                self.train_step = CudaGraph(self._step) if GPU else self._step  # captured again, without that gradient
            super().steps(1)
            if self._lookahead is not None:
                self._lookahead.after_step(self.state.step)
        return self


def pool_without_indices(model: SpeedNet) -> None:
    """Let the groups of a model of depth two pool with `TritonPool`."""
    os.environ.setdefault("TRITON_INTERPRET", "0" if GPU else "1")
    from tests.gpu.triton_pooling import TritonPool

    group_class: Any = type(model.groups[0])

    class Group(group_class):
        def forward(self, x: Tensor) -> Tensor:
            x = F.gelu(self.norms[0](TritonPool.apply(self.convs[0](x))))
            return F.gelu(self.norms[1](self.convs[1](x)))

    for group in model.groups:
        group.__class__ = Group


def variants(c: Campaign) -> None:
    """Train the variants, and print which to adopt."""
    cifar10.load_cifar10 = functools.cache(cifar10.load_cifar10)  # once for all trainings
    rows = {"today": (today := Row([]))} | {name: Row([name]) for name in CHANGES}
    train(c, rows, "today", 0)
    if not today.seconds:
        raise RuntimeError("today's recipe fails: see above")
    for name in CHANGES:
        train(c, rows, name, 0)
    limit = PAYS * today.step_ms[0] if GPU else math.inf
    paying = [name for name in CHANGES if rows[name].seconds and rows[name].step_ms[0] < limit]
    if len(paying) > 1:
        rows[" + ".join(paying)] = Row(paying)
    rows |= {f"{epochs} epochs, Lookahead": Row(["lookahead"], epochs) for epochs in (9, 8)}
    for seed in range(MAX_SEEDS if GPU else 1):
        for name in rows:
            if name in paying or name not in CHANGES:
                train(c, rows, name, seed)
    for name, row in rows.items():
        c.say(name, f"{describe(row, today)}; {verdict(row, today)}" if row.seconds else "failed, or no time was left")


def train(c: Campaign, rows: Mapping[str, Row], name: str, seed: int) -> None:
    """Train a variant with a seed if time is left; one that has failed is not tried again."""
    row, began = rows[name], time.perf_counter()
    if len(row.seconds) != seed or c.deadline - began < 1.5 * max(row.wall for row in rows.values()):
        return
    try:
        train_once(row, seed)
        c.say(f"{name}, seed {seed}", describe(row, rows["today"]))
    except Exception as error:
        c.say(f"{name}, seed {seed}", f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
        traceback.print_exc(file=sys.stdout)
        if GPU:
            torch.cuda.set_stream(torch.cuda.default_stream())  # a failed capture leaves its own
    gc.collect()  # the graph's memory
    row.wall = max(row.wall, time.perf_counter() - began)
    c.details = {name: asdict(row) for name, row in rows.items()}
    (c.out / "variants.json").write_text(json.dumps(c.details, indent=1))


def train_once(row: Row, seed: int) -> None:
    """Train, test, and add what was measured to the row."""
    if GPU and not row.profile:  # before the first training, so that all of them come after the profiler's start
        row.profile = profile_kernels(Trial(row.changes, epochs=1).steps(15))
    trial = Trial(row.changes, row.epochs if GPU else 2, seed)
    began, windows = now(), []
    while trial.state.step < trial.total_steps:
        window_began = now()
        trial.steps(trial.plan.steps_per_epoch)
        windows.append(1e3 * (now() - window_began) / trial.plan.steps_per_epoch)
    seconds = now() - began
    test = evaluate(trial.model, trial.data.test, trial.runtime, trial.config.tta)
    row.step_ms.append(median(windows[1:]))
    row.seconds.append(seconds)
    row.accuracy.append(100 * test.accuracy)


def profile_kernels(trial: Trial) -> dict[str, Any]:
    """Return the number and the milliseconds of a step's kernels, with the loader's, and the longest of them."""
    count, totals = trial.plan.steps_per_epoch, Counter[str]()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        trial.steps(count)
        torch.cuda.synchronize()
    kernels = [event for event in seen.events() if str(event.device_type).endswith("CUDA")]
    for kernel in kernels:
        totals[kernel.name[:100]] += kernel.device_time_total / 1e3 / count
    return {"kernels": len(kernels) / count, "busy_ms": sum(totals.values()), "longest": totals.most_common(15)}


def describe(row: Row, today: Row) -> str:
    """Return what was measured: medians of times, means of accuracies."""
    step, of_today = median(row.step_ms), 100 * median(row.step_ms) / median(today.step_ms)
    times = f"{step:.3f} ms a step ({of_today:.1f} %), {row.profile.get('kernels', 0):.0f} kernels"
    return f"{times}, {median(row.seconds):.3f} s of training; {mean(row.accuracy):.2f} %, seeds: {len(row.seconds)}"


def verdict(row: Row, today: Row) -> str:
    """Compare with today's recipe over the same seeds; the spread is two standard errors of the difference of means."""
    seeds = min(len(row.seconds), len(today.seconds))
    if not GPU:
        return "a smoke test, whose numbers mean nothing"
    if row is today:
        return "today's recipe"
    saved = 1 - median(row.seconds[:seeds]) / median(today.seconds[:seeds])
    difference = mean(row.accuracy[:seeds]) - mean(today.accuracy[:seeds])
    spread = 2 * SPREAD * math.sqrt(2 / seeds)
    found = f"takes {100 * saved:.1f} % less, accuracy {difference:+.2f} %, spread {spread:.2f} %"
    if saved <= 1 - PAYS or difference < -spread:
        return f"do not adopt: {found}"
    return f"{'undecided' if seeds < MIN_SEEDS else 'adopt'}: {found}"
