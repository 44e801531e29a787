"""Attempt folders that nobody removed, as all who would have were killed."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from pathlib import Path

import msgspec

from ckpt_tasks.fencing.process import process_is_alive
from ckpt_tasks.training.spec import FOLDER_PREFIX, AttemptFolder

__all__ = ["remove_leftovers"]


def remove_leftovers() -> None:
    """Remove this user's attempt folders whose processes are all known to be dead.

    What cannot be known from here stays: another machine's, another boot's, another container's.
    """
    for path in Path(tempfile.gettempdir()).glob(f"{FOLDER_PREFIX}*"):
        try:
            if _is_mine(path) and _is_abandoned(AttemptFolder(path)):
                shutil.rmtree(path, ignore_errors=True)
        except FileNotFoundError:
            continue  # another launch removes it at the same time


def _is_mine(path: Path) -> bool:
    status = path.lstat()
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()


def _is_abandoned(folder: AttemptFolder) -> bool:
    try:
        processes = folder.read_processes()
    except msgspec.DecodeError:
        return False
    return "launcher" in processes and all(
        process_is_alive(process) is False for process in processes.values()
    )
