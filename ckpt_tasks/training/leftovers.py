"""Attempts whose processes were all killed but for one: what they left, and what goes on still."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from ckpt_tasks.fencing.process import process_is_alive
from ckpt_tasks.training.spec import FOLDER_PREFIX, AttemptFolder, TrainSpec

__all__ = ["remove_leftovers", "wait_for_writers"]

_POLL_SECONDS = 0.05


def remove_leftovers() -> None:
    """Remove this user's attempt folders whose processes are all known to be dead.

    What cannot be known from here stays: another machine's, another boot's, another container's.
    """
    for folder in _folders():
        if _is_abandoned(folder):
            shutil.rmtree(folder.path, ignore_errors=True)


def wait_for_writers(spec: TrainSpec) -> None:
    """Wait until a dead attempt's writer, on this machine, has written what it was given.

    A claim would come before its commit, and that work would be done again. No longer than the
    grace, though, which is what a save may take.
    """
    deadline = time.monotonic() + spec.config.attempt.grace
    for folder in _folders():
        while _writes_alone(folder, spec) and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)


def _folders() -> Iterator[AttemptFolder]:
    for path in Path(tempfile.gettempdir()).glob(f"{FOLDER_PREFIX}*"):
        try:
            if _is_mine(path):
                yield AttemptFolder(path)
        except FileNotFoundError:
            continue  # another launch removes it at the same time


def _writes_alone(folder: AttemptFolder, spec: TrainSpec) -> bool:
    """Whether all of an attempt of this run are dead, but its writer."""
    try:
        if not folder.has_live_writer():
            return False
        theirs = folder.read_spec()
    except (FileNotFoundError, msgspec.DecodeError):
        return False
    same_run = (theirs.run, theirs.config.store) == (spec.run, spec.config.store)
    return same_run and not folder.has_live_trainer()


def _is_mine(path: Path) -> bool:
    status = path.lstat()
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()


def _is_abandoned(folder: AttemptFolder) -> bool:
    try:
        processes = folder.read_processes()
    except (FileNotFoundError, msgspec.DecodeError):
        return False
    return "launcher" in processes and all(
        process_is_alive(process) is False for process in processes.values()
    )
