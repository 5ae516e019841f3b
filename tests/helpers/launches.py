"""The program on a fake GPU: what waits for the device, and how many kernels a step launches.

    python -m tests.helpers.launches                    # every recipe and precision, as a table
    python -m tests.helpers.launches speed94 bf16       # one of them, by operator

An operator that is not a view counts as one kernel; on a real GPU, some (convolutions, sums) launch two or three.
"""

import dataclasses
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from cifar import loop
from cifar.checkpoint import TrainState, copy_to_host
from cifar.config import TrainConfig
from cifar.cuda_graph import CudaGraph
from cifar.data import DeviceImages, load_data
from cifar.datasets import DATASETS
from cifar.datasets.base import Dataset, Split
from cifar.datasets.cifar10 import CLASSES
from cifar.distributed.ddp import unwrap
from cifar.distributed.runtime import Runtime
from cifar.evaluation import evaluate
from cifar.models import build_model
from cifar.optim import build_optimizer
from cifar.recipes import RECIPES, config_from_recipe
from tests.helpers.fake_cuda import FakeCuda, forked, pretend
from train_ddp import train_step


class Launches(NamedTuple):
    """Kernels that the host launches in a step.

    Attributes:
        fp32, bf16, fp16: the step itself, from zero_grad to the running loss.
        loader: images and labels of a step: a chunk's kernels, divided by its steps.
        replay: the step as a CUDA graph that is replayed.
    """

    fp32: int
    bf16: int
    fp16: int
    loader: float
    replay: int


# At most this many: as printed by `python -m tests.helpers.launches` with torch 2.14, and a few more.
CEILINGS = {
    "tutorial": Launches(fp32=46, bf16=70, fp16=80, loader=0.1, replay=7),
    "wide": Launches(fp32=46, bf16=70, fp16=80, loader=4, replay=7),
    "net-fast": Launches(fp32=73, bf16=96, fp16=171, loader=0.5, replay=8),
    "resnet18": Launches(fp32=175, bf16=222, fp16=233, loader=7, replay=7),
    "speed94": Launches(fp32=138, bf16=158, fp16=259, loader=26, replay=9),
    "speed96": Launches(fp32=174, bf16=200, fp16=337, loader=36, replay=9),
}
PRECISIONS = ("fp32", "bf16", "fp16")
EVALUATION_WAITS = 3  # for metrics, labels and, with views, the indices of the images; at any number of batches

_STEPS = 25  # in an epoch; more would only take time
_TEST_SIZE = 2_000  # two batches


class Measured(NamedTuple):
    """One recipe at one precision.

    Attributes:
        step, loader, replay: launches; see `Launches`. There is no replay with fp16.
        operators: the launches of a step, by operator.
        evaluation_waits: times that the host waits in an evaluation, with views or without, whichever is more.
    """

    step: int
    loader: float
    replay: int | None
    operators: Counter[str]
    evaluation_waits: int


def measure(recipe: str, precision: str, step: Callable[..., Tensor] = train_step, **changes: Any) -> Measured:
    """Train, test, save and resume the recipe, with `changes`, on a fake GPU, in a copy of this process.

    Raises:
        RuntimeError: the host waited for the device in the hot loop, devices were mixed, or anything else went wrong.
    """
    config = config_from_recipe(recipe, precision=precision, dataset="fake", device="cuda", **changes)
    return forked(lambda: _train_test_resume(config, step))


def exceeded(recipe: str, precision: str, measured: Measured) -> list[str]:
    """Return what is more than its ceiling, in words."""
    ceiling = CEILINGS[recipe]
    pairs = {
        f"{precision} launches a step": (measured.step, getattr(ceiling, precision)),
        "loader launches a step": (measured.loader, ceiling.loader),
        "launches to replay a step": (measured.replay or 0, ceiling.replay),
        "waits in an evaluation": (measured.evaluation_waits, EVALUATION_WAITS),
    }
    return [f"{recipe}: {found:g} {what}, at most {most:g}" for what, (found, most) in pairs.items() if found > most]


