"""Check DDP over NCCL with the one rank that one GPU allows: torchrun --nproc_per_node=1 -m tests.gpu.nccl_one_rank

NCCL has little to do with one rank, but every call is made: the group, its watchdog, the reducer's buckets, the hooks.
"""

import warnings

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cifar.distributed.ddp import ddp_options, unwrap
from tests.gpu.parts import Parts, relative


def main() -> None:
    """Compare DDP's steps with those of the bare model."""
    caught = []
    for recipe in ("tutorial", "resnet18", "speed94"):
        for hook in ("none", "fp16", "bf16", "powersgd"):
            plain = Parts(recipe, "cuda", count=10_000)
            other = Parts(recipe, "cuda", count=10_000)
            assert dist.get_backend() == "nccl", dist.get_backend()
            plain.model = unwrap(plain.model)
            options = ddp_options(hook)
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                model: nn.Module = DistributedDataParallel(
                    unwrap(other.model), device_ids=[0], output_device=0, **options.to_kwargs()
                )
                options.register_comm_hook(model)
                other.model = model
                plain.steps(30), other.steps(30)
            caught += [str(warning.message).splitlines()[0][:110] for warning in said]
            apart = relative(other.weights(), plain.weights())
            print(f"{recipe:9} {hook:9} {apart:.1e} from the plain step", flush=True)
            assert hook != "none" or apart < 1e-2
    for text in sorted(set(caught)):
        print("warning:", text)
    print("strides and buckets fit" if not any("stride" in text for text in caught) else "STRIDES DIFFER")
    plain.runtime.close()


if __name__ == "__main__":
    main()
