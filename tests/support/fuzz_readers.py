"""Gives every reader of stored bytes what an attacker might have stored.

``python tests/support/fuzz_readers.py [--executions N | --seconds S] [--seed SEED] [--memory MIB]``

Ends with 1 where a reader raised what it does not announce, took more than a few seconds of the
processor, or more memory than allowed; prints the seed that shows it again, and a summary.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import msgspec
from support.made_ranks import commit_ranks, part_of_rank, plain, sharded, shared
from support.made_runs import MadeRun, State, Tensor, memory_store
from support.mutations import dump, hostile_name, mutated_bytes, mutated_json, parse

from ckpt_tasks.checkpointer.catalog import list_runs, view_run
from ckpt_tasks.checkpointer.files import list_files, list_tensors
from ckpt_tasks.checkpointer.lazy import open_checkpoint
from ckpt_tasks.checkpointer.marks import list_marks, mark, read_completed, read_mark
from ckpt_tasks.checkpointer.reader import load_checkpoint, read_commit
from ckpt_tasks.checkpointer.sharded_reader import open_sharded
from ckpt_tasks.checkpointer.verify import state_digest, verify_checkpoint
from ckpt_tasks.errors import CkptTasksError, CorruptCheckpointError
from ckpt_tasks.fencing.attempts import read_attempts
from ckpt_tasks.fencing.heartbeat import read_heartbeat
from ckpt_tasks.fencing.lineage import trace_lineage
from ckpt_tasks.format import codec
from ckpt_tasks.format.blocks import Part
from ckpt_tasks.format.digest import digest
from ckpt_tasks.format.layout import RunLayout, check_relative, decode_name, encode_name
from ckpt_tasks.format.records import (
    LineageEntry,
    PromotionRecord,
    Record,
    RegistryRunIds,
    ResumedRecord,
    RowBlocks,
    TailRecord,
)
from ckpt_tasks.format.safetensors import parse_header
from ckpt_tasks.format.sharded import ShardedLeaves
from ckpt_tasks.format.tree import decode_tree, encode_tree
from ckpt_tasks.recovery.recover import preview_recovery
from ckpt_tasks.replica import copy
from ckpt_tasks.retention import collect
from ckpt_tasks.store.base import Store
from ckpt_tasks.training.registration.promotions import find_lost, record_promotion
from ckpt_tasks.types import CheckpointId

LONGEST = 10.0
"""Seconds of the processor that nothing may take, on the slowest machine."""

Announced = tuple[type[BaseException], ...]
Try = Callable[[], object]


class ReaderError(Exception):
    """A reader did what it must not; the cause says what."""


def refused_by(call: Try, announced: Announced = (CkptTasksError,)) -> bool:
    """Whether a reader refuses; all else that it raises is a failure."""
    try:
        call()
    except announced:
        return True
    except Exception as error:
        raise ReaderError(f"{type(error).__name__}: {str(error)[:300]}") from error
    return False


def sealed(body: str) -> bytes:
    """A record whose checksum is right."""
    text = body.rstrip().removesuffix("}").encode("utf-8", "surrogatepass")
    return text + codec._SEAL % digest(text).encode()


def fields_of(data: bytes) -> Any:
    members = parse(data)
    return type(members)(each for each in members if each[0] != "checksum")


class Stored:
    """A run in memory whose objects can be replaced, and what reads it."""

    def __init__(self) -> None:
        self.run = MadeRun(memory_store(), "digits/ü 1")
        attempt = self.run.begin()
        table = [
            Tensor("table", f"t[{n}:{n + 1}]", bytes([n] * 8), extents=(1, 8), is_block=True)
            for n in range(2)
        ]
        split = RowBlocks(key="t", position=1, count=2)
        trees = {"model": {"w": plain(0)}, "table": plain(1), "loop": many_kinds()}
        state = State(trees, [Tensor("model", "w", b"weights" * 9), *table], row_blocks=[split])
        saved = attempt.save(4, state, metrics={"loss": 0.5})
        newest = attempt.save(8, state)
        self.run.fail(1, step=9)
        mark(self.run.store, self.run.layout, "pins", saved, why="for the paper", by="ada")
        mark(self.run.store, self.run.layout, "quarantined", newest, why="bad", by="attempt 2")
        self.run.complete(str(saved))
        ids = RegistryRunIds(
            tracking_uri="http://m",
            experiment_id="7",
            experiment="e",
            run_id="0",
            registered_model="m",
        )
        self.run.store.put(self.run.layout.registry_ids("mlflow"), codec.encode(ids))
        promotion = PromotionRecord(
            uid=self.run.identity.uid,
            checkpoint=str(saved),
            alias="paper",
            registry="mlflow",
            registered_model="m",
            model_id="m-1",
            at="2026-01-01T00:00:00.000Z",
        )
        record_promotion(self.run.store, self.run.layout, promotion)
        self._elsewhere = memory_store()
        self.checkpoints = [saved, newest]
        self.objects = self.run.contents()

    def restore(self) -> None:
        """Nothing of what was tried is left."""
        for info in self._elsewhere.list_objects(""):
            self._elsewhere.delete(info.path)
        for info in self.run.store.list_objects(""):
            if info.path not in self.objects:
                self.run.store.delete(info.path)
        for path, data in self.objects.items():
            self.run.store.put(path, data)

    def replace(self, path: str, data: bytes) -> None:
        """With the digests that name it set right."""
        self.run.store.put(path, data)
        for commit in self.checkpoints:
            self._name_anew(self.run.layout.commit(commit), path, data)

    def _name_anew(self, commit: str, path: str, data: bytes) -> None:
        record = msgspec.json.decode(self.objects[commit])
        for ref in record["indexes"]:
            index = self.run.layout.in_run(ref["path"])
            content = data if index == path else self.run.store.read(index)
            if path.endswith(".safetensors"):
                content = self._index_with(content, path, data)
                self.run.store.put(index, content)
            ref.update(size=len(content), digest=digest(content))
        del record["checksum"]
        if commit != path:
            self.run.store.put(commit, sealed(msgspec.json.encode(record).decode()))

    def _index_with(self, content: bytes, path: str, data: bytes) -> bytes:
        index = msgspec.json.decode(content)
        del index["checksum"]
        for file in index["files"]:
            if self.run.layout.in_run(file["path"]) == path:
                header = min(8 + int.from_bytes(data[:8], "little"), len(data))
                file.update(size=len(data), header_size=header, header_digest=digest(data[:header]))
        return sealed(msgspec.json.encode(index).decode())

    def read_all(self) -> None:
        """By every reader that there is, of which each may refuse."""
        store, layout, name = self.run.store, self.run.layout, self.run.name
        for call in (
            lambda: view_run(store, name),
            lambda: list_runs(store),
            lambda: trace_lineage(read_attempts(store, layout)).valid(self.checkpoints),
            lambda: preview_recovery(
                store, layout, self.run.identity, read_attempts(store, layout)
            ),
            lambda: list_marks(store, layout),
            lambda: read_completed(store, layout),
            lambda: read_heartbeat(store, layout, 1),
            lambda: read_mark(store, layout, "pins", self.checkpoints[0]),
            lambda: find_lost(store, layout, "mlflow", {str(self.checkpoints[0]): None}),
            lambda: collect(store, name, grace=1.0, by="fuzz", dry_run=True),
            lambda: copy(store, self._elsewhere, name),
        ):
            refused_by(call)
        for checkpoint in self.checkpoints:
            read_checkpoint(store, layout, checkpoint)


def read_checkpoint(store: Store, layout: RunLayout, checkpoint: CheckpointId) -> None:
    """In each of the ways to look at one."""
    refused_by(lambda: verify_checkpoint(store, layout.run, checkpoint))
    refused_by(lambda: state_digest(store, layout.run, checkpoint))
    with contextlib.suppress(CkptTasksError):
        record = read_commit(store, layout, checkpoint)
        for call in (
            lambda: load_checkpoint(store, layout, record),
            lambda: list_files(store, layout, record),
            lambda: list_tensors(store, layout, record),
            lambda: open_sharded(store, layout, record, rank=1, world_size=2).preload(),
            lambda: {k: list(v) for k, v in open_checkpoint(store, layout, record).items()},
        ):
            refused_by(call)


def many_kinds() -> Any:
    """One of everything that a tree spells."""
    value = [
        {1: (2, None), "b": True}, OrderedDict(a=1), Counter("aab"), {3, 4}, frozenset("x"),
        deque([1], 3), 2**80, -0.0, float("nan"), float("inf"), 1 + 2j, b"\x00", bytearray(b"x"),
        "\ud800", range(1, 9, 2), slice(1, None), {"$": "v"}, "text",
    ]  # fmt: skip
    return encode_tree(value, path=("loop",), leaf=lambda value, path: None)


class Ranks:
    """Trees of two ranks with sharded tensors, in one store."""

    def __init__(self) -> None:
        self.run = MadeRun()
        shape, data = (4, 6), bytes(range(24))
        parts = [Part((0, 0), (2, 6)), Part((2, 0), (2, 6))]
        tensors = [part_of_rank("model", "w", data, shape, part) for part in parts]
        both = Tensor("model", "b", b"both")
        self.states = [
            State({"model": {"w": sharded(shape, parts[0], 0), "b": plain(1)}}, [tensors[0], both]),
            State({"model": {"w": sharded(shape, parts[1], 0), "b": plain(1)}}, [tensors[1]]),
        ]
        self.checkpoint = commit_ranks(self.run, self.states, [[], [shared(1, both)]])
        self.trees = [parse(msgspec.json.encode(state.trees)) for state in self.states]


class Fuzzer:
    """What is tried, by name."""

    def __init__(self) -> None:
        self._stored = Stored()
        self._ranks = Ranks()
        self._commit = self._ranks.run.layout.commit(self._ranks.checkpoint)
        self._record_samples = self._samples()
        self._headers = [
            data for path, data in self._stored.objects.items() if path.endswith(".safetensors")
        ]
        self.targets = {
            "record": self.record,
            "header": self.header,
            "tree": self.tree,
            "sharded": self.sharded,
            "name": self.name,
            "store": self.store,
            "listing": self.listing,
            "attempts": self.attempts,
            "ranks": self.ranks,
        }

    def _samples(self) -> list[tuple[type[Record], bytes]]:
        found: list[tuple[type[Record], bytes]] = []
        tail = codec.encode(TailRecord(attempt=2, kept_at=1e9, rows=[("loss", 0.5, 41, 1000)]))
        contents = {**self._stored.objects, **self._ranks.run.contents(), "tail": tail}
        for data, kind in itertools.product(contents.values(), Record.__subclasses__()):
            with contextlib.suppress(CkptTasksError):
                codec.decode(data, kind, path="sample")
                found.append((kind, data))
        assert {kind for kind, _ in found} == set(Record.__subclasses__())
        return found

    def mutated_record(self, data: bytes, draw: random.Random) -> bytes:
        if draw.randrange(4) == 0:
            return mutated_bytes(data, draw)
        body = dump(mutated_json(fields_of(data), draw))
        if draw.randrange(4) == 0:
            wild = mutated_bytes(body.encode("utf-8", "surrogatepass"), draw)
            return sealed(wild.decode("latin-1"))
        return sealed(body)

    def record(self, draw: random.Random) -> bool:
        kind, data = draw.choice(self._record_samples)
        mutated = self.mutated_record(data, draw)
        return refused_by(lambda: codec.decode(mutated, kind, path="x"), (CkptTasksError,))

    def header(self, draw: random.Random) -> bool:
        data = draw.choice(self._headers)
        length = int.from_bytes(data[:8], "little")
        text = dump(mutated_json(parse(data[8 : 8 + length]), draw)).encode("utf-8", "replace")
        if draw.randrange(4) == 0:
            text = mutated_bytes(text, draw)
        header = len(text).to_bytes(8, "little") + text
        return refused_by(lambda: parse_header(header), (ValueError,))

    def tree(self, draw: random.Random) -> bool:
        text = dump(mutated_json(parse(msgspec.json.encode(many_kinds())), draw))
        try:
            node = msgspec.json.decode(text.encode("utf-8", "replace"))
        except (msgspec.MsgspecError, RecursionError, ValueError):
            return True
        return refused_by(
            lambda: decode_tree(node, leaf=lambda tag, value: (tag, repr(value)[:99])),
            (CorruptCheckpointError,),
        )

    def sharded(self, draw: random.Random) -> bool:
        trees = list(self._ranks.trees)
        place = draw.randrange(2)
        text = dump(mutated_json(trees[place], draw))
        try:
            given = msgspec.json.decode(text.encode("utf-8", "replace"), type=dict[str, Any])
        except (msgspec.MsgspecError, RecursionError, ValueError):
            return True
        both: list[Any] = [msgspec.json.decode(dump(tree)) for tree in trees]
        both[place] = given

        def put_together() -> None:
            leaves = ShardedLeaves(both, lambda rank, position: (2, 6))
            for tree in both:
                for name, node in tree.items():
                    leaves.numbered(name, node)

        return refused_by(put_together, (CorruptCheckpointError,))

    def name(self, draw: random.Random) -> bool:
        text = hostile_name(draw)
        layout = RunLayout("run")
        layout.attempt_number(text)
        layout.checkpoint_id(text)
        layout.write_of(text)
        layout.tracked_name(text, 0)
        calls: list[Try] = [
            lambda: CheckpointId.parse(text),
            lambda: decode_name(text),
            lambda: check_relative(text),
            lambda: decode_name(encode_name(text)),
        ]
        return sum(refused_by(call, (ValueError,)) for call in calls) > 0

    def store(self, draw: random.Random) -> bool:
        """One object of a run is another."""
        path = draw.choice(sorted(self._stored.objects))
        data = self._stored.objects[path]
        if path.endswith(".safetensors"):
            mutated = mutated_bytes(data, draw)
        else:
            mutated = self.mutated_record(data, draw)
        self._stored.replace(path, mutated)
        try:
            self._stored.read_all()
        finally:
            self._stored.restore()
        return True

    def listing(self, draw: random.Random) -> bool:
        """There are objects that are none of the run's."""
        folder = draw.choice(("", "attempts/", "commits/", "marks/", "marks/pins/", "data/x/"))
        name = hostile_name(draw).encode("utf-8", "replace").decode()
        data = draw.choice(sorted(self._stored.objects.values()))
        try:
            with contextlib.suppress(CkptTasksError):  # no path of a store
                self._stored.run.store.put(f"{self._stored.run.layout.folder}{folder}{name}", data)
            self._stored.read_all()
        finally:
            self._stored.restore()
        return True

    def attempts(self, draw: random.Random) -> bool:
        """Attempts are said to have started from one another, each under some number."""
        run = self._stored.run
        claim = run.store.read(run.layout.attempt(1))
        try:
            for number in range(2, 2 + draw.randrange(1, 5)):
                lineage = _lineage(draw)
                resumed = ResumedRecord(
                    attempt=lineage[0].attempt,
                    checkpoint=lineage[0].resumed_from,
                    lineage=lineage,
                    why="fuzz",
                    resumed_at="2026-01-01T00:00:00.000Z",
                )
                run.store.put(run.layout.attempt(number), claim)
                run.store.put(run.layout.resumed(number), codec.encode(resumed))
            self._stored.read_all()
        finally:
            self._stored.restore()
        return True

    def ranks(self, draw: random.Random) -> bool:
        """An index of a checkpoint of two ranks is another."""
        run = self._ranks.run
        commit = run.store.read(self._commit)
        record = msgspec.json.decode(commit)
        ref = draw.choice(record["indexes"])
        path = run.layout.in_run(ref["path"])
        index = run.store.read(path)
        mutated = self.mutated_record(index, draw)
        ref.update(size=len(mutated), digest=digest(mutated))
        del record["checksum"]
        run.store.put(path, mutated)
        run.store.put(self._commit, sealed(msgspec.json.encode(record).decode()))
        try:
            read_checkpoint(run.store, run.layout, self._ranks.checkpoint)
        finally:
            run.store.put(path, index)
            run.store.put(self._commit, commit)
        return True


