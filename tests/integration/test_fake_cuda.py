"""Every recipe at every precision on a fake GPU; see unit/test_fake_cuda.py."""

import pytest

from cifar.recipes import RECIPES
from tests.helpers.fake_cuda import needs_fake_gpu
from tests.helpers.fake_run import train_on_fake_gpu

pytestmark = [pytest.mark.slow, needs_fake_gpu]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_training_never_waits_for_the_device(recipe, precision):
    train_on_fake_gpu(recipe, precision)
