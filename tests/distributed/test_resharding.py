"""Saved in one sharding, restored in another: the same state, bit by bit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.made_ranks import CountingStore
from support.sharded_runs import (
    LAYOUT,
    RankSaver,
    full_states,
    made,
    opened,
    restore,
    same,
    train,
)
from support.worlds import run_world
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ckpt_tasks.checkpointer.files import list_files
from ckpt_tasks.checkpointer.reader import read_commit
from ckpt_tasks.checkpointer.verify import state_digest, verify_checkpoint
from ckpt_tasks.errors import ConfigError, CorruptCheckpointError
from ckpt_tasks.store import open_store
from ckpt_tasks.tasks import ExportRequest, export_from
from ckpt_tasks.training.load import load_uri, open_uri
from ckpt_tasks.training.own import RNG
from ckpt_tasks.types import CheckpointId


def save_trained(rank: int, world_size: int, root: Path, kind: str) -> Any:
    """Train, save, train and save again; ids and whole states, as they were."""
    items, saver = made(kind, world_size), RankSaver(root, rank, world_size)
    saved = []
    for first in (0, 2):
        train(items["model"], items["optimizer"], 2, first=first)
        checkpoint = saver.save(items)
        torch.distributed.barrier()
        saved.append((checkpoint, full_states(items)))
    return saved


def restored(
    rank: int, world_size: int, root: Path, kinds: list[str], checkpoint: CheckpointId
) -> list[Any]:
    """The whole state in each sharding that the checkpoint was restored to."""
    states = []
    for kind in kinds:
        items = made(kind, world_size)
        before = torch.get_rng_state()
        store = CountingStore(open_store(str(root)))
        restore(root, checkpoint, items, rank, world_size, store=store)
        assert torch.equal(torch.get_rng_state(), before), "restoring has drawn random numbers"
        # Each small file is one read; what FSDP2 takes is what was read before it was known.
        again = [name for name, n in store.requests.items() if n > 1 and not name.startswith(RNG)]
        assert kind != "fsdp" or not again
        states.append(full_states(items))
    return states


NORMED = {1: ["plain", "fsdp"], 2: ["ddp", "hsdp"], 3: ["fsdp"]}
PARALLEL = {2: ["tp"], 3: ["tp"], 4: ["fsdp+tp"]}
"""Number of ranks to the shardings that a checkpoint is restored to."""


@pytest.mark.parametrize(
    ("kind", "world_size"),
    [("plain", 1), ("ddp", 2), ("fsdp", 1), ("fsdp", 2), ("fsdp", 3), ("hsdp", 4)],
)
def test_any_number_of_ranks_in_any_sharding(kind: str, world_size: int, tmp_path: Path) -> None:
    """DDP, FSDP2 and hybrids to one another and to one process, on fewer and on more ranks.

    The first layer's 7 rows are divided unevenly, the last one's 2 leave a rank of three empty.
    """
    saved = run_world(world_size, save_trained, tmp_path, tmp_path / "store", kind)
    checkpoint, expected = saved[0][-1]
    for ranks, kinds in NORMED.items():
        args = (tmp_path / "store", kinds, checkpoint)
        for states in run_world(ranks, restored, tmp_path, *args):
            assert all(same(state, expected) for state in states)
    assert_whole(tmp_path / "store", checkpoint, expected)


@pytest.mark.parametrize(("kind", "world_size"), [("tp", 2), ("fsdp+tp", 4)])
def test_tensor_parallel(kind: str, world_size: int, tmp_path: Path) -> None:
    """Columns and rows that were cut over ranks, in two dimensions too, and back."""
    saved = run_world(world_size, save_trained, tmp_path, tmp_path / "store", kind)
    checkpoint, expected = saved[0][-1]
    for ranks, kinds in PARALLEL.items():
        args = (tmp_path / "store", kinds, checkpoint)
        for states in run_world(ranks, restored, tmp_path, *args):
            assert all(same(state, expected) for state in states)
    assert_whole(tmp_path / "store", checkpoint, expected)


def assert_whole(root: Path, checkpoint: CheckpointId, expected: Any) -> None:
    """On one process, without a mesh, every tensor is what it was before it was cut."""
    with open_uri(uri_of(root, checkpoint)) as found:
        assert same(dict(found["model"]), expected["model"])
        state = expected["optimizer"]["state"]
        flat = {f"state.{n}.{key}": v for n, of in state.items() for key, v in of.items()}
        assert flat
        assert same(dict(found["optimizer"]), flat)


def uri_of(root: Path, checkpoint: CheckpointId) -> str:
    return f"file://{root}/{LAYOUT.commit(checkpoint)}"


def test_twice_resharded(tmp_path: Path) -> None:
    """2 ranks, then 1, then 3, then 2 save in turn what they restored: nothing is lost."""
    root = tmp_path / "store-2"
    checkpoint, expected = run_world(2, save_trained, tmp_path, root, "fsdp")[0][-1]
    for number, ranks in enumerate((1, 3, 2)):
        next_root = tmp_path / f"store-{number}-{ranks}"
        results = run_world(ranks, restore_and_save, tmp_path, root, next_root, checkpoint)
        checkpoint, state = results[0]
        assert same(state, expected)
        root = next_root


def restore_and_save(
    rank: int, world_size: int, root: Path, next_root: Path, checkpoint: CheckpointId
) -> Any:
    items = made("fsdp", world_size)
    restore(root, checkpoint, items, rank, world_size)
    saved = RankSaver(next_root, rank, world_size).save(items)
    torch.distributed.barrier()
    return saved, full_states(items)


def made_large(kind: str, world_size: int, *, beside: bool) -> dict[str, Any]:
    """A matrix of 6 chunks, whose parts on 1, 2 and 3 ranks are whole ones; momentum of the same.

    Perhaps also what training may hold `beside`: a plain value, for the module's own memory.
    """
    torch.manual_seed(7)
    module: Any = torch.nn.Linear(1024, 6 * 1024)
    if kind == "fsdp":
        mesh = init_device_mesh("cpu", (world_size,))
        fully_shard(module, mesh=mesh)
    optimizer = torch.optim.SGD(module.parameters(), 0.1, momentum=0.9)
    return {"model": module, "optimizer": optimizer, **({"ema": {}} if beside else {})}


def save_large(rank: int, world_size: int, root: Path, kind: str, beside: bool) -> Any:
    items = made_large(kind, world_size, beside=beside)
    for parameter in items["model"].parameters():
        parameter.grad = torch.ones_like(parameter)
    items["optimizer"].step()
    if beside:
        items["ema"]["weight"] = items["model"].weight
    checkpoint = RankSaver(root, rank, world_size).save(items)
    return checkpoint, full_states({name: items[name] for name in ("model", "optimizer")})


def restore_large(
    rank: int, world_size: int, root: Path, kind: str, beside: bool, checkpoint: CheckpointId
) -> Any:
    """Bytes read, bytes read twice and bytes that this rank needs; and what it has then."""
    items = made_large(kind, world_size, beside=beside)
    store = CountingStore(open_store(str(root)))
    restore(root, checkpoint, items, rank, world_size, store=store)
    momentum = [state["momentum_buffer"] for state in items["optimizer"].state.values()]
    held = [*items["model"].parameters(), *momentum]
    needed = sum(getattr(tensor, "to_local", lambda t=tensor: t)().nbytes for tensor in held)
    assert not beside or items["ema"]["weight"] is items["model"].weight
    states = full_states({name: items[name] for name in ("model", "optimizer")})
    return store.bytes_read, store.read_twice(), needed, states


@pytest.mark.parametrize(
    ("saved_as", "saved_by", "kind", "world_size", "beside"),
    [
        ("fsdp", 2, "fsdp", 3, False),
        ("fsdp", 2, "plain", 1, False),
        ("plain", 1, "fsdp", 2, False),
        ("plain", 1, "plain", 2, True),
    ],
)
def test_ranks_read_what_they_need_once(
    saved_as: str, saved_by: int, kind: str, world_size: int, beside: bool, tmp_path: Path
) -> None:
    """Cut or not, then and now; the state is the same, and what shared memory does so again."""
    root = tmp_path / "store"
    checkpoint, expected = run_world(saved_by, save_large, tmp_path, root, saved_as, beside)[0]
    results = run_world(world_size, restore_large, tmp_path, root, kind, beside, checkpoint)
    for _, twice, _, states in results:
        assert same(states, expected)
        assert twice == 0
    read, needed = (sum(result[n] for result in results) for n in (0, 2))
    assert needed <= read <= 1.1 * needed


TABLE_ROWS = 2048


def made_table(kind: str, world_size: int) -> dict[str, Any]:
    """A table of 8 MiB on each rank, and its moments."""
    torch.manual_seed(7)
    module: Any = torch.nn.Embedding(TABLE_ROWS, 1024)
    if kind == "ddp":
        module = torch.nn.parallel.DistributedDataParallel(module)
    return {"model": module, "optimizer": torch.optim.SGD(module.parameters(), 0.1)}


def save_table(rank: int, world_size: int, root: Path) -> Any:
    """Saved in blocks, twice, with a row changed in between."""
    items = made_table("ddp", world_size)
    saver = RankSaver(root, rank, world_size, row_blocks=["model.weight"])
    saver.save(items)
    torch.distributed.barrier()
    items["model"](torch.tensor([TABLE_ROWS - 1])).sum().backward()
    items["optimizer"].step()
    checkpoint = saver.save(items)
    torch.distributed.barrier()
    return checkpoint, full_states(items)


def restore_table(
    rank: int, world_size: int, root: Path, kind: str, checkpoint: CheckpointId
) -> Any:
    items = made_table(kind, world_size)
    restore(root, checkpoint, items, rank, world_size)
    return full_states(items)


def test_row_blocks_of_several_ranks(tmp_path: Path) -> None:
    """Divided over the ranks, which write only what has changed; whole again on any number."""
    root = tmp_path / "store"
    checkpoint, expected = run_world(2, save_table, tmp_path, root)[0]
    for ranks, kind in ((1, "plain"), (3, "ddp")):
        for states in run_world(ranks, restore_table, tmp_path, root, kind, checkpoint):
            assert same(states, expected)
    assert same(dict(load_uri(uri_of(root, checkpoint), ["model"])["model"]), expected["model"])
    with open_store(str(root)) as store:
        record = read_commit(store, LAYOUT, checkpoint)
        assert verify_checkpoint(store, LAYOUT.run, checkpoint).ok
        blocks = [file for file in list_files(store, LAYOUT, record) if ".rows." in file.path]
        assert {file.rank for file in blocks} == {0, 1}
    assert record.written is not None
    assert record.size > 8 * 2**20 > 4 * record.written


def save_parts_in_blocks(rank: int, world_size: int, root: Path) -> str:
    """What a rank is told whose parameters are DTensors."""
    items = made("fsdp", world_size)
    with pytest.raises(ConfigError) as refused:
        RankSaver(root, rank, world_size, row_blocks=["model.one.*"]).save(items)
    return str(refused.value)


def test_parts_of_dtensors_are_not_split(tmp_path: Path) -> None:
    """It is said so at the first capture, by name; nothing is in the store."""
    root = tmp_path / "store"
    for said in run_world(2, save_parts_in_blocks, tmp_path, root):
        assert "save.row_blocks names model.one." in said
        assert "a DTensor, whose parts are saved as the ranks hold them; leave it out" in said
    with open_store(str(root)) as store:
        assert not store.list_objects(LAYOUT.commits)
        assert not store.list_objects(LAYOUT.data)


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Root of a store, id and whole state of a checkpoint that two ranks have saved."""
    folder = tmp_path_factory.mktemp("fsdp")
    saved = run_world(2, save_trained, folder, folder / "store", "fsdp")
    return folder / "store", *saved[0][-1]


