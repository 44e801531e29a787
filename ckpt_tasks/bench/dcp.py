"""Asynchronous saves by torch.distributed.checkpoint (DCP)."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import _async_process_executor as executor
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, async_save

from ckpt_tasks.bench.dcp_failures import plain_failures
from ckpt_tasks.bench.peers import DCP_PROCESS, state_dicts
from ckpt_tasks.bench.places import Place
from ckpt_tasks.bench.processes import cpu_seconds
from ckpt_tasks.bench.training import AsyncSave, NotMeasuredError

__all__ = ["DcpProcess", "DcpThread"]

_END_SECONDS = 60.0  # for a thread that still writes, which nothing can end
_NAME = "peer-async.dcp"


class DcpThread(AsyncSave):
    """Copied, and written by a thread."""

    name = "DCP, thread"
    _kind = AsyncCheckpointerType.THREAD

    def __init__(self, place: Place, items: Mapping[str, Any]) -> None:
        self._place = place
        self._items = items
        self._future: Future[Any] | None = None

    def prepare(self, number: int) -> None:
        self._place.remove(_NAME)

    def begin(self, number: int) -> None:
        self._begin(state_dicts(self._items))

    def is_done(self) -> bool:
        assert self._future is not None
        if not self._future.done():
            return False
        self._result(0.0)
        return True

    def stop(self) -> None:
        """Waits for what is under way."""
        try:
            if self._future is not None:
                with contextlib.suppress(NotMeasuredError):  # told already
                    self._result(_END_SECONDS)
        finally:
            self._place.remove(_NAME)

    def _begin(self, state: dict[str, Any]) -> None:
        try:
            with plain_failures():
                response: Any = async_save(
                    state,
                    storage_writer=self._place.dcp_writer(_NAME),
                    async_checkpointer_type=self._kind,
                    no_dist=self._kind is AsyncCheckpointerType.THREAD,
                )
        except Exception as error:
            raise NotMeasuredError(_words(error)) from error
        self._future = getattr(response, "upload_completion", response)

    def _result(self, timeout: float) -> None:
        assert self._future is not None
        try:
            with plain_failures():
                self._future.result(timeout)
        except FutureTimeoutError:
            raise NotMeasuredError(f"no answer in {timeout:.0f} s") from None
        except Exception as error:
            raise NotMeasuredError(_words(error)) from error


class DcpProcess(DcpThread):
    """Copied, sent to a process, and written there.

    Parameters
    ----------
    scratch
        A folder for what that process says.
    limit
        Seconds in which it must have started.

    Raises
    ------
    NotMeasuredError
        It has not, or could not be.
    """

    name = DCP_PROCESS
    _kind = AsyncCheckpointerType.PROCESS

    def __init__(
        self, place: Place, items: Mapping[str, Any], *, scratch: Path, limit: float
    ) -> None:
        super().__init__(place, items)
        self._others = {child.pid for child in multiprocessing.active_children()}
        distributed: Any = dist  # it does not say that it exports HashStore
        store = distributed.HashStore()
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        try:
            self._start(scratch / "dcp.log", limit)
        except BaseException:
            self.stop()
            raise

    def helper_cpu_seconds(self) -> float:
        return cpu_seconds(child.pid for child in self._children() if child.pid is not None)

    def stop(self) -> None:
        # What waits for the process, even for its start, ends with it.
        for child in self._children():
            child.kill()
            child.join()
        try:
            super().stop()
        finally:
            executor._CHECKPOINT_PROCESS = None  # else the dead one would be asked by the next save
            if dist.is_initialized():
                dist.destroy_process_group()

    def _start(self, log: Path, limit: float) -> None:
        """A first save, of next to nothing: it starts the process."""
        # Its name may not resolve, and a process that waits for itself to be reached never tells.
        with _loopback(), _stderr_to(log):
            self._begin({"x": torch.zeros(1)})
            self._result(limit)

    def _children(self) -> list[Any]:
        return [c for c in multiprocessing.active_children() if c.pid not in self._others]


@contextlib.contextmanager
def _loopback() -> Iterator[None]:
    before = os.environ.get("MASTER_ADDR")
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    try:
        yield
    finally:
        del os.environ["MASTER_ADDR"]
        if before is not None:
            os.environ["MASTER_ADDR"] = before


@contextlib.contextmanager
def _stderr_to(log: Path) -> Iterator[None]:
    """For a child that is started meanwhile, which logs every step that it takes."""
    before = os.dup(2)
    try:
        with log.open("ab") as file:
            os.dup2(file.fileno(), 2)
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)


def _words(error: BaseException) -> str:
    """The first line of an error that says something."""
    said = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {said}".rstrip(": ")
