"""ResNet-18 for 32 x 32 images (He et al. 2016, arXiv 1512.03385)."""

from torch import nn


def resnet18(num_classes: int) -> nn.Module:
    """Return torchvision's ResNet-18 with a stem for small images: a 3 x 3 convolution, no stride, no pooling.

    11,173,962 parameters with 10 classes. The last BatchNorm of each residual branch starts at zero (Goyal et al. 2017,
    arXiv 1706.02677).
    """
    from torchvision.models import resnet18 as imagenet_resnet18  # importing it takes a second

    model = imagenet_resnet18(num_classes=num_classes, zero_init_residual=True)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model
