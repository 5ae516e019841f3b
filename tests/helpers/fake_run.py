"""Train a recipe on the fake GPU: loader, step, CUDA graph, evaluation, checkpoint and resume."""

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from cifar import loop
from cifar.checkpoint import TrainState, copy_to_host
from cifar.config import TrainConfig
from cifar.cuda_graph import CudaGraph
from cifar.data import load_data
from cifar.datasets import DATASETS
from cifar.datasets.base import Dataset, Split
from cifar.datasets.cifar10 import CLASSES
from cifar.distributed.ddp import unwrap
from cifar.distributed.runtime import Runtime
from cifar.evaluation import evaluate
from cifar.models import build_model
from cifar.optim import build_optimizer
from cifar.recipes import config_from_recipe
from tests.helpers.fake_cuda import FakeCuda, on_fake_gpu
from train_ddp import train_step

_STEPS = 25  # in an epoch; more would only take time
_TEST_SIZE = 2_000  # two batches
_EVALUATION_WAITS = 3  # for metrics, labels and, with views, the indices of the images; at any number of batches


def train_on_fake_gpu(recipe: str, precision: str, step: Callable[..., Tensor] = train_step) -> None:
    """Train, test, save and resume the recipe, also captured and with two micro-batches a step.

    Fails if the host waits for the device in the hot loop, if devices are mixed, or if anything else goes wrong.
    """
    config = config_from_recipe(recipe, precision=precision, dataset="fake", device="cuda")
    on_fake_gpu(lambda mode: _train_test_resume(mode, config, step))


def _train_test_resume(mode: FakeCuda, config: TrainConfig, step: Callable[..., Tensor]) -> None:
    torch.nn.init.dirac_ = lambda tensor, groups=1: tensor  # an operator for each element takes a minute
    Dataset.fingerprint = {}  # type: ignore[assignment]  # fake tensors have no bytes
    DATASETS["fake"] = lambda _: Dataset(CLASSES, _split(_STEPS * config.lr_batch_size), _split(_TEST_SIZE))
    program = _Program(mode, config)
    program.train(step, 3)
    program.evaluate()
    saved = program.save()
    global_batch_size = program.data.plan.global_batch_size
    config = dataclasses.replace(config, resume=Path("run"), global_batch_size=global_batch_size)
    if config.precision != "fp16":  # which a graph refuses
        captured = _Program(mode, dataclasses.replace(config, cuda_graph=True), saved)
        captured.train(CudaGraph(step), 5, cold=(0, 3))  # captured in the fourth step
        assert mode.replays == 2
        saved = captured.save()
    halved = dataclasses.replace(config, local_batch_size=config.local_batch_size // 2)
    _Program(mode, halved, saved).train(step, 2)


def _split(size: int) -> Split:
    return torch.empty((size, 3, 32, 32), dtype=torch.uint8), torch.empty(size, dtype=torch.int64)


class _Program:
    """The parts that train_ddp.py builds, new or from a checkpoint, with a fake dataset and without a run directory."""

    def __init__(self, mode: FakeCuda, config: TrainConfig, saved: dict[str, Any] | None = None) -> None:
        self.mode, self.config = mode, config
        self.runtime = Runtime(config)
        self.data = load_data(config, self.runtime)
        self.model = self.runtime.prepare(build_model(config.model, len(self.data.classes), self.data.sample))
        self.optimizer = build_optimizer(self.model, config)
        self.state = TrainState(unwrap(self.model), self.optimizer, self.runtime.scaler)
        if saved is not None:
            self.state.load_state_dict(saved, rank=0, world_size=1)
        assert all(tensor.is_cuda for tensor in (*self.model.parameters(), *self.model.buffers()))

    def train(self, step: Callable[..., Tensor], steps: int, cold: Iterable[int] = (0,)) -> None:
        """Train as `train_epoch` does; the steps in `cold` may wait, as the first does for the epoch's permutation."""
        done = 0

        def after_step() -> bool:
            nonlocal done
            done += 1
            self.mode.hot = done < steps and done not in cold
            return False

        # A chunk of tiny batches lasts for hundreds of steps: one of two batches begins while the loop is hot.
        self.data.train.sampler.chunk = min(self.data.train.sampler.chunk, 2)
        run: Any = SimpleNamespace(
            config=dataclasses.replace(self.config, max_steps=self.state.step + steps, log_steps=10**9),
            plan=self.data.plan, runtime=self.runtime, state=self.state, first_step=-1,
            after_step=after_step, log=lambda _: None,
        )  # fmt: skip
        loop.train_epoch(run, self.model, self.data.train, self.optimizer, step)
        assert done == steps

    def evaluate(self) -> None:
        """Test, without views and with them."""
        before = self.mode.waits
        plain = evaluate(self.model, self.data.test, self.runtime)
        between = self.mode.waits
        evaluate(self.model, self.data.test, self.runtime, self.config.tta, plain)
        assert max(between - before, self.mode.waits - between) <= _EVALUATION_WAITS

    def save(self) -> dict[str, Any]:
        """Return the state as a checkpoint holds it: on the CPU, and in the layout of a CPU with small batches."""
        saved = copy_to_host(self.state.state_dict([self.state.rank_state()]))
        assert not any(leaf.is_cuda for leaf in tree_leaves(saved) if isinstance(leaf, Tensor))
        return tree_map(lambda leaf: leaf.contiguous() if isinstance(leaf, Tensor) else leaf, saved)
