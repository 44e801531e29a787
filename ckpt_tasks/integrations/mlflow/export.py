"""A checkpoint as an MLflow model: weights in safetensors and the code that builds the module."""

from __future__ import annotations

import shutil
import tempfile
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import msgspec
import numpy
from mlflow.models import Model, infer_signature

from ckpt_tasks import __version__
from ckpt_tasks.checkpointer.sharded_reader import ShardedCheckpoint, open_rank
from ckpt_tasks.errors import ConfigError, StateError
from ckpt_tasks.integrations.mlflow.served_model import CODE_FOLDER, DATA_FOLDER, SPEC_FILE
from ckpt_tasks.tasks.export_safetensors import write_safetensors
from ckpt_tasks.tasks.exporting import (
    ExportRequest,
    ExportSource,
    ServedModel,
    chosen_names,
    module_names,
)
from ckpt_tasks.training.served import (
    Builder,
    Predictor,
    ServedSpec,
    load_builder,
)

__all__ = ["export_model"]

_LOADER = "ckpt_tasks.integrations.mlflow.served_model"
_WEIGHTS = "model"
_OWN_REQUIREMENTS = ("ckpt-tasks", "mlflow", "numpy", "torch")


def export_model(source: ExportSource, request: ExportRequest, folder: Path) -> list[str]:
    """Make a folder that ``mlflow.pyfunc.load_model`` opens; nothing in it is a pickle.

    The module is built here too, and loaded strictly, so that what is written is known to load.
    With it go the source files beside the builder that it has imported, and as requirements this
    package, torch, numpy and mlflow in the versions that are here.

    Raises
    ------
    ConfigError
        No `model`, or one that cannot be built, no such name, or an unreadable example.
    StateError
        The weights do not fit the module, or some of them are no plain tensors.

    and as `export_safetensors`.
    """
    if request.model is None:
        raise ConfigError(
            "an MLflow model needs what builds the module: --model MODULE:FUNCTION, or file.py:"
            "FUNCTION; -p NAME=VALUE for arguments that are no hyperparameters of the run"
        )
    checkpoint = open_rank(source.store, source.layout, source.record, 0)
    name = _chosen_name(source, request, checkpoint)
    builder = load_builder(request.model.entrypoint)
    example = _example(request.model)
    params = builder.arguments(request.model.params, source.record.hyperparameters)
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}.", dir=folder.parent) as work:
        weights = _written_weights(source, checkpoint, name, Path(work))
        predictor = Predictor(builder.load(params, weights))
        spec = ServedSpec(entrypoint=builder.entrypoint, params=params, weights=weights.name)
        description = {**source.described, "tracked": name, "entrypoint": spec.entrypoint}
        mlflow.pyfunc.save_model(
            str(folder),
            loader_module=_LOADER,
            code_paths=_code_paths(Path(work), builder),
            pip_requirements=_requirements(builder, request.model),
            metadata={"ckpt_tasks": description},
            **_signature(predictor, example),
        )
        data = folder / DATA_FOLDER
        data.mkdir()
        (data / SPEC_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(spec)))
        weights.rename(data / weights.name)
    _tell_size(folder)
    return [name]


def _chosen_name(
    source: ExportSource, request: ExportRequest, checkpoint: ShardedCheckpoint
) -> str:
    """The one tracked name that is meant."""
    trees = checkpoint.trees
    names = chosen_names(source.record, trees, request.only, module_names(trees))
    if len(names) > 1:
        raise ConfigError(
            f"an MLflow model is one module, and {source.record.id} has {', '.join(names)}: say "
            "which, --only NAME"
        )
    return names[0]


def _written_weights(
    source: ExportSource, checkpoint: ShardedCheckpoint, name: str, work: Path
) -> Path:
    write_safetensors(source, checkpoint, name, work / _WEIGHTS)
    if (work / f"{_WEIGHTS}.json").exists():
        raise StateError(
            f"{name} holds more than tensors, which its weights alone do not give back; export it "
            "--to torch"
        )
    return work / f"{_WEIGHTS}.safetensors"


def _code_paths(work: Path, builder: Builder) -> list[str] | None:
    """What MLflow is to copy: each file and folder of a copy that has the sources alone."""
    root = work / CODE_FOLDER
    for path, file in builder.code().items():
        target = root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    return [str(each) for each in sorted(root.iterdir())] if root.exists() else None


def _requirements(builder: Builder, model: ServedModel) -> list[str]:
    """Public versions: that of a local build, such as ``2.13.0+cpu``, is on no index."""
    pinned = [f"{name}=={version(name).partition('+')[0]}" for name in ("mlflow", "numpy", "torch")]
    own = [f"ckpt-tasks=={__version__}"]
    return [*own, *pinned, *_installed_as(builder), *model.requirements]


def _installed_as(builder: Builder) -> list[str]:
    """The package that the builder belongs to, where its code does not come with it."""
    if builder.code():
        return []
    top = builder.entrypoint.partition(":")[0].partition(".")[0]
    found = packages_distributions().get(top, [])
    return [f"{name}=={version(name)}" for name in found if name not in _OWN_REQUIREMENTS]


def _example(model: ServedModel) -> Any:
    """The inputs that were given, if any were."""
    if model.example is None:
        return None
    try:
        with Path(model.example).open("rb") as file:
            return numpy.lib.format.read_array(file, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--example {model.example} is no .npy file: {error}") from error


def _signature(predictor: Predictor, example: Any) -> dict[str, Any]:
    if example is None:
        return {}
    try:
        predicted = predictor.predict(example)
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        raise ConfigError(f"the model does not take the example: {said}") from error
    return {"signature": infer_signature(example, predicted), "input_example": example}


def _tell_size(folder: Path) -> None:
    """MLflow has counted its files before the weights were there."""
    model = Model.load(str(folder))
    model.model_size_bytes = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    model.save(str(folder / "MLmodel"))
