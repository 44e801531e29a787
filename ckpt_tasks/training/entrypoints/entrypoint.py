"""Training functions by name: ``MODULE:FUNCTION`` or ``path/to/file.py:FUNCTION``.

`read_signature` and `check_params` find mistakes before anything is started, without importing
the user's module; `load_entrypoint` imports it, in the trainer.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.util
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType, UnionType
from typing import Any, Union, get_args, get_origin

import msgspec

from ckpt_tasks.errors import ConfigError
from ckpt_tasks.masking import MASK, is_secret_name
from ckpt_tasks.suggest import did_you_mean
from ckpt_tasks.training.entrypoints.signature import (
    EntrypointSignature,
    FunctionNode,
    Hyperparameter,
    find_definition,
    signature_of,
    toplevel_names,
)
from ckpt_tasks.training.entrypoints.source import Source, find_spec, read_source

__all__ = [
    "Entrypoint",
    "EntrypointSignature",
    "Hyperparameter",
    "check_params",
    "load_entrypoint",
    "parse_entrypoint",
    "read_signature",
]

_MODULE = re.compile(r"[^\W\d]\w*(?:\.[^\W\d]\w*)*")
_NULLS = ("null", "none")
_MISTAKES: dict[Any, str] = {
    int: " is no integer",
    float: " is no number",
    bool: " is neither true nor false",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Entrypoint:
    """A parsed entry point; exactly one of `module` and `file` is set."""

    text: str
    module: str | None
    file: Path | None
    function: str


def parse_entrypoint(text: str) -> Entrypoint:
    """Take ``MODULE:FUNCTION`` or ``FILE.py:FUNCTION`` apart. Raises `ConfigError`."""
    target, separator, function = text.rpartition(":")
    if not separator or not target or not function.isidentifier():
        raise ConfigError(
            f"entry point {text!r} does not name a function; write MODULE:FUNCTION or "
            "path/to/file.py:FUNCTION"
        )
    if target.endswith(".py"):
        return Entrypoint(text, None, Path(target), function)
    if not _MODULE.fullmatch(target):
        raise ConfigError(
            f"entry point {text!r}: {target!r} is no module name; write MODULE:FUNCTION "
            "(dots, no slashes) or path/to/file.py:FUNCTION"
        )
    return Entrypoint(text, target, None, function)


def read_signature(
    entrypoint: str,
    *,
    folders: Sequence[str] | None = None,
    search_path: Sequence[str] = (),
) -> EntrypointSignature:
    """What a training function takes, read from its source; nothing is imported.

    Parameters
    ----------
    entrypoint
        ``MODULE:FUNCTION`` or ``FILE.py:FUNCTION``.
    folders
        Where the training's code lies: a file's path is relative to the first of them that has
        it, and modules are looked for there first. Default: the working directory.
    search_path
        Further folders in which modules are looked for before ``sys.path``.

    Raises
    ------
    ConfigError
        No such module, file or function, or it is no plain function that takes a run.
    """
    parsed = parse_entrypoint(entrypoint)
    own = list(folders or [os.getcwd()])
    source = _find_source(parsed, own, search_path)
    node, source = _find_function(parsed, source, [*own, *search_path])
    signature = signature_of(node, entrypoint)
    if not signature.takes_run:
        raise ConfigError(
            f"{entrypoint}: {node.name} takes no positional parameter; its first one is the "
            f"run: def {node.name}(run, ...)"
        )
    return signature


def _find_source(parsed: Entrypoint, folders: list[str], search_path: Sequence[str]) -> Source:
    if parsed.file is not None:
        file = _find_file(parsed, folders)
        return read_source(parsed.text, file, file.stem)
    module = parsed.module or ""
    spec = find_spec(module, [*folders, *search_path])
    if spec is None:
        raise ConfigError(
            f"entry point {parsed.text!r}: there is no module {module!r} in "
            f"{', '.join([*folders, *search_path])} or on Python's path"
        )
    if spec.origin is None or not spec.origin.endswith(".py"):
        raise ConfigError(
            f"entry point {parsed.text!r}: module {module!r} has no Python source to read"
        )
    return read_source(parsed.text, Path(spec.origin), module)


def _find_file(parsed: Entrypoint, folders: Sequence[str]) -> Path:
    for folder in folders:
        found = Path(folder, parsed.file or "")
        if found.is_file():
            return found
    raise ConfigError(
        f"entry point {parsed.text!r}: there is no file {parsed.file} in {' or '.join(folders)}"
    )


def _find_function(
    parsed: Entrypoint, source: Source, folders: list[str]
) -> tuple[FunctionNode, Source]:
    """The definition, through one ``from MODULE import FUNCTION`` where there is one."""
    node = find_definition(source.tree, parsed.function)
    name = parsed.function
    if isinstance(node, ast.ImportFrom):
        name = next(alias.name for alias in node.names if (alias.asname or alias.name) == name)
        imported = _find_imported(parsed, node, source, folders)
        if imported is not None:
            source = imported
            node = find_definition(source.tree, name)
    if isinstance(node, ast.FunctionDef):
        return node, source
    if node is None:
        names = [found for found in toplevel_names(source.tree) if not found.startswith("_")]
        hint = did_you_mean(name, names, what="functions there")
        raise ConfigError(
            f"entry point {parsed.text!r}: {source.path} has no function {name!r}; {hint}"
        )
    raise ConfigError(
        f"entry point {parsed.text!r}: {name!r} in {source.path}, line {node.lineno}, is not "
        "defined there by a plain 'def', so its hyperparameters cannot be read; name the module "
        "that defines it, or wrap it: def train(run, ...): ..."
    )


def _find_imported(
    parsed: Entrypoint, node: ast.ImportFrom, source: Source, folders: list[str]
) -> Source | None:
    module = node.module or ""
    if node.level:
        parents = source.module.split(".")
        keep = len(parents) - node.level + (1 if source.is_package else 0)
        module = ".".join([*parents[:keep], *([module] if module else [])])
    spec = find_spec(module, [str(source.path.parent), *folders]) if module else None
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return None
    return read_source(parsed.text, Path(spec.origin), module)


def check_params(
    signature: EntrypointSignature, params: Mapping[str, Any], *, text: bool = False
) -> dict[str, Any]:
    """The hyperparameters as the function's annotations want them.

    Parameters
    ----------
    signature
        From `read_signature`.
    params
        Values by name. A text is read as the annotation asks: ``"3e-4"`` for a float,
        ``"[1, 2]"`` for a list, ``"none"`` for ``None``.
    text
        Whether the values were typed on a command line: then one for a parameter of unknown
        type is read as JSON, where it is JSON.

    Raises
    ------
    ConfigError
        An unknown name, a missing one, or a value of the wrong type.
    """
    known = {parameter.name: parameter for parameter in signature.hyperparameters}
    for name in params:
        if name not in known and not signature.accepts_any:
            hint = did_you_mean(name, known, what="hyperparameters")
            raise ConfigError(f"{signature.entrypoint} has no hyperparameter {name!r}; {hint}")
    missing = [name for name, parameter in known.items() if parameter.required]
    missing = [name for name in missing if name not in params]
    if missing:
        raise ConfigError(
            f"{signature.entrypoint} needs {', '.join(missing)}; pass it: -p {missing[0]}=VALUE"
        )
    return {
        name: _convert(signature, known.get(name, Hyperparameter(name=name)), value, text)
        for name, value in params.items()
    }


def _convert(
    signature: EntrypointSignature, parameter: Hyperparameter, value: Any, text: bool
) -> Any:
    kind = parameter.annotation
    if kind is Any:
        return _json_or_text(value) if text and isinstance(value, str) else value
    try:
        if not isinstance(value, str):
            return msgspec.convert(value, kind)
        return msgspec.convert(_read_text(value, kind), kind, strict=False)
    except msgspec.MsgspecError as error:
        shown = MASK if is_secret_name(parameter.name) else repr(value)
        why = _MISTAKES.get(kind) or f": {error}"
        raise ConfigError(
            f"{signature.entrypoint}: hyperparameter {parameter.name} = {shown}{why}"
        ) from error


def _read_text(value: str, kind: Any) -> Any:
    members = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    if str in members:
        return value
    if type(None) in members and value.lower() in _NULLS:
        return None
    containers = (dict, list, tuple)
    if any(member in containers or get_origin(member) in containers for member in members):
        return msgspec.json.decode(value)
    return value


def _json_or_text(value: str) -> Any:
    try:
        return msgspec.json.decode(value)
    except msgspec.DecodeError:
        return value


def load_entrypoint(entrypoint: str, *, folders: Sequence[str] | None = None) -> Callable[..., Any]:
    """Import the training function. Runs the user's module; for the trainer only.

    A file's folder, or the folders for a module, are put on Python's path first, as
    ``python FILE`` and ``python -m MODULE`` do.

    Parameters
    ----------
    entrypoint, folders
        As `read_signature` takes them.

    Raises
    ------
    ConfigError
        No such module, file or function, it cannot be called, or the module raised while it
        was imported (the message names where).
    """
    parsed = parse_entrypoint(entrypoint)
    own = list(folders or [os.getcwd()])
    _put_on_path(own)
    module = _import_file(parsed, own) if parsed.file is not None else _import_module(parsed)
    function = getattr(module, parsed.function, None)
    if function is None:
        names = [name for name, value in vars(module).items() if callable(value)]
        names = [name for name in names if not name.startswith("_")]
        hint = did_you_mean(parsed.function, names, what="functions there")
        raise ConfigError(
            f"entry point {entrypoint!r}: {module.__name__} has no {parsed.function!r}; {hint}"
        )
    if not callable(function):
        raise ConfigError(
            f"entry point {entrypoint!r}: {parsed.function} is a "
            f"{type(function).__name__}, not a function"
        )
    return function  # type: ignore[no-any-return]


def _import_module(parsed: Entrypoint) -> ModuleType:
    name = parsed.module or ""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise ConfigError(
                f"entry point {parsed.text!r}: there is no module {error.name!r} on Python's "
                f"path ({sys.executable}, working directory {os.getcwd()})"
            ) from error
        raise _import_failed(parsed, error) from error
    except (Exception, SystemExit) as error:
        raise _import_failed(parsed, error) from error


def _import_file(parsed: Entrypoint, folders: Sequence[str]) -> ModuleType:
    path = _find_file(parsed, folders).resolve()
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"entry point {parsed.text!r}: {path} is no Python file")
    _put_on_path([str(path.parent)])
    module = importlib.util.module_from_spec(spec)
    # Pickling by loader workers looks the module up by its name.
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[spec.name]
        raise _import_failed(parsed, error) from error
    return module


def _put_on_path(folders: list[str]) -> None:
    sys.path[:] = [*folders, *(folder for folder in sys.path if folder not in folders)]


def _import_failed(parsed: Entrypoint, error: BaseException) -> ConfigError:
    if isinstance(error, SyntaxError):
        where, what = f"{error.filename}:{error.lineno}", error.msg
    else:
        frames = traceback.extract_tb(error.__traceback__)
        outside = [frame for frame in frames if "importlib" not in frame.filename]
        last = (outside or list(frames))[-1]
        where, what = f"{last.filename}:{last.lineno} in {last.name}", str(error)
    return ConfigError(
        f"entry point {parsed.text!r}: importing it raised {type(error).__name__}: {what} ({where})"
    )
