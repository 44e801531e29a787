"""A training function's hyperparameters, read from its source without running it.

Importing the module would load torch, and run a user's code in the orchestrator's process.
"""

from __future__ import annotations

import ast
import dataclasses
import json
from collections.abc import Iterator
from typing import Any, Literal, Union

from ckpt_tasks.training.entrypoints.docstrings import describe_parameters, summary_of

__all__ = [
    "EntrypointSignature",
    "FunctionNode",
    "Hyperparameter",
    "find_definition",
    "resolve_annotation",
    "signature_of",
    "toplevel_names",
]

_PLAIN_TYPES: dict[str, Any] = {
    "Any": Any,
    "None": type(None),
    "bool": bool,
    "float": float,
    "int": int,
    "object": Any,
    "str": str,
}
_CONTAINERS: dict[str, Any] = {
    "Dict": dict,
    "List": list,
    "Mapping": dict,
    "Sequence": list,
    "Tuple": tuple,
    "dict": dict,
    "list": list,
    "tuple": tuple,
}

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Hyperparameter:
    """One parameter of a training function behind the run.

    Parameters
    ----------
    name
        As it is passed.
    annotation
        Its type, made of ``int``, ``float``, ``str``, ``bool``, ``None``, ``Literal``, unions,
        lists, dicts and tuples of these; else ``Any``. Without an annotation, the type of a
        plain default.
    required
        Whether it has no default.
    default
        Its default where `default_known`.
    default_known
        False where there is no default, or one that only running the code would tell, or that
        JSON cannot hold.
    description
        From the docstring, on one line.
    """

    name: str
    annotation: Any = Any
    required: bool = True
    default: Any = None
    default_known: bool = False
    description: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EntrypointSignature:
    """What a training function takes.

    Parameters
    ----------
    entrypoint
        As it was asked for.
    function
        The function's name.
    summary
        First paragraph of its docstring, on one line.
    hyperparameters
        In the order of the definition, without the run.
    accepts_any
        Whether it takes ``**kwargs`` too.
    takes_run
        Whether there is a first positional parameter for the run.
    """

    entrypoint: str
    function: str
    summary: str
    hyperparameters: tuple[Hyperparameter, ...]
    accepts_any: bool
    takes_run: bool


def toplevel_names(tree: ast.Module) -> Iterator[str]:
    """Names of the functions that a module defines, also under ``if`` and ``try``."""
    for node in _statements(tree.body):
        if isinstance(node, FunctionNode):
            yield node.name


def find_definition(tree: ast.Module, name: str) -> ast.stmt | None:
    """The last statement of a module that binds `name`: a definition, import or assignment."""
    found = None
    for node in _statements(tree.body):
        if name in _bound_names(node):
            found = node
    return found


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for node in body:
        if isinstance(node, ast.If | ast.Try | ast.With):
            yield from _statements(node.body)
            yield from _statements(getattr(node, "orelse", []))
            for handler in getattr(node, "handlers", []):
                yield from _statements(handler.body)
        else:
            yield node


def _bound_names(node: ast.stmt) -> set[str]:
    if isinstance(node, FunctionNode | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {alias.asname or alias.name for alias in node.names}
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return {target.id for target in targets if isinstance(target, ast.Name)}


def signature_of(node: FunctionNode, entrypoint: str) -> EntrypointSignature:
    """Read the signature of a function's definition."""
    docstring = ast.get_docstring(node) or ""
    descriptions = describe_parameters(docstring)
    arguments = node.args
    positional = [*arguments.posonlyargs, *arguments.args]
    first_default = len(positional) - len(arguments.defaults)
    pairs: list[tuple[ast.arg, ast.expr | None]] = [
        (argument, arguments.defaults[index - first_default] if index >= first_default else None)
        for index, argument in enumerate(positional)
    ]
    pairs = pairs[1:] + list(zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True))
    return EntrypointSignature(
        entrypoint=entrypoint,
        function=node.name,
        summary=summary_of(docstring),
        hyperparameters=tuple(
            _hyperparameter(argument, default, descriptions.get(argument.arg, ""))
            for argument, default in pairs
        ),
        accepts_any=arguments.kwarg is not None,
        takes_run=bool(positional),
    )


def _hyperparameter(
    argument: ast.arg, default: ast.expr | None, description: str
) -> Hyperparameter:
    known, value = _literal(default)
    annotation = resolve_annotation(argument.annotation)
    if argument.annotation is None and isinstance(value, bool | int | float | str):
        annotation = type(value)
    if not _is_json(value):
        # Forms and records hold JSON; a set, say, would come back as something else.
        known, value = False, None
    return Hyperparameter(
        name=argument.arg,
        annotation=annotation,
        required=default is None,
        default=value,
        default_known=known,
        description=description,
    )


def _literal(node: ast.expr | None) -> tuple[bool, Any]:
    if node is None:
        return False, None
    try:
        return True, ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return False, None


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


def resolve_annotation(node: ast.expr | None) -> Any:
    """The type that an annotation spells, or ``Any`` where that is not a plain one."""
    if isinstance(node, ast.Constant):
        return _resolve_constant(node.value)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _union([resolve_annotation(node.left), resolve_annotation(node.right)])
    if isinstance(node, ast.Name | ast.Attribute):
        name = _last_name(node)
        return _PLAIN_TYPES.get(name, _CONTAINERS.get(name, Any))
    if isinstance(node, ast.Subscript):
        return _resolve_subscript(_last_name(node.value), node.slice)
    return Any


def _resolve_constant(value: object) -> Any:
    if value is None:
        return type(None)
    if not isinstance(value, str):
        return Any
    try:
        return resolve_annotation(ast.parse(value, mode="eval").body)
    except SyntaxError:
        return Any


def _resolve_subscript(name: str, index: ast.expr) -> Any:
    parts = index.elts if isinstance(index, ast.Tuple) else [index]
    if name == "Literal":
        values = [_literal(part) for part in parts]
        plain = all(known and isinstance(value, str | int | None) for known, value in values)
        return Literal[tuple(value for _, value in values)] if plain else Any
    if name == "Annotated":
        return resolve_annotation(parts[0])
    if name == "Optional":
        return _union([resolve_annotation(parts[0]), type(None)])
    if name == "Union":
        return _union([resolve_annotation(part) for part in parts])
    if name in _CONTAINERS:
        return _container(_CONTAINERS[name], parts)
    return Any


def _container(kind: Any, parts: list[ast.expr]) -> Any:
    variadic = kind is tuple and isinstance(parts[-1], ast.Constant) and parts[-1].value is ...
    items = [resolve_annotation(part) for part in (parts[:-1] if variadic else parts)]
    expected = {dict: 2, list: 1}.get(kind, len(items))
    if len(items) != expected:
        return Any
    return kind[(*items, ...)] if variadic else kind[tuple(items)]


def _union(members: list[Any]) -> Any:
    return Any if Any in members else Union[tuple(members)]  # noqa: UP007 - made at run time


def _last_name(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""
