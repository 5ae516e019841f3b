"""Check on a GPU that the numbers are right: python -m tests.gpu.checks [WORD ...]; one line per check."""

import contextlib
import copy
import itertools
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from cifar.augment import CropFlip
from cifar.data import DeviceImages, EvalLoader
from cifar.distributed.ddp import ddp_options, unwrap
from cifar.evaluation import evaluate
from cifar.models import MODELS, build_model
from cifar.optim import orthogonalize, orthogonalize_filters
from tests.helpers.parts import CLASSES, DEVICE, GPU, RECIPES, Parts, random_images, relative

CHECKS: list[Callable[[], str]] = []


def check(function: Callable[[], str]) -> Callable[[], str]:
    """Register a check: it returns what to print, and fails by raising."""
    CHECKS.append(function)
    return function


def gpu_check(function: Callable[[], str]) -> Callable[[], str]:
    """Register a check that needs a GPU, if there is one."""
    return check(function) if GPU else function


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    """Run a block with float32 convolutions in full precision, to be compared with the CPU's."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


@check
def batches_are_those_of_the_cpu() -> str:
    """Compare crops, flips and cutout bit for bit, and normalization, which CUDA rounds differently, to an ulp."""
    images, labels = random_images(3_000)
    indices = torch.randperm(3_000, generator=torch.Generator().manual_seed(1))[:1_111]
    for padding, alternate, cutout in ((4, False, 0), (2, True, 0), (4, True, 12), (0, False, 5)):
        got = []
        for device in (torch.device("cpu"), torch.device(DEVICE)):
            data = DeviceImages(images, labels, CLASSES, device)
            data.augment = CropFlip(3_000, 0, device, padding, alternate, cutout)
            data.augment.set_epoch(3)
            got.append(tuple(tensor.cpu() for tensor in data[indices.to(device)]))
        assert torch.equal(got[0][1], got[1][1])
        bytes_ = [((images + 1) * 127.5).round() for images, _ in got]
        assert torch.equal(*bytes_), (padding, alternate, cutout)
        assert torch.allclose(got[1][0], got[0][0], rtol=0, atol=1.2e-7), (padding, alternate, cutout)
    return "4 augmentations"


@gpu_check
def no_step_waits_for_the_device() -> str:
    """Run loader and step of every recipe under torch's own alarm, eager and captured."""
    cases = [("fp32", False), ("fp32", True), ("bf16", False), ("bf16", True), ("fp16", False)]
    for recipe, (precision, graph) in itertools.product(RECIPES, cases):
        parts = Parts(recipe, DEVICE, precision, graph=graph, count=20_000).steps(6)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            parts.steps(3)
        except RuntimeError as error:
            raise AssertionError(f"{recipe} {precision} graph={graph}: {error}") from error
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return f"{len(RECIPES) * len(cases)} cases"


@check
def gradients_agree_with_float64_on_the_cpu() -> str:
    """Compare one batch's gradients of every model, in float32 without TF32."""
    worst = {}
    with without_tf32():
        for name in MODELS:
            torch.manual_seed(0)
            model = build_model(name, 10, lambda: torch.randn(500, 3, 32, 32).clamp(-1, 1))
            batch, labels = torch.randn(16, 3, 32, 32), torch.randint(0, 10, (16,))
            gradients = []
            for device, dtype in (("cpu", torch.float64), (DEVICE, torch.float32)):
                own = copy.deepcopy(model).to(device, dtype, memory_format=torch.channels_last)
                F.cross_entropy(own(batch.to(device, dtype)), labels.to(device)).backward()
                gradients.append(torch.cat([p.grad.flatten() for p in own.parameters() if p.grad is not None]))
            worst[name] = relative(gradients[1], gradients[0])
            assert worst[name] < 2e-3, worst
    return ", ".join(f"{name} {value:.0e}" for name, value in worst.items())


@check
def muon_has_the_directions_of_the_cpu() -> str:
    """Compare the orthogonalization, in bfloat16 on a GPU."""
    cosines = []
    shapes = [(64, 24, 3, 3), (16, 6, 5, 5), (6, 3, 5, 5), (64, 16, 1, 1), *GPU * [(256, 256, 3, 3), (512, 512, 3, 3)]]
    filters = [torch.randn(shape, generator=torch.Generator().manual_seed(0)) for shape in shapes]
    there = orthogonalize_filters([filter.to(DEVICE, memory_format=torch.channels_last) for filter in filters])
    for filter, batched in zip(filters, there, strict=True):
        here, own = orthogonalize(filter.flatten(1)), batched.cpu().flatten(1)
        cosines.append(float(F.cosine_similarity(here.flatten(), own.flatten(), dim=0)))
        assert torch.linalg.svdvals(own).max() < 1.6
    assert min(cosines) > 0.995, cosines
    return f"cosine {min(cosines):.4f} at least"


