"""The tutorial's Net: LeNet-5 (LeCun et al. 1998) with ReLU, max-pooling and three input channels."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Net(nn.Module):
    """Two convolutions and three linear layers; 62,006 parameters at width 1 with 10 classes.

    Args:
        num_classes: number of outputs.
        width: multiplies the channels of both convolutions (6 and 16) and the hidden units (120 and 84).
    """

    def __init__(self, num_classes: int, width: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6 * width, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.conv2 = nn.Conv2d(6 * width, 16 * width, 5)
        self.fc1 = nn.Linear(16 * width * 5 * 5, 120 * width)
        self.fc2 = nn.Linear(120 * width, 84 * width)
        self.fc3 = nn.Linear(84 * width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, float [batch, num_classes], of normalized images, float [batch, 3, 32, 32]."""
        # The tutorial applies the ReLU before pooling. The maximum of four is the same either way, bit for bit,
        # forward and backward, and here the ReLU has a quarter of the work.
        x = F.relu(self.pool(self.conv1(images)))  # [batch, 6, 14, 14]
        x = F.relu(self.pool(self.conv2(x)))  # [batch, 16, 5, 5]
        x = torch.flatten(x, 1)  # [batch, 400]
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        return self.fc3(x)
