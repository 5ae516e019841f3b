"""Every recipe at every precision on a fake GPU; see unit/test_fake_cuda.py."""

import pytest

from cifar.recipes import RECIPES
from tests.helpers.fake_cuda import unsupported
from tests.helpers.launches import CEILINGS, PRECISIONS, exceeded, measure

pytestmark = pytest.mark.slow

# GradScaler reads on the host whether a gradient overflowed, unless the optimizer says that it looks itself.
_WAITS = {("net-fast", "fp16"), ("speed94", "fp16"), ("speed96", "fp16")}


def _cases():
    for recipe in RECIPES:
        for precision in PRECISIONS:
            waits = pytest.mark.xfail(strict=True, raises=RuntimeError, reason="Muon waits under fp16's loss scaler")
            yield pytest.param(recipe, precision, marks=waits if (recipe, precision) in _WAITS else ())


@pytest.fixture(scope="module", autouse=True)
def _torch_can_fake():
    if (reason := unsupported()) is not None:
        pytest.skip(reason)


def test_every_recipe_has_a_ceiling():
    assert CEILINGS.keys() == RECIPES.keys()


@pytest.mark.parametrize(("recipe", "precision"), _cases())
def test_hot_loop_never_waits_and_launches_few_kernels(recipe, precision):
    assert exceeded(recipe, precision, measure(recipe, precision)) == []
