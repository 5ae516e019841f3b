"""The same training written plainly: the programs that train_ddp.py is measured against.

    python -m tests.benchmarks.baselines tutorial --data-dir data --steps 3000
    python -m tests.benchmarks.baselines pipeline --data-dir data --workers 2 --steps 60 --skip 20
    torchrun --nproc_per_node=2 -m tests.benchmarks.baselines bare --local-batch-size 4 --steps 3000 --skip 500

`tutorial` is the loop of the classic PyTorch tutorial "Training a Classifier", with its Net, its data pipeline and its
hyperparameters; `pipeline` adds augmentation and larger batches; `bare` is DDP over ready tensors. Nothing is imported
from `cifar/`, so a change there cannot make these faster or slower. The last line of output is one JSON object.
"""

import argparse
import json
import os
import time
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAX_EPOCHS = 20  # after which `tutorial` gives up
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make_net() -> nn.Sequential:
    """Return the tutorial's Net: LeNet-5 with ReLU, max-pooling and three input channels."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * 5 * 5, 120), nn.ReLU(),
        nn.Linear(120, 84), nn.ReLU(),
        nn.Linear(84, 10),
    )  # fmt: skip


def cifar10_loader(data_dir: str, train: bool, crop_flip: bool = False, **options: Any) -> Iterable[Any]:
    """Return torchvision's dataset and transforms, image by image through PIL, in a DataLoader with `options`."""
    from torchvision import datasets, transforms

    augmentation = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()] if crop_flip else []
    scaling = [transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.5,) * 3)]
    dataset = datasets.CIFAR10(data_dir, train=train, transform=transforms.Compose(augmentation + scaling))
    return torch.utils.data.DataLoader(dataset, **options)


@torch.no_grad()
def test(net: nn.Module, loader: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Return the test accuracy, 0 to 1."""
    net.eval()
    correct = total = 0
    for images, labels in loader:
        correct += (net(images.to(DEVICE)).argmax(1) == labels.to(DEVICE)).sum().item()
        total += len(labels)
    return correct / total


def tutorial(args: argparse.Namespace) -> dict[str, float]:
    """Run the tutorial's loop for `--steps` steps, or epoch by epoch until the test accuracy reaches `--target`."""
    torch.manual_seed(args.seed)
    train_loader = cifar10_loader(args.data_dir, train=True, batch_size=4, shuffle=True, num_workers=2)
    test_loader = cifar10_loader(args.data_dir, train=False, batch_size=4, shuffle=False, num_workers=2)
    net = make_net().to(DEVICE)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.001, momentum=0.9)
    steps, seconds = 0, 0.0
    for epoch in range(1, MAX_EPOCHS + 1):
        began = time.perf_counter()
        steps += train(net, train_loader, optimizer, args.steps - steps, epoch)
        seconds += time.perf_counter() - began  # no need to synchronize: loss.item() did
        accuracy = test(net, test_loader) if steps >= args.steps or args.target is not None else 0.0
        if steps >= args.steps or (args.target is not None and accuracy >= args.target):
            return {"seconds": seconds, "steps": steps, "epochs": epoch, "accuracy": accuracy}
    raise SystemExit(f"baselines: error: {MAX_EPOCHS} epochs do not suffice; last accuracy: {accuracy:.4f}")


def train(
    net: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    steps: int,
    epoch: int,
) -> int:
    """Train for an epoch, or `steps` steps if that is less, and print the loss; return the number of steps."""
    net.train()
    running, step = 0.0, 0
    for images, labels in loader:
        images, labels = images.to(DEVICE), labels.to(DEVICE)
        optimizer.zero_grad()
        loss = F.cross_entropy(net(images), labels)
        loss.backward()
        optimizer.step()
        step += 1
        running += loss.item()
        if step % 2000 == 0 or (epoch, step) == (1, 1):
            print(f"[{epoch}, {step:5d}] loss: {running / (step % 2000 or 2000):.3f}", flush=True)
        if step % 2000 == 0:
            running = 0.0
        if step == steps:
            break
    return step


def now() -> float:
    """Return the seconds of a clock, once the device has done everything."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def pipeline(args: argparse.Namespace) -> dict[str, float]:
    """Train the Net on torchvision's pipeline with crop and flip; time the steps from `--skip` to `--steps`."""
    torch.manual_seed(args.seed)
    size = args.local_batch_size
    loader = cifar10_loader(
        args.data_dir, train=True, crop_flip=True, batch_size=size, shuffle=True, drop_last=True,
        num_workers=args.workers, pin_memory=DEVICE.type == "cuda",
    )  # fmt: skip
    net = make_net().to(DEVICE)
    optimizer = torch.optim.SGD(net.parameters(), 0.05, 0.9, nesterov=True, weight_decay=5e-4, fused=True)
    step, began = 0, now()
    while step < args.steps:
        for images, labels in loader:
            images, labels = images.to(DEVICE, non_blocking=True), labels.to(DEVICE, non_blocking=True)
            optimizer.zero_grad()
            F.cross_entropy(net(images), labels).backward()
            optimizer.step()
            step += 1
            if step == args.skip:  # until then, caches and memory are cold
                began = now()
            if step == args.steps:
                break
    return {"images_per_second": (step - args.skip) * size / (now() - began)}


def bare(args: argparse.Namespace) -> dict[str, float]:
    """Time steps of DistributedDataParallel on the CPU, over batches that are ready."""
    # As train_ddp.py does: divide the cores among the processes.
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ["WORLD_SIZE"])))
    torch.distributed.init_process_group("gloo")
    torch.manual_seed(args.seed)
    net = make_net().to(memory_format=torch.channels_last)
    model = nn.parallel.DistributedDataParallel(net, gradient_as_bucket_view=True)
    optimizer = torch.optim.SGD(net.parameters(), 0.001, 0.9, fused=True)
    # Noise trains as fast as pictures; 8,192 images exceed a processor's cache.
    images = (torch.rand(8192, 3, 32, 32) * 2 - 1).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (8192,))
    ready = list(zip(images.split(args.local_batch_size), labels.split(args.local_batch_size), strict=True))
    began = time.perf_counter()
    for step in range(1, args.steps + 1):
        inputs, targets = ready[step % len(ready)]
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        if step == args.skip:
            began = time.perf_counter()
    seconds = time.perf_counter() - began
    torch.distributed.destroy_process_group()
    return {"ms_per_step": 1000 * seconds / (args.steps - args.skip)} if os.environ["RANK"] == "0" else {}


def main() -> None:
    """Run one baseline."""
    parser = argparse.ArgumentParser(prog="tests.benchmarks.baselines", description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=("tutorial", "pipeline", "bare"))
    parser.add_argument("--data-dir", default=os.environ.get("CIFAR_DATA_DIR") or "data")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=10**9)
    parser.add_argument("--skip", type=int, default=0, help="steps before the measurement begins")
    parser.add_argument("--target", type=float, help="test accuracy at which `tutorial` ends")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--local-batch-size", type=int, default=512)
    args = parser.parse_args()
    numbers = {"tutorial": tutorial, "pipeline": pipeline, "bare": bare}[args.name](args)
    if numbers:
        print(json.dumps(numbers), flush=True)


if __name__ == "__main__":
    main()
