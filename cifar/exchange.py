"""How DistributedDataParallel exchanges gradients, whole or compressed."""

from accelerate.utils import DDPCommunicationHookType, DistributedDataParallelKwargs

_COMM_HOOKS = {
    "none": DDPCommunicationHookType.NO,
    "fp16": DDPCommunicationHookType.FP16,
    "bf16": DDPCommunicationHookType.BF16,
    "powersgd": DDPCommunicationHookType.POWER_SGD,
}
# Vogels et al. 2019 (arXiv 1905.13727): gradient matrices as products of two thin ones, once the first steps, whose
# gradients are least like those before, are done. What was lost is added to the next step's gradient.
_POWER_SGD = {"matrix_approximation_rank": 4, "start_powerSGD_iter": 20}

_ONE_BUCKET = 4096  # MB


def ddp_options(comm_hook: str) -> DistributedDataParallelKwargs:
    """How DistributedDataParallel exchanges gradients.

    A gradient that is a view of its bucket is not copied before and after the exchange. Buffers are rank zero's when
    it counts, before an evaluation, and need no exchange in every step.
    """
    return DistributedDataParallelKwargs(
        gradient_as_bucket_view=True,
        broadcast_buffers=False,
        # PowerSGD exchanges several times a bucket, from callbacks whose order between two buckets may differ between
        # ranks, which then wait for each other for good (seen over gloo, torch 2.15): all gradients in one bucket.
        bucket_cap_mb=_ONE_BUCKET if comm_hook == "powersgd" else 25,
        comm_hook=_COMM_HOOKS[comm_hook],
        comm_state_option=_POWER_SGD if comm_hook == "powersgd" else {},
    )
