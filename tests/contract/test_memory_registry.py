"""The reference registry keeps the contract that it defines."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from ckpt_tasks.errors import RegistryError
from ckpt_tasks.registry import Registry, RegistryRunIds, RunDescription, RunStatus
from ckpt_tasks.testing import FaultyRegistry, FileRegistry
from ckpt_tasks.testing.file_registry import read_memory
from ckpt_tasks.testing.memory_registry import MemoryRegistry, RegistryMemory
from ckpt_tasks.testing.registry import RegistryTests, example_description


class MemoryTests(RegistryTests):
    """Looks behind the registry into its memory."""

    memory: RegistryMemory

    def run_ids(self, uid: str) -> list[str]:
        return self.memory.runs_of(uid)

    def make_twin(self, description: RunDescription) -> RegistryRunIds:
        run_id = self.memory.new_run(description)
        return RegistryRunIds(
            tracking_uri="memory://",
            experiment_id="1",
            experiment="memory",
            run_id=run_id,
            registered_model="checkpoints",
        )

    def status(self, run_id: str) -> RunStatus:
        return self.memory.runs[run_id].status

    def rows(self, run_id: str, key: str) -> list[tuple[int, float]]:
        rows = self.memory.runs[run_id].rows
        return sorted((row.step, row.value) for row in rows if row.key == key)

    def checkpoints(self, run_id: str) -> list[str]:
        return sorted(one.checkpoint for one in self.memory.versions if one.run_id == run_id)

    def alias(self, alias: str) -> str | None:
        return self.memory.aliases.get(alias)

    def tag(self, run_id: str, name: str) -> str | None:
        return self.memory.runs[run_id].tags.get(name)

    def note(self, run_id: str) -> str:
        return self.memory.runs[run_id].note


class TestMemoryRegistry(MemoryTests):
    @pytest.fixture(autouse=True)
    def _memory(self) -> None:
        self.memory = RegistryMemory()

    def open_registry(self) -> MemoryRegistry:
        return MemoryRegistry(self.memory)

    def test_switched_off(self) -> None:
        """Switched off, every call raises `RegistryError`; switched on, all is as before."""
        description = example_description()
        registry, run_id = self.opened(description)
        self.memory.available = False
        with pytest.raises(RegistryError, match="switched off"):
            registry.find_run(description)
        with pytest.raises(RegistryError, match="switched off"):
            registry.registered()
        self.memory.available = True
        assert self.run_ids(description.uid) == [run_id]


class TestFileRegistry(MemoryTests):
    """The same in a file, and behind the wrapper that could let it fail."""

    @pytest.fixture(autouse=True)
    def _path(self, tmp_path: Path) -> None:
        self.path = tmp_path / "registry"

    @property
    def memory(self) -> RegistryMemory:  # type: ignore[override]
        return read_memory(self.path)

    def open_registry(self) -> Registry:
        return FaultyRegistry(FileRegistry(self.path))

    def make_twin(self, description: RunDescription) -> RegistryRunIds:
        memory = self.memory
        twin = msgspec.structs.replace(
            MemoryRegistry(memory).create_run(description), run_id=memory.new_run(description)
        )
        self.path.write_bytes(memory.dump())
        return twin
