"""Uploads of the attempts before this one, which nobody will complete.

No listing shows them, and an object store keeps their parts, which are paid for. Once a later
attempt is claimed, the fence refuses whatever an earlier one might still commit, and that one asks
the fence only when all its uploads are complete: so none under way can belong to a checkpoint.
"""

from __future__ import annotations

import math
import threading

from ckpt_tasks.errors import CkptTasksError
from ckpt_tasks.events import EventSink, Warned
from ckpt_tasks.format.layout import RunLayout
from ckpt_tasks.store.base import Store

__all__ = ["abort_interrupted"]


def abort_interrupted(
    store: Store, layout: RunLayout, attempt: int, on_event: EventSink
) -> threading.Thread | None:
    """Have them removed by a thread, so that nothing waits for a slow store.

    Parameters
    ----------
    attempt
        The one that has been claimed. What it uploads itself, or a later one does, stays.
    on_event
        Told where that failed: they stay until a collection.

    Returns
    -------
    threading.Thread or None
        ``None`` where there was no attempt before.
    """
    if attempt == 1:
        return None

    def is_earlier(path: str) -> bool:
        write = layout.write_of(path)
        return write is not None and write[0] < attempt

    def run() -> None:
        try:
            # Begun before the claim, or by a writer that does not know of it yet: of any age.
            store.abort_uploads(layout.data, -math.inf, chosen=is_earlier)
        except CkptTasksError as error:
            on_event(
                Warned(
                    message="uploads that earlier attempts may have left unfinished are not "
                    f"removed, `ckpt-tasks collect` does it later: {error}"
                )
            )

    thread = threading.Thread(target=run, name="uploads", daemon=True)
    thread.start()
    return thread
