"""Finding and parsing the source of a module without importing it, or its parents."""

from __future__ import annotations

import ast
import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from ckpt_tasks.errors import ConfigError

__all__ = ["Source", "find_spec", "interpreter_path", "read_source"]

_PRINT_PATH = "import json, sys; print(json.dumps(sys.path[1:]))"


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """A parsed module: its file, its dotted name, and whether it is a package."""

    path: Path
    module: str
    is_package: bool
    tree: ast.Module


def interpreter_path(python: str) -> list[str]:
    """The folders in which another interpreter looks for modules.

    Raises
    ------
    ConfigError
        `python` cannot be run.
    """
    try:
        answer = subprocess.run(
            [python, "-c", _PRINT_PATH], check=True, capture_output=True, text=True, timeout=60
        )
        return [str(folder) for folder in json.loads(answer.stdout)]
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise ConfigError(f"cannot run the interpreter {python!r}: {error}") from error


def read_source(entrypoint: str, path: Path, module: str) -> Source:
    """Parse a file. Raises `ConfigError`, naming `entrypoint`, when that is impossible."""
    try:
        tree = ast.parse(path.read_bytes(), filename=str(path))
    except OSError as error:
        raise ConfigError(
            f"entry point {entrypoint!r}: cannot read {path}: {error.strerror}"
        ) from error
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None)
        where = f"{path}:{line}" if line else str(path)
        what = error.msg if isinstance(error, SyntaxError) else error
        raise ConfigError(f"entry point {entrypoint!r}: {where}: {what}") from error
    return Source(path, module, path.name == "__init__.py", tree)


def find_spec(module: str, folders: Sequence[str]) -> ModuleSpec | None:
    """Like `importlib.util.find_spec`, which imports the parents of a module, without that."""
    spec: ModuleSpec | None = None
    name = ""
    for part in module.split("."):
        name = f"{name}.{part}" if name else part
        if spec is None:
            found = PathFinder.find_spec(name, [*folders, *sys.path]) or _find_by_hooks(name, None)
        elif spec.submodule_search_locations is None:
            return None
        else:
            inside = list(spec.submodule_search_locations)
            found = PathFinder.find_spec(name, inside) or _find_by_hooks(name, inside)
        if found is None:
            return None
        spec = found
    return spec


def _find_by_hooks(name: str, path: list[str] | None) -> ModuleSpec | None:
    """Ask the other finders, which serve editable installations and zip files."""
    for finder in sys.meta_path:
        if finder is not PathFinder:
            found = finder.find_spec(name, path)
            if found is not None:
                return found
    return None
