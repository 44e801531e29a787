"""What MLflow calls to load a model that `export` has written; named in its ``MLmodel``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from ckpt_tasks.training.served import Predictor, ServedSpec, load_served

__all__ = ["CODE_FOLDER", "DATA_FOLDER", "SPEC_FILE"]

CODE_FOLDER = "code"
DATA_FOLDER = "data"
SPEC_FILE = "model.json"


def _load_pyfunc(path: str, model_config: Mapping[str, Any] | None = None) -> Predictor:
    """The model in a folder.

    Parameters
    ----------
    model_config
        ``{"device": "cuda"}`` to compute there.

    Raises as `load_served`.
    """
    folder = Path(path).resolve()
    data, code = folder / DATA_FOLDER, folder / CODE_FOLDER
    spec = msgspec.json.decode((data / SPEC_FILE).read_bytes(), type=ServedSpec)
    module = load_served(data, spec, code if code.is_dir() else None)
    return Predictor(module, str((model_config or {}).get("device", "cpu")))
