"""Errors, grouped by what the handler would do.

::

    CkptTasksError
    |-- ConfigError (ValueError)             stop: fix the configuration or the code     exit 2
    |   |-- StateError                       a tracked object cannot be saved or restored as asked
    |   |-- UnsupportedFormatError           written by a newer version: upgrade
    |   `-- NoProgressError                  attempts died again and again without a commit
    |-- CheckpointNotFoundError (LookupError) stop: nothing restorable, or no such id     exit 4
    |-- CorruptCheckpointError               fall back to the next older checkpoint      exit 1
    |-- StaleAttemptError                    stop, never retry: a later attempt owns it  exit 3
    |-- RunBusyError                         wait: another live invocation owns the run  exit 5
    |-- AttemptFailedError                   retry: the trainer died or raised           exit 1
    |-- AttemptStoppedError                  run again: saved and stopped on a signal    exit 75
    |-- StoreError (OSError)                 retry: storage failed                       exit 1
    |   |-- NoSpaceError                   remove what has expired, and try once more
    |   |-- ObjectNotFoundError
    |   `-- ObjectExistsError
    |-- MaintenanceError                     repeat: some runs were left as they are  exit 1
    |-- TornStateError                       save again, without overlap                exit 1
    `-- RegistryError                        queue and go on: the store is the truth     exit 1
        `-- RegistryRefusedError             set this one aside: the others may be taken

Every error takes one message, so that it pickles across processes.
"""

from __future__ import annotations

from typing import ClassVar

__all__ = [
    "AttemptFailedError",
    "AttemptStoppedError",
    "CheckpointNotFoundError",
    "CkptTasksError",
    "ConfigError",
    "CorruptCheckpointError",
    "MaintenanceError",
    "NoProgressError",
    "NoSpaceError",
    "ObjectExistsError",
    "ObjectNotFoundError",
    "RegistryError",
    "RegistryRefusedError",
    "RunBusyError",
    "StaleAttemptError",
    "StateError",
    "StoreError",
    "TornStateError",
    "UnsupportedFormatError",
]


class CkptTasksError(Exception):
    """Base of all errors of this package.

    Attributes
    ----------
    exit_code
        What a process that ends with this error exits with.
    """

    exit_code: ClassVar[int] = 1


class ConfigError(CkptTasksError, ValueError):
    """Configuration, arguments or user code are wrong. A retry changes nothing."""

    exit_code = 2


class StateError(ConfigError):
    """A tracked object cannot be represented without pickle, or does not match what was saved."""


class UnsupportedFormatError(ConfigError):
    """A record was written by a version that this one cannot read safely."""


class NoProgressError(ConfigError):
    """Too many attempts in a row ended without a new commit."""


class CheckpointNotFoundError(CkptTasksError, LookupError):
    """No such run or checkpoint, or none of a run's checkpoints can be restored."""

    exit_code = 4


class CorruptCheckpointError(CkptTasksError):
    """Bytes in the store are not the bytes that were committed."""


class StaleAttemptError(CkptTasksError):
    """A later attempt owns the run; this one must not commit, register, publish or prune."""

    exit_code = 3


class RunBusyError(CkptTasksError):
    """Another invocation's attempt of this run is alive."""

    exit_code = 5


class AttemptFailedError(CkptTasksError):
    """The trainer died or raised; another attempt resumes from the last checkpoint."""


class AttemptStoppedError(CkptTasksError):
    """The trainer saved and stopped on a signal; another attempt goes on from there."""

    exit_code = 75


class StoreError(CkptTasksError, OSError):
    """Storage failed or did not answer; worth retrying."""


class NoSpaceError(StoreError):
    """The store has no room: its disk is full, or a quota is used up."""


class MaintenanceError(CkptTasksError):
    """Something went wrong with runs of a store, which were left alone; all others are done."""


class TornStateError(CkptTasksError):
    """The state changed while it was copied, so that what was copied never was a state."""


class ObjectNotFoundError(StoreError):
    """The store has no object at this path."""


class ObjectExistsError(StoreError):
    """A conditional create found an object at this path."""


class RegistryError(CkptTasksError):
    """The registry failed or did not answer. Work for it is queued, never lost."""


class RegistryRefusedError(RegistryError):
    """The registry answered, and refuses what this call asks for; a repetition may change that
    only where somebody changes the registry.
    """
