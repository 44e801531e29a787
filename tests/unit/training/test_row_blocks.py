"""On request a tensor is saved in blocks of rows, of which only those that changed are written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors import safe_open
from support.damage import flip
from support.made_ranks import CountingStore, commit_ranks
from support.made_runs import MadeRun, save_request
from support.resume_harness import Harness, Kill, Recorder, digest_of
from support.resume_loaders import seed_everything
from torch import nn

from ckpt_tasks import TrainingRun
from ckpt_tasks.checkpointer.checkpointer import Checkpointer
from ckpt_tasks.checkpointer.differing import differing
from ckpt_tasks.checkpointer.drain import InlineDrain
from ckpt_tasks.checkpointer.files import list_files, list_tensors
from ckpt_tasks.checkpointer.job import JobRunner
from ckpt_tasks.checkpointer.reader import load_checkpoint, read_commit, read_index
from ckpt_tasks.checkpointer.sharded_reader import open_sharded
from ckpt_tasks.checkpointer.verify import verify_checkpoint
from ckpt_tasks.config import SaveConfig, ScheduleConfig, load_config
from ckpt_tasks.errors import ConfigError, CorruptCheckpointError
from ckpt_tasks.fencing.fence import Fence
from ckpt_tasks.format import codec
from ckpt_tasks.format.records import CommitRecord, Index
from ckpt_tasks.state.capture import CapturedState
from ckpt_tasks.state.overlap import StepFence
from ckpt_tasks.state.row_blocks import BLOCK_BYTES
from ckpt_tasks.state.sharing import SharingPlanner
from ckpt_tasks.state.tracked import TrackedItems
from ckpt_tasks.store.local import LocalStore
from ckpt_tasks.training.load import load_uri, open_uri
from ckpt_tasks.training.restore import restored_values

ROW_BYTES = 1000  # no power of two: a block is no multiple of anything
ROWS = 64 * 1024 * 1024 // ROW_BYTES
FEW = ROWS // 100


class Table(nn.Module):
    """An embedding, and a head that is tied to it."""

    def __init__(self, rows: int, dtype: torch.dtype = torch.bfloat16, *, dense: int = 8) -> None:
        super().__init__()
        width = ROW_BYTES // dtype.itemsize
        values = (torch.arange(rows * width, dtype=torch.int32) % 251).to(dtype)
        self.embedding = nn.Embedding(rows, width, _weight=values.view(rows, width))
        self.head = nn.Linear(width, rows, bias=False, device="meta")
        self.head.weight = self.embedding.weight
        self.dense = nn.Linear(dense, dense)
        nn.init.zeros_(self.dense.weight)
        nn.init.zeros_(self.dense.bias)


class Scene:
    """A run in a folder, whose saves keep `patterns` in blocks of rows."""

    def __init__(self, root: Path, items: dict[str, Any], *patterns: str) -> None:
        self.root = root
        self.run = MadeRun(LocalStore(root))
        attempt = self.run.begin()
        fence = Fence(self.run.store, self.run.layout, attempt.number)
        self.checkpointer = Checkpointer(
            InlineDrain(JobRunner(self.run.store, self.run.layout, fence)),
            self.run.identity,
            attempt.number,
            attempt.recovered.lineage,
            hyperparameters={},
            environment={},
        )
        self.items = TrackedItems(patterns)
        for name, item in items.items():
            self.items.add(name, item)

    def save(self, step: int) -> CommitRecord:
        return self.checkpointer.save(self.items.capture(), save_request(step))

    def index(self, record: CommitRecord) -> Index:
        return read_index(self.run.store, self.run.layout, record.indexes[0])

    def uri(self, record: CommitRecord) -> str:
        return f"{self.root}/{self.run.layout.commit(record.checkpoint)}"

    def files(self, record: CommitRecord) -> list[Path]:
        files = list_files(self.run.store, self.run.layout, record)
        return [self.root / file.path for file in files]


def test_only_blocks_that_changed_are_written(tmp_path: Path) -> None:
    """1 % of the rows of 64 MiB, in one place, five times; each checkpoint holds what it saved."""
    model = Table(ROWS)
    scene = Scene(tmp_path, {"model": model}, "model.embedding.weight")
    records = [scene.save(1)]
    saved = [model.embedding.weight.detach().clone()]
    assert records[0].written == records[0].size
    assert records[0].size > saved[0].nbytes

    for step in range(2, 6):
        first = (step - 1) * ROWS // 6
        with torch.no_grad():
            model.embedding.weight[first : first + FEW] += step
        records.append(scene.save(step))
        saved.append(model.embedding.weight.detach().clone())

        index = scene.index(records[-1])
        touched = -(-FEW * ROW_BYTES // BLOCK_BYTES) + 1
        assert records[-1].written is not None
        assert records[-1].written < touched * BLOCK_BYTES + index_size(records[-1]) + 8192
        rows = [file for file in index.files if file.path.endswith(".rows.safetensors")]
        assert len(rows) == step
        assert verify_checkpoint(scene.run.store, "digits", records[-1].id).ok

    for record, weight in zip(records, saved, strict=True):
        with open_uri(scene.uri(record)) as opened:
            assert torch.equal(opened["model"]["embedding.weight"], weight)
    values = load_uri(scene.uri(records[-1]), ["model"])["model"]
    assert torch.equal(values["embedding.weight"], saved[-1])
    assert values["head.weight"] is values["embedding.weight"]  # tied as before


def test_dense_weights_beside_a_table_are_all_that_is_written_with_it(tmp_path: Path) -> None:
    """However large they are: a table whose file they shared would soon be written again."""
    model = Table(5000, dense=1500)
    scene = Scene(tmp_path, {"model": model}, "model.embedding.weight")
    scene.save(1)
    for step in range(2, 5):
        with torch.no_grad():
            model.dense.weight += 1
            model.embedding.weight[step] += 1
        record = scene.save(step)
        assert record.written is not None
        assert record.written < model.dense.weight.nbytes + BLOCK_BYTES + 32_768
    with torch.no_grad():
        model.embedding.weight[:2700] += 1
    assert record.size > 5000 * ROW_BYTES
    assert (scene.save(5).written or 0) > 5000 * ROW_BYTES, "half of the file was no longer used"


def index_size(record: CommitRecord) -> int:
    return record.indexes[0].size


def test_what_others_see(tmp_path: Path) -> None:
    """Blocks in the file; one tensor in our own list; and a feature older versions refuse."""
    model = Table(5000, torch.float32)
    scene = Scene(tmp_path, {"model": model}, "model.emb*.weight", "model.dense.bias")
    record = scene.save(1)
    (rows,) = (path for path in scene.files(record) if ".rows." in path.name)
    with safe_open(rows, "pt") as file:
        first = [int(key.partition("[")[2].partition(":")[0]) for key in file.keys()]  # noqa: SIM118
        blocks = [key for _, key in sorted(zip(first, file.keys(), strict=True))]
        whole = torch.cat([file.get_tensor(key) for key in blocks])
    assert blocks[0] == f"embedding.weight[0:{BLOCK_BYTES // ROW_BYTES}]"
    assert torch.equal(whole, model.embedding.weight.detach())

    lines = list_tensors(scene.run.store, scene.run.layout, record)
    assert sorted((line.key, line.shape) for line in lines) == [
        ("dense.bias", [8]),
        ("dense.weight", [8, 8]),
        ("embedding.weight", [5000, ROW_BYTES // 4]),
    ]
    committed = read_commit(scene.run.store, scene.run.layout, record.checkpoint)
    assert committed.required_features == ["row-blocks"]


@pytest.mark.parametrize("where", [0.3, 1.0])
def test_a_flipped_bit_is_found(tmp_path: Path, where: float) -> None:
    """In an old block that is referred to, and in a new one; by every way of reading."""
    model = Table(5000)
    scene = Scene(tmp_path, {"model": model}, "model.embedding.weight")
    scene.save(1)
    with torch.no_grad():
        model.embedding.weight[-1] += 1
    record = scene.save(2)
    old, new, _ = sorted(scene.files(record), key=lambda path: -path.stat().st_size)
    flip(where)(old if where < 1 else new)
    assert not verify_checkpoint(scene.run.store, "digits", record.id).ok
    with pytest.raises(CorruptCheckpointError):
        load_checkpoint(scene.run.store, scene.run.layout, record)
    with open_uri(scene.uri(record)) as opened, pytest.raises(CorruptCheckpointError):
        opened["model"]["embedding.weight"]


def damaged(index: Index, change: Callable[[dict[str, Any]], None]) -> bytes:
    """An index with other contents, sealed as if it had been written so."""
    content = msgspec.json.decode(msgspec.json.encode(index))
    change(content["row_blocks"][0])
    return codec.encode(msgspec.convert(content, Index))


@pytest.mark.parametrize(
    "change", [{"count": 9}, {"position": 3}, {"count": 1}, {"position": -1}, {"count": 2**40}]
)
def test_places_that_cannot_be_are_refused(tmp_path: Path, change: dict[str, int]) -> None:
    """An index is not trusted: no memory is taken for what it makes up."""
    scene = Scene(tmp_path, {"model": Table(5000)}, "model.embedding.weight")
    index = scene.index(scene.save(1))
    assert index.row_blocks
    assert len(index.tensors) == index.row_blocks[0].count + 2
    with pytest.raises((ConfigError, msgspec.ValidationError)):
        damaged(index, lambda blocks: blocks.update(change))


@pytest.mark.parametrize(("more", "message"), [(1, "a part of emb"), (2, "is no row of emb")])
def test_blocks_that_are_no_rows_of_one_tensor_are_refused(
    tmp_path: Path, more: int, message: str
) -> None:
    """A tensor of another shape among them is damage."""
    scene = Scene(tmp_path, {"model": Table(5000)}, "model.embedding.weight")
    record = scene.save(1)
    index = scene.index(record)
    assert index.row_blocks
    wrong = msgspec.structs.replace(index.row_blocks[0], count=index.row_blocks[0].count + more)
    loaded = load_checkpoint(scene.run.store, scene.run.layout, record)
    index = msgspec.structs.replace(index, row_blocks=[wrong])
    loaded = msgspec.structs.replace(loaded, index=index)
    with pytest.raises(CorruptCheckpointError, match=message):
        restored_values(loaded, [])


def lookups(run: TrainingRun, recorder: Recorder) -> None:
    """Trains a table sparsely: few rows and their moments change in each step."""
    seed_everything()
    table = nn.Embedding(9000, 100, sparse=True)
    optimizer = torch.optim.SparseAdam(table.parameters(), lr=0.1)
    loader = torch.utils.data.DataLoader(list(range(0, 9000, 1500)), batch_size=1)
    run.track(table=table, optimizer=optimizer, loader=loader)
    for _ in run.epochs(1):
        for batch in run.steps(loader):
            optimizer.zero_grad()
            table(batch).pow(2).sum().backward()
            optimizer.step()
            recorder("step", batch)
    recorder.end(table, optimizer)


ROW_BLOCKED = ["table.weight", "optimizer.state.*.exp_avg*"]


@pytest.mark.parametrize("save", [{}, {"overlap": True, "asynchronous": False}])
def test_a_resumed_training_ends_as_one_never_killed(save: dict[str, bool]) -> None:
    """Bit by bit: weights, moments; also where the setting comes and goes between attempts."""
    schedule = ScheduleConfig(every_steps=1)
    whole = Harness(lookups, schedule).attempt()
    assert whole.digest is not None
    harness = Harness(lookups, schedule)
    for patterns in (ROW_BLOCKED, [], ROW_BLOCKED, ROW_BLOCKED):
        config = msgspec.structs.replace(
            harness.spec.config, save=SaveConfig(row_blocks=patterns, **save)
        )
        harness.spec = msgspec.structs.replace(harness.spec, config=config)
        last = harness.attempt(Kill(place=1))
        assert last.killed
    assert harness.attempt().digest == whole.digest


def test_overlapping_copies_cover_every_block() -> None:
    """What a step changes is copied later, all blocks of it, and a change meanwhile is noticed."""
    table = nn.Embedding(5000, 100)
    optimizer = torch.optim.SGD(table.parameters())
    items = TrackedItems(["table.weight"])
    items.add("table", table)
    items.add("optimizer", optimizer)
    fence = StepFence()
    fence.watch({"optimizer": optimizer})
    captured = items.capture()
    (split,) = captured.row_blocks
    assert split.count == 2
    assert set(split.positions) <= set(fence.overlap(captured, captured)._later)


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["model.embeding.weight"], "did you mean 'model.embedding.weight'"),
        (["model.dense.*", "optimiser.*"], r"names optimiser\.\*, which is no tensor"),
        (["model.head.weight"], "whose memory is that of model.embedding.weight; name that"),
        (["optimizer.state.0.moment"], "did you mean 'optimizer.state.0.momentum_buffer'"),
    ],
)
def test_a_name_that_is_no_tensor_is_told(patterns: list[str], message: str) -> None:
    """At the first save; of an optimizer's state, once there is one."""
    model = Table(3, torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.5)
    items = TrackedItems(patterns)
    items.add("model", model)
    items.add("optimizer", optimizer)
    if patterns[0].startswith("optimizer"):
        items.capture()
        model.embedding(torch.tensor([0])).sum().backward()
        optimizer.step()
    with pytest.raises(ConfigError, match=message):
        items.capture()


