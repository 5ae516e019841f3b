"""The nets by name. A new one is a file here and a line in `NETS`."""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from cifar.nets.net import Net
from cifar.nets.resnet import resnet18
from cifar.nets.speed import SpeedNet

NETS: dict[str, Callable[[], nn.Module]] = {
    "net": Net,
    "net-wide": partial(Net, width=4),
    "resnet18": resnet18,
    "speed": SpeedNet,
    "speed-wide": partial(SpeedNet, widths=(128, 384, 512), depth=3),
}


def build_net(name: str, images: Tensor | None = None) -> nn.Module:
    """A freshly initialized net on the CPU, drawn from torch's global generator.

    Args:
        images: normalized training images, float32 [n, 3, 32, 32], from which nets that have a whitening layer
            compute it; None where a checkpoint's weights follow.

    Raises:
        KeyError: `name` is not in `NETS`; the command line has checked it by then.
    """
    net = NETS[name]()
    if images is not None and isinstance(net, SpeedNet):
        net.whiten_from(images)
    return net
