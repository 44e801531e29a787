"""Reading back: nothing is handed out that is not what was committed, hostile records included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from support.made_runs import (
    HookedStore,
    MadeRun,
    State,
    Tensor,
    memory_store,
    small_state,
    write_state,
)

from ckpt_tasks.checkpointer.reader import load_checkpoint, read_commit, read_index
from ckpt_tasks.checkpointer.verify import state_digest, verify_checkpoint
from ckpt_tasks.errors import (
    CheckpointNotFoundError,
    ConfigError,
    CorruptCheckpointError,
    StoreError,
    UnsupportedFormatError,
)
from ckpt_tasks.format.codec import encode
from ckpt_tasks.format.digest import CHUNK_BYTES, digest
from ckpt_tasks.format.records import MAX_INDEX_BYTES, CommitRecord, Index, IndexRef
from ckpt_tasks.testing import Fault, FaultyStore
from ckpt_tasks.testing.wrappers import Operation
from ckpt_tasks.types import CheckpointId

HUGE = 2**50


@pytest.fixture
def run() -> MadeRun:
    return MadeRun()


@pytest.fixture
def checkpoint(run: MadeRun) -> CheckpointId:
    """A checkpoint of two items; the second tensor has two chunks."""
    state = State(
        {"model": {}, "optimizer": {}},
        [
            Tensor("model", "bias", b"bias"),
            Tensor("model", "weight", bytes(CHUNK_BYTES) + b"end"),
            Tensor("optimizer", "step", b"step"),
        ],
    )
    return run.begin().save(10, state)


def index_of(run: MadeRun, checkpoint: CheckpointId) -> Index:
    return read_index(run.store, run.layout, run.record(checkpoint).indexes[0])


def forge(run: MadeRun, checkpoint: CheckpointId, index: Index, **changes: Any) -> None:
    """Put another index in place, and a commit record that names it by its digest.

    What a digest cannot find: whoever can write the store can make all digests fit.
    """
    data = msgspec.json.encode(index)
    body = data.removesuffix(b"}")
    data = body + b',\n "checksum": "%s"\n}\n' % digest(body).encode("ascii")
    record = run.record(checkpoint)
    ref = record.indexes[0]
    run.store.put(run.layout.in_run(ref.path), data)
    ref = IndexRef(rank=ref.rank, path=ref.path, size=len(data), digest=digest(data))
    record = msgspec.structs.replace(record, indexes=[ref], **changes)
    run.store.put(run.layout.commit(checkpoint), encode(record))


def load(run: MadeRun, checkpoint: CheckpointId) -> list[bytes]:
    record = read_commit(run.store, run.layout, checkpoint, run=run.identity)
    tensors = load_checkpoint(run.store, run.layout, record).tensors
    return [bytes(tensor) for _, tensor in sorted(tensors.items())]


def test_tensors_in_the_order_of_the_index(run: MadeRun, checkpoint: CheckpointId) -> None:
    """Bytes come back by position, over several files and chunks."""
    assert load(run, checkpoint) == [b"bias", bytes(CHUNK_BYTES) + b"end", b"step"]


@pytest.mark.parametrize("position", [0, 8, 3000, 4096, 4100, 4100 + CHUNK_BYTES, -1])
def test_flipped_bit_in_a_tensor_file(
    run: MadeRun, checkpoint: CheckpointId, position: int
) -> None:
    """In length, header, padding, or any chunk: found, and the file is named."""
    path = run.tensors_path(checkpoint)
    run.damage(path, position=position)
    with pytest.raises(CorruptCheckpointError, match=path):
        load(run, checkpoint)


def test_every_bit_of_record_and_index(run: MadeRun) -> None:
    """Whichever byte of commit record and index is changed, the checkpoint is not loaded."""
    checkpoint = run.begin().save(10)
    for path in (run.layout.commit(checkpoint), run.index_path(checkpoint)):
        original = run.store.read(path)
        for position in range(0, len(original), 7):
            run.damage(path, position=position)
            with pytest.raises(CorruptCheckpointError):
                load(run, checkpoint)
            run.store.put(path, original)
    assert load(run, checkpoint) == [b"\x00"]


@pytest.mark.parametrize("size", [-1, 1])
def test_wrong_length(run: MadeRun, checkpoint: CheckpointId, size: int) -> None:
    """A file that is shorter or longer than committed is refused before it is read."""
    path = run.tensors_path(checkpoint)
    content = run.store.read(path)
    run.store.put(path, content[:-1] if size < 0 else content + b"0")
    with pytest.raises(CorruptCheckpointError, match=r"has \d+ bytes, committed were"):
        load(run, checkpoint)


@pytest.mark.parametrize("missing", ["tensors", "index"])
def test_missing_file(run: MadeRun, checkpoint: CheckpointId, missing: str) -> None:
    """A file that is gone is damage, not a failure of the store, and is named."""
    paths = {"tensors": run.tensors_path(checkpoint), "index": run.index_path(checkpoint)}
    run.store.delete(paths[missing])
    with pytest.raises(CorruptCheckpointError, match=f"{paths[missing]} is missing"):
        load(run, checkpoint)


def test_missing_record(run: MadeRun) -> None:
    """No record, no checkpoint; the message names run and id."""
    with pytest.raises(CheckpointNotFoundError, match=r"'digits' has no checkpoint step-0000001"):
        load(run, CheckpointId(10, 1, 1))


@pytest.mark.parametrize("operation", ["size", "read_range", "read_into"])
def test_failing_store_is_not_damage(
    run: MadeRun, checkpoint: CheckpointId, operation: Operation
) -> None:
    """What cannot be read now may be read later: a size, a header, a window."""
    store = FaultyStore(run.store, [Fault(at=2)], counted={operation})
    record = read_commit(store, run.layout, checkpoint)
    with pytest.raises(StoreError):
        load_checkpoint(store, run.layout, record)


def test_record_of_another_run(run: MadeRun) -> None:
    """A record copied from another run's folder is refused by its uid."""
    other = MadeRun(run.store, "other")
    checkpoint = other.begin().save(10)
    path = run.layout.commit(checkpoint)
    run.store.put(path, other.store.read(other.layout.commit(checkpoint)))
    with pytest.raises(CorruptCheckpointError, match=other.identity.uid):
        load(run, checkpoint)