def test_each_ranks_own_random_numbers(fsdp: Any) -> None:
    """Those of a rank are had by its number: its generators, and the tensors in them."""
    root, checkpoint, _ = fsdp
    uri = uri_of(root, checkpoint)
    for rank in (0, 1):
        values = load_uri(uri, [RNG], rank=rank)[RNG]
        with open_uri(uri, rank=rank) as found:
            assert torch.equal(found[RNG]["torch"], values["torch"])
    with pytest.raises(ConfigError, match="2 rank"):
        load_uri(uri, ["model"], rank=2)


def test_whole_tensors_for_who_uses_the_model(fsdp: Any) -> None:
    """By its address, on one process and without any mesh, a sharded model is a plain one."""
    root, checkpoint, expected = fsdp
    values = load_uri(uri_of(root, checkpoint), ["model", "optimizer"])
    assert same(dict(values["model"]), expected["model"])
    first = values["optimizer"]["state"][0]["exp_avg"]
    assert same(first, expected["optimizer"]["state"]["0"]["exp_avg"])


def test_exported_tensors_are_whole(fsdp: Any, tmp_path: Path) -> None:
    """In each form, a model that ranks have cut is a plain one, and its optimizer's state too."""
    root, checkpoint, expected = fsdp
    names = ExportRequest(only=["model", "optimizer"])
    with open_store(str(root)) as store:
        for to in ("safetensors", "torch"):
            how = {"checkpoint": str(checkpoint), "request": names}
            export_from(store, LAYOUT.run, to, str(tmp_path / to), **how)
    moment = load_file(tmp_path / "safetensors" / "optimizer.safetensors")["state.0.exp_avg"]
    states = torch.load(tmp_path / "torch", weights_only=True)
    assert same(load_file(tmp_path / "safetensors" / "model.safetensors"), expected["model"])
    assert same(dict(states["model"]), expected["model"])
    assert same(moment, expected["optimizer"]["state"]["0"]["exp_avg"])
    assert same(states["optimizer"]["state"][0]["exp_avg"], moment)