@gpu_check
def a_captured_step_is_the_eager_one() -> str:
    """Compare weights after 4, 8 and 16 steps from the same seed: equal bits, or how far apart."""
    said = []
    for recipe, precision in itertools.product(RECIPES, ("fp32", "bf16")):
        plain = Parts(recipe, DEVICE, precision, count=20_000)
        graphed = Parts(recipe, DEVICE, precision, graph=True, count=20_000)
        apart = []
        for count in (4, 4, 8):
            apart.append(relative(graphed.steps(count).weights(), plain.steps(count).weights()))
        said.append(f"{recipe} {precision} " + ("bits" if apart[2] == 0 else f"{apart[0]:.0e}..{apart[2]:.0e}"))
        assert apart[0] < 1e-3, said
        assert apart[2] < 5e-2, said
        assert abs(float(plain.state.running_loss) - float(graphed.state.running_loss)) < 0.05, said
    return "; ".join(said)


@check
def a_resumed_run_continues_where_it_was() -> str:
    """Go through the content of a checkpoint: equal bits where two runs have them."""
    said = []
    cases = itertools.product(RECIPES, (False, True)) if GPU else [("tutorial", False), ("net-fast", False)]
    for recipe, graph in cases:
        whole = Parts(recipe, DEVICE, graph=graph, count=20_000).steps(8)
        with tempfile.TemporaryFile() as file:
            torch.save(whole.save(), file)
            file.seek(0)
            saved = torch.load(file, map_location="cpu", weights_only=True)
        other = Parts(recipe, DEVICE, graph=graph, count=20_000).load(saved)
        apart = relative(other.steps(8).weights(), whole.steps(8).weights())
        assert apart < 1e-2, (recipe, graph, apart)
        said.append(f"{recipe}{' graph' if graph else ''} {'bits' if apart == 0 else f'{apart:.0e}'}")
    return ", ".join(said)


@check
def a_run_moves_between_cpu_and_gpu() -> str:
    """Resume on the other device, whose filters and momentum have another memory layout."""
    for here, there in (("cpu", DEVICE), (DEVICE, "cpu")):
        first = Parts("tutorial", here, count=4_000).steps(5)
        saved, before = first.save(), first.weights()
        with without_tf32():
            stayed = first.steps(5)
            moved = Parts("tutorial", there, count=4_000).load(saved).steps(5)
        apart = relative(moved.weights() - before, stayed.weights() - before)
        assert apart < 0.02, (here, there, apart)
    return "both ways"


@check
def an_evaluation_agrees_with_that_on_the_cpu() -> str:
    """Compare the predictions with views, and the losses."""
    found = []
    saved = Parts("speed94", "cpu", count=2_000).save()
    images, labels = random_images(2_500 if GPU else 400)
    with without_tf32():
        for device in ("cpu", DEVICE):
            parts = Parts("speed94", device, count=2_000).load(saved)
            test = EvalLoader(DeviceImages(images, labels, CLASSES, parts.runtime.device), 0, 1)
            found.append(evaluate(parts.model, test, parts.runtime, "crop"))
    same = float((found[0].predicted == found[1].predicted).double().mean())
    assert same > 0.995, same
    assert abs(found[0].loss - found[1].loss) < 1e-3
    return f"{100 * same:.1f} % of the predictions"


@gpu_check
def ddp_over_nccl_takes_the_plain_step() -> str:
    """Compare DDP's steps, with each hook, with those of the bare model; with one rank, NCCL makes every call, too."""
    if "RANK" not in os.environ:
        return "skipped: not under torchrun"
    said = []
    for recipe, hook in itertools.product(("tutorial", "resnet18", "speed94"), ("none", "fp16", "bf16", "powersgd")):
        plain, other = Parts(recipe, "cuda", count=10_000), Parts(recipe, "cuda", count=10_000)
        assert dist.get_backend() == "nccl", dist.get_backend()
        plain.model = unwrap(plain.model)
        options = ddp_options(hook)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            bare = unwrap(other.model)
            other.model = DistributedDataParallel(bare, device_ids=[0], output_device=0, **options.to_kwargs())
            options.register_comm_hook(other.model)
            apart = relative(other.steps(30).weights(), plain.steps(30).weights())
        assert not any("stride" in str(warning.message) for warning in caught), [str(each.message) for each in caught]
        assert hook != "none" or apart < 1e-2, (recipe, apart)
        said.append(f"{recipe} {hook} {apart:.0e}")
    plain.runtime.close()
    return ", ".join(said)


def main() -> None:
    """Run the checks; exit with status 1 if one fails."""
    failed = 0
    words = sys.argv[1:] or [""]
    for function in [each for each in CHECKS if any(word in each.__name__ for word in words)]:
        began = time.perf_counter()
        try:
            said, verdict = function(), "PASS"
        except Exception as error:
            failed += 1
            said, verdict = f"{type(error).__name__}: {str(error)[:300]}", "FAIL"
            traceback.print_exc()
        name = function.__name__.replace("_", " ")
        print(f"{verdict}  {name} ({time.perf_counter() - began:.0f} s): {said}", flush=True)
    print(f"{failed} failed", flush=True)
    os._exit(failed > 0)  # the threads of compilers and of NCCL have no part in it


if __name__ == "__main__":
    main()