def test_renamed_record(run: MadeRun, checkpoint: CheckpointId) -> None:
    """A record under another id's name is refused."""
    renamed = CheckpointId(99, 1, 2)
    data = run.store.read(run.layout.commit(checkpoint))
    run.store.put(run.layout.commit(renamed), data)
    with pytest.raises(CorruptCheckpointError, match=f"holds {checkpoint} and not {renamed}"):
        load(run, renamed)


def test_record_larger_than_any(run: MadeRun, checkpoint: CheckpointId) -> None:
    """A record beyond the limit is not read into memory."""
    run.store.put(run.layout.commit(checkpoint), b" " * 65_537)
    with pytest.raises(CorruptCheckpointError, match="65537 bytes, more than the 65536"):
        load(run, checkpoint)


def test_several_ranks(run: MadeRun, checkpoint: CheckpointId) -> None:
    """A checkpoint of two ranks is refused by name, and is no damage."""
    record = run.record(checkpoint)
    second = msgspec.structs.replace(record.indexes[0], rank=1)
    wide = msgspec.structs.replace(record, world_size=2, indexes=[record.indexes[0], second])
    run.store.put(run.layout.commit(checkpoint), encode(wide))
    with pytest.raises(UnsupportedFormatError, match="was saved by 2 ranks"):
        load(run, checkpoint)


def test_index_of_another_checkpoint(run: MadeRun) -> None:
    """A whole and valid index in another one's place is found by the digest committed."""
    attempt = run.begin()
    one, two = attempt.save(10, small_state(1)), attempt.save(20, small_state(2))
    run.store.put(run.index_path(one), run.store.read(run.index_path(two)))
    with pytest.raises(CorruptCheckpointError, match=r"is damaged: digest \w+, committed \w+"):
        load(run, one)


def test_index_of_another_rank(run: MadeRun, checkpoint: CheckpointId) -> None:
    """An index that says it is another rank's is refused."""
    index = msgspec.structs.replace(index_of(run, checkpoint), rank=1, world_size=2)
    forge(run, checkpoint, index)
    with pytest.raises(CorruptCheckpointError, match="is rank 1's index, not 0's"):
        load(run, checkpoint)


def test_huge_file_size_takes_no_memory(run: MadeRun, checkpoint: CheckpointId) -> None:
    """A size that the file does not have is refused before memory is taken."""
    index = index_of(run, checkpoint)
    files = [msgspec.structs.replace(index.files[0], size=HUGE), *index.files[1:]]
    forge(run, checkpoint, msgspec.structs.replace(index, files=files))
    with pytest.raises(CorruptCheckpointError, match=f"committed were {HUGE}"):
        load(run, checkpoint)


