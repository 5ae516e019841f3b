"""The same training as a beginner, or a purist, would write it: what this program is measured against.

    python -m tests.benchmarks.peers tutorial --data-dir data --steps 3000
    python -m tests.benchmarks.peers pipeline --data-dir data --workers 2 --steps 60 --skip 20
    torchrun --nproc_per_node=2 -m tests.benchmarks.peers bare --local-batch-size 4 --steps 3000 --skip 500

The last line of each is one JSON object. Nothing here is shared with `cifar/`, so that nothing that makes that faster
or slower touches these. `tutorial` does what the classic PyTorch tutorial "Training a Classifier" does (its net, its
data pipeline, its numbers), and `bare` what that on DistributedDataParallel does, in words of their own.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAX_EPOCHS = 20
"""After so many epochs `tutorial --target` gives up."""


def make_net() -> nn.Sequential:
    """LeNet-5 with ReLU, max-pooling and three input channels: the tutorial's net, layer by layer."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * 5 * 5, 120), nn.ReLU(),
        nn.Linear(120, 84), nn.ReLU(),
        nn.Linear(84, 10),
    )  # fmt: skip


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """`name`, where "auto" is a GPU if there is one. (Not run on a GPU yet.)"""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name, local_rank) if name == "cuda" else torch.device(name)


def cifar10_loader(data_dir: str, train: bool, crop_flip: bool = False, **options: Any) -> Iterable[Any]:
    """torchvision's data set, image by image through PIL and its transforms, in a DataLoader with `options`."""
    from torchvision import datasets, transforms

    augmentation = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()] if crop_flip else []
    scaling = [transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.5,) * 3)]
    dataset = datasets.CIFAR10(data_dir, train=train, transform=transforms.Compose(augmentation + scaling))
    return torch.utils.data.DataLoader(dataset, **options)


def train(
    net: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    steps: int,
    on_loss: Callable[[int, float], None],
) -> int:
    """One pass over `loader`, but `steps` steps at most; the loss is read back after each of them.

    Returns:
        How many steps that were.
    """
    net.train()
    step = 0
    for images, labels in loader:
        images, labels = images.to(device), labels.to(device)
        optimizer.zero_grad()
        loss = F.cross_entropy(net(images), labels)
        loss.backward()
        optimizer.step()
        step += 1
        on_loss(step, loss.item())
        if step == steps:
            break
    return step


@torch.no_grad()
def test(net: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], device: torch.device) -> float:
    """The share of the images that the net names right."""
    net.eval()
    right = total = 0
    for images, labels in loader:
        right += (net(images.to(device)).argmax(1) == labels.to(device)).sum().item()
        total += len(labels)
    return right / total


def tutorial(args: argparse.Namespace) -> dict[str, float]:
    """The tutorial's loop, for `--steps` steps, or epoch by epoch until the test accuracy is `--target`."""
    device = pick_device(args.device)
    torch.manual_seed(args.seed)
    train_loader = cifar10_loader(args.data_dir, train=True, batch_size=4, shuffle=True, num_workers=2)
    test_loader = cifar10_loader(args.data_dir, train=False, batch_size=4, shuffle=False, num_workers=2)
    net = make_net().to(device)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.001, momentum=0.9)

    running, epoch, steps, seconds, accuracy = 0.0, 0, 0, 0.0, 0.0
    every = args.log_steps

    def on_loss(step: int, loss: float) -> None:
        nonlocal running
        running += loss
        if step % every == 0 or (epoch, step) == (1, 1):
            print(f"[{epoch}, {step:5d}] loss: {running / (step % every or every):.3f}", flush=True)
        if step % every == 0:
            running = 0.0

    while True:
        epoch += 1
        began = time.perf_counter()
        steps += train(net, train_loader, optimizer, device, args.steps - steps, on_loss)
        seconds += time.perf_counter() - began  # loss.item() has waited for the device
        if args.target is not None or steps >= args.steps:
            accuracy = test(net, test_loader, device)
        if steps >= args.steps or (args.target is not None and accuracy >= args.target):
            break
        if epoch == MAX_EPOCHS:
            raise SystemExit(f"peers: error: not reached in {epoch} epochs; the last accuracy was {accuracy:.4f}")
    return {"seconds": seconds, "steps": steps, "epochs": epoch, "accuracy": accuracy}


