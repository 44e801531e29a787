"""A file system of its own: small, or read-only."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path


class SmallDisk:
    """A mounted tmpfs."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def fill(self, *, leaving: int) -> None:
        """Occupy all but `leaving` bytes with something that is not the store's."""
        free = shutil.disk_usage(self.path).free
        with self._ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, free - leaving)

    def make_room(self) -> None:
        """Remove what `fill` has put there."""
        self._ballast.unlink()

    @property
    def _ballast(self) -> Path:
        return self.path / "ballast"

    def remount(self, options: str) -> None:
        """Change its options: ``ro``, ``rw``."""
        subprocess.run(["mount", "-o", f"remount,{options}", self.path], check=True)


@contextlib.contextmanager
def small_disk(path: Path, *, size: int) -> Iterator[SmallDisk]:
    """Mount a tmpfs of `size` bytes; raises ``OSError`` where this user may not."""
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise OSError(f"cannot mount a small disk: {done.stderr.strip()}")
    try:
        yield SmallDisk(path)
    finally:
        subprocess.run(["umount", "--lazy", path], check=True)