def test_huge_index_size_takes_no_memory(run: MadeRun, checkpoint: CheckpointId) -> None:
    """The same for an index."""
    record = run.record(checkpoint)
    ref = msgspec.structs.replace(record.indexes[0], size=MAX_INDEX_BYTES)
    forged = msgspec.structs.replace(record, indexes=[ref])
    run.store.put(run.layout.commit(checkpoint), encode(forged))
    with pytest.raises(CorruptCheckpointError, match=f"committed were {MAX_INDEX_BYTES}"):
        load(run, checkpoint)


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [2, 2]},
        {"dtype": "I8"},
        {"key": "renamed"},
        {"offset": 4097, "size": 3},
    ],
    ids=["shape", "dtype", "key", "place"],
)
def test_header_and_index_disagree(
    run: MadeRun, checkpoint: CheckpointId, change: dict[str, Any]
) -> None:
    """Both describe each tensor; where they differ, neither is believed."""
    index = index_of(run, checkpoint)
    tensors = [msgspec.structs.replace(index.tensors[0], **change), *index.tensors[1:]]
    forge(run, checkpoint, msgspec.structs.replace(index, tensors=tensors))
    with pytest.raises(CorruptCheckpointError, match="header and index differ on"):
        load(run, checkpoint)


@pytest.mark.parametrize(
    "path", ["../other/data/x", "/etc/passwd", "data//x", "data/./x", "data\\x"]
)
def test_path_that_leaves_the_run(run: MadeRun, checkpoint: CheckpointId, path: str) -> None:
    """An index cannot make anybody open a file elsewhere."""
    index = index_of(run, checkpoint)
    files = [msgspec.structs.replace(index.files[0], path=path), *index.files[1:]]
    forge(run, checkpoint, msgspec.structs.replace(index, files=files))
    with pytest.raises(CorruptCheckpointError, match="is not a plain relative path"):
        load(run, checkpoint)


# -- verify ---------------------------------------------------------------------------------------


def test_verify_counts_what_it_read(run: MadeRun, checkpoint: CheckpointId) -> None:
    """Files and bytes of the report are those of the checkpoint."""
    report = verify_checkpoint(run.store, run.name, str(checkpoint))
    assert (report.ok, report.problem, report.files) == (True, None, 3)
    assert report.size == run.record(checkpoint).size
    assert report.seconds >= 0


def test_verify_names_the_damage(run: MadeRun, checkpoint: CheckpointId) -> None:
    """The report says which file is damaged, and where."""
    run.damage(run.tensors_path(checkpoint))
    report = verify_checkpoint(run.store, run.name, checkpoint)
    assert not report.ok
    assert report.problem is not None
    assert "chunk 1 of tensor 'weight'" in report.problem


def test_verify_reads_every_rank(run: MadeRun, checkpoint: CheckpointId) -> None:
    """Proving needs no restoring, so a checkpoint of two ranks is verified too."""
    record = run.record(checkpoint)
    second = write_state(
        run.store, run.layout, small_state(), write_id=record.write_id, rank=1, world_size=2
    )
    wide = msgspec.structs.replace(record, world_size=2, indexes=[*record.indexes, second.ref])
    run.store.put(run.layout.commit(checkpoint), encode(wide))
    report = verify_checkpoint(run.store, run.name, checkpoint)
    assert (report.ok, report.files) == (True, 5)
    run.damage(run.layout.in_run(second.index.files[0].path))
    assert not verify_checkpoint(run.store, run.name, checkpoint).ok


@pytest.mark.parametrize(
    ("position", "chunk", "key"),
    [
        (0, 0, "small"),
        (7, 0, "large"),
        (7 + 3 * CHUNK_BYTES - 1, 2, "large"),
        (7 + 3 * CHUNK_BYTES, 3, "large"),
        (7 + 3 * CHUNK_BYTES + 5, 0, "last"),
        (7 + 3 * CHUNK_BYTES + 5 + CHUNK_BYTES, 1, "last"),
    ],
)
def test_verify_reads_in_windows(run: MadeRun, position: int, chunk: int, key: str) -> None:
    """A file is read in pieces of some chunks, small tensors together: whole, it is found so;
    one flipped bit anywhere is found and placed, also at the edges of chunks and pieces.
    """
    sizes = {"small": 7, "empty": 0, "large": 3 * CHUNK_BYTES + 5, "last": CHUNK_BYTES + 1}
    tensors = [Tensor("model", name, b"\x05" * size) for name, size in sizes.items()]
    large = run.begin().save(10, State({"model": {}}, tensors))
    assert verify_checkpoint(run.store, run.name, large).ok
    header = index_of(run, large).files[0].header_size
    run.damage(run.tensors_path(large), position=header + position)
    problem = verify_checkpoint(run.store, run.name, large).problem
    assert problem is not None
    assert f"chunk {chunk} of tensor {key!r}" in problem


@pytest.mark.parametrize("ask", [verify_checkpoint, state_digest])
def test_text_that_is_no_checkpoint_id(run: MadeRun, ask: Callable[..., object]) -> None:
    """An id that can be none is a mistake to correct, not a checkpoint that is missing."""
    with pytest.raises(ConfigError, match="'step-10' is not a checkpoint id; one looks like"):
        ask(run.store, run.name, "step-10")


