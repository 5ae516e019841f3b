"""The models by name. To add one, add a file here and a line to `MODELS`."""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from cifar.models.net import Net
from cifar.models.resnet import resnet18
from cifar.models.speed import SpeedNet

# A function from the number of classes to a model with random weights, for each name of --model.
MODELS: dict[str, Callable[[int], nn.Module]] = {
    "net": Net,
    "net-wide": partial(Net, width=4),
    "resnet18": resnet18,
    "speed": SpeedNet,
    "speed-wide": partial(SpeedNet, widths=(128, 384, 512), depth=3),
}


def build_model(name: str, num_classes: int, sample: Callable[[], Tensor] | None = None) -> nn.Module:
    """Return a new model on the CPU, initialized from torch's global random generator.

    Args:
        num_classes: number of outputs.
        sample: returns normalized training images, float32 [n, 3, size, size] on the CPU; called only for a model with
            data-dependent initialization (a method `init_from_data`). None if weights are loaded right after.
    """
    model = MODELS[name](num_classes)
    init_from_data = getattr(model, "init_from_data", None)
    if sample is not None and init_from_data is not None:
        init_from_data(sample())
    return model
