"""The part "captured": a step under DDP over NCCL, with one rank, as a CUDA graph; without a GPU, eager, over gloo."""

from functools import partial
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from cifar import cuda_graph
from cifar.distributed.ddp import settle_buckets, unwrap
from tests.gpu.campaign import TORCHRUN, Campaign
from tests.gpu.checks import run_checks
from tests.helpers.measuring import now
from tests.helpers.parts import DEVICE, GPU, Parts, relative

CASES = [*((recipe, "fp32", "none") for recipe in ("tutorial", "net-fast", "wide")),
         *(("speed94", "bf16", hook) for hook in ("none", "fp16", "bf16"))]  # fmt: skip
EAGER_STEPS = 11  # DDP measures the first ten, and a graph must not: https://docs.pytorch.org/docs/main/notes/cuda.html
STEPS, TIMED_STEPS = (30, 100) if GPU else (2, 1)


def captured(c: Campaign) -> None:
    """Run this file in a process for each precision, which accelerate keeps, with the variable of torch's notes."""
    start = [*TORCHRUN, "--nproc_per_node=1", "-m", "tests.gpu.captured"]
    for precision in ("fp32", "bf16"):
        command = ["env", "TORCH_NCCL_ASYNC_ERROR_HANDLING=0", *start, f"in {precision}"]
        c.checks(f"captured {precision}", command, 60)


def build(recipe: str, precision: str, hook: str, graph: bool) -> Parts:
    """Build the parts, and wrap the model as accelerate does several ranks', on the stream that is to be captured."""
    size: dict[str, Any] = {} if GPU else {"local_batch_size": 4, "global_batch_size": 4}
    stream = torch.cuda.Stream() if graph else None
    with torch.cuda.stream(stream):
        parts = Parts(recipe, DEVICE, precision, graph, 20_000, comm_hook=hook, **size)
        options: Any = parts.runtime.accelerator.ddp_handler
        devices = [0] if GPU else None
        parts.model = DistributedDataParallel(unwrap(parts.model), device_ids=devices, **options.to_kwargs())
        options.register_comm_hook(parts.model)
        settle_buckets(parts.model, parts.train.images[:2])
    if not GPU:
        torch.set_num_threads(1)
    if isinstance(parts.train_step, cuda_graph.CudaGraph):
        parts.train_step._stream = stream
        torch.cuda.synchronize()
    return parts


def compare(recipe: str, precision: str, hook: str) -> str:
    """Compare eager and captured weights and losses bit for bit, and time the steps."""
    torch.backends.cudnn.deterministic = recipe == "wide"  # whose eager runs differ from each other otherwise
    eager, graphed = (build(recipe, precision, hook, graph).steps(STEPS) for graph in (False, GPU))
    apart = relative(graphed.weights(), eager.weights())
    assert apart == 0, f"captured weights are {apart:.0e} from the eager ones"
    assert torch.equal(graphed.state.running_loss, eager.state.running_loss), "the losses differ"
    began = [now()]
    for parts in (eager, graphed):
        parts.steps(TIMED_STEPS)
        began.append(now())
    before, after = (1e3 * (began[k + 1] - began[k]) / TIMED_STEPS for k in (0, 1))
    other = "captured" if GPU else "eager again (no GPU)"
    return f"same bits after {STEPS} steps; eager {before:.3f} ms, {other} {after:.3f} ms a step"


if __name__ == "__main__":
    cuda_graph._EAGER_STEPS = EAGER_STEPS
    checks = {f"{recipe} in {precision}, hook {hook}": (recipe, precision, hook) for recipe, precision, hook in CASES}
    run_checks({name: partial(compare, *case) for name, case in checks.items()})
