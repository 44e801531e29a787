"""Registry protocol. Implementations live under `ckpt_tasks.integrations`."""

from ckpt_tasks.registry.base import (
    AliasHolder,
    Registration,
    Registry,
    RegistryRunIds,
    RunDescription,
    RunState,
    RunStatus,
)
from ckpt_tasks.registry.loading import load_registry

__all__ = [
    "AliasHolder",
    "Registration",
    "Registry",
    "RegistryRunIds",
    "RunDescription",
    "RunState",
    "RunStatus",
    "load_registry",
]