def test_verify_reads_all_ranks(fsdp: Any) -> None:
    """Verification covers every rank's files, and the state's digest every rank's state."""
    root, checkpoint, _ = fsdp
    with open_store(str(root)) as store:
        report = verify_checkpoint(store, LAYOUT.run, checkpoint)
        # Of each rank: index, random numbers, model and optimizer.
        assert (report.ok, report.files) == (True, 8)
        record = read_commit(store, LAYOUT, checkpoint)
        assert report.size == record.size
        assert {file.rank for file in list_files(store, LAYOUT, record)} == {0, 1}
        digest = state_digest(store, LAYOUT.run, checkpoint)
        assert digest != state_digest(store, LAYOUT.run, CheckpointId(1, 1, 1))


def test_any_flipped_bit_is_found(fsdp: Any, tmp_path: Path) -> None:
    """In whichever rank's file: by verification, and by the load, which hands nothing out."""
    root, checkpoint, _ = fsdp
    copy = tmp_path / "store"
    shutil.copytree(root, copy)
    with open_store(str(copy), for_writing=True) as store:
        record = read_commit(store, LAYOUT, checkpoint)
        for file in list_files(store, LAYOUT, record):
            if file.name != "model":
                continue
            sound = store.read(file.path)
            store.put(file.path, sound[:-1] + bytes([sound[-1] ^ 1]))
            assert not verify_checkpoint(store, LAYOUT.run, checkpoint).ok
            with pytest.raises(CorruptCheckpointError, match=f"rank000{file.rank}.* damaged"):
                load_uri(uri_of(copy, checkpoint), ["model"])
            with (
                open_uri(uri_of(copy, checkpoint)) as found,
                pytest.raises(CorruptCheckpointError, match=f"rank000{file.rank}.* damaged"),
            ):
                dict(found["model"])
            with pytest.raises(CorruptCheckpointError, match="damaged"):
                opened(copy, checkpoint, file.rank, 2).preload()
            store.put(file.path, sound[:-8])
            with pytest.raises(CorruptCheckpointError, match="bytes, committed were"):
                load_uri(uri_of(copy, checkpoint), ["model"])
            store.put(file.path, sound)
