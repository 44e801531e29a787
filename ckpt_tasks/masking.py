"""Keeps credentials out of records, events, logs and registries.

What is one is told by its name, its place in a URL, or its value:

- `is_secret_name` knows the usual names; `[secrets] names` of the configuration adds to them, for
  the whole process: whoever shows anything in it masks by the same names.
- A value that stands under such a name is looked for in all text that is shown, while its training
  goes on (`hidden_values`): the message of an error of a client library may quote it.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any
from urllib.parse import unquote

import msgspec

from ckpt_tasks.types import Scalar, finite_or_text

__all__ = [
    "MASK",
    "add_secret_names",
    "flatten_hyperparameters",
    "hidden_values",
    "is_secret_name",
    "mask_hyperparameters",
    "mask_text",
    "mask_url",
    "mask_values",
]

MASK = "***"

_MAX_VALUE = 500
_MAX_INTEGER = 2**63

_LEAST_HIDDEN = 6  # characters; shorter values stand in too many texts that are none of theirs

_USERINFO = re.compile(r"(?<=://)[^/?#]*@")
# A password with a slash, which clients take: a colon with what is no port behind it.
_LOOSE_USERINFO = re.compile(r"(?<=://)[^/?#@\[\s]*:(?!\d*(?:[/?#]|$))[^@\s]*@")
_PARAMETER = re.compile(r"([?&;#])([^=&;#\s]+)=([^&;#\s]*)")
_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")

_SECRET_WORDS = frozenset(
    [
        "apikey",
        "apikeys",
        "auth",
        "authorization",
        "bearer",
        "credential",
        "credentials",
        "passphrase",
        "passwd",
        "password",
        "passwords",
        "pwd",
        "secret",
        "secrets",
        "sig",
        "signature",
    ]
)
_SECRET_PAIRS = frozenset(
    [
        ("access", "key"),
        ("access", "tokens"),
        ("account", "key"),
        ("api", "key"),
        ("api", "keys"),
        ("api", "tokens"),
        ("connection", "string"),
        ("encryption", "key"),
        ("private", "key"),
        ("secret", "key"),
        ("signing", "key"),
    ]
)
# Words that stand before "token" where it is a piece of text, not a credential.
_TEXT_TOKENS = frozenset(["bos", "class", "cls", "eos", "mask", "pad", "sep", "special", "unk"])

_added_names: set[str] = set()
_hidden: list[tuple[str, ...]] = []


def add_secret_names(names: Iterable[str]) -> None:
    """Take things of these names for credentials from now on, in this process.

    Parameters
    ----------
    names
        Patterns as the shell's, ``*_dsn``, without regard to case; one for nested values may be
        their whole name, ``database.host``.
    """
    _added_names.update(name.lower() for name in names)


@contextlib.contextmanager
def hidden_values(hyperparameters: Mapping[str, Any]) -> Iterator[None]:
    """Within the block, `mask_text` and `mask_values` mask what stands under secret names.

    Texts of at least six characters; in all threads of the process.
    """
    found = tuple(set(_secret_texts("", hyperparameters)))
    _hidden.append(found)
    try:
        yield
    finally:
        _hidden.remove(found)


def _secret_texts(name: str, value: Any, *, is_secret: bool = False) -> Iterator[str]:
    is_secret = is_secret or is_secret_name(name)
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _secret_texts(_joined(name, key), inner, is_secret=is_secret)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _secret_texts(name, inner, is_secret=is_secret)
    elif is_secret and isinstance(value, str) and len(value) >= _LEAST_HIDDEN:
        yield value


def _joined(name: str, key: object) -> str:
    return f"{name}.{key}" if name else str(key)


def is_secret_name(name: str) -> bool:
    """Whether a thing of this name is taken for a credential: ``api_key``, ``dbPassword``.

    ``max_tokens``, ``tokenizer`` and ``pad_token`` are not. Of a nested name, ``database.pwd``,
    each part counts.
    """
    names = [name.lower(), *name.lower().split(".")]
    if any(fnmatchcase(each, pattern) for pattern in _added_names for each in names):
        return True
    return any(_has_secret_words(part) for part in name.split("."))


def _has_secret_words(name: str) -> bool:
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
    masked = _LOOSE_USERINFO.sub(f"{MASK}@", masked)
    return _PARAMETER.sub(_mask_parameter, masked)


def _mask_parameter(match: re.Match[str]) -> str:
    separator, name, value = match.groups()
    return f"{separator}{name}={MASK if is_secret_name(unquote(name)) else value}"


def mask_text(text: str) -> str:
    """Free text, with every URL and every hidden value in it masked."""
    # From "://" on, which is all that is masked: a search for what stands before it takes
    # quadratic time in a long text without spaces.
    return mask_values(re.sub(r"://\S+", lambda match: mask_url(match[0]), text))


def mask_values(text: str) -> str:
    """Free text, with the values masked that `hidden_values` names now; URLs stay as they are."""
    # The longest first: one may be part of another.
    for value in sorted(itertools.chain(*_hidden), key=len, reverse=True):
        text = text.replace(value, MASK)
    return text


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
        return {str(key): _mask_value(_joined(name, key), inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_mask_value(name, item) for item in value]
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
