"""Exact test metrics: every test image counts once at every world size, with one all_reduce."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cifar.distributed.ddp import unwrap
from cifar.distributed.runtime import Runtime

MANY_CLASSES = 20  # with more, the console and the charts show the lowest and the highest accuracies only
_FIXED_POINT = 2**20  # units of loss and confidence, for six decimals
_MAX_LOSS = 2**22  # of one image: a sum over all ranks stays below 2**63 units
_WITH_VIEWS = 1 / 4  # share of the test images, the least certain ones, whose views are classified, too


@dataclass(frozen=True)
class Evaluation:
    """The metrics of a test set of n images, the same on every rank; its tensors are on the CPU."""

    losses: Tensor  # cross-entropy of each image, float64 [n]; NaN if it is not finite or exceeds four million
    labels: Tensor  # int64 [n], in the order of the test set
    predicted: Tensor  # classes, int64 [n]
    confidence: Tensor  # probability of the predicted class, float64 [n]
    classes: tuple[str, ...]  # names, in the order of the labels

    @property
    def loss(self) -> float:
        """Return the mean cross-entropy."""
        return self.losses.mean().item()

    @property
    def total(self) -> int:
        """Return the number of images in the test set."""
        return len(self.labels)

    @property
    def correct(self) -> int:
        """Return the number of images whose class was predicted."""
        return int((self.predicted == self.labels).sum())

    @property
    def accuracy(self) -> float:
        """Return correct / total, 0 to 1."""
        return self.correct / self.total

    def confusion(self) -> Tensor:
        """Return the confusion matrix, int64 [class, predicted class], in images."""
        n = len(self.classes)
        return torch.bincount(self.labels * n + self.predicted, minlength=n**2).view(n, n)

    def class_accuracies(self) -> dict[str, float]:
        """Return the accuracy among the images of each class, 0 to 1; NaN for a class without test images."""
        confusion = self.confusion().double()
        return dict(zip(self.classes, (confusion.diagonal() / confusion.sum(1)).tolist(), strict=True))

    def lowest_and_highest(self, count: int) -> dict[str, float]:
        """Return the `count` lowest and the `count` highest class accuracies, ascending; NaN is left out."""
        finite = {name: accuracy for name, accuracy in self.class_accuracies().items() if math.isfinite(accuracy)}
        ranked = sorted(finite.items(), key=lambda item: item[1])
        return dict(ranked[:count] + ranked[-count:])

    def most_confidently_wrong(self, count: int) -> list[int]:
        """Return the indices of the `count` misclassified images with the highest confidence, highest first."""
        wrong = torch.nonzero(self.predicted != self.labels).flatten()
        order = self.confidence[wrong].sort(descending=True, stable=True).indices
        return wrong[order[:count]].tolist()


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Any,  # this rank's shard of the test set: `data.EvalLoader`
    runtime: Runtime,
    tta: str = "none",
    base: Evaluation | None = None,
) -> Evaluation:
    """Test the model on the shards of all ranks together. Collective.

    Ranks hold uneven shards, so the forward pass must not communicate: DistributedDataParallel would hang, and the bare
    module is used. The one all_reduce sums a row of integers per test image, in fixed point: integer sums do not depend
    on the order, and each image's count has to come out as one. A row per rank holds a checksum of its weights: after
    the gradients' exchange each rank updates its own, so on GPUs of different models, which round differently, they
    would drift apart unseen.

    Args:
        tta: test-time augmentation, "none", "flip" or "crop"; see `augmented_logits`. It applies to the quarter of the
            images with the least confidence: views of the others would hardly change a prediction.
        base: the evaluation without it, where it is known; else it is made first.
    """
    test, chosen = loader.dataset, torch.arange(len(loader.dataset))
    if tta != "none":
        base = base or evaluate(model, loader, runtime)
        chosen = base.confidence.argsort(stable=True)[: math.ceil(_WITH_VIEWS * len(test))]
        loader = loader.subset(chosen)
    model = unwrap(model)
    runtime.average_buffers(model)
    rows = torch.zeros(len(test) + runtime.world_size, 5, dtype=torch.int64, device=runtime.device)
    rows[len(test) + runtime.rank, 0] = _checksum(model)
    _fill_rows(rows, model, loader, tta)

    results, checksums = runtime.sum(rows).cpu().split([len(test), runtime.world_size])
    counts, predicted, losses, confidence, infinite = results.unbind(1)
    if not bool((counts == torch.zeros_like(counts).index_fill(0, chosen, 1)).all()):
        numbers = torch.bincount(counts[chosen]).tolist()
        raise RuntimeError(f"test images counted 0, 1, 2, ... times: {numbers}; each must be counted once")
    _compare_weights(checksums[:, 0].tolist(), runtime)
    losses = (losses.double() / _FIXED_POINT).where(infinite == 0, math.nan)
    confidence = confidence.double() / _FIXED_POINT
    if base is not None:
        losses, predicted, confidence = (
            new.where(counts == 1, old)
            for new, old in ((losses, base.losses), (predicted, base.predicted), (confidence, base.confidence))
        )
    return Evaluation(losses, test.labels.cpu(), predicted, confidence, test.classes)


def _fill_rows(rows: Tensor, model: nn.Module, loader: Any, tta: str) -> None:
    """Add to the row of each image of this rank's shard: seen, predicted class, loss, confidence, loss not finite."""
    was_training = model.training
    model.eval()
    for indices, (images, labels) in zip(loader.sampler, loader, strict=True):
        logits = augmented_logits(model, images, tta).float()
        losses = F.cross_entropy(logits, labels, reduction="none")
        confidence, predicted = logits.softmax(1).max(1)
        finite = losses < _MAX_LOSS  # false for NaN, too
        columns = (torch.ones_like(labels), predicted, _fixed(losses.where(finite, 0)), _fixed(confidence), ~finite)
        rows.index_add_(0, indices, torch.stack([column.long() for column in columns], dim=1))
    model.train(was_training)


def _compare_weights(checksums: list[int], runtime: Runtime) -> None:
    """Print a warning that names the ranks whose weights have another checksum than rank zero's."""
    if others := ", ".join(f"{rank}" for rank, checksum in enumerate(checksums) if checksum != checksums[0]):
        runtime.print0(f"WARNING: the weights of rank {others} differ from rank zero's; are the GPUs of one model?")


def _checksum(model: nn.Module) -> Tensor:
    """Return the sum of the bits of all weights, int64 [], on their device."""
    return torch.cat([parameter.flatten() for parameter in model.parameters()]).float().view(torch.int32).sum()


def _fixed(values: Tensor) -> Tensor:
    return (values.nan_to_num(0) * _FIXED_POINT).round()


def augmented_logits(model: nn.Module, images: Tensor, tta: str) -> Tensor:
    """Return logits, float [batch, classes], of normalized images, float32 [batch, 3, size, size], averaged over views.

    Test-time augmentation after K. Jordan 2024 (arXiv 2404.00498), section 3.5.

    Args:
        tta: "none": the image itself. "flip": the mean over it and its mirror image. "crop": half of that, and a
            quarter each of the same for the image shifted by a pixel to the upper left and to the lower right.
    """
    if tta == "none":
        return model(images)
    if tta == "flip":
        return (model(images) + model(images.flip(3))) / 2
    padded = F.pad(images, (1, 1, 1, 1), "reflect")
    shifted = [augmented_logits(model, view, "flip") for view in (padded[:, :, :-2, :-2], padded[:, :, 2:, 2:])]
    return augmented_logits(model, images, "flip") / 2 + (shifted[0] + shifted[1]) / 4
