"""The digits model of a checkpoint, on images that it was not trained on."""

from __future__ import annotations

from ckpt_tasks.demo.digits import build_model, evaluate, load_data
from ckpt_tasks.training.load import load_uri

__all__ = ["held_out_accuracy"]


def held_out_accuracy(uri: str, digest: str | None = None) -> float:
    """Share of the held-out images that a checkpoint's model recognises.

    Parameters
    ----------
    uri, digest
        Of the checkpoint's commit record, as an asset's event tells them.

    Raises
    ------
    CkptTasksError
        As `load_uri` raises.
    """
    state = load_uri(uri, ["model"], digest=digest)["model"]
    model = build_model(width=len(state["0.bias"]), dropout=0.0)
    model.load_state_dict(state)
    _, images, labels = load_data()
    return evaluate(model, images, labels)
