"""On a fake GPU: no step waits for the device, and no operator has tensors on two devices."""

import itertools

import pytest
import torch

from cifar.recipes import RECIPES
from tests.helpers.fake_cuda import needs_fake_gpu
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


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (lambda loss: loss.item(), "SyncError: aten._local_scalar_dense.default waits for the device"),
        (lambda loss: loss.expand(3) + torch.ones(3), "DeviceError: add of tensors on the GPU and the CPU"),
    ],
)
def test_step_that_waits_or_mixes_devices_is_caught(spoil, error, capfd):
    def wrong_step(*arguments):
        loss = train_step(*arguments)
        spoil(loss)
        return loss

    with pytest.raises(AssertionError):
        train_on_fake_gpu("tutorial", "fp32", wrong_step)
    assert error in capfd.readouterr().err
