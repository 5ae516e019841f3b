"""Exact test metrics: every test image counts once, at every world size, after one all_reduce."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cifar.data import EvalLoader
from cifar.datasets import CLASSES
from cifar.distributed.runtime import Runtime

_FIXED_POINT = 2**20  # units of loss and confidence: fine enough for six decimals
_MAX_LOSS = 2**22  # of one image: ten thousand of them stay below 2**63 units


@dataclass(frozen=True)
class Evaluation:
    """The metrics of a test set of n images, the same on every rank.

    Attributes:
        loss: mean cross-entropy; NaN if any image's isn't finite, or is above four million.
        labels, predicted: int64 [n], on the CPU, in the order of the test set.
        confidence: float64 [n], the probability given to the predicted class.
    """

    loss: float
    labels: Tensor
    predicted: Tensor
    confidence: Tensor

    @property
    def total(self) -> int:
        """Images in the test set."""
        return len(self.labels)

    @property
    def correct(self) -> int:
        """Images whose class was predicted."""
        return int((self.predicted == self.labels).sum())

    @property
    def accuracy(self) -> float:
        """Correct / total, 0 to 1."""
        return self.correct / self.total

    def confusion(self, classes: int = len(CLASSES)) -> Tensor:
        """int64 [class, predicted class]: how many images of the one were taken for the other."""
        return torch.bincount(self.labels * classes + self.predicted, minlength=classes**2).view(classes, classes)

    def class_accuracies(self) -> list[float]:
        """Accuracy among the images of each class, 0 to 1."""
        confusion = self.confusion().double()
        return (confusion.diagonal() / confusion.sum(1)).tolist()

    def most_confidently_wrong(self, count: int) -> list[int]:
        """Indices of the misclassified images whose predicted class had the highest probability, highest first."""
        wrong = torch.nonzero(self.predicted != self.labels).flatten()
        order = self.confidence[wrong].sort(descending=True, stable=True).indices
        return wrong[order[:count]].tolist()


@torch.no_grad()
def evaluate(net: nn.Module, loader: EvalLoader, runtime: Runtime, tta: str = "none") -> Evaluation:
    """Test `net`, the bare module, on the images of all ranks' loaders together. Collective: every rank calls it.

    `tta` is the test-time augmentation, "none", "flip" or "crop"; see `cifar.evaluation`.

    Ranks hold uneven shares, so the forward pass must not communicate; DistributedDataParallel would hang here.
    What the one all_reduce adds up is a row of integers for every test image, in fixed point: sums of integers
    don't depend on their order, and the count of how often each image was seen has to come out as one.

    Raises:
        RuntimeError: an image was seen twice or not at all.
    """
    runtime.broadcast_buffers(net)
    was_training = net.training
    net.eval()
    test = loader.dataset
    rows = torch.zeros(len(test), 5, dtype=torch.int64, device=runtime.device)
    for indices, (images, labels) in zip(loader.sampler, loader, strict=True):
        scores = augmented_scores(net, images, tta).float()
        losses = F.cross_entropy(scores, labels, reduction="none")
        confidence, predicted = scores.softmax(1).max(1)
        sound = losses < _MAX_LOSS  # false for NaN, too
        columns = (torch.ones_like(labels), predicted, _fixed(losses.where(sound, 0)), _fixed(confidence), ~sound)
        rows.index_add_(0, indices, torch.stack([column.long() for column in columns], dim=1))
    net.train(was_training)

    seen, predicted, losses, confidence, unsound = runtime.sum(rows).cpu().unbind(1)
    if not bool((seen == 1).all()):
        counts = torch.bincount(seen).tolist()
        raise RuntimeError(f"test images seen 0, 1, 2, ... times: {counts}; every one should have been seen once")
    return Evaluation(
        loss=float("nan") if bool(unsound.any()) else losses.sum().item() / _FIXED_POINT / len(test),
        labels=test.labels.cpu(),
        predicted=predicted,
        confidence=confidence.double() / _FIXED_POINT,
    )


def _fixed(values: Tensor) -> Tensor:
    return (values.nan_to_num(0) * _FIXED_POINT).round()


def augmented_scores(net: nn.Module, images: Tensor, tta: str) -> Tensor:
    """Class scores, float [batch, 10], of normalized images, float32 [batch, 3, 32, 32].

    Args:
        tta: "none"; "flip": the mean over an image and its mirror image; "crop": half of that, and half of the same
            for the image moved by a pixel up and left, and down and right: six views.
    """
    if tta == "none":
        return net(images)
    if tta == "flip":
        return (net(images) + net(images.flip(3))) / 2
    padded = F.pad(images, (1, 1, 1, 1), "reflect")
    moved = [augmented_scores(net, view, "flip") for view in (padded[:, :, :-2, :-2], padded[:, :, 2:, 2:])]
    return augmented_scores(net, images, "flip") / 2 + (moved[0] + moved[1]) / 4
