"""When a save is due."""

from ckpt_tasks.schedule.policy import (
    AnyOf,
    AtEnd,
    EveryEpochs,
    EverySeconds,
    EverySteps,
    OnSignal,
    SaveContext,
    SaveDecisionPolicy,
    policy_from_config,
)

__all__ = [
    "AnyOf",
    "AtEnd",
    "EveryEpochs",
    "EverySeconds",
    "EverySteps",
    "OnSignal",
    "SaveContext",
    "SaveDecisionPolicy",
    "policy_from_config",
]
