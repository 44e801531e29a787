"""A module with exported weights: built by the user's function, loaded strictly, and asked."""

from __future__ import annotations

import ast
import inspect
import json
import mmap
import os
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import numpy
import torch
from torch import nn

from ckpt_tasks.errors import ConfigError, CorruptCheckpointError
from ckpt_tasks.format.safetensors import parse_header
from ckpt_tasks.masking import MASK, is_secret_name
from ckpt_tasks.state.modules import load_module
from ckpt_tasks.state.tensors import tensor_from_buffer
from ckpt_tasks.training.entrypoints.entrypoint import (
    EntrypointSignature,
    Hyperparameter,
    check_params,
    load_entrypoint,
    parse_entrypoint,
)
from ckpt_tasks.training.entrypoints.signature import resolve_annotation
from ckpt_tasks.types import Scalar

__all__ = ["Builder", "Predictor", "ServedSpec", "load_builder", "load_served"]


class ServedSpec(msgspec.Struct, frozen=True, kw_only=True):
    """How a module with exported weights is made again.

    Parameters
    ----------
    entrypoint
        ``MODULE:FUNCTION`` of what returns the module.
    params
        Arguments for it.
    weights
        A safetensors file with its state dict, beside this.
    """

    entrypoint: str
    params: dict[str, Any]
    weights: str


class Builder:
    """A function, or a class, that makes a module.

    Parameters
    ----------
    entrypoint
        ``MODULE:FUNCTION``, also where it was found by its file.
    make
        What it names.
    """

    def __init__(self, entrypoint: str, make: Callable[..., Any]) -> None:
        self.entrypoint = entrypoint
        self._make = make

    def arguments(self, given: Mapping[str, Any], recorded: Mapping[str, Scalar]) -> dict[str, Any]:
        """What it is called with.

        Parameters
        ----------
        given
            By a person; a text is read as the parameter's annotation asks.
        recorded
            Hyperparameters of a run, of which those with a parameter of the same name are taken.

        Raises `ConfigError` for an unknown or missing argument, or one of a wrong type.
        """
        secret = sorted(filter(is_secret_name, given))
        if secret:
            raise ConfigError(f"{', '.join(secret)} would be kept in the model, for all to read")
        signature = self._signature()
        kinds = {each.name: each.annotation for each in signature.hyperparameters}
        known = {
            # What was a text stays one where no annotation says what it is.
            name: json.dumps(value) if isinstance(value, str) and kinds[name] is Any else value
            for name, value in recorded.items()
            if name in kinds and value != MASK
        }
        return check_params(signature, {**known, **given}, text=True)

    def load(self, params: Mapping[str, Any], weights: Path) -> nn.Module:
        """The module with weights from a safetensors file, in evaluation mode.

        Raises
        ------
        ConfigError
            It raises, or returns something else.
        StateError
            Missing or unexpected names, another shape or dtype: the message lists them.
        CorruptCheckpointError
            It is no whole safetensors file.
        """
        try:
            module = self._make(**params)
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
            raise ConfigError(f"{self.entrypoint} raised {said}") from error
        if not isinstance(module, nn.Module):
            kind = type(module).__qualname__
            raise ConfigError(f"{self.entrypoint} returned a {kind}, not a torch.nn.Module")
        _load_weights(module, weights)
        return module.eval()

    def code(self) -> dict[str, Path]:
        """Source files that lie with it and were imported so far, by their paths from its root.

        None where it is installed, as a package that can be required.
        """
        root = self._root()
        if root is None or _is_installed(root):
            return {}
        files = {file.resolve() for file in _source_files()}
        return {
            str(file.relative_to(root)): file
            for file in sorted(files)
            if file.is_relative_to(root) and not _is_installed(file)
        }

    def _root(self) -> Path | None:
        """The folder from which it is imported."""
        name = self.entrypoint.partition(":")[0]
        file = sys.modules[name].__file__
        if file is None:
            return None
        above = name.count(".") + (Path(file).name == "__init__.py")
        return Path(file).resolve().parents[above]

    def _signature(self) -> EntrypointSignature:
        parameters = inspect.signature(self._make).parameters.values()
        named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        return EntrypointSignature(
            entrypoint=self.entrypoint,
            function=self.entrypoint.rpartition(":")[2],
            summary="",
            hyperparameters=tuple(_argument(each) for each in parameters if each.kind in named),
            accepts_any=any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters),
            takes_run=False,
        )


def load_builder(entrypoint: str, folders: Sequence[str] | None = None) -> Builder:
    """Import what makes the module; runs the user's code.

    Parameters
    ----------
    entrypoint, folders
        As `load_entrypoint` takes them.

    Raises `ConfigError` as that does.
    """
    parsed = parse_entrypoint(entrypoint)
    make = load_entrypoint(entrypoint, folders=folders)
    module = parsed.module or (parsed.file.stem if parsed.file else "")
    return Builder(f"{module}:{parsed.function}", make)


