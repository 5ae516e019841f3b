"""Check on a GPU that the numbers are right: python -m tests.gpu.checks [--only WORD ...]; one line per check."""

import argparse
import contextlib
import copy
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

from cifar.augment import CropFlip
from cifar.checkpoint import copy_to_host
from cifar.data import DeviceImages, EvalLoader
from cifar.evaluation import evaluate
from cifar.models import MODELS, build_model
from cifar.optim import orthogonalize, orthogonalize_filters
from tests.gpu.parts import CLASSES, RECIPES, Parts, random_images, relative

CHECKS: list[Callable[[], str]] = []
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GPU = DEVICE == "cuda"
# Without a GPU these are smoke tests: few steps, small batches, and two recipes for all.
SIZES = {} if GPU else {"local_batch_size": 8, "global_batch_size": 8}
SOME = RECIPES if GPU else ("tutorial", "net-fast")


def check(function: Callable[[], str]) -> Callable[[], str]:
    """Register a check: it returns what to print, and fails by raising."""
    CHECKS.append(function)
    return function


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    """Run a block with float32 products in full precision, to be compared with the CPU's."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def _sample() -> torch.Tensor:
    return torch.randn(500, 3, 32, 32, generator=torch.Generator().manual_seed(2)).clamp(-1, 1)


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


@check
def no_step_waits_for_the_device() -> str:
    """Run loader and step of every recipe under torch's own alarm, eager and captured."""
    if not GPU:
        return "skipped: no GPU"
    cases = 0
    for recipe in RECIPES:
        for precision in ("fp32", "bf16", "fp16"):
            for graph in (False, True):
                if precision == "fp16" and graph:  # the loss scaler's decision cannot be captured
                    continue
                parts = Parts(recipe, DEVICE, precision, graph=graph, count=20_000).steps(6)
                torch.cuda.synchronize()
                torch.cuda.set_sync_debug_mode("error")
                try:
                    parts.steps(3)
                except RuntimeError as error:
                    raise AssertionError(f"{recipe} {precision} graph={graph}: {error}") from error
                finally:
                    torch.cuda.set_sync_debug_mode("default")
                cases += 1
    return f"{cases} cases"


@check
def gradients_agree_with_float64_on_the_cpu() -> str:
    """Compare one batch's gradients of every model, in float32 without TF32."""
    worst = {}
    with without_tf32():
        for name in MODELS:
            torch.manual_seed(0)
            model = build_model(name, 10, _sample)
            batch, labels = torch.randn(16, 3, 32, 32), torch.randint(0, 10, (16,))
            gradients = []
            for device, dtype in (("cpu", torch.float64), (DEVICE, torch.float32)):
                own = copy.deepcopy(model).to(device, dtype)
                if device == "cuda":
                    own.to(memory_format=torch.channels_last)
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


@check
def an_overflow_in_fp16s_first_step_leaves_no_trace() -> str:
    """Momentum must not be what happened to lie in memory."""
    if not GPU:
        return "skipped: no GPU"
    for recipe in ("tutorial", "wide", "resnet18", "speed94"):
        junk = [torch.full((1 << 20,), float("nan"), device=DEVICE) for _ in range(64)]
        del junk
        parts = Parts(recipe, DEVICE, "fp16", count=4_000)
        parts.runtime.scaler = torch.amp.GradScaler("cuda", init_scale=2.0**60, growth_interval=10_000)
        parts.steps(60)
        assert parts.weights().isfinite().all(), recipe
        assert parts.runtime.scaler.get_scale() < 2.0**60
    return "4 recipes"


@check
def a_captured_step_is_the_eager_one() -> str:
    """Compare weights after 4, 8 and 16 steps from the same seed: equal bits, or how far apart."""
    if not GPU:
        return "skipped: no GPU"
    said = []
    for recipe in RECIPES:
        for precision in ("fp32", "bf16"):
            plain, graphed = (Parts(recipe, DEVICE, precision, graph=graph, count=20_000) for graph in (False, True))
            apart = []
            for count in (4, 4, 8):
                plain.steps(count), graphed.steps(count)
                apart.append(relative(graphed.weights(), plain.weights()))
            said.append(f"{recipe} {precision} " + ("bits" if apart[2] == 0 else f"{apart[0]:.0e}..{apart[2]:.0e}"))
            assert apart[0] < 1e-3, said
            assert apart[2] < 5e-2, said
            assert abs(float(plain.state.running_loss) - float(graphed.state.running_loss)) < 0.05, said
    return "; ".join(said)


@check
def two_runs_have_the_same_bits() -> str:
    """Report whether exact resuming is possible with the kernels that the libraries choose."""
    precision, steps = ("bf16", 12) if GPU else ("fp32", 2)
    said = []
    for recipe in RECIPES:
        one, two = (Parts(recipe, DEVICE, precision, count=20_000, **SIZES).steps(steps) for _ in range(2))
        said.append(f"{recipe} {'yes' if torch.equal(one.weights(), two.weights()) else 'NO'}")
    return ", ".join(said)