def _train_test_resume(config: TrainConfig, step: Callable[..., Tensor]) -> Measured:
    mode = FakeCuda()
    pretend(mode)
    torch.nn.init.dirac_ = lambda tensor, groups=1: tensor  # an operator for each element takes a minute
    train_size = _STEPS * config.lr_batch_size
    Dataset.fingerprint = {}  # type: ignore[assignment]  # fake tensors have no bytes
    DATASETS["fake"] = lambda _: Dataset(CLASSES, _split(train_size), _split(_TEST_SIZE))
    with mode:
        program = _Program(mode, config)
        operators = program.train(step, 3)
        waits = program.evaluate()
        saved = program.save()
        replay = None
        changes: dict[str, Any] = {"resume": Path("run"), "global_batch_size": program.data.plan.global_batch_size}
        if config.precision != "fp16":  # which a graph refuses
            graphed = _Program(mode, dataclasses.replace(config, cuda_graph=True, **changes), saved)
            # Captured in the fourth step.
            replay = graphed.train(CudaGraph(step), 5, cold=(0, 3)).total()
            saved = graphed.save()
        # Two micro-batches a step, without the graph.
        half = dataclasses.replace(config, local_batch_size=config.local_batch_size // 2, **changes)
        _Program(mode, half, saved).train(step, 2)
    return Measured(operators.total(), program.loader_launches, replay, operators, waits)


def _split(size: int) -> Split:
    return torch.empty((size, 3, 32, 32), dtype=torch.uint8), torch.empty(size, dtype=torch.int64)


class _Program:
    """What train_ddp.py builds, new or from a checkpoint, with a fake dataset and without a run directory."""

    def __init__(self, mode: FakeCuda, config: TrainConfig, saved: dict[str, Any] | None = None) -> None:
        self.mode, self.config = mode, config
        self.runtime = Runtime(config)
        self.data = load_data(config, self.runtime)
        model = build_model(config.model, len(self.data.classes), self.data.sample)
        self.model = self.runtime.prepare(model)
        self.optimizer = build_optimizer(self.model, config)
        self.state = TrainState(unwrap(self.model), self.optimizer, self.runtime.scaler)
        if saved is not None:
            self.state.load_state_dict(saved, rank=0, world_size=1)
        devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
        assert devices == {torch.device("cuda", 0)}, devices

    def train(self, step: Callable[..., Tensor], steps: int, cold: Iterable[int] = (0,)) -> Counter[str]:
        """Train as `train_epoch` does; return the launches of the last step, without the loader's.

        Args:
            cold: steps that may wait. The first reads the epoch's permutation, which comes from the host.
        """
        mode, plan, sampler = self.mode, self.data.plan, self.data.train.sampler
        counted: list[Counter[str]] = []

        def read(images: DeviceImages, indices: Tensor) -> tuple[Tensor, Tensor]:
            of_step, mode.launches = mode.launches, Counter()
            batch = real_read(images, indices)
            self.loader_launches = mode.launches.total() * plan.accumulation / chunk
            mode.launches = of_step
            return batch

        def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
            with mode.on_host():  # a number is rounded there
                real_set_rate(optimizer, lr)

        def after_step() -> bool:
            counted.append(mode.launches)
            mode.launches = Counter()
            mode.hot = len(counted) < steps and len(counted) not in cold
            return False

        # A chunk of tiny batches lasts for hundreds of steps: one of two batches begins while the loop is hot.
        chunk, sampler.chunk = sampler.chunk, min(sampler.chunk, 2)
        config = dataclasses.replace(self.config, max_steps=self.state.step + steps, log_steps=10**9)
        run: Any = SimpleNamespace(
            config=config,
            plan=plan,
            runtime=self.runtime,
            state=self.state,
            after_step=after_step,
            log=lambda _: None,
            first_step=-1,
        )
        real_read, real_set_rate = DeviceImages.__getitem__, loop.set_learning_rate
        mode.launches = Counter()
        with (
            patch.object(DeviceImages, "__getitem__", read),
            patch.object(loop, "set_learning_rate", set_rate),
        ):
            loop.train_epoch(run, self.model, self.data.train, self.optimizer, step)
        assert len(counted) == steps
        return +counted[-1]

    def evaluate(self) -> int:
        """Test, without views and with them; return how often the host waited for the device, at most."""
        waits = [self.mode.waits]
        plain = evaluate(self.model, self.data.test, self.runtime)
        waits.append(self.mode.waits)
        evaluate(self.model, self.data.test, self.runtime, self.config.tta, plain)
        waits.append(self.mode.waits)
        return max(after - before for before, after in pairwise(waits))

    def save(self) -> dict[str, Any]:
        """Return the state as a checkpoint holds it: on the CPU, and in the layout of a CPU with small batches."""
        saved = copy_to_host(self.state.state_dict([self.state.rank_state()]))
        assert not any(leaf.is_cuda for leaf in tree_leaves(saved) if isinstance(leaf, Tensor))
        return tree_map(lambda leaf: leaf.contiguous() if isinstance(leaf, Tensor) else leaf, saved)


def main(recipes: Sequence[str], precisions: Sequence[str]) -> None:
    """Print the launches of a step, and by operator if only one recipe and precision are asked for."""
    print(f"operators that a step launches on a fake GPU, torch {torch.__version__}; a profiler sees more kernels")
    print(f"{'':10}" + "".join(f"{name:>8}" for name in (*precisions, "loader", "replay")))
    for recipe in recipes:
        found = [measure(recipe, precision) for precision in precisions]
        replays = [measured.replay for measured in found if measured.replay is not None]
        cells = [*(f"{measured.step}" for measured in found), f"{found[0].loader:.1f}", f"{max(replays, default='-')}"]
        print(f"{recipe:10}" + "".join(f"{cell:>8}" for cell in cells), flush=True)
    if len(recipes) == len(precisions) == 1:
        for operator, count in found[0].operators.most_common():
            print(f"{count:6} {operator}")


if __name__ == "__main__":
    main(sys.argv[1:2] or list(RECIPES), sys.argv[2:3] or PRECISIONS)
