"""The nets by name. A new one is a file here and a line in `NETS`."""

from collections.abc import Callable
from functools import partial

from torch import nn

from cifar.nets.net import Net

NETS: dict[str, Callable[[], nn.Module]] = {
    "net": Net,
    "net-wide": partial(Net, width=4),
}


def build_net(name: str) -> nn.Module:
    """A freshly initialized net on the CPU, drawn from torch's global generator.

    Raises:
        KeyError: `name` is not in `NETS`; the command line has checked it by then.
    """
    return NETS[name]()
