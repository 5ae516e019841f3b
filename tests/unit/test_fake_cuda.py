"""On a fake GPU: no step waits for the device, and no operator has tensors on two devices."""

import itertools

import pytest
import torch

from cifar.distributed.device import resolve
from cifar.distributed.environment import Launch
from cifar.recipes import RECIPES, config_from_recipe
from tests.helpers.fake_cuda import DeviceError, SyncError, needs_fake_gpu, on_fake_gpu
from tests.helpers.fake_run import train_on_fake_gpu
from train_ddp import train_step

pytestmark = needs_fake_gpu


QUICK = [("tutorial", "fp32"), ("speed94", "bf16")]
OTHERS = sorted({*itertools.product(RECIPES, ("fp32", "bf16", "fp16"))} - {*QUICK})


@pytest.mark.parametrize(
    ("recipe", "precision"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in OTHERS)]
)
def test_training_never_waits_for_the_device(recipe, precision):
    """Loader, augmentation, step, CUDA graph, evaluation, checkpoint and resume."""
    train_on_fake_gpu(recipe, precision)


def test_step_that_waits_is_caught(capfd):
    def wrong_step(*arguments):
        loss = train_step(*arguments)
        loss.item()
        return loss

    with pytest.raises(AssertionError):
        train_on_fake_gpu("tutorial", "fp32", wrong_step)
    assert "SyncError: aten._local_scalar_dense.default waits for the device" in capfd.readouterr().err


WAITS = [
    lambda x: float(x),
    lambda x: 1 if x > 3 else 2,
    lambda x: f"{x}",
    lambda x: x.tolist(),
    lambda x: x.cpu(),
    lambda x: torch.tensor(0.5, device=x.device),
    lambda x: x.copy_(torch.zeros(())),
    lambda x: x.expand(3)[x.expand(3) > 0],
    lambda x: x.nonzero(),
    lambda _: torch.cuda.synchronize(),
]
MIXTURES = [
    lambda x: x.expand(3) + torch.ones(3),
    lambda x: torch.ones(3)[x.expand(3).long()],
    lambda x: torch._foreach_add_([torch.zeros(())], [x]),
]


def test_mistakes_are_refused():
    def work(mode):
        x = torch.zeros((), device="cuda")
        mode.hot = True
        for wait in WAITS:
            with pytest.raises(SyncError):
                wait(x)
        mode.hot = False
        float(x)
        assert mode.waits == 1
        for mix in MIXTURES:
            with pytest.raises(DeviceError, match="on the GPU and the CPU"):
                mix(x)
        momentum = torch.zeros(4, 3, 2, 2, device="cuda")
        weights = momentum.contiguous(memory_format=torch.channels_last)
        with pytest.raises(DeviceError, match="strides"):
            torch._fused_sgd_([weights], [weights], [momentum], weight_decay=0, momentum=0.9, lr=0.1, dampening=0,
                              nesterov=False, maximize=False, is_first_step=False)  # fmt: skip
        rate = torch.tensor(0.1)
        x * rate
        with mode.capture(), pytest.raises(SyncError, match="the graph would keep the value"):
            x * rate

    on_fake_gpu(work)


@pytest.mark.parametrize("cores", [0, 1])
def test_fewer_cores_than_gpus_are_a_warning(cores, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr("cifar.distributed.device.available_cores", lambda: cores)
    resolve(config_from_recipe("tutorial", device="cuda"), Launch())
    warning = f"WARNING: 1 GPUs get their kernels from {cores} CPU core(s)"
    assert (warning in capsys.readouterr().out) == (cores == 0)
