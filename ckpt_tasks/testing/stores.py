"""Contract tests of a store: an implementation subclasses them and brings its own helpers.

Example
-------
::

    class TestMyStore(StoreTests):
        @pytest.fixture
        def store(self, tmp_path):
            return MyStore(tmp_path)

        def set(self, store, path, data):
            (store.root / path).parent.mkdir(parents=True, exist_ok=True)
            (store.root / path).write_bytes(data)

        def get(self, store, path):
            return (store.root / path).read_bytes()
"""

from __future__ import annotations

import mmap
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from ckpt_tasks.errors import (
    ConfigError,
    CorruptCheckpointError,
    ObjectExistsError,
    ObjectNotFoundError,
    StoreError,
)
from ckpt_tasks.store.ambiguity import create_once
from ckpt_tasks.store.base import Store

__all__ = ["StoreTests"]

HOSTILE_PATHS = ["../x", "a/../../x", "/x", "a//b", "", ".", "a/./b", "a/", "a\\b", "a\0b"]


class StoreTests(ABC):
    """What every store must do. Subclasses give a fixture `store`, empty at the start."""

    racers: int = 8
    """Threads that create one object at once."""
    rounds: int = 5
    """Races."""

    @abstractmethod
    def set(self, store: Store, path: str, data: bytes) -> None:
        """Put an object where `store` finds it, **without** `store`."""

    @abstractmethod
    def get(self, store: Store, path: str) -> bytes:
        """The object that `store` has put at `path`, read without it."""

    def reopen(self, store: Store) -> Store:
        """The same store opened again, as another process would."""
        return store

    def test_reads_the_whole_object(self, store: Store) -> None:
        """`read` returns exactly the bytes that lie there, an empty object's too."""
        self.set(store, "run/some", b"\x00\xff bytes")
        self.set(store, "run/empty", b"")
        assert store.read("run/some") == b"\x00\xff bytes"
        assert store.read("run/empty") == b""
        assert isinstance(store.read("run/some"), bytes)

    def test_missing_object_is_told_apart(self, store: Store) -> None:
        """What is not there raises `ObjectNotFoundError` that names the path, or is no error."""
        for ask in (store.read, store.size):
            with pytest.raises(ObjectNotFoundError, match="run/missing"):
                ask("run/missing")
        with pytest.raises(ObjectNotFoundError, match="run/missing"):
            store.read_range("run/missing", 0, 1)
        assert not store.exists("run/missing")
        store.delete("run/missing")

    def test_folder_is_no_object(self, store: Store) -> None:
        """A path that only leads to objects is not one itself."""
        self.set(store, "run/folder/x", b"x")
        assert not store.exists("run/folder")
        with pytest.raises(ObjectNotFoundError):
            store.read("run/folder")
        with pytest.raises(ObjectNotFoundError):
            store.size("run/folder")

    def test_object_is_no_folder(self, store: Store) -> None:
        """Nothing lies below an object."""
        self.set(store, "run/x", b"x")
        assert not store.exists("run/x/y")
        assert store.list_objects("run/x/") == []
        assert store.list_folders("run/x/") == []

    def test_limit_is_kept(self, store: Store) -> None:
        """`read` refuses an object larger than `limit`, and reads one of exactly that size."""
        self.set(store, "run/x", b"12345")
        assert store.read("run/x", limit=5) == b"12345"
        with pytest.raises(CorruptCheckpointError, match="5 bytes"):
            store.read("run/x", limit=4)

    @pytest.mark.parametrize(("start", "stop"), [(0, 5), (0, 1), (2, 4), (4, 5), (0, 0), (5, 5)])
    def test_range_is_exact(self, store: Store, start: int, stop: int) -> None:
        """`read_range` returns bytes `start` to `stop`, exclusive."""
        self.set(store, "run/x", b"01234")
        assert store.read_range("run/x", start, stop) == b"01234"[start:stop]

    @pytest.mark.parametrize(("start", "stop"), [(0, 5), (0, 1), (2, 4), (4, 5), (0, 0), (5, 5)])
    @pytest.mark.parametrize("room", [0, 3, 4096])
    def test_range_is_read_into_memory(
        self, store: Store, start: int, stop: int, room: int
    ) -> None:
        """`read_into` puts the same bytes at the beginning of a buffer, which may have room."""
        self.set(store, "run/x", b"01234")
        buffer = bytearray(stop - start + room)
        store.read_into("run/x", start, stop, memoryview(buffer))
        assert buffer[: stop - start] == b"01234"[start:stop]

    def test_large_range_is_read_into_pages(self, store: Store) -> None:
        """Whole pages in aligned memory, which stores may read in another way."""
        size = 3 * 1024 * 1024 + 5
        content = b"".join(number.to_bytes(4, "little") for number in range(-(-size // 4)))[:size]
        store.write("run/data/w1/x", [content], size)
        buffer = memoryview(mmap.mmap(-1, 3 * 1024 * 1024))
        start = 1024 * 1024
        store.read_into("run/data/w1/x", start, size, buffer[: -(-(size - start) // 4096) * 4096])
        assert buffer[: size - start] == content[start:]
        buffer.release()

    def test_short_object_fills_no_memory(self, store: Store) -> None:
        """`read_into` beyond the object's end raises, as does a missing object."""
        self.set(store, "run/x", b"01234")
        buffer = memoryview(mmap.mmap(-1, 2 * 1024 * 1024))
        for stop in (6, 2 * 1024 * 1024):
            with pytest.raises(CorruptCheckpointError, match="5 bytes"):
                store.read_into("run/x", 0, stop, buffer)
        with pytest.raises(ObjectNotFoundError, match="run/missing"):
            store.read_into("run/missing", 0, 1, buffer)
        buffer.release()

    @pytest.mark.parametrize("content", [b"", b"01234"])
    def test_mapped_object_is_a_private_copy(self, store: Store, content: bytes) -> None:
        """`map` gives all bytes, or nothing; what is written to them stays in this process."""
        self.set(store, "run/x", content)
        mapped = store.map("run/x")
        if mapped is None:
            return
        assert (bytes(mapped), mapped.readonly) == (content, False)
        mapped[:] = bytes(len(content))
        assert self.get(store, "run/x") == content
        with pytest.raises(ObjectNotFoundError, match="run/missing"):
            store.map("run/missing")

    @pytest.mark.parametrize(("start", "stop"), [(0, 6), (4, 9), (5, 6), (8, 9), (9, 9)])
    def test_short_object_is_damage(self, store: Store, start: int, stop: int) -> None:
        """`read_range` beyond the object's end raises instead of returning less."""
        self.set(store, "run/x", b"01234")
        with pytest.raises(CorruptCheckpointError, match="5 bytes"):
            store.read_range("run/x", start, stop)

    def test_create_makes_the_object(self, store: Store) -> None:
        """`create` makes an object, in folders that need not exist, even an empty one."""
        store.create("run/commits/new.json", b"record")
        store.create("run/commits/empty", b"")
        assert self.get(store, "run/commits/new.json") == b"record"
        assert self.get(store, "run/commits/empty") == b""

    def test_create_never_overwrites(self, store: Store) -> None:
        """`create` raises `ObjectExistsError` where there is an object, and leaves it alone."""
        self.set(store, "run/x", b"first")
        with pytest.raises(ObjectExistsError, match="run/x"):
            store.create("run/x", b"second")
        assert self.get(store, "run/x") == b"first"

    def test_one_of_many_creates_wins(self, store: Store) -> None:
        """Of many that create one object at once, exactly one does, and its bytes stand."""
        if not store.supports_conditional_create:
            pytest.skip("this store declares that it has no conditional create")
        for number in range(self.rounds):
            path = f"run/attempts/{number:04d}.json"
            winners = self._race(store.create, path)
            assert len(winners) == 1
            assert self.get(store, path) == winners[0]

    def test_create_once_has_one_winner(self, store: Store) -> None:
        """`create_once` tells exactly one of many that the object is its own."""
        if not store.supports_conditional_create:
            pytest.skip("this store declares that it has no conditional create")

        def claim(path: str, name: bytes) -> None:
            if not create_once(store, path, name):
                raise ObjectExistsError(path)

        owners = self._race(claim, "run/claim.json")
        assert len(owners) == 1
        assert self.get(store, "run/claim.json") == owners[0]

    def _race(self, create: Callable[[str, bytes], None], path: str) -> list[bytes]:
        """Let threads create `path` with their names, at once; returns those that did."""
        start = threading.Barrier(self.racers)

        def run(name: bytes) -> bytes | None:
            start.wait()
            try:
                create(path, name)
            except ObjectExistsError:
                return None
            return name

        with ThreadPoolExecutor(self.racers) as pool:
            names = [f"racer {number}".encode() for number in range(self.racers)]
            return [name for name in pool.map(run, names) if name is not None]

    def test_put_overwrites(self, store: Store) -> None:
        """`put` makes an object, and replaces it by a shorter or a longer one."""
        for data in (b"one", b"1", b"one and one", b""):
            store.put("run/attempts/0001.heartbeat", data)
            assert self.get(store, "run/attempts/0001.heartbeat") == data

    def test_put_is_whole_for_readers(self, store: Store) -> None:
        """A reader beside a writer sees one or the other value, never a mixture or nothing."""
        values = [bytes([digit]) * 50_000 for digit in b"ab"]
        store.put("run/beat", values[0])
        done = threading.Event()

        def read_all() -> set[bytes]:
            seen = set()
            while not done.is_set():
                seen.add(store.read("run/beat"))
            return seen

        with ThreadPoolExecutor(1) as pool:
            seen = pool.submit(read_all)
            try:
                for number in range(20):
                    store.put("run/beat", values[number % 2])
            finally:
                done.set()
            assert seen.result() <= set(values)

    def test_write_joins_parts(self, store: Store) -> None:
        """`write` joins bytes-like parts of any size, made while it writes, in their order."""
        parts = [b"head", bytearray(b"-body-"), memoryview(b"xxtailxx")[2:6], b"", b"!" * 70_000]

        def lazily() -> Iterator[object]:
            yield from parts

        whole = b"".join(bytes(part) for part in parts)
        store.write("run/data/w1/m.safetensors", lazily(), len(whole))
        assert self.get(store, "run/data/w1/m.safetensors") == whole
        assert store.size("run/data/w1/m.safetensors") == len(whole)

    def test_write_takes_nothing_for_an_empty_object(self, store: Store) -> None:
        """`write` of no bytes makes an empty object."""
        store.write("run/data/w1/empty", [], 0)
        assert self.get(store, "run/data/w1/empty") == b""

    def test_write_takes_other_items_than_bytes(self, store: Store) -> None:
        """A part may be a buffer of other items than bytes: it counts by its bytes."""
        numbers = memoryview(bytes(range(16))).cast("I")
        store.write("run/data/w1/x", [numbers], 16)
        assert self.get(store, "run/data/w1/x") == bytes(range(16))

    def test_write_never_overwrites(self, store: Store) -> None:
        """`write` raises `ObjectExistsError` where there is an object, and leaves it alone."""
        self.set(store, "run/data/w1/x", b"first")
        with pytest.raises(ObjectExistsError, match="run/data/w1/x"):
            store.write("run/data/w1/x", [b"second"], 6)
        assert self.get(store, "run/data/w1/x") == b"first"

    @pytest.mark.parametrize("size", [0, 4, 6])
    def test_write_of_another_size_fails(self, store: Store, size: int) -> None:
        """Parts that do not add up to `size` raise, and leave no object."""
        with pytest.raises(StoreError):
            store.write("run/data/w1/x", [b"123", b"45"], size)
        assert not store.exists("run/data/w1/x")

    def test_failing_parts_leave_nothing(self, store: Store) -> None:
        """An error raised while parts are made comes through, and no object is left."""

        def broken() -> Iterator[bytes]:
            yield b"half"
            raise KeyError("the rest")

        with pytest.raises((KeyError, StoreError)):
            store.write("run/data/w1/x", broken(), 8)
        assert store.list_objects("") == []

    def test_replace_makes_an_object_or_takes_its_place(self, store: Store) -> None:
        """`replace` writes whether or not there is an object."""
        first, second = [bytes([i]) * 3_000_000 for i in range(6)], [b"second"]
        for parts in (first, second):
            whole = b"".join(parts)
            store.replace("run/data/w1/x", iter(parts), len(whole))
            assert self.get(store, "run/data/w1/x") == whole
        with pytest.raises(StoreError):
            store.replace("run/data/w2/x", [b"12345"], 6)
        assert [info.path for info in store.list_objects("")] == ["run/data/w1/x"]

    def test_ended_writes_leave_nothing_to_abort(self, store: Store) -> None:
        """`abort_uploads` finds no write that has ended, well or not, and touches no object."""
        store.write("run/data/w1/x", [b"12345"], 5)
        with pytest.raises(StoreError):
            store.write("run/data/w2/x", [b"12345"], 6)
        assert store.abort_uploads("run/", older_than=0) == []
        assert store.abort_uploads("", older_than=0) == []
        assert store.list_uploads("", older_than=0) == []
        assert self.get(store, "run/data/w1/x") == b"12345"

    def test_nothing_is_cached(self, store: Store) -> None:
        """What another writer makes or replaces is seen at once by every way of asking."""
        assert not store.exists("run/commits/x")
        assert store.list_objects("run/commits/") == []
        assert store.list_folders("") == []
        self.set(store, "run/commits/x", b"1")
        assert store.exists("run/commits/x")
        assert [info.path for info in store.list_objects("run/commits/")] == ["run/commits/x"]
        assert store.list_folders("") == ["run"]
        assert store.read("run/commits/x") == b"1"
        self.set(store, "run/commits/x", b"22")
        assert store.size("run/commits/x") == 2
        assert store.read("run/commits/x") == b"22"

    def test_lists_recursively_and_sorted(self, store: Store) -> None:
        """`list_objects` finds all depths, in order of path, with sizes and sane times."""
        for path in ("run/b/2", "run/a", "run/b/1/x", "other/z", "run b/q"):
            self.set(store, path, path.encode())
        found = store.list_objects("run/")
        assert [info.path for info in found] == ["run/a", "run/b/1/x", "run/b/2"]
        assert [info.size for info in found] == [5, 9, 7]
        assert all(info.modified is None or info.modified > 1e9 for info in found)
        everything = [info.path for info in store.list_objects("")]
        assert everything == sorted(everything)
        assert len(everything) == 5

    def test_prefix_is_a_folder(self, store: Store) -> None:
        """A listing of ``run/`` does not show ``run2/``, nor an object named ``run``'s like."""
        self.set(store, "run/a", b"")
        self.set(store, "run2/a", b"")
        assert [info.path for info in store.list_objects("run/")] == ["run/a"]
        assert store.list_folders("") == ["run", "run2"]

    def test_lists_direct_folders(self, store: Store) -> None:
        """`list_folders` names direct subfolders only, sorted, and no objects."""
        for path in ("run/data/w2/x", "run/data/w1/x", "run/data/w1/deep/y", "run/data/file"):
            self.set(store, path, b"")
        assert store.list_folders("run/data/") == ["w1", "w2"]
        assert store.list_folders("run/data/w2/") == []
        assert store.list_folders("nothing/") == []

    def test_delete_removes_one_object(self, store: Store) -> None:
        """`delete` removes the object and nothing else; a folder without objects is gone."""
        self.set(store, "run/data/w1/x", b"")
        self.set(store, "run/data/w2/x", b"")
        store.delete("run/data/w1/x")
        assert not store.exists("run/data/w1/x")
        assert store.list_folders("run/data/") == ["w2"]
        store.create("run/data/w1/x", b"again")
        assert self.get(store, "run/data/w1/x") == b"again"

    @pytest.mark.parametrize("name", ["%20%2F", "%2E%2E", "a%C3%BC-_.json", "x" * 180, "#?&"])
    def test_odd_names_stay_as_they_are(self, store: Store, name: str) -> None:
        """Percent signs and other marks in a path are plain text, never decoded."""
        store.create(f"{name}/run.json", b"1")
        assert store.read(f"{name}/run.json") == b"1"
        assert store.list_folders("") == [name]
        assert [info.path for info in store.list_objects("")] == [f"{name}/run.json"]

    @pytest.mark.parametrize("path", HOSTILE_PATHS)
    def test_hostile_paths_are_refused(self, store: Store, path: str) -> None:
        """A path that is not plain and relative is refused before anything is opened."""
        asks: list[Callable[[str], object]] = [
            store.read,
            store.exists,
            store.size,
            store.delete,
            lambda path: store.read_range(path, 0, 0),
            lambda path: store.create(path, b""),
            lambda path: store.put(path, b""),
            lambda path: store.list_objects(f"{path}/"),
            lambda path: store.list_folders(f"{path}/"),
        ]
        for ask in asks:
            with pytest.raises(ConfigError):
                ask(path)
        with pytest.raises(ConfigError):
            store.write(path, [], 0)

    def test_opens_again(self, store: Store) -> None:
        """What was written is there for whoever opens the store afterwards."""
        store.create("run/run.json", b"identity")
        again = self.reopen(store)
        assert again.url == store.url
        assert again.read("run/run.json") == b"identity"
        with pytest.raises(ObjectExistsError):
            again.create("run/run.json", b"other")
