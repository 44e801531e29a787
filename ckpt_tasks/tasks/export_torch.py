"""Tracked names as one file of torch's own, without what only pickle could restore."""

from __future__ import annotations

from pathlib import Path

from ckpt_tasks.checkpointer.sharded_reader import open_rank
from ckpt_tasks.errors import ConfigError
from ckpt_tasks.tasks.exporting import ExportRequest, ExportSource, chosen_names

__all__ = ["export_torch"]

_OWN_PREFIX = "ckpt_tasks."


def export_torch(source: ExportSource, request: ExportRequest, path: Path) -> list[str]:
    """Write ``{tracked name: state}`` as ``torch.load(path, weights_only=True)`` reads it.

    The states are as `load_state_dict` takes them, on the CPU: all that was tracked, the
    optimizer's state too. By default without this package's own, such as random generators.

    Of several ranks, it is rank 0's state, with every tensor whole.

    Raises
    ------
    ConfigError
        A form that has no module was asked for one, no such name was tracked, or torch is not
        installed.
    StateError
        Values that are not restored without pickle; names each.

    and as `load_checkpoint`.
    """
    if request.model is not None:
        raise ConfigError("a model's code is for --to mlflow-model; torch has states only")
    try:
        from ckpt_tasks.training.torch_file import save_torch_file
    except ImportError as error:
        raise ConfigError(
            f"exporting to 'torch' needs torch ({error}); pip install 'ckpt-tasks[torch]'"
        ) from error
    tracked = open_rank(source.store, source.layout, source.record, 0).trees
    default = [name for name in tracked if not name.startswith(_OWN_PREFIX)]
    names = chosen_names(source.record, tracked, request.only, default)
    save_torch_file(source.store, source.layout, source.record, names, path)
    return names
