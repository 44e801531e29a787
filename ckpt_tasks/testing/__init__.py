"""Tools to test a store or a registry of your own with: contract tests, faults, a clock.

Needs pytest, which the package itself does not.
"""

from __future__ import annotations

from ckpt_tasks.testing.clock import FakeClock
from ckpt_tasks.testing.faults import Fault, FaultInjector
from ckpt_tasks.testing.file_registry import FileRegistry
from ckpt_tasks.testing.files import faulty_files
from ckpt_tasks.testing.memory_registry import MemoryRegistry, RegistryMemory
from ckpt_tasks.testing.registry import RegistryTests
from ckpt_tasks.testing.registry_wrappers import FaultyRegistry, WrapperRegistry
from ckpt_tasks.testing.stores import StoreTests
from ckpt_tasks.testing.sweep import FATES, Case, Fate, Struck, Trial, summary, sweep
from ckpt_tasks.testing.wrappers import FaultyStore, LatencyStore, WrapperStore

__all__ = [
    "FATES",
    "Case",
    "FakeClock",
    "Fate",
    "Fault",
    "FaultInjector",
    "FaultyRegistry",
    "FaultyStore",
    "FileRegistry",
    "LatencyStore",
    "MemoryRegistry",
    "RegistryMemory",
    "RegistryTests",
    "StoreTests",
    "Struck",
    "Trial",
    "WrapperRegistry",
    "WrapperStore",
    "faulty_files",
    "summary",
    "sweep",
]