def load_served(folder: Path, spec: ServedSpec, code: Path | None) -> nn.Module:
    """The module with its weights, ready to predict.

    Parameters
    ----------
    folder
        Where the weights lie.
    code
        Where the code that came with it lies, if any did.

    Raises
    ------
    ConfigError
        It cannot be built, its code is hidden by another module of the same name, or the weights
        do not fit.
    CorruptCheckpointError
        The file of weights is damaged.
    """
    builder = load_builder(spec.entrypoint, [] if code is None else [str(code)])
    _check_is_own(spec.entrypoint, code)
    return builder.load(spec.params, folder / spec.weights)


def _load_weights(module: nn.Module, file: Path) -> None:
    with file.open("rb") as opened:
        # Not closed by hand: it lives as long as a tensor is looked at, in a traceback say.
        data = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
    load_module(file.name, module, _state_in(memoryview(data), file))


def _state_in(data: memoryview, file: Path) -> dict[str, torch.Tensor]:
    start = 8 + int.from_bytes(data[:8], "little")
    try:
        entries = parse_header(bytes(data[:start]))
        return {
            key: tensor_from_buffer(
                data[start + offset : start + offset + spec.size], spec.dtype, spec.shape
            )
            for key, (spec, offset) in entries.items()
        }
    except ValueError as error:
        raise CorruptCheckpointError(f"{file} is damaged: {error}") from error


class Predictor:
    """Asks a module as MLflow asks its models.

    Parameters
    ----------
    module
        In evaluation mode.
    device
        Where it computes.
    """

    def __init__(self, module: nn.Module, device: str = "cpu") -> None:
        self._module = module.to(device)
        self._device = device
        floating = (each.dtype for each in module.parameters() if each.is_floating_point())
        self._dtype = next(floating, torch.get_default_dtype())

    def get_raw_model(self) -> nn.Module:
        """The module itself."""
        return self._module

    def predict(self, data: Any, params: Mapping[str, Any] | None = None) -> Any:
        """What the module returns for a batch, as arrays.

        Parameters
        ----------
        data
            An array, a list or a data frame, passed as one tensor; or a dict of such, passed by
            name. Floating values become the dtype of the module's parameters.
        params
            Further keyword arguments.

        Returns
        -------
        numpy.ndarray, or lists and dicts of such
            In float32 where NumPy has no such dtype.
        """
        with torch.inference_mode():
            if isinstance(data, Mapping):
                named = {name: self._tensor(value) for name, value in data.items()}
                return _arrays(self._module(**named, **(params or {})))
            return _arrays(self._module(self._tensor(data), **(params or {})))

    def _tensor(self, data: Any) -> torch.Tensor:
        array = data.to_numpy() if hasattr(data, "to_numpy") else numpy.asarray(data)
        tensor = torch.tensor(array, device=self._device)
        return tensor.to(self._dtype) if tensor.is_floating_point() else tensor


def _arrays(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        value = value.cpu()
        return value.float().numpy() if value.dtype is torch.bfloat16 else value.numpy()
    if isinstance(value, Mapping):
        return {name: _arrays(item) for name, item in value.items()}
    return [_arrays(item) for item in value] if isinstance(value, list | tuple) else value


def _argument(parameter: inspect.Parameter) -> Hyperparameter:
    required = parameter.default is parameter.empty
    annotation: Any = Any
    if parameter.annotation is not parameter.empty:
        annotation = _annotation(parameter.annotation)
    elif isinstance(parameter.default, bool | int | float | str):
        annotation = type(parameter.default)
    return Hyperparameter(name=parameter.name, annotation=annotation, required=required)


def _annotation(annotation: Any) -> Any:
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    try:
        return resolve_annotation(ast.parse(text, mode="eval").body)
    except SyntaxError:
        return Any


def _source_files() -> Iterator[Path]:
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None) if isinstance(module, ModuleType) else None
        # Some modules of torch name a file that there is not.
        if file is not None and file.endswith(".py") and os.path.isabs(file):
            yield Path(file)


def _is_installed(path: Path) -> bool:
    places = ("stdlib", "platstdlib", "purelib", "platlib")
    return any(path.is_relative_to(Path(sysconfig.get_path(place)).resolve()) for place in places)


def _check_is_own(entrypoint: str, code: Path | None) -> None:
    name = entrypoint.partition(":")[0]
    file = sys.modules[name].__file__
    if code is not None and (file is None or not Path(file).resolve().is_relative_to(code)):
        raise ConfigError(
            f"the module {name!r} of this process is {file}, not the one in {code}: another was "
            "imported under its name; load each such model in a process of its own"
        )
