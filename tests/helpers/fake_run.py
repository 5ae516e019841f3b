"""Train a recipe on the fake GPU: loader, step, CUDA graph, evaluation, checkpoint and resume."""

import dataclasses
from collections.abc import Callable, Iterable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from cifar import loop
from cifar.cuda_graph import CudaGraph
from cifar.data import DeviceImages, EvalLoader
from cifar.evaluation import evaluate
from cifar.recipes import config_from_recipe
from tests.helpers.fake_cuda import FakeCuda, on_fake_gpu
from tests.helpers.parts import CLASSES, Parts, random_images
from train_ddp import train_step

_STEPS = 25  # in an epoch; more would only take time
_TEST_SIZE = 2_000  # two batches
_EVALUATION_WAITS = 3  # for metrics, labels and, with views, the indices of the images; at any number of batches


def train_on_fake_gpu(recipe: str, precision: str, step: Callable[..., Tensor] = train_step) -> None:
    """Train, test, save and resume the recipe, also captured and with two micro-batches a step.

    Fails if the host waits for the device in the hot loop, if devices are mixed, or if anything else goes wrong.
    """
    on_fake_gpu(lambda mode: _train_test_resume(mode, recipe, precision, step))


def _train_test_resume(mode: FakeCuda, recipe: str, precision: str, step: Callable[..., Tensor]) -> None:
    torch.nn.init.dirac_ = lambda tensor, groups=1: tensor  # an operator for each element takes a minute
    batch = config_from_recipe(recipe).lr_batch_size
    build = partial(Parts, recipe, "cuda", precision, count=_STEPS * batch, global_batch_size=batch)
    parts = build()
    _train(mode, parts, step, 3)
    _evaluate(mode, parts)
    saved = _save(parts)
    if precision != "fp16":  # which a graph refuses
        captured = build(graph=True).load(saved)
        _train(mode, captured, CudaGraph(step), 5, cold=(0, 3))  # captured in the fourth step
        assert mode.replays == 2
        saved = _save(captured)
    _train(mode, build(local_batch_size=batch // 2).load(saved), step, 2)


def _train(mode: FakeCuda, parts: Parts, step: Callable[..., Tensor], steps: int, cold: Iterable[int] = (0,)) -> None:
    """Train as `train_epoch` does; the steps in `cold` may wait, as the first does for the epoch's permutation."""
    assert all(tensor.is_cuda for tensor in (*parts.model.parameters(), *parts.model.buffers()))
    done = 0

    def after_step() -> bool:
        nonlocal done
        done += 1
        mode.hot = done < steps and done not in cold
        return False

    # A chunk of tiny batches lasts for hundreds of steps: one of two batches begins while the loop is hot.
    parts.loader.sampler.chunk = min(parts.loader.sampler.chunk, 2)
    run: Any = SimpleNamespace(
        config=dataclasses.replace(parts.config, max_steps=parts.state.step + steps, log_steps=10**9),
        plan=parts.plan, runtime=parts.runtime, state=parts.state, first_step=-1, layer_seed=0,
        after_step=after_step, log=lambda _: None,
    )  # fmt: skip
    loop.train_epoch(run, parts.model, parts.loader, parts.optimizer, step)
    assert done == steps


def _evaluate(mode: FakeCuda, parts: Parts) -> None:
    """Test, without views and with them."""
    test = EvalLoader(DeviceImages(*random_images(_TEST_SIZE), CLASSES, parts.runtime.device), 0, 1)
    before = mode.waits
    plain = evaluate(parts.model, test, parts.runtime)
    between = mode.waits
    evaluate(parts.model, test, parts.runtime, parts.config.tta, plain)
    assert max(between - before, mode.waits - between) <= _EVALUATION_WAITS


def _save(parts: Parts) -> dict[str, Any]:
    """Return the state as a checkpoint holds it: on the CPU, and in the layout of a CPU with small batches."""
    saved = parts.save()
    assert not any(leaf.is_cuda for leaf in tree_leaves(saved) if isinstance(leaf, Tensor))
    return tree_map(lambda leaf: leaf.contiguous() if isinstance(leaf, Tensor) else leaf, saved)