@check
def a_resumed_run_continues_where_it_was() -> str:
    """Go through the content of a checkpoint: equal bits where two runs have them."""
    said = []
    for recipe in SOME:
        for graph in (False, True) if GPU else (False,):
            whole = Parts(recipe, DEVICE, graph=graph, count=20_000).steps(8)
            with tempfile.TemporaryDirectory() as directory:
                path = Path(directory) / "state.pt"
                torch.save(copy_to_host(whole.state.state_dict([whole.state.rank_state()])), path)
                saved = torch.load(path, map_location="cpu", weights_only=True)
            other = Parts(recipe, DEVICE, graph=graph, count=20_000)
            other.state.load_state_dict(saved, rank=0, world_size=1)
            whole.steps(8), other.steps(8)
            apart = relative(other.weights(), whole.weights())
            assert apart < 1e-2, (recipe, graph, apart)
            said.append(f"{recipe}{' graph' if graph else ''} {'bits' if apart == 0 else f'{apart:.0e}'}")
    return ", ".join(said)


@check
def a_run_moves_between_cpu_and_gpu() -> str:
    """Resume on the other device, whose filters and momentum have another memory layout."""
    for here, there in (("cpu", DEVICE), (DEVICE, "cpu")):
        first = Parts("tutorial", here, count=4_000).steps(5)
        saved = copy_to_host(first.state.state_dict([first.state.rank_state()]))
        before = first.weights()
        with without_tf32():
            stayed = first.steps(5)
            moved = Parts("tutorial", there, count=4_000)
            moved.state.load_state_dict(saved, rank=0, world_size=1)
            moved.steps(5)
        apart = relative(moved.weights() - before, stayed.weights() - before)
        assert apart < 0.02, (here, there, apart)
    return "both ways"


@check
def every_test_image_counts_once_and_as_on_the_cpu() -> str:
    """Evaluate in three uneven shards, with and without views, and compare the predictions."""
    images, labels = random_images(2_500 if GPU else 400)
    results = {}
    torch.manual_seed(0)
    model = build_model("speed", 10, _sample)
    with without_tf32():
        for device in ("cpu", DEVICE):
            own = copy.deepcopy(model).to(device)
            data = DeviceImages(images, labels, CLASSES, torch.device(device))
            for tta in ("none", "crop"):
                rows: list[torch.Tensor] = []

                def all_reduce(own_rows: torch.Tensor, rows: list[torch.Tensor] = rows) -> torch.Tensor:
                    rows.append(own_rows)
                    return torch.stack(rows).sum(0)

                for rank in range(3):
                    runtime: Any = SimpleNamespace(
                        device=torch.device(device), rank=rank, world_size=3, sum=all_reduce, broadcast_buffers=id
                    )
                    arguments = own, EvalLoader(data, rank, 3), runtime, tta, results.get((device, "none"))
                    with contextlib.suppress(RuntimeError):  # the first two have not seen all images
                        results[device, tta] = evaluate(*arguments)
    for tta in ("none", "crop"):
        here, there = results["cpu", tta], results[DEVICE, tta]
        same = float((here.predicted == there.predicted).double().mean())
        assert same > 0.995, (tta, same)
        assert abs(here.loss - there.loss) < 1e-3
    return "without and with views"


@check
def a_compiled_model_has_few_graphs_and_no_breaks() -> str:
    """Count the graphs of training, testing and views, and compare the loss with the eager model's."""
    import torch._dynamo
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    precision = "bf16" if GPU else "fp32"
    began = time.perf_counter()
    compiled = Parts("speed94", DEVICE, precision, compile=True, count=20_000, **SIZES).steps(1)
    first = time.perf_counter() - began
    plain = Parts("speed94", DEVICE, precision, count=20_000, **SIZES).steps(1)
    compiled.steps(3), plain.steps(3)
    loss = float(compiled.state.running_loss), float(plain.state.running_loss)
    test = EvalLoader(DeviceImages(*random_images(2_500), CLASSES, compiled.runtime.device), 0, 1)
    for tta in ("none", "crop"):
        evaluate(compiled.model, test, compiled.runtime, tta)
    compiled.steps(2)
    evaluate(compiled.model, test, compiled.runtime)
    graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    assert breaks == 0, dict(counters["graph_break"])
    assert graphs <= 4, graphs  # 4 with torch 2.11, 3 with 2.14
    assert abs(loss[0] - loss[1]) / loss[1] < 0.02, loss
    return f"{graphs} graphs, first step {first:.0f} s, loss {loss[0]:.4f} and {loss[1]:.4f}"


@check
def memory_does_not_grow() -> str:
    """Compare what is allocated after the second epoch and after the fourth."""
    if not GPU:
        return "skipped: no GPU"
    said = []
    for recipe, graph in (("speed94", False), ("speed94", True), ("resnet18", False)):
        parts = Parts(recipe, DEVICE, "bf16", graph=graph, count=10_000)
        sizes = []
        for _ in range(2):
            parts.steps(2 * parts.plan.steps_per_epoch)
            torch.cuda.synchronize()
            sizes.append(torch.cuda.memory_allocated())
        assert sizes[1] <= sizes[0] * 1.02, sizes
        said.append(f"{recipe}{' graph' if graph else ''} {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
        del parts
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return ", ".join(said)


def main() -> None:
    """Run the checks; exit with status 1 if one fails."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="*", default=[""], help="words of the names of the checks to run")
    args = parser.parse_args()
    if GPU:
        print(torch.cuda.get_device_name(), "torch", torch.__version__, "cuDNN", torch.backends.cudnn.version())
    failed = 0
    for function in CHECKS:
        if not any(word in function.__name__ for word in args.only):
            continue
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
