"""A handwritten-digits classifier: real data, a convolutional network, randomness everywhere."""

from __future__ import annotations

import random
import warnings

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

from ckpt_tasks import TrainingRun

_TRAINING_IMAGES = 1440


class AugmentedDigits(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Images of 1x8x8 in 0..1, shifted, scaled in brightness and made noisy at random.

    The random numbers come from all three global generators, on purpose: a resumed training
    ends bit for bit where an uninterrupted one does only if each of them is restored.
    """

    def __init__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        shift = (random.randint(-1, 1), random.randint(-1, 1))  # noqa: S311
        image = torch.roll(self.images[index], shift, dims=(1, 2))
        image = image * float(np.random.uniform(0.8, 1.2)) + 0.05 * torch.randn(image.shape)
        return image, self.labels[index]


def build_model(width: int, dropout: float) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(width * 16, 10),
    )


def load_data() -> tuple[AugmentedDigits, torch.Tensor, torch.Tensor]:
    """The training set, and the images and labels held out for validation."""
    digits = load_digits()
    images = torch.tensor(digits.images / 16.0, dtype=torch.float32).unsqueeze(1)
    labels = torch.tensor(digits.target)
    training = AugmentedDigits(images[:_TRAINING_IMAGES], labels[:_TRAINING_IMAGES])
    return training, images[_TRAINING_IMAGES:], labels[_TRAINING_IMAGES:]


@torch.no_grad()
def evaluate(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of `images` that `model` recognises."""
    model.eval()
    accuracy = (model(images).argmax(1) == labels).float().mean()
    model.train()
    return float(accuracy)


def train(
    run: TrainingRun,
    lr: float = 2e-3,
    epochs: int = 10,
    batch_size: int = 32,
    width: int = 32,
    dropout: float = 0.3,
    seed: int = 0,
) -> None:
    """Train a small convolutional network on scikit-learn's handwritten digits.

    Parameters
    ----------
    lr
        Peak learning rate of AdamW; a cosine brings it down to zero.
    epochs
        Passes over the 1,440 training images.
    batch_size
        Images a step.
    width
        Channels of the convolutions.
    dropout
        Share of features dropped before the classifier.
    seed
        Of everything random.
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*set_vital")  # torchdata 0.11 on torch 2.13
    training, images, labels = load_data()
    loader = StatefulDataLoader(training, batch_size=batch_size, shuffle=True, drop_last=True)
    model = build_model(width, dropout)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    run.track(model=model, optimizer=optimizer, lr_scheduler=scheduler, loader=loader)

    for epoch in run.epochs(epochs):
        for batch, targets in run.steps(loader):
            loss = nn.functional.cross_entropy(model(batch), targets)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            run.log(loss=loss)
        accuracy = evaluate(model, images, labels)
        run.log(val_accuracy=accuracy, lr=scheduler.get_last_lr()[0])
        scheduler.step()
        print(f"epoch {epoch + 1:>2} of {epochs}: validation accuracy {accuracy:.3f}", flush=True)