def test_names_come_from_anywhere(tmp_path: Path) -> None:
    """File, environment or argument; without incremental saves they have no sense."""
    file = tmp_path / "config.toml"
    file.write_text('[save]\nrow_blocks = ["model.embedding.weight"]\n')
    assert load_config(file, {}).save.row_blocks == ["model.embedding.weight"]
    environ = {"CKPT_TASKS_SAVE_ROW_BLOCKS": '["model.*"]'}
    assert load_config(file, environ).save.row_blocks == ["model.*"]
    assert load_config(file, {}, {"save.row_blocks": ["x"]}).save.row_blocks == ["x"]
    with pytest.raises(ConfigError, match=r"save\.row_blocks .* without save\.incremental"):
        load_config(file, {"CKPT_TASKS_SAVE_INCREMENTAL": "false"})


def trained_table() -> tuple[Table, torch.optim.Optimizer]:
    model = Table(5000, torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.5)
    model.embedding(torch.tensor([7, 4999])).sum().backward()
    optimizer.step()
    return model, optimizer


def tracked(model: Table, optimizer: torch.optim.Optimizer) -> TrackedItems:
    items = TrackedItems(["model.embedding.weight", "optimizer.state.*"])
    items.add("model", model)
    items.add("optimizer", optimizer)
    return items


