"""One epoch of training: batches, learning rate, logging, checkpoints."""

import math
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from cifar.augment import derive_seed
from cifar.data import TrainLoader
from cifar.errors import LocalError, TrainingDivergedError, out_of_memory
from cifar.optim import learning_rate, set_learning_rate
from cifar.records.metrics import LogPoint
from cifar.run import Run


def train_epoch(
    run: Run,
    model: nn.Module,
    loader: TrainLoader,
    optimizer: torch.optim.Optimizer,
    train_step: Callable[..., Tensor],
) -> None:
    """Train from `run.state.step` to the end of its epoch, or to `--max-steps`.

    The loss stays on the device between log points: reading it would make the host wait for the device.

    Args:
        train_step: `train_ddp.train_step`, or a `CudaGraph` of it.

    Raises:
        LocalError: the memory of this rank's device or host does not suffice.
        TrainingDivergedError: the mean loss since the last log point is not finite; raised on all ranks.
        StoppedError: some rank was asked to stop; raised on all ranks after the same step.
    """
    config, plan, state = run.config, run.plan, run.state
    began, images = time.perf_counter(), 0  # before the epoch's random numbers are drawn, which is part of training
    epoch, done = divmod(state.step, plan.steps_per_epoch)
    loader.set_epoch(epoch, first=done)
    steps = iter(loader)
    last = min(plan.steps_per_epoch, plan.last_step(config) - epoch * plan.steps_per_epoch)
    model.train()

    for epoch_step in range(done + 1, last + 1):
        lr = learning_rate(config, plan, state.step)
        set_learning_rate(optimizer, lr)
        _train_on(steps, run, model, optimizer, train_step)
        images += plan.global_batch_size
        if state.step == run.first_step:
            state.running_loss.item()  # wait for the device, once in a process
            state.first_step_seconds += time.perf_counter() - began

        # After the last step of an epoch, the checkpoint follows the evaluation: resuming never skips an evaluation.
        at_end = epoch_step == last
        at_stop = run.after_step() and not at_end
        at_log = epoch_step % config.log_steps == 0 or at_end
        at_checkpoint = config.checkpoint_steps is not None and state.step % config.checkpoint_steps == 0 and not at_end
        if not (at_log or at_checkpoint or at_stop):
            continue
        loss = run.runtime.mean(state.running_loss / state.running_steps).item()
        if not math.isfinite(loss):
            raise TrainingDivergedError(f"the loss became {loss} at step {state.step}, with lr {lr:g}")
        seconds = time.perf_counter() - began
        state.train_seconds += seconds
        if at_log:
            run.log(LogPoint(state.step, epoch + 1, epoch_step, loss, lr, images / seconds))
            state.running_loss.zero_()
            state.running_steps = 0
        if at_checkpoint or at_stop:
            run.save_checkpoint()
        if at_stop:
            run.stop()
        began, images = time.perf_counter(), 0


def _train_on(
    steps: Iterator[list[tuple[Tensor, Tensor]]],
    run: Run,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    train_step: Callable[..., Tensor],
) -> None:
    """Train on the micro-batches of the next step, and add its loss to the running one."""
    config, plan, runtime, state = run.config, run.plan, run.runtime, run.state
    try:
        batches = next(steps)
        runtime.seed_layers(derive_seed(config.seed, "layers", runtime.rank) + state.step)  # ranks differ in dropout
        with runtime.convolutions():
            state.running_loss += train_step(
                model, batches, plan.global_batch_size, optimizer, runtime, config.label_smoothing
            )
    except RuntimeError as error:
        if (lack := out_of_memory(error)) is None:
            raise
        raise LocalError(f"{lack} at {plan.advise_on_memory()}") from error
    state.running_steps += 1
    state.step += 1
