"""Check on a GPU that the numbers are right: python -m tests.gpu.checks [WORD ...]; one line per check."""

import copy
import itertools
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F

from cifar.data import DeviceImages, EvalLoader
from cifar.evaluation import evaluate
from cifar.models import MODELS, build_model
from tests.helpers.parts import CLASSES, DEVICE, GPU, RECIPES, Parts, random_images, relative


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


def gradients_agree_with_float64_on_the_cpu() -> str:
    """Compare one batch's gradients of every model, in float32 without TF32."""
    worst = {}
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


def an_evaluation_agrees_with_that_on_the_cpu() -> str:
    """Compare the predictions with views, and the losses."""
    found = []
    saved = Parts("speed94", "cpu", count=2_000).save()
    images, labels = random_images(2_500 if GPU else 400)
    for device in ("cpu", DEVICE):
        parts = Parts("speed94", device, count=2_000).load(saved)
        test = EvalLoader(DeviceImages(images, labels, CLASSES, parts.runtime.device), 0, 1)
        found.append(evaluate(parts.model, test, parts.runtime, "crop"))
    same = float((found[0].predicted == found[1].predicted).double().mean())
    assert same > 0.995, same
    assert abs(found[0].loss - found[1].loss) < 1e-3
    return f"{100 * same:.1f} % of the predictions"


def run_checks(checks: Mapping[str, Callable[[], str]]) -> None:
    """Run the checks whose names have a word of the command line; exit with status 1 if one fails."""
    failed = 0
    words = sys.argv[1:] or [""]
    for name in [name for name in checks if any(word in name for word in words)]:
        began = time.perf_counter()
        try:
            said, verdict = checks[name](), "PASS"
        except Exception as error:
            failed += 1
            said, verdict = f"{type(error).__name__}: {str(error)[:300]}", "FAIL"
            traceback.print_exc()
        print(f"{verdict}  {name} ({time.perf_counter() - began:.0f} s): {said}", flush=True)
    print(f"{failed} failed", flush=True)
    os._exit(failed > 0)  # the threads of compilers and of NCCL have no part in it


if __name__ == "__main__":
    torch.backends.cudnn.allow_tf32 = False  # for what is compared with the CPU
    on_gpu = (no_step_waits_for_the_device, a_captured_step_is_the_eager_one) if GPU else ()
    on_any = (
        gradients_agree_with_float64_on_the_cpu,
        a_resumed_run_continues_where_it_was,
        an_evaluation_agrees_with_that_on_the_cpu,
    )
    run_checks({check.__name__.replace("_", " "): check for check in (*on_gpu, *on_any)})
