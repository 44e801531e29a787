"""What ``alias`` does and prints, and how it exits."""

from __future__ import annotations

import importlib

from ckpt_tasks.testing import MemoryRegistry, RegistryMemory


def test_a_checkpoint_is_named(call, store_path, stored, monkeypatch):
    """In the registry, for which the store remembers it; what is not registered has no alias."""
    memory = RegistryMemory()
    for name in ("promote", "reconcile"):
        module = importlib.import_module(f"ckpt_tasks.tasks.{name}")
        monkeypatch.setattr(module, "load_registry", lambda config: MemoryRegistry(memory))
    stored.run.fail(2, step=1)
    where = ("--store", store_path, "--tracking-uri", "memory://")
    named = ("alias", f"digits cnn@{stored.newest}", "paper")
    early = call(*named, *where)
    assert (early.code, "does not know run" in early.err) == (1, True)
    assert call("reconcile", "digits cnn", *where).code == 0
    done = call(*named, *where)
    assert (done.code, done.err) == (0, "")
    assert f"@paper is version {memory.aliases['paper']}: {stored.newest}" in done.out
    for kept in (memory.runs, memory.versions, memory.aliases):
        kept.clear()
    plan = call("reconcile", "digits cnn", "--dry-run", *where).out
    assert f"point it at {stored.newest}" in plan
    assert call("reconcile", "digits cnn", *where).code == 0
    assert memory.aliases.keys() == {"paper", "resume-digits_cnn"}
    assert call("alias", "digits cnn", "paper", *where).code == 2
    assert "registry.tracking_uri" in call(*named, "--store", store_path).err
