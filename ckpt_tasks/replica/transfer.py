"""One file from one store to another, verified on the way.

A file goes through in pieces, in order, while the next ones are read. Each piece is fed to the
digests of the chunks that it touches, and the last one is handed on only when all of them were
right: so a file that is whole in the target is one that was verified.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from blake3 import blake3

from ckpt_tasks.checkpointer.memory import fresh_memory
from ckpt_tasks.checkpointer.windows import check_header, chunks_of, missing
from ckpt_tasks.errors import CorruptCheckpointError, ObjectNotFoundError
from ckpt_tasks.format.records import FileEntry, TensorEntry
from ckpt_tasks.store.base import Store

__all__ = ["PIECE_BYTES", "WantedFile", "copy_file", "is_whole"]

PIECE_BYTES = 8 * 1024 * 1024
"""Also a part of an upload to S3, which then is sent from where it was read to."""

_AHEAD = 2  # pieces of a file that are read while another is written
_PAGE = 4096


class WantedFile(NamedTuple):
    """A file of tensors, and those of them by which it is verified.

    Parameters
    ----------
    entry
        Its path is relative to the run's folder.
    tensors
        Bytes of the file that belong to none of them are copied as they are: no record that is
        copied refers to them.
    """

    entry: FileEntry
    tensors: list[TensorEntry]


def copy_file(source: Store, target: Store, path: str, file: WantedFile) -> None:
    """Put a verified copy at the same path in the target, in the place of what is there.

    Memory is bounded by a few pieces in the source's hands, and those that the target sends.

    Parameters
    ----------
    path
        From the root of either store.

    Raises
    ------
    CorruptCheckpointError
        A byte, the header or the size is not what was committed. Nothing has changed.
    StoreError
        One of the stores failed.
    """
    check_header(source, path, file.entry, file.tensors)
    target.replace(path, _verified(source, path, file), file.entry.size)


def is_whole(store: Store, path: str, file: WantedFile) -> bool:
    """Whether a file is there with exactly the bytes that were committed; reads all of it."""
    try:
        check_header(store, path, file.entry, file.tensors)
        deque(_verified(store, path, file), maxlen=0)
    except CorruptCheckpointError:
        return False
    return True


def _verified(store: Store, path: str, file: WantedFile) -> Iterator[memoryview]:
    checks = _Checks(path, file)
    stop = 0
    for piece in _pieces(store, path, file.entry.size):
        checks.feed(stop, piece)
        stop += piece.nbytes
        yield piece


def _pieces(store: Store, path: str, size: int) -> Iterator[memoryview]:
    """A file from its first byte to its last, read ahead. Each piece is memory of its own, as who
    sends it may hold it for long.
    """
    reading: deque[Future[memoryview]] = deque()
    pool = ThreadPoolExecutor(_AHEAD, thread_name_prefix="copy-read")
    try:
        for start in range(0, size, PIECE_BYTES):
            stop = min(start + PIECE_BYTES, size)
            reading.append(pool.submit(_read, store, path, start, stop))
            if len(reading) > _AHEAD:
                yield reading.popleft().result()
        while reading:
            yield reading.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _read(store: Store, path: str, start: int, stop: int) -> memoryview:
    buffer = fresh_memory(-(-(stop - start) // _PAGE) * _PAGE)
    try:
        store.read_into(path, start, stop, buffer)
    except ObjectNotFoundError as error:
        raise missing(store, path) from error
    return buffer[: stop - start]


class _Span(NamedTuple):
    """Bytes of a file under one digest, and what they are, for people."""

    start: int
    stop: int
    digest: str
    what: str


class _Checks:
    """The digests of a file's header and chunks, computed while its bytes pass by in order.

    Chunks need not end where pieces do, and two tensors may name the same bytes.
    """

    def __init__(self, path: str, file: WantedFile) -> None:
        self._path = path
        self._pending = deque(sorted(_spans(file)))
        self._open: list[tuple[_Span, blake3]] = []

    def feed(self, start: int, data: memoryview) -> None:
        """Take the next bytes, from `start` on; every span that ends in them is compared."""
        stop = start + data.nbytes
        while self._pending and self._pending[0].start < stop:
            self._open.append((self._pending.popleft(), blake3()))
        still_open = []
        for span, hasher in self._open:
            hasher.update(data[max(0, span.start - start) : min(data.nbytes, span.stop - start)])
            if span.stop > stop:
                still_open.append((span, hasher))
            elif hasher.hexdigest() != span.digest:
                raise CorruptCheckpointError(
                    f"{self._path} is damaged: {span.what} has digest {hasher.hexdigest()}, "
                    f"committed was {span.digest}"
                )
        self._open = still_open


def _spans(file: WantedFile) -> Iterator[_Span]:
    entry = file.entry
    yield _Span(0, entry.header_size, entry.header_digest, "its header")
    for tensor in file.tensors:
        for chunk in chunks_of(0, tensor):
            what = f"chunk {chunk.number} of tensor {tensor.key!r}"
            yield _Span(chunk.start, chunk.stop, tensor.chunks[chunk.number], what)
