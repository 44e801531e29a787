"""Finding a registry by its name. Implementations are offered as entry points."""

from __future__ import annotations

from importlib.metadata import entry_points

from ckpt_tasks.config import RegistryConfig
from ckpt_tasks.errors import ConfigError
from ckpt_tasks.registry.base import Registry
from ckpt_tasks.suggest import did_you_mean

__all__ = ["load_registry"]

_GROUP = "ckpt_tasks.registries"


def load_registry(config: RegistryConfig) -> Registry:
    """Make the registry that `config.kind` names, not yet bound to a run.

    Raises
    ------
    ConfigError
        No installed package offers a registry of this name, or it cannot be imported.
    """
    found = {entry.name: entry for entry in entry_points(group=_GROUP)}
    if config.kind not in found:
        hint = did_you_mean(config.kind, found, what="installed registries")
        raise ConfigError(f"there is no registry {config.kind!r}: {hint}")
    try:
        make = found[config.kind].load()
    except ImportError as error:
        raise ConfigError(
            f"the registry {config.kind!r} cannot be imported ({error}); "
            f"pip install 'ckpt-tasks[{config.kind}]'"
        ) from error
    registry: Registry = make(config)
    return registry
