"""Registry protocol. Implementations live under `ckpt_tasks.integrations`."""

from ckpt_tasks.registry.base import (
    Registration,
    Registry,
    RegistryRunIds,
    RunDescription,
    RunStatus,
)

__all__ = ["Registration", "Registry", "RegistryRunIds", "RunDescription", "RunStatus"]