def two_ranks(run: MadeRun, *states: CapturedState) -> CommitRecord:
    """What two ranks save together that hold alike what one of them may write for both."""
    offers: list[bytes] = []
    for rank, state in enumerate(states):
        SharingPlanner(rank, 2, lambda message: offers.append(message)).divide(state)  # type: ignore[func-returns-value]
    divided = [
        SharingPlanner(rank, 2, lambda message: offers).divide(state)
        for rank, state in enumerate(states)
    ]
    for state in divided:
        state.compare(state.left)
    return run.record(commit_ranks(run, divided, [state.shared for state in divided]))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_share_the_blocks_of_what_they_hold_alike(world_size: int) -> None:
    """Each writes about half of them; whoever restores, on whatever rank, has all."""
    run, (model, optimizer) = MadeRun(), trained_table()
    record = two_ranks(run, *[tracked(model, optimizer).capture() for _ in range(2)])
    lines = {line.key: line for line in list_tensors(run.store, run.layout, record)}
    for key in ("embedding.weight", "state.0.momentum_buffer"):
        assert (lines[key].ranks, lines[key].shape) == ([0, 1], [5000, ROW_BYTES // 4])
    for rank in range(world_size):
        store = CountingStore(run.store)
        start = open_sharded(store, run.layout, record, rank=rank, world_size=world_size)
        assert differing(start) == []
        start.preload()
        start.verify_rest()
        again = Table(5000, torch.float32)
        nn.init.zeros_(again.embedding.weight)
        other = torch.optim.SGD(again.parameters(), momentum=0.5)
        items = tracked(again, other)
        items.restore(restored_values(start, [], optimizers=["optimizer"]))
        assert digest_of([again.state_dict(), other.state_dict()]) == digest_of(
            [model.state_dict(), optimizer.state_dict()]
        )
        # Where ranks share the rows, shares may meet within a block.
        assert start.is_resharded or store.read_twice() == 0


def test_a_row_that_differs_between_ranks_is_told() -> None:
    """By the name of its tensor; the other blocks are shared all the same."""
    run, (model, optimizer), (own, _) = MadeRun(), trained_table(), trained_table()
    with torch.no_grad():
        own.embedding.weight[-1] = 5
    states = [tracked(each, optimizer).capture() for each in (model, own)]
    record = two_ranks(run, *states)
    start = open_sharded(run.store, run.layout, record, rank=1, world_size=2)
    assert differing(start) == ["model.embedding.weight", "model.head.weight"]
    start.preload()
    values = restored_values(start, [])
    assert torch.equal(values["model"]["embedding.weight"], own.embedding.weight)


def test_nan_in_a_block_is_told_by_the_tensors_name() -> None:
    """However many blocks hold some."""
    model = nn.ModuleDict({"table": nn.Embedding(5000, 100)})
    torch.nn.init.constant_(model["table"].weight, float("nan"))
    items = TrackedItems(["model.table.weight"])
    items.add("model", model)
    captured = items.capture()
    buffer = memoryview(bytearray(sum(image.nbytes for image in captured.tensors)))
    offsets = [0]
    for image in captured.tensors[:-1]:
        offsets.append(offsets[-1] + image.nbytes)
    captured.copy_into(buffer, offsets)
    assert captured.find_nonfinite(buffer, offsets) == ["model.table.weight"]
