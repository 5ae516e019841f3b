"""Every recipe at every precision on a fake GPU; see unit/test_fake_cuda.py."""

import pytest

from cifar.recipes import RECIPES
from tests.helpers.fake_cuda import unsupported
from tests.helpers.launches import CEILINGS, PRECISIONS, exceeded, measure

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def _torch_can_fake():
    if (reason := unsupported()) is not None:
        pytest.skip(reason)


def test_every_recipe_has_a_ceiling():
    assert CEILINGS.keys() == RECIPES.keys()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_hot_loop_never_waits_and_launches_few_kernels(recipe, precision):
    assert exceeded(recipe, precision, measure(recipe, precision)) == []
