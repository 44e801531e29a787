"""A real run beside its model: what happens is done to both, and then they are compared.

Here: attempts and their saves. What is done to the run from outside is in `modelled_upkeep`.
"""

from __future__ import annotations

import json
from collections.abc import Callable

from support.made_runs import HookedStore, State, Tensor, claim_request, save_request
from support.modelled_trainer import FOR_EVER, Cut, Trainer, age_of, arm
from support.retained_runs import GRACE, RetainedRun
from support.run_model import Age, Lost, RunModel, Write

from ckpt_tasks.checkpointer.marks import marked
from ckpt_tasks.checkpointer.reader import load_checkpoint, read_commit
from ckpt_tasks.config import RegistryConfig
from ckpt_tasks.errors import (
    CheckpointNotFoundError,
    CkptTasksError,
    CorruptCheckpointError,
    StaleAttemptError,
    StoreError,
)
from ckpt_tasks.events import discard_event
from ckpt_tasks.fencing.claim import claim_attempt
from ckpt_tasks.fencing.fence import Fence
from ckpt_tasks.format.codec import encode
from ckpt_tasks.format.records import Heartbeat, RowBlocks, now
from ckpt_tasks.recovery.recover import Recovered, recover
from ckpt_tasks.registry import Registration, RunDescription
from ckpt_tasks.store.base import Store
from ckpt_tasks.testing import Fault, FaultyStore, MemoryRegistry, RegistryMemory
from ckpt_tasks.training.registration.publisher import Publisher
from ckpt_tasks.types import CheckpointId

REGISTRY = RegistryConfig(tracking_uri="memory://", best="loss:min")


