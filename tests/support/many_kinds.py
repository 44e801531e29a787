"""A training function with a hyperparameter of each kind, for forms."""

from typing import Literal

from ckpt_tasks import TrainingRun


def train(
    run: TrainingRun,
    name: str,
    lr: float = 0.001,
    amp: bool = True,
    loss: Literal["l1", "l2"] = "l2",
    widths: list[int] = [32, 64],  # noqa: B006 - as people write it
    clip: float | None = None,
) -> None:
    """Never called.

    Parameters
    ----------
    name
        What the model is called.
    lr
        Learning rate.
    amp
        Use mixed precision.
    loss
        Which loss is minimised.
    widths
        Hidden units of each layer.
    clip
        Largest norm of the gradients.
    """
