"""Install each extra of a built wheel alone, in a fresh environment, and use it.

Not collected by pytest: it builds environments, which takes minutes. ``make extras`` runs it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

PROBES = Path(__file__).parent / "probes"
_AT_ONCE = 2


@dataclass(frozen=True)
class Check:
    """An environment to make, and what is run in it.

    Parameters
    ----------
    name
        Shown, and the name of the folder.
    extra
        Of the package; empty for the bare one.
    probes
        Scripts in ``probes/``, run by the environment's Python.
    beside
        Requirements installed in the same step.
    lowest
        Take the oldest versions that the package's own bounds allow.
    as_of
        Take nothing that was released later than this day; what bounds its own dependencies too
        loosely works with those of its time only.
    """

    name: str
    extra: str
    probes: tuple[str, ...]
    beside: tuple[str, ...] = ()
    lowest: bool = False
    as_of: str | None = None


# What needs torch takes the tested one: elsewhere the newest may be a build of gigabytes.
TORCH = "torch==2.13.0"

CHECKS = (
    Check("bare", "", ("bare.py",)),
    Check("bare, oldest", "", ("bare.py",), lowest=True),
    Check("torch", "torch", ("torch_extra.py",), (TORCH,)),
    Check("torch, oldest", "torch", ("torch_extra.py",), (TORCH,), lowest=True),
    Check("mlflow", "mlflow", ("mlflow_extra.py",)),
    Check("mlflow, oldest", "mlflow", ("mlflow_extra.py",), lowest=True),
    Check("prefect, newest", "prefect", ("prefect_extra.py",)),
    Check("prefect, oldest", "prefect", ("prefect_extra.py",), lowest=True),
    Check("demo", "demo", ("demo_extra.py",), (TORCH,)),
    Check("airflow, newest", "airflow", ("airflow_extra.py",)),
    Check("airflow, oldest", "airflow", ("airflow_extra.py",), lowest=True, as_of="2026-06-10"),
    Check("s3", "s3", ("s3_extra.py",), ("moto[server]>=5.1",)),
    Check("s3, oldest", "s3", ("s3_extra.py",), ("moto[server]>=5.1",), lowest=True),
)


def main() -> int:
    """Run every check, or those named; 1 when one fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--uv", type=Path, required=True)
    parser.add_argument("--only", action="append", choices=[check.name for check in CHECKS])
    options = parser.parse_args()
    failures = check_wheel(options.wheel)
    chosen = [check for check in CHECKS if not options.only or check.name in options.only]

    def run(check: Check) -> tuple[str | None, float]:
        started = time.monotonic()
        problem = run_check(check, options.wheel.resolve(), options.uv.resolve())
        return problem, time.monotonic() - started

    # They wait for downloads and servers half of the time.
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for check, (problem, seconds) in zip(chosen, pool.map(run, chosen), strict=True):
            said = "FAILED" if problem else "ok"
            print(f"{said:<7} {check.name:<16} {seconds:5.0f} s", flush=True)
            if problem:
                print(problem, flush=True)
                failures.append(check.name)
    return 1 if failures else 0


def check_wheel(wheel: Path) -> list[str]:
    """The wheel holds the package, its typing marker and licence, and no tests."""
    names = zipfile.ZipFile(wheel).namelist()
    problems = []
    if "ckpt_tasks/py.typed" not in names:
        problems.append("no py.typed")
    if not any(name.endswith("/licenses/LICENSE") for name in names):
        problems.append("no LICENSE")
    tops = {name.split("/")[0] for name in names} - {"ckpt_tasks"}
    strangers = [top for top in tops if not top.endswith(".dist-info")]
    if strangers:
        problems.append(f"also contains {', '.join(strangers)}")
    print(f"{'FAILED' if problems else 'ok':<7} wheel: {'; '.join(problems) or wheel.name}")
    return problems


def run_check(check: Check, wheel: Path, uv: Path) -> str | None:
    """Make the environment and run the probes; the output of the first step that fails."""
    with tempfile.TemporaryDirectory(prefix="ckpt-tasks-extra-") as folder:
        python = Path(folder, "venv", "bin", "python")
        requirement = f"{wheel}[{check.extra}]" if check.extra else str(wheel)
        steps: list[list[str]] = [
            [str(uv), "venv", "--quiet", "--python", sys.executable, str(Path(folder, "venv"))],
            [
                *(str(uv), "pip", "install", "--quiet", "--python", str(python)),
                *(["--resolution", "lowest-direct"] if check.lowest else []),
                *(["--exclude-newer", check.as_of] if check.as_of else []),
                *_find_links(),
                *(requirement, *check.beside),
            ],
            [str(uv), "pip", "check", "--quiet", "--python", str(python)],
            *([str(python), str(PROBES / probe)] for probe in check.probes),
        ]
        for step in steps:
            answer = subprocess.run(
                step,
                cwd=folder,
                env=_environment(Path(folder)),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=600,
            )
            if answer.returncode != 0:
                return f"$ {' '.join(step)}\n{answer.stdout[-4000:]}"
    return None


def _find_links() -> list[str]:
    folder = os.environ.get("PIP_FIND_LINKS")
    return ["--find-links", folder] if folder else []


def _environment(folder: Path) -> dict[str, str]:
    """Nothing of the development environment, nor of earlier runs, is seen by the probes.

    They may keep what Python compiles: the demo starts dozens of processes that import torch.
    """
    left_out = (
        *("VIRTUAL_ENV", "PYTHONPATH", "PYTHONDONTWRITEBYTECODE"),
        *("PREFECT_", "MLFLOW_", "AIRFLOW_", "CKPT_TASKS_"),
    )
    kept = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
    return {
        **kept,
        "AIRFLOW_HOME": str(folder / "airflow"),
        "DO_NOT_TRACK": "1",
        "PREFECT_HOME": str(folder / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        # This one has torch, for the checks of what itself has none.
        "TRAINING_PYTHON": sys.executable,
    }


if __name__ == "__main__":
    sys.exit(main())
