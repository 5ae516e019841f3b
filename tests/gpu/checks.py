"""Check on a GPU that the numbers are right: python -m tests.gpu.checks [WORD ...]; one line per check."""

import copy
import itertools
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F

from cifar.models import MODELS, build_model
from tests.helpers.parts import DEVICE, GPU, RECIPES, Parts, relative


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
    torch.backends.cudnn.allow_tf32 = False  # in this process, to compare with the CPU's
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
    checks = {"gradients agree with float64 on the CPU": gradients_agree_with_float64_on_the_cpu}
    run_checks(checks | ({"no step waits for the device": no_step_waits_for_the_device} if GPU else {}))
