"""Checkpoints of several ranks: opened anywhere, and read block by block, each byte once."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import msgspec
import pytest
from support.made_ranks import (
    CountingStore,
    commit_ranks,
    part_of_rank,
    plain,
    sharded,
    shared,
    values_of,
)
from support.made_runs import MadeRun, State, Tensor, memory_store

from ckpt_tasks.checkpointer.files import list_tensors
from ckpt_tasks.checkpointer.lazy import LazyTensor, open_checkpoint
from ckpt_tasks.checkpointer.sharded_reader import ShardedCheckpoint, open_sharded
from ckpt_tasks.checkpointer.windows import PARALLEL_WINDOWS, WINDOW_BYTES
from ckpt_tasks.errors import ConfigError, CorruptCheckpointError
from ckpt_tasks.format.blocks import Part, share_of_rows, whole
from ckpt_tasks.store.local import LocalStore
from ckpt_tasks.types import CheckpointId

ROWS = (12288, 4096)  # 48 MiB, cut by rows
COLUMNS = (64, 1024)
RNG = "ckpt_tasks.rng"


def random_bytes(size: int, seed: int) -> bytes:
    return hashlib.shake_128(bytes([seed])).digest(size)


BY_ROWS = random_bytes(ROWS[0] * ROWS[1], 1)
BY_COLUMNS = random_bytes(COLUMNS[0] * COLUMNS[1], 2)
BIAS = Tensor("model", "bias", random_bytes(100, 3))


def own_random_state(rank: int) -> Tensor:
    return Tensor(RNG, "cpu", bytes([rank]) * 16)


def state_of(rank: int, world_size: int) -> State:
    """A matrix cut by rows, one cut by columns, what ranks hold alike, and what is each one's."""
    rows = share_of_rows(ROWS, rank, world_size)
    columns = Part((0, rank * COLUMNS[1] // world_size), (COLUMNS[0], COLUMNS[1] // world_size))
    own = own_random_state(rank)
    tensors = [
        part_of_rank("model", "rows", BY_ROWS, ROWS, rows),
        part_of_rank("model", "columns", BY_COLUMNS, COLUMNS, columns),
        *([BIAS] if rank == 0 else []),
        own,
    ]
    trees: dict[str, Any] = {
        "model": {
            "rows": sharded(ROWS, rows, 0),
            "columns": sharded(COLUMNS, columns, 1),
            "bias": plain(2),
        },
        RNG: {"cpu": plain(3)},
    }
    return State(trees, tensors)


def save(run: MadeRun, world_size: int) -> CheckpointId:
    states = [state_of(rank, world_size) for rank in range(world_size)]
    others = [[], *([shared(2, BIAS)] for _ in states[1:])]
    return commit_ranks(run, states, others)


@pytest.fixture(scope="module", params=["local", "memory"])
def saved(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[MadeRun, CheckpointId]:
    """A checkpoint of two ranks; in a store that can map its files, and in one that cannot."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    run = MadeRun(LocalStore(str(folder)) if request.param == "local" else memory_store())
    return run, save(run, 2)


def opened(
    run: MadeRun, checkpoint: CheckpointId, store: Any = None, rank: int = 0
) -> dict[str, dict[str, LazyTensor]]:
    return open_checkpoint(store or run.store, run.layout, run.record(checkpoint), rank=rank)


def test_tensors_are_whole_wherever_they_are_opened(saved: tuple[MadeRun, CheckpointId]) -> None:
    """Put together from the parts, with the shape that they have together."""
    model = opened(*saved)["model"]
    assert {key: (t.shape, t.size) for key, t in model.items()} == {
        "rows": (ROWS, len(BY_ROWS)),
        "columns": (COLUMNS, len(BY_COLUMNS)),
        "bias": ((100,), 100),
    }
    assert bytes(model["rows"].read()) == BY_ROWS
    assert bytes(model["columns"].read()) == BY_COLUMNS
    assert bytes(model["bias"].read()) == BIAS.data
    assert model["rows"].details == {"parameter": True, "grad": True}


def test_what_is_each_ranks_own_is_had_by_its_number(saved: tuple[MadeRun, CheckpointId]) -> None:
    """And all else is the same, whosever state it is."""
    run, checkpoint = saved
    for rank in (0, 1):
        found = opened(run, checkpoint, rank=rank)
        assert bytes(found[RNG]["cpu"].read()) == own_random_state(rank).data
        assert bytes(found["model"]["bias"].read()) == BIAS.data
        assert bytes(found["model"]["columns"].read()) == BY_COLUMNS
    with pytest.raises(ConfigError, match="saved by 2 rank"):
        opened(run, checkpoint, rank=2)


def test_only_what_is_looked_at_is_read(saved: tuple[MadeRun, CheckpointId]) -> None:
    """Opening reads no tensor, and a tensor its own chunks, of both files."""
    store = CountingStore(saved[0].store)
    found = opened(*saved, store=store)
    assert store.spans == []
    found["model"]["columns"].read()
    assert set(store.requests) == {f"model.rank000{rank}.safetensors" for rank in (0, 1)}
    assert store.bytes_read <= len(BY_COLUMNS) + 2 * 4096


def test_a_list_of_all_tensors_has_each_once(saved: tuple[MadeRun, CheckpointId]) -> None:
    """By their whole shapes, and by who wrote them."""
    run, checkpoint = saved
    lines = list_tensors(run.store, run.layout, run.record(checkpoint))
    assert [(line.name, line.key, line.ranks, line.shape, line.size) for line in lines] == [
        ("model", "rows", [0, 1], list(ROWS), len(BY_ROWS)),
        ("model", "columns", [0, 1], list(COLUMNS), len(BY_COLUMNS)),
        ("model", "bias", [0], [100], 100),
        (RNG, "cpu", [0], [16], 16),
        (RNG, "cpu", [1], [16], 16),
    ]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("position", [3, -1, -len(BY_COLUMNS)])
def test_a_flipped_bit_in_any_part_is_found(
    saved: tuple[MadeRun, CheckpointId], rank: int, position: int
) -> None:
    """In header or values, at every look, and whatever the other rank's part is."""
    run, checkpoint = saved
    record = run.record(checkpoint)
    folder = record.indexes[rank].path.rpartition("/")[0]
    path = run.layout.in_run(f"{folder}/model.rank{rank:04d}.safetensors")
    run.damage(path, position=position)
    try:
        found = opened(run, checkpoint)["model"]
        damaged = [key for key in found if _is_damaged(found[key])]
        assert damaged
        assert damaged == [key for key in found if _is_damaged(found[key])]
        start = open_sharded(run.store, run.layout, record)
        with pytest.raises(CorruptCheckpointError, match=f"rank000{rank}"):
            start.preload()
    finally:
        run.damage(path, position=position)
    assert bytes(opened(run, checkpoint)["model"]["columns"].read()) == BY_COLUMNS


def _is_damaged(tensor: LazyTensor) -> bool:
    try:
        tensor.read()
    except CorruptCheckpointError:
        return True
    return False


# -- restoring ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def in_memory() -> tuple[MadeRun, dict[int, CheckpointId]]:
    """Checkpoints of one rank and of two."""
    run = MadeRun()
    return run, {ranks: save(MadeRun(run.store, f"of-{ranks}"), ranks) for ranks in (1, 2)}


def start_of(
    run: MadeRun, checkpoints: dict[int, CheckpointId], saved_by: int, rank: int, world_size: int
) -> tuple[CountingStore, ShardedCheckpoint]:
    made = MadeRun(run.store, f"of-{saved_by}")
    store = CountingStore(run.store)
    record = made.record(checkpoints[saved_by])
    return store, open_sharded(store, made.layout, record, rank=rank, world_size=world_size)


def matrices(start: ShardedCheckpoint) -> list[Any]:
    """The sharded tensors of a checkpoint."""
    _, found = start.leaves().numbered("model", start.trees["model"])
    return [start.tensor_of(each) for each in found]


@pytest.mark.parametrize(("saved_by", "world_size"), [(2, 1), (1, 2), (2, 3), (2, 2)])
def test_together_ranks_read_every_byte_once(
    in_memory: tuple[MadeRun, dict[int, CheckpointId]], saved_by: int, world_size: int
) -> None:
    """Each only what it needs, in one go and in few requests; what it takes then is there."""
    total = 0
    for rank in range(world_size):
        store, start = start_of(*in_memory, saved_by, rank, world_size)
        start.preload()
        start.verify_rest()
        assert store.read_twice() == 0
        total += store.bytes_read
        windows = store.bytes_read / WINDOW_BYTES
        assert len(store.spans) <= 2 * windows + 8
        before = len(store.spans)
        rows, _ = matrices(start)
        own = share_of_rows(ROWS, rank, world_size)
        (image,) = start.read([(rows, own)])
        assert (bytes(image.data), image.shape) == (values_of(BY_ROWS, ROWS, own), own.sizes)
        assert len(store.spans) == before
    small = len(BY_COLUMNS) + saved_by * (16 + 4096) + 100
    assert len(BY_ROWS) <= total <= len(BY_ROWS) + world_size * small


def test_what_is_there_is_not_read_again(
    in_memory: tuple[MadeRun, dict[int, CheckpointId]],
) -> None:
    """Whole matrices, of which a rank has a share of the rows: it reads the others."""
    store, start = start_of(*in_memory, 2, 1, 3)
    start.preload()
    rows, columns = matrices(start)
    images = start.read([(rows, whole(ROWS)), (columns, whole(COLUMNS))])
    assert [bytes(image.data) for image in images] == [BY_ROWS, BY_COLUMNS]
    assert store.read_twice() <= 3 * len(BY_COLUMNS)
    assert store.bytes_read <= 1.1 * len(BY_ROWS)


def test_a_block_of_columns(in_memory: tuple[MadeRun, dict[int, CheckpointId]]) -> None:
    """Across both parts, in memory of its own."""
    _, start = start_of(*in_memory, 2, 0, 4)
    start.preload()
    block = Part((7, 500), (40, 100))
    (image,) = start.read([(matrices(start)[1], block)])
    assert bytes(image.data) == values_of(BY_COLUMNS, COLUMNS, block)


def test_memory_beside_the_blocks_is_bounded(
    in_memory: tuple[MadeRun, dict[int, CheckpointId]],
) -> None:
    """Windows, however large the block is."""
    store, start = start_of(*in_memory, 2, 0, 1)
    start.preload()
    assert max(stop - start for _, start, stop in store.spans) <= WINDOW_BYTES + 4096
    assert len(store.spans) > PARALLEL_WINDOWS


def test_damage_of_what_nobody_takes_is_found_too(
    in_memory: tuple[MadeRun, dict[int, CheckpointId]],
) -> None:
    """Rank 1's own random state, where one rank restores rank 0's: one of the ranks sees it."""
    run = MadeRun()
    checkpoint = save(run, 2)
    record = run.record(checkpoint)
    folder = record.indexes[1].path.rpartition("/")[0]
    run.damage(run.layout.in_run(f"{folder}/{RNG}.rank0001.safetensors"))
    found = []
    for rank in range(3):
        start = open_sharded(run.store, run.layout, record, rank=rank, world_size=3)
        start.preload()
        try:
            start.verify_rest()
        except CorruptCheckpointError as error:
            found.append((rank, str(error)))
    assert [rank for rank, _ in found] == [1]
    assert "rng.rank0001.safetensors is damaged" in found[0][1]


@pytest.mark.parametrize("ranks", [[0], [0, 0]])
def test_a_record_that_lacks_a_rank_is_damage(ranks: list[int]) -> None:
    """As many indexes as ranks, each once."""
    run = MadeRun()
    record = run.record(save(run, 2))
    odd = msgspec.structs.replace(record, indexes=[record.indexes[rank] for rank in ranks])
    with pytest.raises(CorruptCheckpointError, match="names the indexes of"):
        open_sharded(run.store, run.layout, odd)
