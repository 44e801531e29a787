"""Keeps credentials out of records, events, logs and registries."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping
from typing import Any

import msgspec

from ckpt_tasks.types import Scalar, finite_or_text

__all__ = [
    "MASK",
    "flatten_hyperparameters",
    "is_secret_name",
    "mask_hyperparameters",
    "mask_text",
    "mask_url",
]

MASK = "***"

_MAX_VALUE = 500
_MAX_INTEGER = 2**63

_USERINFO = re.compile(r"(?<=://)[^/?#]*@")
_QUERY_VALUE = re.compile(r"([?&;])([^=&;#\s]+)=([^&;#\s]*)")
_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")

_SECRET_WORDS = frozenset(
    [
        "apikey",
        "credential",
        "credentials",
        "passphrase",
        "passwd",
        "password",
        "pwd",
        "secret",
        "secrets",
        "sig",
        "signature",
    ]
)
_SECRET_PAIRS = frozenset(
    [("access", "key"), ("account", "key"), ("api", "key"), ("private", "key"), ("secret", "key")]
)
# Words that stand before "token" where it is a piece of text, not a credential.
_TEXT_TOKENS = frozenset(["bos", "class", "cls", "eos", "mask", "pad", "sep", "special", "unk"])


def is_secret_name(name: str) -> bool:
    """Whether a thing of this name is taken for a credential: ``api_key``, ``dbPassword``.

    ``max_tokens``, ``tokenizer`` and ``pad_token`` are not.
    """
    words = [word.lower() for word in _WORDS.findall(name)]
    pairs = itertools.pairwise(words)
    if _SECRET_WORDS.intersection(words) or _SECRET_PAIRS.intersection(pairs):
        return True
    return bool(words) and words[-1] == "token" and not _TEXT_TOKENS.intersection(words)


def mask_url(url: str) -> str:
    """`url` without its userinfo and without the values of secret-named query parameters.

    Anything that is not a URL comes back as it is.
    """
    if "://" not in url:
        return url
    masked = _USERINFO.sub(f"{MASK}@", url)
    return _QUERY_VALUE.sub(_mask_query_value, masked)


def _mask_query_value(match: re.Match[str]) -> str:
    separator, name, value = match.groups()
    return f"{separator}{name}={MASK if is_secret_name(name) else value}"


def mask_text(text: str) -> str:
    """Free text, with every URL in it masked."""
    # From "://" on, which is all that is masked: a search for what stands before it takes
    # quadratic time in a long text without spaces.
    return re.sub(r"://\S+", lambda match: mask_url(match[0]), text)


def mask_hyperparameters(hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
    """A copy with secret-named values, at any depth, and userinfo in URLs masked.

    ``None`` and booleans stay: they say that there is a secret, not what it is.
    """
    return {str(name): _mask_value(str(name), value) for name, value in hyperparameters.items()}


def _mask_value(name: str, value: Any) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if is_secret_name(name):
        return MASK
    if isinstance(value, Mapping):
        return mask_hyperparameters(value)
    if isinstance(value, list | tuple):
        return [_mask_value("", item) for item in value]
    return mask_text(value) if isinstance(value, str) else value


def flatten_hyperparameters(hyperparameters: Mapping[str, Any]) -> dict[str, Scalar]:
    """Hyperparameters as records and registries keep them: flat, short, and masked.

    Nested mappings are joined by ``.``, lists become JSON text, other objects their ``repr``;
    a text longer than 500 characters is cut, and says how much is missing.
    """
    flat: dict[str, Scalar] = {}
    _flatten_into(flat, "", mask_hyperparameters(hyperparameters))
    return flat


def _flatten_into(flat: dict[str, Scalar], prefix: str, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and value:
            _flatten_into(flat, f"{key}.", value)
        else:
            flat[key] = _scalar(value)


def _scalar(value: Any) -> Scalar:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int) and abs(value) < _MAX_INTEGER:
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else finite_or_text(value)
    text = value if isinstance(value, str) else _text(value)
    if len(text) > _MAX_VALUE:
        return f"{text[:_MAX_VALUE]}... [{len(text) - _MAX_VALUE} more characters]"
    return text


def _text(value: Any) -> str:
    if not isinstance(value, Mapping | list):
        return repr(value)
    try:
        return msgspec.json.encode(value, enc_hook=repr).decode()
    except (TypeError, ValueError, OverflowError):
        return repr(value)
