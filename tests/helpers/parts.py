"""The parts of a training program in this process: for a GPU's checks and timings, the fake GPU and the slow link."""

import dataclasses
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from cifar.augment import CropFlip
from cifar.batch_plan import BatchPlan
from cifar.checkpoint import TrainState, copy_to_host
from cifar.cuda_graph import CudaGraph
from cifar.data import Data, DeviceImages, EvalLoader, TrainLoader, load_data
from cifar.distributed.ddp import unwrap
from cifar.distributed.runtime import Runtime
from cifar.models import build_model
from cifar.optim import build_optimizer, learning_rate, set_learning_rate
from cifar.recipes import config_from_recipe
from train_ddp import train_step

warnings.filterwarnings("ignore", ".*TensorFloat32")

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
RECIPES = ("tutorial", "wide", "net-fast", "resnet18", "speed94", "speed96")
CLASSES = tuple("0123456789")


def random_images(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return images, uint8 [count, 3, 32, 32], and labels; the time of a step does not depend on what they show."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return images, torch.randint(0, 10, (count,), generator=generator)


class Parts:
    """Runtime, data, model, optimizer and step of a recipe, put together as train_ddp.py does.

    The images are random, and the process trains alone, unless `dataset` says otherwise.
    """

    def __init__(
        self,
        recipe: str,
        device: str,
        precision: str = "fp32",
        graph: bool = False,
        count: int = 50_000,
        **changes: Any,
    ) -> None:
        config = config_from_recipe(recipe, device=device, precision=precision, cuda_graph=graph, dataset="synthetic")
        self.config = config = dataclasses.replace(config, **changes)
        self.runtime = Runtime(config)
        self.data = self._random_data(count) if config.dataset == "synthetic" else load_data(config, self.runtime)
        self.plan, self.loader, self.train = self.data.plan, self.data.train, self.data.train.dataset
        torch.manual_seed(config.seed)
        self.model = self.runtime.prepare(build_model(config.model, 10, self.data.sample))
        self.optimizer = build_optimizer(self.model, config)
        self.state = TrainState(unwrap(self.model), self.optimizer, self.runtime.scaler)
        self.train_step = CudaGraph(train_step) if graph else train_step
        self.batches = self._endless()
        self.model.train()

    def _random_data(self, count: int) -> Data:
        config, device = self.config, self.runtime.device
        train = DeviceImages(*random_images(count), CLASSES, device, self.runtime.memory_format)
        if config.augment != "none":
            how = config.crop_padding, config.augment == "crop-altflip", config.cutout
            train.augment = CropFlip(train.images, config.seed, *how)
        plan = BatchPlan.make(config, 1, count)
        return Data("random", CLASSES, plan, TrainLoader(train, plan, 0, config.seed), EvalLoader(train, 0, 1))

    def _endless(self) -> Iterator[list[tuple[Tensor, Tensor]]]:
        while True:
            epoch, done = divmod(self.state.step, self.plan.steps_per_epoch)
            self.loader.set_epoch(epoch, first=done)
            yield from self.loader

    def steps(self, count: int) -> "Parts":
        """Run `count` training steps from where the state is."""
        for _ in range(count):
            set_learning_rate(self.optimizer, learning_rate(self.config, self.plan, self.state.step))
            size, smoothing = self.plan.global_batch_size, self.config.label_smoothing
            loss = self.train_step(self.model, next(self.batches), size, self.optimizer, self.runtime, smoothing)
            self.state.running_loss += loss
            self.state.step += 1
        return self

    def save(self) -> dict[str, Any]:
        """Return the state as a checkpoint holds it."""
        return copy_to_host(self.state.state_dict([self.state.rank_state(rank=0)]))

    def load(self, saved: dict[str, Any]) -> "Parts":
        """Continue from a saved state."""
        self.state.load_state_dict(saved, rank=0, world_size=1)
        return self

    def weights(self) -> Tensor:
        """Return all parameters, float64 [n] on the CPU."""
        return torch.cat([parameter.detach().flatten() for parameter in self.model.parameters()]).double().cpu()


def relative(a: Tensor, b: Tensor) -> float:
    """Return |a - b| / |b|; NaN if either holds one."""
    return float((a.double().cpu() - b.double().cpu()).norm() / b.double().cpu().norm())