def _lineage(draw: random.Random) -> list[LineageEntry]:
    """One that is valid by itself."""
    chain = sorted(draw.sample(range(1, 8), draw.randrange(1, 5)), reverse=True)
    starts = [CheckpointId(4 * n, n, draw.randrange(1, 3)) for n in chain[1:]]
    last = CheckpointId(4, chain[-1] - 1, 1) if draw.randrange(2) and chain[-1] > 1 else None
    return [
        LineageEntry(attempt=number, resumed_from=str(start) if start else None)
        for number, start in zip(chain, [*starts, last], strict=True)
    ]


WEIGHTS = {
    "record": 12,
    "header": 6,
    "tree": 6,
    "sharded": 4,
    "name": 4,
    "store": 2,
    "ranks": 2,
    "attempts": 1,
    "listing": 1,  # each takes a hundred times as long
}


def one(fuzzer: Fuzzer, seed: int, number: int) -> tuple[str, bool, float]:
    """One execution: what was tried, whether it was refused, and its seconds."""
    draw = random.Random(f"{seed}/{number}")  # noqa: S311 - no secret
    name = draw.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
    start = time.process_time()
    signal.setitimer(signal.ITIMER_PROF, LONGEST)
    try:
        refused = fuzzer.targets[name](draw)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return name, refused, time.process_time() - start


