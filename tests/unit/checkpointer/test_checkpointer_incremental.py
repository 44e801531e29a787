"""Tensors that have not changed are referred to where an earlier write has left them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.made_runs import (
    HookedStore,
    MadeAttempt,
    MadeRun,
    State,
    Tensor,
    memory_store,
    save_request,
    write_state,
)

from ckpt_tasks.checkpointer.checkpointer import Checkpointer
from ckpt_tasks.checkpointer.drain import InlineDrain
from ckpt_tasks.checkpointer.job import JobRunner
from ckpt_tasks.checkpointer.marks import mark
from ckpt_tasks.checkpointer.reader import load_checkpoint, read_commit, read_index
from ckpt_tasks.checkpointer.references import Base, check_references
from ckpt_tasks.checkpointer.verify import verify_checkpoint
from ckpt_tasks.errors import StoreError
from ckpt_tasks.fencing.fence import Fence
from ckpt_tasks.format.records import CommitRecord, Index, IndexRef
from ckpt_tasks.store import Store
from ckpt_tasks.testing.wrappers import Operation

FROZEN = Tensor("model", "frozen", bytes(range(256)) * 64)


class Scene:
    """A run whose attempts save incrementally."""

    def __init__(self, store: Store | None = None) -> None:
        self.run = MadeRun(store or memory_store())
        self.attempt: MadeAttempt = self.run.begin()
        self.checkpointer = self.begin(None)

    def begin(self, base: IndexRef | None) -> Checkpointer:
        """Saves of the attempt, which started from the checkpoint with the index `base`."""
        run = self.run
        fence = Fence(run.store, run.layout, self.attempt.number)
        return Checkpointer(
            InlineDrain(JobRunner(run.store, run.layout, fence, base=base)),
            run.identity,
            self.attempt.number,
            self.attempt.recovered.lineage,
            hyperparameters={},
            environment={},
        )

    def save(self, step: int, *tensors: Tensor) -> CommitRecord:
        return self.checkpointer.save(State({"model": {}}, tensors), save_request(step))

    def index(self, record: CommitRecord) -> Index:
        return read_index(self.run.store, self.run.layout, record.indexes[0])

    def tensors(self, record: CommitRecord) -> list[bytes]:
        """What a load of the checkpoint gives, all of it verified."""
        loaded = load_checkpoint(self.run.store, self.run.layout, record)
        return [bytes(loaded.tensors[position]) for position in sorted(loaded.tensors)]


@pytest.fixture
def scene() -> Scene:
    return Scene()


def trained(value: int, size: int = 1000) -> Tensor:
    return Tensor("model", "head", bytes([value]) * size)


def test_only_what_has_changed_is_written(scene: Scene) -> None:
    """The record says how much; a load gives all of it."""
    first = scene.save(1, FROZEN, trained(1))
    second = scene.save(2, FROZEN, trained(2))
    assert first.written == first.size
    assert second.written is not None
    assert second.written < first.written - 0.9 * len(FROZEN.data)
    assert second.size >= len(FROZEN.data) + 1000
    assert scene.tensors(second) == [FROZEN.data, trained(2).data]
    assert scene.tensors(first) == [FROZEN.data, trained(1).data]
    assert verify_checkpoint(scene.run.store, "digits", second.id).ok


def test_tensors_that_several_threads_digest_keep_their_own_digests(scene: Scene) -> None:
    """Of any sizes, and whichever of them have changed: where a tensor is looked for, and where it
    is written.
    """
    tensors = [Tensor("model", f"{n}", bytes([n]) * (n * 37_000)) for n in range(1, 9)]
    scene.save(1, *tensors)
    changed = [replace(t, data=t.data[:-1] + b"!") if int(t.key) % 3 == 0 else t for t in tensors]
    second = scene.save(2, *changed)
    assert scene.tensors(second) == [t.data for t in changed]
    index = scene.index(second)
    own = [second.write_id in index.files[tensor.file].path for tensor in index.tensors]
    assert own == [n % 3 == 0 for n in range(1, 9)]


def test_references_make_no_chains(scene: Scene) -> None:
    """The tenth checkpoint names the file of the first, and nothing in between."""
    first = scene.save(1, FROZEN, trained(1))
    for step in range(2, 11):
        last = scene.save(step, FROZEN, trained(step))
    paths = [file.path for file in scene.index(last).files]
    assert scene.index(first).files[0].path in paths
    assert len(paths) == 2


def test_an_attempt_refers_to_what_it_started_from(scene: Scene) -> None:
    """The first save after a resume, too, leaves out what lies there already."""
    first = scene.save(1, FROZEN, trained(1))
    scene.checkpointer = scene.begin(first.indexes[0])
    scene.checkpointer._sequence = 10
    second = scene.save(2, FROZEN, trained(2))
    assert second.written is not None
    assert second.written < len(FROZEN.data)
    assert scene.tensors(second) == [FROZEN.data, trained(2).data]


def test_a_damaged_start_is_not_referred_to(scene: Scene) -> None:
    """Nor does it hold up a save."""
    first = scene.save(1, FROZEN, trained(1))
    scene.run.damage(scene.run.index_path(first.checkpoint))
    scene.checkpointer = scene.begin(first.indexes[0])
    scene.checkpointer._sequence = 10
    second = scene.save(2, FROZEN, trained(2))
    assert second.written == second.size


def test_a_small_part_of_a_file_is_written_again(scene: Scene) -> None:
    """Else a tensor that never changes would keep a whole checkpoint's bytes for ever."""
    small = replace(FROZEN, data=b"position ids")
    scene.save(1, small, trained(1))
    second = scene.save(2, small, trained(2))
    assert second.written == second.size
    assert len(scene.index(second).files) == 1


