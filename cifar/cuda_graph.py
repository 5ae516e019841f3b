"""A training step as one CUDA graph: one launch instead of hundreds, for models whose kernels are shorter than that."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from cifar.distributed.runtime import Runtime

_EAGER_STEPS = 3  # in which the libraries choose their kernels and the optimizer allocates its buffers


class CudaGraph:
    """A training step that runs eagerly a few times, is captured once, and is replayed from then on.

    Every step is one of the run's: none is spent on warming up.
    Inputs that change between steps (images, labels, learning rates) are tensors at fixed addresses.
    """

    def __init__(self, train_step: Callable[..., Tensor]) -> None:
        self._train_step = train_step
        self._stream = torch.cuda.Stream()
        self._eager_steps = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._batches: list[tuple[Tensor, Tensor]] = []
        self._loss: Tensor

    def __call__(
        self,
        model: nn.Module,
        batches: Sequence[tuple[Tensor, Tensor]],
        global_batch_size: int,
        optimizer: torch.optim.Optimizer,
        runtime: Runtime,
        label_smoothing: float,
    ) -> Tensor:
        """Run one training step, with the arguments and the result of `train_step`."""
        if self._eager_steps < _EAGER_STEPS:
            # On the stream that will capture, so that no memory is shared with the default stream.
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                loss = self._train_step(model, batches, global_batch_size, optimizer, runtime, label_smoothing)
            torch.cuda.current_stream().wait_stream(self._stream)
            self._eager_steps += 1
            return loss
        if self._graph is None:
            self._batches = [(images.clone(), labels.clone()) for images, labels in batches]
            for group in optimizer.param_groups:
                group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32, device=runtime.device)
            optimizer.zero_grad()  # so that the gradients, too, are allocated in the graph's memory pool
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, stream=self._stream):
                self._loss = self._train_step(
                    model, self._batches, global_batch_size, optimizer, runtime, label_smoothing
                )
        else:
            for (images, labels), (new_images, new_labels) in zip(self._batches, batches, strict=True):
                images.copy_(new_images)
                labels.copy_(new_labels)
        self._graph.replay()  # capturing only records the kernels
        return self._loss