class Stopwatch:
    """Times the steps after the first `skip` ones, in which caches and memory are new."""

    def __init__(self, skip: int, device: torch.device) -> None:
        self._skip, self._device, self._began = skip, device, 0.0

    def after_step(self, step: int) -> None:
        """Start after the `skip`-th step."""
        if step == self._skip:
            self._began = self._now()

    def seconds(self) -> float:
        """Since the start."""
        return self._now() - self._began

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize()  # what was asked of the device is done
        return time.perf_counter()


def pipeline(args: argparse.Namespace) -> dict[str, float]:
    """Images/s of the net behind torchvision's pipeline with crop and flip, for `--steps` steps after `--skip`."""
    device = pick_device(args.device)
    torch.manual_seed(args.seed)
    size = args.local_batch_size
    loader = cifar10_loader(
        args.data_dir, train=True, crop_flip=True, batch_size=size, shuffle=True, drop_last=True,
        num_workers=args.workers, pin_memory=device.type == "cuda",
    )  # fmt: skip
    net = make_net().to(device)
    optimizer = torch.optim.SGD(net.parameters(), 0.05, 0.9, nesterov=True, weight_decay=5e-4, fused=True)
    watch, step = Stopwatch(args.skip, device), 0
    while step < args.steps:
        for images, labels in loader:
            images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            optimizer.zero_grad()
            F.cross_entropy(net(images), labels).backward()
            optimizer.step()
            step += 1
            watch.after_step(step)
            if step == args.steps:
                break
    return {"images_per_second": (step - args.skip) * size / watch.seconds()}


def bare(args: argparse.Namespace) -> dict[str, float]:
    """Milliseconds per step of DistributedDataParallel over batches that lie ready on the device."""
    rank, local_rank, processes = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    device = pick_device(args.device, local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:  # as train_ddp.py does it when torchrun has set OMP_NUM_THREADS to 1: the cores, shared out
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // processes))
    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    torch.manual_seed(args.seed)
    net = make_net().to(device, memory_format=torch.channels_last)
    model = nn.parallel.DistributedDataParallel(net, gradient_as_bucket_view=True)
    optimizer = torch.optim.SGD(net.parameters(), 0.001, 0.9, fused=True)
    # Noise trains as fast as pictures; 8192 of them don't stay in a processor's cache.
    images = (torch.rand(8192, 3, 32, 32, device=device) * 2 - 1).contiguous(memory_format=torch.channels_last)
    ready = list(
        zip(
            images.split(args.local_batch_size),
            torch.randint(10, (8192,), device=device).split(args.local_batch_size),
            strict=True,
        )
    )
    watch = Stopwatch(args.skip, device)
    for step in range(1, args.steps + 1):
        inputs, labels = ready[step % len(ready)]
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
        watch.after_step(step)
    seconds = watch.seconds()
    torch.distributed.destroy_process_group()
    return {"ms_per_step": 1000 * seconds / (args.steps - args.skip)} if rank == 0 else {}


def main() -> None:
    """Run the peer that the command line names."""
    parser = argparse.ArgumentParser(prog="tests.benchmarks.peers", description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=("tutorial", "pipeline", "bare"))
    parser.add_argument("--data-dir", default=os.environ.get("CIFAR_DATA_DIR") or "data")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=10**9)
    parser.add_argument("--skip", type=int, default=0, help="steps before the measurement begins")
    parser.add_argument("--log-steps", type=int, default=2000)
    parser.add_argument("--target", type=float, help="test accuracy at which tutorial ends")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--local-batch-size", type=int, default=512)
    args = parser.parse_args()
    numbers = {"tutorial": tutorial, "pipeline": pipeline, "bare": bare}[args.name](args)
    if numbers:
        print(json.dumps(numbers), flush=True)


if __name__ == "__main__":
    main()
