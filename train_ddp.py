"""Train a model on CIFAR-10, in one process or in many.

    python train_ddp.py                              # one process: the GPU if there is one, else the CPU
    torchrun --nproc_per_node=4 train_ddp.py         # 4 GPUs of one host (or 4 CPU processes)
    torchrun --nproc_per_node=2 train_ddp.py --device cpu --recipe wide --global-batch-size 512
    python train_ddp.py --resume runs/NAME           # continue a run
    python train_ddp.py --evaluate runs/NAME/checkpoints/step-00050000.pt
    python -m pdb train_ddp.py --dataset synthetic   # debug it like any script

Every process runs this whole script. They make up one training run because they start from the same weights, take
turns at the same permutation of the images, and average their gradients before every update. `--help` lists the flags.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cifar.cli import launch
from cifar.command import exit_on_error
from cifar.cuda_graph import CudaGraph
from cifar.data import load_data
from cifar.distributed.runtime import Runtime
from cifar.evaluation import evaluate
from cifar.loop import train_epoch
from cifar.models import build_model
from cifar.optim import build_optimizer
from cifar.predict import evaluate_checkpoint
from cifar.run import Run


def train_step(
    model: nn.Module,
    batches: Sequence[tuple[Tensor, Tensor]],  # micro-batches: images, float32 [n, 3, size, size]; labels, int64 [n]
    global_batch_size: int,  # images of the micro-batches of all ranks together
    optimizer: torch.optim.Optimizer,
    runtime: Runtime,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Update the model once and return this rank's part of the loss, a float32 scalar on the device.

    Its mean over the ranks is the mean cross-entropy of the global batch.
    """
    optimizer.zero_grad()  # backward adds to .grad: without this, the last step's gradients would stay in
    total = torch.zeros((), device=runtime.device)
    for images, labels in runtime.accumulate(model, batches):  # DDP averages the gradients in the last backward
        loss = F.cross_entropy(model(images), labels, label_smoothing=label_smoothing)
        # Every image counts the same, in whichever micro-batch: DDP's average divides by the ranks only.
        divisor = global_batch_size / (len(images) * runtime.world_size)
        runtime.backward(loss / divisor)  # loss.backward(), with the loss scaled under fp16
        total.add_(loss.detach(), alpha=len(batches) / divisor)  # times the parts, so that one division rounds once
    runtime.step(optimizer)  # optimizer.step(), skipped under fp16 if a gradient overflowed
    return total / len(batches)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the four steps of the tutorial."""
    with launch(argv) as (config, runtime):
        # 1. Load CIFAR-10: uint8 tensors on the device; every rank reads its share of one permutation.
        data = load_data(config, runtime)

        # 2. Define the model. DistributedDataParallel sends rank zero's weights to all ranks.
        torch.manual_seed(config.seed)
        model = build_model(config.model, len(data.classes), data.sample if runtime.is_main else None)
        model = runtime.prepare(model, compile=config.compile)
        if config.evaluate is not None:
            evaluate_checkpoint(config, model, data, runtime)
            return
        optimizer = build_optimizer(model, config)
        step = CudaGraph(train_step) if config.cuda_graph else train_step

        with Run(config, runtime, data, model, optimizer) as run:
            while not run.finished:
                # 3. Train for an epoch: zero_grad, forward, loss, backward, step.
                train_epoch(run, model, data.train, optimizer, step)

                # 4. Test: each image counts once, at any number of processes.
                run.end_epoch(evaluate(model, data.test, runtime))
            run.finish()


if __name__ == "__main__":
    with exit_on_error("train_ddp.py"):
        main()
