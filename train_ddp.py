"""Train a net on CIFAR-10, in one process or in many.

    python train_ddp.py                              # one process: the GPU if there is one, else the CPU
    torchrun --nproc_per_node=4 train_ddp.py         # 4 GPUs of one host (or 4 CPU processes)
    torchrun --nproc_per_node=2 train_ddp.py --device cpu --recipe wide --global-batch-size 512
    python train_ddp.py --resume runs/NAME           # continue a run
    python train_ddp.py --evaluate runs/NAME/checkpoints/step-00050000.pt
    python -m pdb train_ddp.py --dataset synthetic   # one process has no process group: debug it as any script

The four steps are those of the classic PyTorch tutorial. Each process runs this whole script; what makes them
one training run is that they start from the same weights, take turns at the same permutation of the images, and
average their gradients before every update. `--help` lists the flags.
"""

from collections.abc import Sequence

import torch

from cifar import batches, checkpoint, claim, console, data, evaluation, graph, loop, nets, optim, session
from cifar.config import parse_args
from cifar.distributed.runtime import Runtime
from cifar.cli import exit_on_error


def main(argv: Sequence[str] | None = None) -> None:
    config = parse_args(argv)
    runtime = Runtime(config)
    config = claim.find_own_run(config, runtime)  # if torchrun has restarted this launch

    # 1. Load CIFAR-10: uint8 tensors on the device; every rank reads its own shard of the same permutation.
    images = data.load_data(config, runtime)
    plan = batches.BatchPlan.make(config, runtime.world_size, len(images.train))
    train_loader = data.TrainLoader(images.train, plan, runtime.rank, config.seed)
    test_loader = data.EvalLoader(images.test, runtime.rank, runtime.world_size)

    # 2. Define the net. DistributedDataParallel hands rank zero's weights to all and averages gradients.
    torch.manual_seed(config.seed)
    net = nets.build_model(config.model, data.normalize(images.train.images[:5000].cpu()))
    model = runtime.wrap(net, config.compile)

    if config.evaluate is not None:
        checkpoint.load_model(net, checkpoint.read_checkpoint(config.evaluate), config.model, config.evaluate)
        views = evaluation.evaluate(net, test_loader, runtime, config.tta) if config.tta != "none" else None
        console.print_test(runtime, images, evaluation.evaluate(net, test_loader, runtime), views)
        return runtime.close()

    optimizer = optim.build_optimizer(net, config)
    state = loop.TrainState(net, optimizer, runtime.scaler)
    step = graph.GraphedStep() if config.cuda_graph else loop.train_step
    with session.Run(config, runtime, images, plan, state) as run:
        if run.finished:  # but for its result: it was killed after its last step
            test = evaluation.evaluate(net, test_loader, runtime)
        while not run.finished:
            # 3. Train for an epoch: forward, loss, backward, update.
            loop.train_epoch(model, train_loader, state, config, plan, runtime, run, step)

            # 4. Test on the 10,000 images: each counts once, whatever the number of processes.
            test = evaluation.evaluate(net, test_loader, runtime)
            run.end_epoch(test)
        views = evaluation.evaluate(net, test_loader, runtime, config.tta) if config.tta != "none" else None
        run.finish(test, views)
    runtime.close()


if __name__ == "__main__":
    with exit_on_error("train_ddp.py"):
        main()