def _too_long(*_: object) -> None:
    raise ReaderError(f"took more than {LONGEST:g} s of the processor")


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--executions", type=int, default=sys.maxsize)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first execution")
    parser.add_argument("--memory", type=int, default=2048, help="MiB of addresses, in all")
    asked = parser.parse_args()
    limit = asked.memory * 1024 * 1024
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    tempfile.tempdir = tempfile.mkdtemp()
    signal.signal(signal.SIGPROF, _too_long)
    fuzzer = Fuzzer()
    tried: Counter[str] = Counter()
    refused = crashes = 0
    longest, slowest = 0.0, 0
    start = time.monotonic()
    for number in range(asked.first, asked.first + asked.executions):
        if time.monotonic() - start > asked.seconds:
            break
        try:
            name, was_refused, seconds = one(fuzzer, asked.seed, number)
        except Exception as error:
            crashes += 1
            print(f"crash: --seed {asked.seed} --first {number} --executions 1: {error}")
            traceback.print_exception(error.__cause__ or error, limit=-6)
            if crashes == 20:
                break
            continue
        tried[name] += 1
        refused += was_refused
        longest, slowest = max((longest, slowest), (seconds, number))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(
        f"fuzz: {tried.total()} executions in {time.monotonic() - start:.1f} s "
        f"({', '.join(f'{name} {count}' for name, count in sorted(tried.items()))}), "
        f"{refused} refused, {crashes} crashes; the longest {longest:.2f} s (number {slowest}), "
        f"{peak} MiB at most"
    )
    return 1 if crashes else 0


if __name__ == "__main__":
    sys.exit(main())
