"""Records are read back as written, and nothing that was damaged passes for one."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckpt_tasks.errors import ConfigError, CorruptCheckpointError, UnsupportedFormatError
from ckpt_tasks.format import codec
from ckpt_tasks.format.codec import decode, encode
from ckpt_tasks.format.digest import CHUNK_BYTES, digest
from ckpt_tasks.format.records import (
    Ancestor,
    AttemptClaim,
    CommitRecord,
    CompletedRecord,
    Failure,
    FileEntry,
    Heartbeat,
    Index,
    IndexRef,
    LineageEntry,
    MarkRecord,
    PassedOver,
    Process,
    Replica,
    ResumedRecord,
    RunRecord,
    TensorEntry,
)
from ckpt_tasks.types import Position

UID = "0123456789abcdef" * 2
NOW = "2026-11-21T12:00:00.000Z"
HEX = digest(b"")

COMMIT = CommitRecord(
    uid=UID,
    id="step-00001200-a2-s7",
    write_id="w-1",
    position=Position(epoch=3, step=1200, phase="epoch_done"),
    lineage=[
        LineageEntry(attempt=2, resumed_from="step-00000800-a1-s3"),
        LineageEntry(attempt=1, resumed_from=None),
    ],
    hyperparameters={"lr": 3e-4, "name": "größe", "deep": None, "fast": True},
    metrics={"loss": 0.25, "worst": "inf"},
    trigger="steps",
    reason="500 steps since the last save",
    timings={"capture": 0.1, "write": 1.5},
    environment={"python": "3.11"},
    world_size=2,
    size=3_000_000,
    indexes=[
        IndexRef(rank=rank, path=f"data/w-1/rank{rank:04d}.index.json", size=100, digest=HEX)
        for rank in (1, 0)
    ],
    nonfinite=["head.weight"],
    created_at=NOW,
)
INDEX = Index(
    rank=0,
    world_size=2,
    files=[
        FileEntry(path="data/w-0/model.safetensors", size=4096 + CHUNK_BYTES + 1, header_size=4096,
                  header_digest=HEX),
    ],
    tensors=[
        TensorEntry(file=0, key="w", dtype="F32", shape=[1, CHUNK_BYTES // 4], offset=4096,
                    size=CHUNK_BYTES, chunks=[HEX]),
        TensorEntry(file=0, key="b", dtype="U8", shape=[], offset=4096 + CHUNK_BYTES, size=1,
                    chunks=[HEX]),
        TensorEntry(file=0, key="empty", dtype="F32", shape=[0], offset=4096, size=0, chunks=[]),
    ],
    items={"model": {"w": {"$tensor": 0}}, "best": 0.5},
    metrics=[("loss", 0.5, 1200, 1_700_000_000_000), ("worst", "nan", 1200, 1)],
)  # fmt: skip
RECORDS = [
    COMMIT,
    INDEX,
    RunRecord(uid=UID, run="a/b ..", created_at=NOW, created_by="0.1"),
    RunRecord(
        uid=UID,
        run="a",
        created_at=NOW,
        created_by="0.1",
        ancestors=[Ancestor(uid="f" * 32, attempts=3)],
        replica=Replica(source="s3://bucket/runs", since=NOW),
    ),
    AttemptClaim(
        uid=UID,
        attempt=2,
        claim_id="c-1",
        invocation="flow-run 1",
        process=Process(host="h", boot_id="b", pid=1, started=2),
        claimed_at=NOW,
        entrypoint="pkg.mod:train",
        hyperparameters={"lr": 1},
    ),
    ResumedRecord(
        attempt=2,
        checkpoint=None,
        lineage=[LineageEntry(attempt=2, resumed_from=None)],
        why="none committed",
        passed_over=[PassedOver(checkpoint="step-00000001-a1-s1", why="damaged")],
        resumed_at=NOW,
    ),
    Heartbeat(attempt=2, beat=17, at=NOW),
    Heartbeat(attempt=2, beat=18, at=NOW, ended=True, failure=Failure(kind="SIGSEGV", step=3)),
    MarkRecord(checkpoint="step-00000001-a1-s1", why="bit flip", by="attempt 2", at=NOW),
    CompletedRecord(uid=UID, attempt=2, checkpoint=None, position=Position(), completed_at=NOW),
]
by_kind = pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
many = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def sealed(body: Any) -> bytes:
    """A record of any content, with a checksum that is right, as an attacker would make it."""
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    text = text[: text.rindex(b"}")] if b"}" in text else text
    return text + codec._SEAL % digest(text).encode()


def as_json(record: Any) -> dict[str, Any]:
    return json.loads(msgspec.json.encode(record))


@by_kind
def test_round_trip(record: Any) -> None:
    """A record is read back equal, and its bytes are JSON that any tool reads."""
    data = encode(record)
    assert decode(data, type(record), path="x") == record
    plain = json.loads(data)
    assert plain.pop("checksum") == digest(data[: data.rindex(b',\n "checksum')])
    assert plain["format"] == 1
    assert encode(decode(data, type(record), path="x")) == data


@by_kind
@many
@given(data=st.data())
def test_any_changed_byte_is_found(record: Any, data: st.DataObject) -> None:
    """A record with any byte changed, added or cut off is damaged, and says where it lay."""
    whole = encode(record)
    place = data.draw(st.integers(0, len(whole) - 1))
    flipped = bytes([whole[place] ^ (1 << data.draw(st.integers(0, 7)))])
    changed = data.draw(
        st.sampled_from(
            [
                whole[:place] + flipped + whole[place + 1 :],
                whole[:place],
                whole[place + 1 :],
                whole[:place] + flipped + whole[place:],
                whole + whole[place:],
            ]
        )
    )
    with pytest.raises(CorruptCheckpointError, match="run/commits/x"):
        decode(changed, type(record), path="run/commits/x")


@by_kind
@many
@given(data=st.data())
def test_hostile_bytes_raise_nothing_else(record: Any, data: st.DataObject) -> None:
    """Bytes changed by somebody who also mends the checksum give a valid record or our errors."""
    body = bytearray(msgspec.json.encode(record))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(body) - 1))
        body[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
        body = body or bytearray(b"{")
    try:
        read = decode(sealed(bytes(body)), type(record), path="x")
    except (CorruptCheckpointError, UnsupportedFormatError):
        return
    assert decode(encode(read), type(record), path="x") == read


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)  # fmt: skip


@by_kind
@many
@given(data=st.data())
def test_hostile_values_raise_nothing_else(record: Any, data: st.DataObject) -> None:
    """Any JSON value in any field gives a valid record or one of our errors."""
    fields = as_json(record)
    fields[data.draw(st.sampled_from(sorted(fields)))] = data.draw(JSON)
    try:
        read = decode(sealed(fields), type(record), path="x")
    except (CorruptCheckpointError, UnsupportedFormatError):
        return
    assert isinstance(read, type(record))


@given(st.binary(max_size=200))
def test_garbage_is_damage(data: bytes) -> None:
    """Bytes that are no record at all are damage, whatever they are."""
    with pytest.raises(CorruptCheckpointError):
        decode(data, RunRecord, path="x")


@by_kind
def test_a_name_twice_is_damage(record: Any) -> None:
    """Also with the same value: another reader of JSON could take the other one."""
    body = encode(record)[: -codec._SEAL_BYTES]
    name = next(iter(json.loads(body + b"}")))
    value = json.dumps(json.loads(body + b"}")[name]).encode()
    doubled = body + b',"' + name.encode() + b'":' + value
    with pytest.raises(CorruptCheckpointError, match=f"the name '{name}' twice"):
        decode(doubled + codec._SEAL % digest(doubled).encode(), type(record), path="x")
    spaced = body.replace(b":", b": ", 1)  # as no version writes it; but it says one thing
    again = decode(spaced + codec._SEAL % digest(spaced).encode(), type(record), path="x")
    assert again == record


def test_deep_nesting_is_damage() -> None:
    """Nesting that would exhaust the stack is refused, not a crash."""
    deep = b'{"format": 1, "items": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"
    with pytest.raises(CorruptCheckpointError):
        decode(sealed(deep), Index, path="x")


@by_kind
def test_unknown_field_is_damage(record: Any) -> None:
    """A field that this format does not have is refused, never ignored."""
    with pytest.raises(CorruptCheckpointError, match="surprise"):
        decode(sealed({**as_json(record), "surprise": 1}), type(record), path="x")


@by_kind
def test_newer_format_is_no_damage(record: Any) -> None:
    """A later format is told apart from damage, so that nothing quarantines or deletes it."""
    fields = {**as_json(record), "format": 2, "new_in_2": {}}
    with pytest.raises(UnsupportedFormatError, match=r"run/x uses format 2.*upgrade"):
        decode(sealed(fields), type(record), path="run/x")


def test_unknown_feature_is_no_damage() -> None:
    """So is a record that needs a feature this version does not know."""
    fields = {**as_json(COMMIT), "required_features": ["zstd", "aes"]}
    with pytest.raises(UnsupportedFormatError, match=r"\['aes', 'zstd'\]"):
        decode(sealed(fields), CommitRecord, path="x")


@pytest.mark.parametrize("version", [0, -1, "1", None, 1.5, True])
def test_wrong_format_number_is_damage(version: object) -> None:
    """A format that no version ever wrote is damage."""
    with pytest.raises(CorruptCheckpointError):
        decode(sealed({**as_json(COMMIT), "format": version}), CommitRecord, path="x")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"id": "step-00001199-a2-s7"}, "does not match step 1200"),
        ({"id": "../../x"}, "not a checkpoint id"),
        ({"uid": 5}, "uid"),
        ({"write_id": "../x"}, "write_id"),
        ({"world_size": 1}, "ranks"),
        ({"world_size": 999_999_999}, "ranks"),
        ({"world_size": 0}, "world_size"),
        ({"lineage": []}, "lineage"),
        ({"lineage": [{"attempt": 1, "resumed_from": None}]}, "lineage"),
        ({"lineage": [{"attempt": 2, "resumed_from": "x"}]}, "not a checkpoint id"),
        ({"lineage": [{"attempt": 2, "resumed_from": ""}]}, "not a checkpoint id"),
        ({"size": -1}, "size"),
        ({"size": 2**63}, "size"),
        ({"trigger": "whim"}, "trigger"),
        ({"metrics": {"loss": "many"}}, "metrics"),
    ],
)
def test_impossible_commit_is_damage(change: dict[str, Any], says: str) -> None:
    """A commit record that contradicts itself is refused, saying in what."""
    with pytest.raises(CorruptCheckpointError, match=says):
        decode(sealed({**as_json(COMMIT), **change}), CommitRecord, path="x")


def test_completed_with_what_is_no_checkpoint_is_damage() -> None:
    """Copies and listings look for it by its attempt and sequence."""
    (completed,) = [record for record in RECORDS if isinstance(record, CompletedRecord)]
    fields = {**msgspec.to_builtins(completed), "checkpoint": "step-00000/../004-a1-s1"}
    with pytest.raises(CorruptCheckpointError, match="not a checkpoint id"):
        decode(sealed({"format": 1, **fields}), CompletedRecord, path="x")


@pytest.mark.parametrize(
    ("part", "change", "says"),
    [
        ("files", {"path": "../../etc/passwd"}, "relative path"),
        ("files", {"path": "/etc/passwd"}, "relative path"),
        ("files", {"header_size": 7}, "header of 7"),
        ("files", {"header_size": 10**9, "size": 10**10}, "header of"),
        ("files", {"size": 5000}, "outside"),
        ("files", {"header_digest": "0" * 63}, "header_digest"),
        ("tensors", {"file": 1}, "names file 1"),
        ("tensors", {"offset": 4095}, "outside"),
        ("tensors", {"offset": 2**62}, "outside"),
        ("tensors", {"size": CHUNK_BYTES + 1, "chunks": [HEX]}, "chunk digests"),
        ("tensors", {"chunks": []}, "chunk digests"),
        ("tensors", {"chunks": [HEX[:-1] + "G"]}, "hexadecimal"),
        ("tensors", {"chunks": [HEX[:-1] + "\n"]}, "hexadecimal"),
        ("tensors", {"chunks": [HEX[:-1]]}, "chunks"),
        ("tensors", {"dtype": "F32; rm"}, "dtype"),
        ("tensors", {"dtype": ""}, "dtype"),
        ("tensors", {"shape": [-1]}, "shape"),
    ],
)
def test_impossible_index_is_damage(part: str, change: dict[str, Any], says: str) -> None:
    """An index that points outside its files, or outside the run, is refused, saying how."""
    fields = as_json(INDEX)
    fields[part][0].update(change)
    with pytest.raises(CorruptCheckpointError, match=says):
        decode(sealed(fields), Index, path="x")


@pytest.mark.parametrize(
    "record",
    [
        msgspec.structs.replace(COMMIT, reason="x" * 5000),
        msgspec.structs.replace(COMMIT, metrics={"loss": float("nan")}),
        msgspec.structs.replace(COMMIT, uid=None),
        msgspec.structs.replace(INDEX, rank=2),
        MarkRecord(checkpoint="c", why="x" * 5000, by="me", at=NOW),
    ],
    ids=["long text", "NaN", "no uid", "rank", "long reason"],
)
def test_record_that_nobody_could_read_is_not_written(record: Any) -> None:
    """What `decode` would refuse raises when it is written, while there is time to do better."""
    with pytest.raises(ConfigError, match=f"cannot write {type(record).__name__}"):
        encode(record)