def test_a_tensor_that_is_changed_back_is_found(scene: Scene) -> None:
    """What counts is what the latest checkpoint holds."""
    scene.save(1, FROZEN, trained(1, 20_000))
    scene.save(2, FROZEN, trained(2, 20_000))
    third = scene.save(3, FROZEN, trained(2, 20_000))
    assert third.written is not None
    assert third.written < 10_000
    assert scene.tensors(third) == [FROZEN.data, trained(2, 20_000).data]


def test_a_change_behind_the_first_bytes_is_seen(scene: Scene) -> None:
    """Whatever tells quickly that a tensor has changed, its digest decides that it has not."""
    scene.save(1, FROZEN)
    changed = replace(FROZEN, data=FROZEN.data[:-1] + b"!")
    second = scene.save(2, changed)
    assert scene.tensors(second) == [changed.data]


def test_same_bytes_of_another_shape_are_another_tensor(scene: Scene) -> None:
    """The file's header would not say what the index says."""
    scene.save(1, FROZEN)
    reshaped = replace(FROZEN, extents=(64, 256))
    second = scene.save(2, reshaped)
    assert second.written == second.size
    assert scene.index(second).tensors[0].shape == [64, 256]


@pytest.mark.parametrize("change", [{"key": "renamed"}, {"item": "other"}])
def test_a_tensor_is_known_by_its_name(scene: Scene, change: dict[str, str]) -> None:
    """The same bytes under another name are written: other ranks may look for them by it."""
    scene.save(1, FROZEN)
    second = scene.save(2, replace(FROZEN, **change))
    assert second.written == second.size
    assert scene.tensors(second) == [FROZEN.data]


def test_tensors_of_equal_content_keep_their_names(scene: Scene) -> None:
    """Such as an optimizer's step counts, which are the same for all parameters."""
    twins = [replace(FROZEN, key="one"), replace(FROZEN, key="two")]
    scene.save(1, *twins)
    second = scene.save(2, *twins)
    assert [tensor.key for tensor in scene.index(second).tensors] == ["one", "two"]
    assert second.written is not None
    assert second.written < len(FROZEN.data)


@pytest.mark.parametrize("kind", ["expired", "collecting", "quarantined"])
def test_bytes_that_are_going_away_are_written_again(scene: Scene, kind: str) -> None:
    """The save that would refer to them fails, and the next one holds them itself."""
    first = scene.save(1, FROZEN, trained(1))
    mark(
        scene.run.store,
        scene.run.layout,
        kind,  # type: ignore[arg-type]
        first.checkpoint,
        why="a test",
        by="a test",
    )
    with pytest.raises(StoreError, match="which this checkpoint refers to"):
        scene.save(2, FROZEN, trained(2))
    third = scene.save(3, FROZEN, trained(3))
    assert third.written == third.size
    assert scene.tensors(third) == [FROZEN.data, trained(3).data]