def test_verify_finds_another_runs_checkpoint(run: MadeRun, checkpoint: CheckpointId) -> None:
    """Copied into another run's folder, whole as it is, a checkpoint is not that run's: no retry
    would start from it.
    """
    other = MadeRun(run.store, "other")
    other.begin()
    for path, data in run.contents().items():
        if "/attempts/" not in path and not path.endswith("run.json"):
            run.store.put(path.replace(run.layout.root, other.layout.root, 1), data)
    report = verify_checkpoint(run.store, "other", checkpoint)
    assert not report.ok
    assert run.identity.uid in str(report.problem)


def test_verify_of_a_missing_checkpoint(run: MadeRun) -> None:
    """Nothing to verify is an error, not a report."""
    with pytest.raises(CheckpointNotFoundError):
        verify_checkpoint(run.store, run.name, "step-00000010-a1-s1")


def test_verify_with_a_failing_store(run: MadeRun, checkpoint: CheckpointId) -> None:
    """A store that does not answer says nothing about the checkpoint."""
    store = FaultyStore(run.store, [Fault(at=2)], counted={"read"})
    with pytest.raises(StoreError):
        verify_checkpoint(store, run.name, checkpoint)


# -- state digest ---------------------------------------------------------------------------------


def digest_of(run: MadeRun, state: State, step: int = 10) -> str:
    return state_digest(run.store, run.name, run.begin().save(step, state))


def test_state_digest_is_of_the_state_alone(run: MadeRun) -> None:
    """Equal for the same state in another run, attempt, step, write, and with other metrics."""
    expected = digest_of(run, small_state(5))
    again = run.begin()
    again.save(20)
    checkpoint = again.save(30, small_state(5), rows=[("loss", 0.5, 30, 1)])
    assert state_digest(run.store, run.name, checkpoint) == expected
    other = MadeRun(memory_store(), "other")
    assert digest_of(other, small_state(5), step=99) == expected


@pytest.mark.parametrize(
    "state",
    [
        State({"model": {"a": 1}}, [Tensor("model", "x", b"abce")]),
        State({"model": {"a": 2}}, [Tensor("model", "x", b"abcd")]),
        State({"model": {"b": 1}}, [Tensor("model", "x", b"abcd")]),
        State({"model": {"a": 1}}, [Tensor("model", "y", b"abcd")]),
        State({"model": {"a": 1}}, [Tensor("model", "x", b"abcd", "I8")]),
        State({"model": {"a": 1}}, [Tensor("model", "x", b"abcd", "U8", (2, 2))]),
        State({"model": {"a": 1}, "ema": {}}, [Tensor("model", "x", b"abcd")]),
        State({"model": {"a": 1}}, [Tensor("model", "x", b"abcd"), Tensor("model", "y", b"")]),
    ],
    ids=["byte", "value", "name", "key", "dtype", "shape", "item", "tensor"],
)
def test_state_digest_tells_states_apart(run: MadeRun, state: State) -> None:
    """A single other byte, value, name, dtype or shape is another digest."""
    original = State({"model": {"a": 1}}, [Tensor("model", "x", b"abcd")])
    assert digest_of(run, state) != digest_of(run, original)


def test_state_digest_of_a_damaged_index(run: MadeRun, checkpoint: CheckpointId) -> None:
    """No digest is given for what is not what was committed."""
    run.damage(run.index_path(checkpoint), position=50)
    with pytest.raises(CorruptCheckpointError):
        state_digest(run.store, run.name, checkpoint)


def test_record_types_are_read_back(run: MadeRun, checkpoint: CheckpointId) -> None:
    """A record read is the record written, field by field."""
    record = run.record(checkpoint)
    assert isinstance(record, CommitRecord)
    assert encode(record) == run.store.read(run.layout.commit(checkpoint))


def test_only_the_tensors_that_names_refer_to_are_read(run: MadeRun) -> None:
    """Wherever they lie: one that two names share is in the first one's file."""
    state = State(
        {
            "model": {"$": "dict", "v": [["w", {"$": "tensor", "v": 0}]]},
            "ema": [{"$": "tensor", "v": {"index": 0, "grad": True}}, {"$": "tensor", "v": 2}],
            "optimizer": {"$": "tensor", "v": 1},
        },
        [Tensor("model", "w", b"w"), Tensor("optimizer", "m", b"m"), Tensor("ema", "e", b"e")],
    )
    checkpoint = run.begin().save(10, state)
    record = run.record(checkpoint)
    asked: list[str] = []
    store = HookedStore(run.store, lambda operation, path: asked.append(path))

    loaded = load_checkpoint(store, run.layout, record, names=["ema"])

    assert {p: bytes(tensor) for p, tensor in loaded.tensors.items()} == {0: b"w", 2: b"e"}
    assert not [path for path in asked if "optimizer" in path]