class ModelledRun:
    """A run, its `model`, a registry's `memory`, and the `trainers` that still live."""

    def __init__(self) -> None:
        self.run = RetainedRun()
        self.store, self.layout = self.run.aged, self.run.layout
        self.model = RunModel(grace=GRACE)
        self.memory = RegistryMemory()
        self.trainers: list[Trainer] = []
        self.late: list[tuple[float, FaultyStore]] = []
        self.description = RunDescription(
            run=self.run.name,
            uid=self.run.identity.uid,
            store_url=self.store.url,
            hyperparameters={},
        )
        self._heads = 0

    # -- comparing ---------------------------------------------------------------------------------

    def check(self) -> None:
        """The listing of the store, and the registry, are what the model says."""
        model, layout = self.model, self.layout
        found = {info.path for info in self.store.list_objects("")}
        expected = set(model.data)
        expected |= {layout.commit(self.id_of(age)) for age in model.committed}
        expected |= {layout.attempt(number) for number in range(1, model.attempts + 1)}
        expected |= {layout.resumed(number) for number in model.starts}
        for kind, ages in model.marks.items():
            expected |= {layout.mark(kind, self.id_of(age)) for age in ages}  # type: ignore[arg-type]
        expected |= {layout.completed} if model.completed else set()
        beside = {layout.run_record, layout.registry_ids("memory"), layout.collected}
        beside |= {layout.heartbeat(number) for number in range(1, model.attempts + 1)}
        assert found - beside == expected, f"store and model differ:\n{found - beside ^ expected}"
        for age in model.committed - model.quarantined:
            assert model.needs(age) <= model.data.keys(), f"{age} has lost {model.needs(age)}"
        self._check_registry()

    def _check_registry(self) -> None:
        versions = {one.version: age_of(one.checkpoint) for one in self.memory.versions}
        assert set(versions.values()) == self.model.registered
        assert len(versions) == len(self.model.registered), "a checkpoint is registered twice"
        own = f"resume-{self.run.name}"
        aliases = {
            "resume" if name == own else name: versions[held]
            for name, held in self.memory.aliases.items()
        }
        assert aliases == self.model.aliases

    def check_contents(self) -> None:
        """What is not damaged loads, as it was saved; what is damaged does not."""
        for age in self.model.committed:
            try:
                found = load_tensors(self.store, self, age)
            except CorruptCheckpointError:
                assert self.model.is_damaged(age), f"{age} cannot be loaded"
            else:
                assert not self.model.is_damaged(age), f"{age} is damaged, and was loaded"
                assert found == self.model.writes[age].tensors, f"{age} is not what was saved"

    def id_of(self, age: Age) -> CheckpointId:
        return CheckpointId(self.model.writes[age].step, *age)

    def marked(self, kind: str) -> set[Age]:
        marks = marked(self.store, self.layout)
        return {age_of(checkpoint) for checkpoint in marks[kind]}  # type: ignore[index]

    def commits(self) -> set[Age]:
        paths = [info.path for info in self.store.list_objects(self.layout.commits)]
        found = (self.layout.checkpoint_id(path) for path in paths)
        return {age_of(checkpoint) for checkpoint in found if checkpoint is not None}

    # -- attempts ----------------------------------------------------------------------------------

    def begin(self, resume: str = "auto", cut: Cut | None = None) -> None:
        """A new attempt claims, and goes on from what the model has picked before."""
        model = self.model
        picked: Age | None = None
        fails = False
        try:
            picked, damaged = self._expected_start(resume)
        except Lost as lost:
            damaged, fails = lost.damaged, True
        number = model.attempts + 1
        store = FaultyStore(self.store)
        struck_at = arm(store, cut)
        error: CkptTasksError | None = None
        recovered: Recovered | None = None
        try:
            recovered = self._claim_and_recover(store, number, resume)
        except (StoreError, CheckpointNotFoundError, CorruptCheckpointError) as raised:
            error = raised
        struck = store.count >= struck_at
        store.faults.clear()

        if self.store.exists(self.layout.attempt(number)):
            model.attempts, model.sign = number, model.now
            if resume not in ("auto", "fresh"):
                model.asked[number] = age_of(resume)
        news = set(damaged) - model.quarantined
        found = self.marked("quarantined") - model.quarantined
        assert found <= news, f"quarantines {found}, damaged is {news}"
        model.quarantine(found)
        if self.store.exists(self.layout.resumed(number)):
            start = json.loads(self.store.read(self.layout.resumed(number)))["checkpoint"]
            start = age_of(start) if start is not None else None
            assert not fails, f"went on from {start}, and nothing is left to go on from"
            assert start == picked, f"went on from {start}, not from {picked}"
            model.starts[number] = start
            model.sign = model.now
        if struck:
            return
        assert (error is not None) == fails, error
        assert found == news
        if recovered is not None:
            self.trainers.append(self._trainer(number, store, recovered))

    def _expected_start(self, resume: str) -> tuple[Age | None, list[Age]]:
        if resume == "auto":
            return self.model.pick()
        if resume == "fresh":
            return None, []
        asked = age_of(resume)
        if asked not in self.model.committed or asked in self.model.collecting:
            raise Lost([])
        if self.model.is_damaged(asked):
            raise Lost([asked])
        return asked, []

    def _claim_and_recover(self, store: FaultyStore, number: int, resume: str) -> Recovered:
        invocation = "nightly" if resume == "auto" else f"by hand {number}"
        request = claim_request(invocation, resume=resume, without_commit=FOR_EVER)
        attempt = claim_attempt(store, self.layout, self.run.identity, request)
        assert attempt.number == number
        self._attempt = attempt
        return recover(store, self.layout, self.run.identity, attempt)

    def _trainer(self, number: int, store: FaultyStore, recovered: Recovered) -> Trainer:
        start = recovered.checkpoint
        step = start.record.position.step if start is not None else 0
        trainer = Trainer(number, step, store, self.publisher(number))

        def before(operation: str, path: str) -> None:
            action = trainer.at_commit
            if action and operation == "create" and path.startswith(self.layout.commits):
                trainer.at_commit = None
                action()

        hooked = HookedStore(store, before)
        trainer.checkpointer = self.run.checkpointer(hooked, self._attempt, recovered)
        return trainer

    def publisher(self, number: int) -> Publisher:
        store, layout, registry = self.store, self.layout, WatchedRegistry(self)
        fence = Fence(store, layout, number)
        return Publisher(store, layout, fence, registry, REGISTRY, self.description, discard_event)

    def is_stale(self, trainer: Trainer) -> bool:
        return trainer.number < self.model.attempts

    def kill(self, trainer: Trainer) -> None:
        """Nothing is left of it but what it has stored, and what is on its way there."""
        trainer.checkpointer.close()
        self.trainers = [one for one in self.trainers if one is not trainer]

    def beat(self, trainer: Trainer) -> None:
        """Its heartbeat."""
        beat = Heartbeat(attempt=trainer.number, beat=1, at=now())
        self.store.put(self.layout.heartbeat(trainer.number), encode(beat))
        if not self.is_stale(trainer):
            self.model.sign = self.model.now

    # -- saves -------------------------------------------------------------------------------------

    def save(
        self,
        trainer: Trainer,
        *,
        body: int = 0,
        rows: tuple[int, int] = (0, 0),
        healthy: bool = True,
        loss: int = 0,
        cut: Cut | None = None,
        during: Callable[[], object] | None = None,
        lands_late: bool = False,
    ) -> None:
        """Save; `during` happens between the data, with the checks, and the commit record."""
        model, store = self.model, trainer.store
        trainer.saves, trainer.step = trainer.saves + 1, trainer.step + 1
        age = trainer.number, trainer.saves
        state, tensors = self._state(body, rows, healthy=healthy)
        was_stale, was_refused = self.is_stale(trainer), trainer.refused
        known_bad = set(model.known_bad)

        def note() -> None:
            self._note_write(age, trainer.step, tensors, healthy=healthy, loss=loss)

        def at_commit() -> None:
            note()
            if during is not None:
                during()
            if lands_late:
                store.faults.append(Fault(at=store.count + 1, when="late", times=6, delay=FOR_EVER))

        trainer.at_commit = at_commit
        struck_at = arm(store, cut)
        error: CkptTasksError | None = None
        request = save_request(trainer.step, metrics={"loss": float(loss)})
        try:
            trainer.checkpointer.save(state, request)
        except (StaleAttemptError, StoreError) as raised:
            error = raised
        trainer.at_commit = None
        struck = store.count >= struck_at
        store.faults.clear()
        if struck and cut is not None and cut.torn and store.log[struck_at - 1][0] == "write":
            self._leave_torn(store.log[struck_at - 1][1])
        note()
        stands = age in self.commits()
        if stands:
            model.committed.add(age)
            assert not was_stale, f"a stale attempt has committed {age}"
            assert not model.damage_of(age) & known_bad, (
                f"{age} refers to what was known to be damaged"
            )
        elif error is not None and not isinstance(error, StaleAttemptError):
            self._forget_removed(age)
        if was_refused and age in model.writes:
            assert model.needs(age) <= model.own(age), "a save after a refused one refers again"
        trainer.refused = error is not None
        if struck and cut is not None and cut.kills:
            self.kill(trainer)
        elif error is None:
            assert stands
            assert not self.is_stale(trainer)
            trainer.queue.append(age)
            trainer.publisher.add_commit(model.writes[age].id)
        elif isinstance(error, StaleAttemptError):
            assert self.is_stale(trainer), error
            self.kill(trainer)
        elif lands_late and age in model.writes:
            self.late.append((model.now, store))
        else:
            assert struck or self._may_be_refused(age), error

    def land(self) -> None:
        """Commit records that were on their way arrive, whoever has sent them."""
        before = self.commits()
        for _, store in self.late:
            store.land()
        self.late.clear()
        self.model.committed |= self.commits() - before

    def _state(
        self, body: int, rows: tuple[int, int], *, healthy: bool
    ) -> tuple[State, dict[int, bytes]]:
        """A large tensor, a small one that is always new, and a table in two blocks of rows."""
        self._heads += 1
        large, small = bytes([body]) * 9000, self._heads.to_bytes(4, "big") * 30
        blocks = [bytes([row]) * 5000 for row in rows]
        tensors = [Tensor("model", "body", large), Tensor("model", "head", small)]
        for number, block in enumerate(blocks):
            key = f"table[{number}:{number + 1}]"
            tensors.append(Tensor("model", key, block, extents=(1, 5000), is_block=True))
        state = State(
            {"model": {}},
            tensors,
            nonfinite=() if healthy else ("model.head",),
            row_blocks=[RowBlocks(key="table", position=2, count=2)],
        )
        return state, {0: large, 1: small, 2: b"".join(blocks)}

    def _note_write(
        self, age: Age, step: int, tensors: dict[int, bytes], *, healthy: bool, loss: int
    ) -> None:
        """Tell the model what a save has written so far."""
        model, layout = self.model, self.layout
        for info in self.store.list_objects(layout.data):
            if layout.write_of(info.path) == age:
                model.data.setdefault(info.path, model.now)
        mine = [path for path in model.data if layout.write_of(path) == age]
        index = next((path for path in mine if path.endswith(".index.json")), None)
        if index is None or age in model.writes:
            return
        try:
            content = json.loads(self.store.read(index))
        except ValueError:
            return  # torn
        files = [(layout.in_run(file["path"]), file["header_size"]) for file in content["files"]]
        spans = {(path, 0, header_size) for path, header_size in files}
        for one in content["tensors"]:
            spans.add((files[one["file"]][0], one["offset"], one["offset"] + one["size"]))
        model.writes[age] = Write(
            age=age,
            step=step,
            folder=index[: index.rindex("/") + 1],
            index=index,
            spans=frozenset(spans),
            tensors=tensors,
            healthy=healthy,
            loss=float(loss),
        )

    def _leave_torn(self, path: str) -> None:
        if not self.store.exists(path):
            self.store.put(path, b"torn")

    def _forget_removed(self, age: Age) -> None:
        """A save that has failed removes what it wrote."""
        for path in [path for path in self.model.data if self.layout.write_of(path) == age]:
            if not self.store.exists(path):
                self.model.remove(path)

    def _may_be_refused(self, age: Age) -> bool:
        """Whether what a write refers to may be gone soon, or is known to be damaged."""
        model = self.model
        if age not in model.writes:
            return False
        foreign = model.writes[age].files - model.own(age)
        homes = {self.layout.write_of(path) for path in foreign}
        doubtful = {*model.expired, *model.collecting, *model.quarantined}
        by_way_of_damaged = any(foreign <= model.needs(bad) for bad in model.quarantined)
        return bool(homes & doubtful or homes - model.committed) or by_way_of_damaged


class WatchedRegistry(MemoryRegistry):
    """The modelled registry; no alias of where a run goes on from moves backwards, be it for a
    moment.
    """

    def __init__(self, modelled: ModelledRun) -> None:
        super().__init__(modelled.memory)
        self._modelled = modelled

    def set_alias(self, alias: str, registration: Registration) -> None:
        held = self.alias_holder(alias, "loss")
        super().set_alias(alias, registration)
        if alias == f"resume-{self._modelled.run.name}" and held is not None and held.checkpoint:
            before, after = age_of(held.checkpoint), age_of(registration.checkpoint)
            startable = self._modelled.model.startable()
            assert after >= before or before not in startable, f"from {before} back to {after}"


def load_tensors(store: Store, modelled: ModelledRun, age: Age) -> dict[int, bytes]:
    """The bytes that a checkpoint restores from a store."""
    record = read_commit(store, modelled.layout, modelled.id_of(age))
    tensors = load_checkpoint(store, modelled.layout, record).tensors
    return {position: bytes(data) for position, data in tensors.items()}