def test_a_save_that_failed_is_not_referred_to() -> None:
    """Its files are gone."""
    fail = [False]

    def before(operation: Operation, path: str) -> None:
        if fail[0] and operation == "write" and "index" in path:
            raise StoreError("no space")

    scene = Scene(HookedStore(memory_store(), before))
    fail[0] = True
    with pytest.raises(StoreError):
        scene.save(1, FROZEN)
    fail[0] = False
    second = scene.save(2, FROZEN)
    assert second.written == second.size
    assert scene.tensors(second) == [FROZEN.data]


def test_files_of_references_open_with_the_library(scene: Scene) -> None:
    """A file that lacks what did not change is a whole safetensors file of the rest."""
    scene.save(1, FROZEN, trained(1))
    second = scene.save(2, FROZEN, trained(2))
    index = scene.index(second)
    own = next(file for file in index.files if second.write_id in file.path)
    from safetensors import deserialize

    content = scene.run.store.read(scene.run.layout.in_run(own.path))
    assert [(name, bytes(t["data"])) for name, t in deserialize(content)] == [
        ("head", trained(2).data)
    ]


def test_every_byte_can_be_written_each_time() -> None:
    """With ``incremental`` off, no two checkpoints share a file."""
    run = MadeRun()
    attempt = run.begin()
    records = [
        read_commit(run.store, run.layout, attempt.save(step, State({}, [FROZEN])))
        for step in (1, 2)
    ]
    assert [record.written == record.size for record in records] == [True, True]


def test_a_save_may_be_asked_to_refer_to_nothing(scene: Scene) -> None:
    """As all ranks are behind one that failed; those that follow refer to it."""
    scene.save(1, FROZEN, trained(1))
    state = State({"model": {}}, [FROZEN, trained(2)])
    whole = scene.checkpointer.save(state, save_request(2, whole=True))
    assert whole.written == whole.size
    third = scene.save(3, FROZEN, trained(3))
    assert whole.write_id in " ".join(file.path for file in scene.index(third).files)


def test_bytes_of_a_checkpoint_that_is_gone_are_referred_to_by_way_of_the_latest(
    scene: Scene,
) -> None:
    """The record of the first is removed, its file stays for the second: also where the attempt
    has started from that, and knows no more of it than its index.
    """
    first = scene.save(1, FROZEN, trained(1))
    second = scene.save(2, FROZEN, trained(2))
    scene.run.store.delete(scene.run.layout.commit(first.checkpoint))
    for step, how in ((3, scene.checkpointer), (4, scene.begin(second.indexes[0]))):
        state = State({"model": {}}, [FROZEN, trained(step)])
        record = how.save(state, save_request(step, number=step))
        assert first.write_id in " ".join(file.path for file in scene.index(record).files)


def test_a_base_vouches_for_nothing_but_what_it_names(scene: Scene) -> None:
    """That it stands keeps no file of another checkpoint that may go, whether its own index is
    known, is read, or cannot be read.
    """
    run = scene.run
    first, second = scene.save(1, FROZEN), scene.save(2, trained(2))
    mark(run.store, run.layout, "expired", first.checkpoint, why="a test", by="a test")
    foreign, own = scene.index(first), f"a{scene.attempt.number:04d}-s0003-ff"
    known = Base.of(second, [scene.index(second)])
    for base in (known, Base(known.age), Base(known.age)):
        with pytest.raises(StoreError, match="which this checkpoint refers to"):
            check_references(run.store, run.layout, own, [foreign], base)
        if base is not known:
            run.damage(run.index_path(second.checkpoint))


def test_writes_that_were_never_committed_are_referred_to_by_their_attempt_only(
    scene: Scene,
) -> None:
    """Where another rank failed, this one's part stands, and a collection leaves it alone."""
    run, attempt = scene.run, scene.attempt.number
    for number, sequence, allowed in ((attempt, 1, True), (attempt + 1, 2, False)):
        write_id = f"a{number:04d}-s{sequence:04d}-dead"
        written = write_state(run.store, run.layout, State({}, [FROZEN]), write_id=write_id)
        own = f"a{attempt:04d}-s0005-ff"
        if allowed:
            check_references(run.store, run.layout, own, [written.index], None)
            continue
        with pytest.raises(StoreError, match="which this checkpoint refers to"):
            check_references(run.store, run.layout, own, [written.index], None)
