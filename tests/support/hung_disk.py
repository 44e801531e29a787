"""A mounted file system that does not answer, as one on a network does whose server is away.

Whoever opens or makes something in it stands still in the kernel, and does not even die of SIGKILL,
until the file system is gone. Spoken is as little as that takes of FUSE's protocol: see
``linux/fuse.h`` and fuse(4).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import stat
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

_REQUEST = struct.Struct("<IIQQIIIHH")  # length, operation, id; whose it is
_ANSWER = struct.Struct("<IiQ")  # length, error, id
_INIT_OUT = struct.Struct("<4I2H2I2H8I")
_ATTR_OUT = struct.Struct("<QII6Q10I")
_GETATTR, _INIT = 3, 26
_VERSION = (7, 31)
_MOST_BYTES = 128 * 1024 + 4096
_FORCE, _DETACH = 1, 2  # of umount2(2); the first one answers whoever waits, with an error


class HungDisk:
    """Knows what it was asked and has not answered: the processes' ids."""

    def __init__(self, device: int) -> None:
        self._device = device
        self.waiting: list[int] = []
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):  # ENODEV: it is unmounted
            while True:
                request = os.read(self._device, _MOST_BYTES)
                _, operation, number, _, _, _, pid, _, _ = _REQUEST.unpack_from(request)
                if operation == _INIT:
                    body = _INIT_OUT.pack(*_VERSION, 0, 0, 8, 8, 64 * 1024, 1, *[0] * 10)
                    self._answer(number, body)
                elif operation == _GETATTR:
                    folder = stat.S_IFDIR | 0o755
                    attributes = (1, 0, 0, 0, 0, 0, 0, 0, 0, folder, 2, 0, 0, 0, 4096, 0)
                    self._answer(number, _ATTR_OUT.pack(3600, 0, 0, *attributes))
                else:
                    self.waiting.append(pid)

    def _answer(self, number: int, body: bytes) -> None:
        os.write(self._device, _ANSWER.pack(_ANSWER.size + len(body), 0, number) + body)


@contextlib.contextmanager
def hung_disk(path: Path) -> Iterator[HungDisk]:
    """Mount one over a folder; raises ``OSError`` where this user may not."""
    libc = ctypes.CDLL(None, use_errno=True)
    device = os.open("/dev/fuse", os.O_RDWR)
    try:
        options = f"fd={device},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()}"
        if libc.mount(b"hung", bytes(path), b"fuse", 0, options.encode()) != 0:
            raise OSError(ctypes.get_errno(), "cannot mount a file system of this process")
        disk = HungDisk(device)
        try:
            yield disk
        finally:
            libc.umount2(bytes(path), _FORCE)
            libc.umount2(bytes(path), _DETACH)
            disk.thread.join()
    finally:
        os.close(device)
