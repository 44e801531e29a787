"""Where checkpoints lie: a contract, its implementations, and how to open one by URL."""

from __future__ import annotations

from ckpt_tasks.store.ambiguity import create_once
from ckpt_tasks.store.base import ObjectInfo, Store, UploadInfo
from ckpt_tasks.store.open import open_existing_store, open_store

__all__ = [
    "ObjectInfo",
    "Store",
    "UploadInfo",
    "create_once",
    "open_existing_store",
    "open_store",
]
