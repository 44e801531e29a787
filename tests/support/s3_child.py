"""Child processes that write to S3: they are killed, or their memory is measured.

Run as a script: ``s3_child.py write CONFIG PATH BYTES`` or ``s3_child.py memory CONFIG BYTES
ONE_PIECE``.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec

from ckpt_tasks.config import StoreConfig
from ckpt_tasks.store import open_store, s3_upload

PART_BYTES, IN_FLIGHT = 5 * 1024 * 1024, 4
_PIECE_BYTES = 1024 * 1024


def write(config: str, path: str, size: str) -> None:
    """Write one object."""
    store = open_store(msgspec.json.decode(config, type=StoreConfig))
    store.write(path, [bytes(int(size))], int(size))


def memory(config: str, size: str, one_piece: str) -> None:
    """Print by how many bytes this process grows while it writes an object of zeros.

    Either from memory in one piece, made before, or from pieces that are made as they are asked
    for. Few and small parts are under way, so that what is needed beyond them shows.
    """
    s3_upload._PART_BYTES, s3_upload.CONNECTIONS = PART_BYTES, IN_FLIGHT
    store = open_store(msgspec.json.decode(config, type=StoreConfig))
    whole = bytearray(b"\1") * int(size) if one_piece == "True" else None
    store.write("run/data/w/first", _pieces(PART_BYTES + 1), PART_BYTES + 1)  # all code is loaded
    before = _peak()
    parts = _pieces(int(size)) if whole is None else [whole]
    store.write("run/data/w/second", parts, int(size))
    print(_peak() - before)


def _pieces(size: int) -> Iterator[bytes]:
    for start in range(0, size, _PIECE_BYTES):
        yield b"\1" * min(_PIECE_BYTES, size - start)


def _peak() -> int:
    """Not ``ru_maxrss``, which begins with that of the process that started this one."""
    status = Path("/proc/self/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) * 1024


if __name__ == "__main__":
    {"write": write, "memory": memory}[sys.argv[1]](*sys.argv[2:])
