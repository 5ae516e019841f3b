"""ResNet-18 for 32 x 32 images (He et al. 2016, arXiv 1512.03385)."""

from torch import nn

from cifar.datasets import CLASSES


def resnet18() -> nn.Module:
    """torchvision's ResNet-18 with the stem that small images need: a 3 x 3 convolution, no stride and no pooling.

    11,173,962 parameters. The last BatchNorm of each residual branch begins at zero (Goyal et al. 2017).
    """
    from torchvision.models import resnet18 as imagenet_resnet18  # its other models cost a second to import

    net = imagenet_resnet18(num_classes=len(CLASSES), zero_init_residual=True)
    net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    net.maxpool = nn.Identity()
    return net
