"""Names and values as MLflow accepts them.

What MLflow takes unchanged stays as it is. What it refuses is changed, and then carries eight
digits of the original's digest, so that two names never become one. The limits are those of
``mlflow/utils/validation.py`` and of the columns in ``mlflow/store``.
"""

from __future__ import annotations

import posixpath
import re

from ckpt_tasks.format.digest import digest

__all__ = ["alias", "key", "registered_model", "text_value"]

MAX_KEY = 220  # of 250, with room for a prefix
MAX_TAG = 5000  # of a registered version, the shortest limit; a run's tag may have 8000
MAX_PARAM = 6000

_MAX_ALIAS = 200
_MAX_MODEL_NAME = 250
_DIGITS = 8

_NOT_IN_KEY = re.compile(r"[^/\w.\- :]")
_NOT_IN_ALIAS = re.compile(r"[^A-Za-z0-9_-]")
_NOT_IN_MODEL_NAME = re.compile(r"[/:\x00-\x1f\x7f]")
_RESERVED_ALIAS = re.compile(r"latest|v\d+", re.IGNORECASE | re.ASCII)


def key(name: str) -> str:
    """`name` as the key of a metric, a param or a tag."""
    cleaned = _NOT_IN_KEY.sub("_", name)
    if not cleaned or posixpath.normpath(cleaned) != cleaned or cleaned.startswith((".", "/")):
        # MLflow's file store made paths of keys, and the rule outlived it.
        cleaned = "_" + cleaned.replace("/", "_").lstrip(".")
    return _told_apart(name, cleaned, MAX_KEY)


def alias(name: str) -> str:
    """`name` as an alias of a registered model; ``latest`` and ``v<N>`` are MLflow's own."""
    cleaned = _NOT_IN_ALIAS.sub("_", name)
    if not cleaned or _RESERVED_ALIAS.fullmatch(cleaned):
        cleaned = f"{cleaned}_"
    return _told_apart(name, cleaned, _MAX_ALIAS)


def registered_model(name: str) -> str:
    """`name` as that of a registered model."""
    cleaned = _NOT_IN_MODEL_NAME.sub("-", name).strip() or "checkpoints"
    if cleaned == "." or cleaned.startswith("..") or posixpath.normpath(cleaned) != cleaned:
        cleaned = f"model-{cleaned.replace('.', '-')}"
    if len(cleaned) <= _MAX_MODEL_NAME:
        return cleaned
    return _told_apart(name, cleaned, _MAX_MODEL_NAME)


def text_value(value: object, limit: int) -> str:
    """`value` as text of at most `limit` characters; two different texts stay different."""
    text = str(value)
    if len(text) <= limit:
        return text
    end = f"... [{len(text)} characters, digest {_digits(text)}]"
    return text[: limit - len(end)] + end


def _told_apart(original: str, cleaned: str, limit: int) -> str:
    if cleaned == original and len(cleaned) <= limit:
        return cleaned
    return f"{cleaned[: limit - _DIGITS - 1]}-{_digits(original)}"


def _digits(text: str) -> str:
    return digest(text.encode("utf-8", "surrogatepass"))[:_DIGITS]
