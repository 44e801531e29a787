"""What happens to a run from outside, to the real one and to its model."""

from __future__ import annotations

from support.modelled_run import REGISTRY, ModelledRun
from support.modelled_trainer import Cut, Trainer, age_of, arm
from support.retained_runs import GRACE
from support.run_model import Age

from ckpt_tasks.checkpointer.verify import verify_checkpoint
from ckpt_tasks.config import AttemptConfig, CheckpointConfig, RetentionConfig
from ckpt_tasks.errors import (
    CheckpointNotFoundError,
    ConfigError,
    RegistryError,
    StaleAttemptError,
    StoreError,
)
from ckpt_tasks.fencing.fence import Fence
from ckpt_tasks.registry.base import Registry
from ckpt_tasks.retention import CollectReport, collect, expire, expire_checkpoint, pin, unpin
from ckpt_tasks.tasks import reconcile
from ckpt_tasks.testing import FaultyStore, MemoryRegistry
from ckpt_tasks.training.registration.registry_ids import read_ids

CONFIG = CheckpointConfig(
    registry=REGISTRY,
    attempt=AttemptConfig(heartbeat=0.001, takeover_after=0.003),
    retention=RetentionConfig(grace=GRACE),
)


class Upkeep:
    """Retention, reconciliation, and everything that goes wrong from outside, of a modelled run."""

    def __init__(self, modelled: ModelledRun) -> None:
        self.modelled = modelled
        self.model = modelled.model
        self._originals: dict[str, bytes] = {}
        self._is_emptied = False

    # -- retention ---------------------------------------------------------------------------------

    def pin(self, age: Age) -> None:
        try:
            m = self.modelled
            pin(m.store, m.layout, m.id_of(age), why="a paper", by="a person")
        except CheckpointNotFoundError:
            assert age in self.model.collecting
        else:
            assert age not in self.model.collecting
            self.model.pins.add(age)
            self.model.expired.pop(age, None)

    def unpin(self, age: Age) -> None:
        m = self.modelled
        assert unpin(m.store, m.layout, m.id_of(age)) == (age in self.model.pins)
        self.model.pins.discard(age)
        self.model.expired.pop(age, None)

    def expire_one(self, age: Age) -> None:
        m = self.modelled
        try:
            registry = self._registry()
            run, text = m.run.name, str(m.id_of(age))
            expire_checkpoint(m.store, run, text, by="a person", registry=registry)
        except ConfigError:
            assert age in self.model.protected()
        except RegistryError:
            assert self._is_away()
        else:
            assert age not in self.model.protected(), f"{age} expired, and must stay"
            self.model.expired.setdefault(age, self.model.now)

    def expire(self, latest: int, trainer: Trainer | None = None) -> None:
        """By the rule that keeps the `latest`; in the name of an attempt, or of nobody."""
        m = self.modelled
        wanted = self.model.to_expire(latest)
        fence = Fence(m.store, m.layout, trainer.number) if trainer is not None else None
        config = RetentionConfig(latest=latest)
        try:
            expire(m.store, m.run.name, config, by="it", registry=self._registry(), fence=fence)
        except RegistryError:
            assert self._is_away()
        except StaleAttemptError:
            assert trainer is not None
            assert m.is_stale(trainer)
        else:
            assert trainer is None or not m.is_stale(trainer) or not wanted
            self._note_expired(wanted)

    def _note_expired(self, ages: set[Age]) -> None:
        for age in ages:
            self.model.expired.setdefault(age, self.model.now)

    def collect(self, trainer: Trainer | None = None, cut: Cut | None = None) -> None:
        """Remove what nothing needs, exactly that; killed on the way, no more than that."""
        m = self.modelled
        store = FaultyStore(m.store)
        struck_at = arm(store, cut)
        fence = Fence(m.store, m.layout, trainer.number) if trainer is not None else None
        report: CollectReport | None = None
        try:
            registry = self._registry()
            report = collect(
                store, m.run.name, grace=GRACE, by="it", registry=registry, fence=fence
            )
        except RegistryError:
            assert self._is_away()
        except StoreError:
            assert store.count >= struck_at
        except StaleAttemptError:
            assert trainer is not None
            assert m.is_stale(trainer)
        if report is not None:
            self._compare_collection(report.refused)
        else:
            self._compare_part(self._going())

    def _going(self) -> set[Age]:
        """What a collection that has just been removes, by the model, which first learns what it
        has read.
        """
        m, model = self.modelled, self.model
        due = model.due()
        found = m.marked("quarantined") - model.quarantined
        assert all(model.is_damaged(age) for age in found), f"{found} is not damaged"
        model.quarantine(found)
        going = due & model.due() - model.claimed_by_others()
        read = m.marked("verified") - model.verified
        assert not any(model.is_damaged(age) for age in read)
        model.verified |= read
        read = model.verified | set(model.starts.values())
        newest = max(read.intersection(model.startable()), default=(0, 0))
        gone = {age for age in model.committed - m.commits() if model.could_start(age)}
        assert all(age < newest for age in gone), f"{gone} go, {newest} is the newest ever read"
        return going

    def _compare_collection(self, refused: str | None, *, is_preview: bool = False) -> None:
        model = self.model
        due = model.due()
        going = self._going()
        refuses = model.refuses(due, going)
        if refused is None:
            assert self._registry_says_what_it_holds()
            assert not refuses
            model.collect(going)
        elif self._registry_says_what_it_holds():
            unknown = is_preview and model.cannot_tell_what_is_needed(going)
            assert unknown or refuses, refused

    def _compare_part(self, going: set[Age]) -> None:
        """What a collection has done until it was killed: nothing that it would not have done."""
        m, model = self.modelled, self.model
        left = {info.path for info in m.store.list_objects(m.layout.data)}
        gone = model.data.keys() - left
        assert gone <= model.removable(going), f"removes {gone - model.removable(going)}"
        removed = model.committed - m.commits()
        assert removed <= going, f"removes {removed - going}"
        forgotten = model.registered - {age_of(v.checkpoint) for v in m.memory.versions}
        assert forgotten <= going
        collecting = m.marked("collecting")
        assert collecting <= going | model.collecting.keys()
        for path in gone:
            model.remove(path)
        model.committed -= removed
        model.registered -= forgotten
        for age in going:
            for kind in ("quarantined", "verified", "expired"):
                if age not in m.marked(kind):
                    model.unmark(kind, age)
        model.collecting = {age: model.collecting.get(age, model.now) for age in collecting}

    def advance(self, seconds: float) -> None:
        """Time passes; a put that is on its way does not stay so for a whole grace."""
        oldest = min((at for at, _ in self.modelled.late), default=self.model.now)
        if self.model.now + seconds - oldest >= GRACE:
            self.modelled.land()
        self.modelled.store.age(seconds)
        self.model.now += seconds

    # -- registry ----------------------------------------------------------------------------------

    def _registry(self) -> Registry | None:
        """As a command opens it; ``None`` where the run has never been in it."""
        m = self.modelled
        ids = read_ids(m.store, m.layout, "memory", lambda _: None)
        if ids is None:
            return None
        registry = MemoryRegistry(m.memory)
        registry.attach_run(ids, m.description)
        return registry

    def _is_away(self) -> bool:
        return not self.modelled.memory.available or self._is_emptied

    def _registry_says_what_it_holds(self) -> bool:
        """Or the run has never been in it."""
        ids = self.modelled.layout.registry_ids("memory")
        return not self._is_away() or not self.modelled.store.exists(ids)

    def publish(self, trainer: Trainer) -> None:
        """Its registrar publishes all that waits."""
        was_stale = self.modelled.is_stale(trainer)
        try:
            trainer.publisher.publish()
        except StaleAttemptError:
            assert was_stale
        except RegistryError:
            assert self._is_away()
        else:
            assert not was_stale or (trainer.opened and not trainer.queue)
            self.model.publish(trainer.queue, anew=not trainer.opened)
            self._note_best(all_known=not trainer.opened)
            trainer.queue.clear()
            trainer.opened = True

    def _note_best(self, *, all_known: bool) -> None:
        """The alias `best` may be on any of equal ones, and stays where no other is better."""
        m, model = self.modelled, self.model
        versions = {one.version: age_of(one.checkpoint) for one in m.memory.versions}
        held = versions.get(m.memory.aliases.get("best", ""))
        best = model.best()
        if held is not None:
            model.aliases["best"] = held
        if all_known and best is not None:
            assert held is not None
            assert held not in model.quarantined
            assert model.writes[held].loss <= best

    def reconcile(self) -> None:
        """Registry and store agree afterwards, and what nothing needs is gone."""
        m, model = self.modelled, self.model
        report = reconcile(CONFIG, m.run.name)
        if not m.memory.available and model.starts:
            assert report.problem is not None
            return
        assert report.problem is None
        assert not [one for one in report.left if one.kind not in ("expired", "orphan")]
        if model.starts:
            self._is_emptied = False
            model.reconcile()
            self._note_best(all_known=True)
            (kept,) = m.memory.runs.values()
            assert kept.status != "running"
            assert (kept.status == "finished") == model.is_complete()
        notes = [note for note in report.notes if note.startswith("not collected")]
        self._compare_collection(notes[0] if notes else None, is_preview=True)

    def empty_registry(self) -> None:
        """All that it had is lost; registrars begin again."""
        m = self.modelled
        for kept in (m.memory.runs, m.memory.versions, m.memory.aliases, m.memory.metrics):
            kept.clear()  # type: ignore[attr-defined]
        self.model.registered.clear()
        self.model.aliases.clear()
        self._is_emptied = m.store.exists(m.layout.registry_ids("memory"))
        for trainer in m.trainers:
            trainer.publisher, trainer.opened = m.publisher(trainer.number), False
            trainer.queue.clear()

    def complete(self, trainer: Trainer, age: Age) -> None:
        """Its training has come to its end with a checkpoint of its own."""
        self.modelled.run.complete(str(self.modelled.id_of(age)))
        self.model.completed = trainer.number
        self.modelled.kill(trainer)

    def lose_registration(self, age: Age) -> None:
        """Somebody deletes its version, and with it the aliases."""
        m = self.modelled
        (found,) = [v for v in m.memory.versions if age_of(v.checkpoint) == age]
        m.memory.versions.remove(found)
        held = m.memory.aliases
        m.memory.aliases = {name: v for name, v in held.items() if v != found.version}
        self.model.unregister(age)

    def set_alias(self, age: Age) -> None:
        """A person's own."""
        m = self.modelled
        (found,) = [v for v in m.memory.versions if age_of(v.checkpoint) == age]
        MemoryRegistry(m.memory).set_alias("paper", found)
        self.model.aliases["paper"] = age

    # -- damage ------------------------------------------------------------------------------------

    def damage(self, path: str, place: float) -> None:
        """One bit flips behind the store's back: it is as old as it was."""
        raw = self.modelled.store.store
        content = bytearray(raw.read(path))
        self._originals.setdefault(path, bytes(content))
        at = round(place * (len(content) - 1))
        content[at] ^= 1
        raw.put(path, bytes(content))
        self.model.damaged ^= {(path, at)}

    def repair(self) -> None:
        """Copies of what was there are brought back."""
        for path in {path for path, _ in self.model.damaged}:
            self.modelled.store.store.put(path, self._originals[path])
        self.model.damaged.clear()

    def verify(self, age: Age) -> None:
        m = self.modelled
        report = verify_checkpoint(m.store, m.run.name, m.id_of(age))
        assert report.ok == (not self.model.is_damaged(age)), report
