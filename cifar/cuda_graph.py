"""The optimizer step as a CUDA graph: one launch instead of hundreds, for nets whose kernels are shorter than that."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from cifar.batch_plan import BatchPlan
from cifar.config import TrainConfig
from cifar.loop import TrainState, train_step
from cifar.distributed.runtime import Runtime

_EAGER_STEPS = 3  # in which the libraries choose their kernels and the optimizer makes its buffers


class GraphedStep:
    """`train_step`, called as it is, that after a few steps captures the next one and from then on replays it.

    Every step is one of the run's: none is spent on warming up, and nothing has to be undone. What changes from step
    to step lies in tensors that stay where they are: the images and labels of the step, and the learning rates.
    """

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()
        self._done = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._batches: list[tuple[Tensor, Tensor]] = []

    def __call__(
        self,
        model: nn.Module,
        micro_batches: Iterator[Any],
        state: TrainState,
        config: TrainConfig,
        plan: BatchPlan,
        runtime: Runtime,
    ) -> None:
        """One optimizer step, as `train_step`."""
        if self._done < _EAGER_STEPS:
            # On a stream of its own, as capturing will be, so that memory isn't shared with the default stream's.
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                train_step(model, micro_batches, state, config, plan, runtime)
            torch.cuda.current_stream().wait_stream(self._stream)
            self._done += 1
            return
        batches = [next(micro_batches) for _ in range(plan.accumulation)]
        if self._graph is None:
            self._batches = [(images.clone(), labels.clone()) for images, labels in batches]
            for group in state.optimizer.param_groups:
                group["lr"] = torch.tensor(float(group["lr"]), device=runtime.device)
            state.optimizer.zero_grad()  # so that the gradients, too, get memory of the graph's
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, stream=self._stream):
                train_step(model, iter(self._batches), state, config, plan, runtime)
        else:
            for (images, labels), (new_images, new_labels) in zip(self._batches, batches, strict=True):
                images.copy_(new_images)
                labels.copy_(new_labels)
            state.count_step()
        self._graph.replay()  # capturing has run nothing yet
