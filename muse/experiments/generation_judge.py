"""What generated pictures of the demo are judged by: distance to real ones, class, nearest picture.

All three in the features of a frozen EfficientNet-Lite0. It is no Inception, and the sets are
small, so its numbers compare the rows of one table and nothing else.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from muse.evaluation.metrics.accuracy_iou import accuracy
from muse.evaluation.metrics.frechet import RunningMoments, frechet_distance

BATCH = 64


class ClassifiedSet(NamedTuple):
    """Pictures, their classes, and their features."""

    images: Tensor  # (n, 3, H, W) uint8
    labels: Tensor  # (n,)
    features: Tensor  # (n, D)

    def first(self, count: int) -> "ClassifiedSet":
        """Only the first `count`."""
        return ClassifiedSet(*(part[:count] for part in self))


class LinearClassifier:
    """Multinomial logistic regression on standardised features, fitted to convergence.

    Args:
        features: (n, D) of real pictures.
        labels: (n,).
        num_classes: of the labels.
        decay: of the squared weights, beside the mean cross-entropy.
    """

    def __init__(self, features: Tensor, labels: Tensor, num_classes: int, decay: float = 1e-2):
        self.mean, self.std = features.mean(0), features.std(0).clamp_min(1e-6)
        weight = torch.zeros(num_classes, features.shape[1], requires_grad=True)
        bias = torch.zeros(num_classes, requires_grad=True)
        rows = self._standard(features)
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = F.cross_entropy(F.linear(rows, weight, bias), labels)
            value = value + decay * weight.square().sum()
            value.backward()
            return value

        optimizer.step(loss)
        self.weight, self.bias = weight.detach(), bias.detach()

    def _standard(self, features: Tensor) -> Tensor:
        return (features - self.mean) / self.std

    def predict(self, features: Tensor) -> Tensor:
        """(n, D) -> (n,) classes."""
        return F.linear(self._standard(features), self.weight, self.bias).argmax(1)


class Judge:
    """Measures sets of pictures against real ones.

    Args:
        network: images (B, 3, H, W) in [0, 1] -> features (B, D).
        train: real pictures: the classifier learns on all of them, and the distance is to the
            first half.
        num_classes: of the labels.
    """

    def __init__(self, network: Callable[[Tensor], Tensor], train: ClassifiedSet, num_classes: int):
        self.network, self.train, self.num_classes = network, train, num_classes
        self.half = len(train.labels) // 2
        self.reference = moments(train.features[: self.half])
        self.classifier = LinearClassifier(train.features, train.labels, num_classes)

    def distance(self, features: Tensor) -> float:
        """Fréchet distance of (n, D) to the first half of the real pictures."""
        return frechet_distance(*self.reference, *moments(features))

    def class_accuracy(self, pictures: ClassifiedSet) -> float:
        """Share of pictures that the classifier gives their own class, as a mean over classes."""
        guesses = self.classifier.predict(pictures.features)
        return accuracy(guesses, pictures.labels, self.num_classes).macro

    def nearest(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine distance to the nearest real picture (n,), and which one (n,)."""
        own, real = (F.normalize(rows, dim=1) for rows in (features, self.train.features))
        similarity, index = (own @ real.T).max(1)
        return 1 - similarity, index

    def measure(self, pictures: ClassifiedSet) -> dict[str, float]:
        """Distance, class accuracy, and the mean distance to the nearest real picture."""
        return {
            "fd": self.distance(pictures.features),
            "accuracy": self.class_accuracy(pictures),
            "nearest": float(self.nearest(pictures.features)[0].mean()),
        }


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of (n, D)."""
    running = RunningMoments()
    running.update(features)
    return running.compute()[1:]


@torch.no_grad()
def classified_set(
    batches: Iterable[tuple[Tensor, Tensor]], network: Callable[[Tensor], Tensor]
) -> ClassifiedSet:
    """The features of (images in [0, 1], labels) and all of it together.

    Pictures are rounded to bytes first, as those on disk are.
    """
    images, labels, features = [], [], []
    for batch, classes in batches:
        bytes_ = (batch.clamp(0, 1) * 255).round()
        features.append(network(bytes_ / 255))
        images.append(bytes_.to(torch.uint8))
        labels.append(classes)
    return ClassifiedSet(torch.cat(images), torch.cat(labels), torch.cat(features))
