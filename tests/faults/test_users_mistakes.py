"""Users' mistakes: one clear line, the exit code that fits, and nothing lost."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.attempt_forks import AttemptForks, Kill
from support.shell import Answer, ckpt_tasks, contents

from ckpt_tasks.config import CheckpointConfig, StoreConfig
from ckpt_tasks.errors import ConfigError
from ckpt_tasks.format.layout import RunLayout
from ckpt_tasks.store import open_store
from ckpt_tasks.training.launch import launch
from ckpt_tasks.training.spec import TrainSpec
from ckpt_tasks.types import EXIT_FAILED, EXIT_NOT_FOUND, EXIT_USAGE

TOY = "support.toy_training:train"
USER_CODE = '''
import functools

LAYERS = 2


def train(run, lr: float = 0.1, *, layers: int, secret_pin: int = 0):
    """Never called by these tests."""
    raise AssertionError


reduced = functools.partial(train, layers=1)
compiled = type  # of no signature


def forgot_the_run():
    raise AssertionError


def raises(run):
    import torch

    run.track(model=torch.nn.Linear(2, 2))
    for epoch in run.epochs(3):
        evaluate(epoch)


def evaluate(epoch):
    if epoch == 1:
        raise RuntimeError("loss is\\nnot a number")


def tracks_a_lock(run):
    import threading

    class Meter:
        def state_dict(self):
            return {"seen": 3, "lock": threading.Lock()}

        def load_state_dict(self, state):
            pass

    run.track(meter=Meter())
'''

Train = Callable[..., Answer]


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """A user's folder, with a module that works and one that cannot be imported."""
    folder = tmp_path / "workplace"
    folder.mkdir()
    (folder / "user_code.py").write_text(USER_CODE)
    broken = "def train(run):\n    pass\n\nvalue = {}['missing']\n"
    (folder / "broken.py").write_text(broken)
    return folder


@pytest.fixture
def train(workplace: Path, root: Path) -> Train:
    """``ckpt-tasks train ENTRYPOINT --run toy --store ROOT ARGUMENTS...``."""

    def call(
        entrypoint: str,
        *arguments: str,
        store: str | None = None,
        debug: bool = False,
        environment: dict[str, str] | None = None,
    ) -> Answer:
        front = ["--debug"] if debug else []
        rest = ["--run", "toy", "--store", store or str(root), *arguments]
        return ckpt_tasks(
            *front, "train", entrypoint, *rest, folder=workplace, environment=environment
        )

    return call


@pytest.fixture
def interrupted(spec: TrainSpec, forks: AttemptForks) -> TrainSpec:
    """A run with checkpoints, whose first attempt was killed."""
    assert forks.run(spec, kill=Kill(step=13)).killed
    return spec


# -- entry points and hyperparameters ----------------------------------------------------------


@pytest.mark.parametrize(
    ("entrypoint", "arguments", "expected"),
    [
        ("no_such:train", [], "there is no module 'no_such'"),
        ("user_code:trian", [], "did you mean 'train'?"),
        ("user_code", [], "write MODULE:FUNCTION"),
        ("user_code:LAYERS", [], "is not defined there by a plain 'def'"),
        ("user_code:forgot_the_run", [], "def forgot_the_run(run, ...)"),
        ("user_code:train", [], "needs layers; pass it: -p layers=VALUE"),
        ("user_code:train", ["-p", "layer=2"], "did you mean 'layers'?"),
        ("user_code:train", ["-p", "layers=two"], "layers = 'two' is no integer"),
        ("user_code:train", ["-p", "layers=1", "--resume", "latest"], "or say auto or fresh"),
        ("user_code:train", ["-p", "layers=1", "--every", "soon"], "'10m'"),
        ("broken:train", [], "raised KeyError: 'missing' ("),
    ],
)
def test_a_mistaken_command_starts_nothing(
    train: Train, root: Path, entrypoint: str, arguments: list[str], expected: str
) -> None:
    """A wrong function, hyperparameter or option exits with 2, one line, and an empty store."""
    answer = train(entrypoint, *arguments)
    assert answer.code == EXIT_USAGE
    assert expected in answer.error
    assert answer.said == [answer.error]
    assert not root.exists()


def test_the_line_of_an_import_error_is_the_users_own(train: Train, workplace: Path) -> None:
    """Where the user's module raised is in the message; with --debug the traceback is shown."""
    where = f"({workplace / 'broken.py'}:4 in <module>)"
    assert where in train("broken:train").error
    debugged = train("broken:train", debug=True)
    assert "value = {}['missing']" in debugged.out
    assert where in debugged.err


@pytest.mark.parametrize(
    ("entrypoint", "params", "expected"),
    [
        ("no_such:train", {}, "there is no module 'no_such'"),
        ("user_code:trian", {"layers": 1}, "did you mean 'train'?"),
        ("user_code:LAYERS", {}, "LAYERS is a int, not a function"),
        ("user_code:forgot_the_run", {}, "cannot be called with the run"),
        ("user_code:train", {}, "needs layers"),
        ("user_code:train", {"layers": 1, "lrr": 1}, "did you mean 'lr'?"),
        ("user_code:train", {"layers": "two"}, "layers = 'two' is no integer"),
        ("user_code:train", {"layers": 1, "secret_pin": "hunter2"}, "secret_pin = ***"),
        ("user_code:reduced", {"lrr": 1}, "unexpected keyword argument 'lrr'"),
        ("user_code:compiled", {}, "its hyperparameters cannot be read"),
        ("broken:train", {}, "raised KeyError: 'missing' ("),
    ],
)
def test_the_trainer_checks_what_no_command_line_has(
    workplace: Path,
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    entrypoint: str,
    params: dict[str, object],
    expected: str,
) -> None:
    """`launch` called by code answers a wrong function or hyperparameter as the shell does."""
    monkeypatch.chdir(workplace)
    events: list[object] = []
    spec = TrainSpec(
        entrypoint=entrypoint,
        run="toy",
        params=params,
        config=CheckpointConfig(store=StoreConfig(url=str(root))),
        invocation="flow-run-1",
    )
    outcome = launch(spec, events.append)
    assert outcome.code == EXIT_USAGE
    assert expected in outcome.message
    assert "Traceback" not in str(events)
    assert "hunter2" not in str(events) + outcome.message
    assert not root.exists()


def test_an_interpreter_without_torch_is_told_what_to_install(
    train: Train, workplace: Path, root: Path
) -> None:
    """Where torch cannot be imported training exits with 2, and names interpreter and extra."""
    (workplace / "torch.py").write_text("raise ImportError('there is no torch here')\n")
    answer = train("user_code:train", "-p", "layers=1")
    assert answer.code == EXIT_USAGE
    assert f"{sys.executable} cannot import what training needs" in answer.error
    assert "pip install 'ckpt-tasks[torch]'" in answer.error
    assert not root.exists()


def test_an_interpreter_without_this_package_is_told_what_to_install(
    train: Train, tmp_path: Path, root: Path
) -> None:
    """Where ckpt_tasks itself cannot be imported training exits with 2, and names it."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')  # no site-packages
    python.chmod(0o755)
    answer = train("user_code:train", "-p", "layers=1", "--python", str(python))
    assert answer.code == EXIT_USAGE
    assert f"{python} cannot run ckpt_tasks" in answer.error
    assert not root.exists()


@pytest.mark.parametrize(("field", "value"), [("run", ""), ("run", "x" * 300), ("resume", "last")])
def test_a_spec_that_cannot_be_is_refused_where_it_is_made(
    spec: TrainSpec, field: str, value: str
) -> None:
    """A run's name that no store can hold, or an unknown word for resume, raises at once."""
    fields = {"entrypoint": TOY, "run": "toy", "invocation": "1", field: value}
    with pytest.raises(ConfigError):
        TrainSpec(**fields)


def test_a_checkpoint_that_is_not_there_is_not_resumed_from(
    interrupted: TrainSpec, train: Train, root: Path, finish: Callable[[TrainSpec], None]
) -> None:
    """A wrong --resume id exits with 4 and claims nothing; the run goes on from its newest."""
    before = contents(root)
    answer = train(TOY, "--resume", "step-00000099-a1-s1")
    assert answer.code == EXIT_NOT_FOUND
    assert "run 'toy' has no checkpoint step-00000099-a1-s1" in answer.error
    assert contents(root) == before
    finish(interrupted)


# -- the user's code ---------------------------------------------------------------------------


def test_an_exception_of_the_users_code_is_shown_once_as_theirs(
    train: Train, workplace: Path
) -> None:
    """Their traceback, without this package's part above it, then one line that says how far."""
    answer = train("user_code:raises", "--every-epochs", "1")
    assert answer.code == EXIT_FAILED
    line = answer.error_after_traceback
    assert "the training raised RuntimeError: loss is not a number" in line
    assert "newest checkpoint: step-00000000-a1-s1" in line
    frames = [text for text in answer.out.splitlines() if text.startswith("  File ")]
    assert frames[0].startswith(f'  File "{workplace / "user_code.py"}"')


def test_what_cannot_be_saved_is_named_by_key_and_type(train: Train) -> None:
    """Tracking an object whose state needs pickle exits with 2, without a traceback."""
    answer = train("user_code:tracks_a_lock")
    assert answer.code == EXIT_USAGE
    assert "meter['lock'] is a _thread.lock" in answer.error


# -- configuration -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[schedule]\nevery_step = 5\n", "did you mean 'every_steps'?"),
        ("[schedul]\nevery_steps = 5\n", "did you mean 'schedule'?"),
        ("[schedule]\nevery_steps = 'many'\n", "schedule.every_steps = 'many'"),
        ("[schedule\n", "not valid TOML"),
        (None, "cannot read the configuration run.toml"),
    ],
)
def test_a_wrong_configuration_is_named_with_its_file(
    train: Train, workplace: Path, root: Path, text: str | None, expected: str
) -> None:
    """A wrong key or value, or a file that cannot be read, exits with 2 and names the file."""
    if text is None:
        (workplace / "run.toml").mkdir()
    else:
        (workplace / "run.toml").write_text(text)
    answer = train(TOY, "--config", "run.toml")
    assert answer.code == EXIT_USAGE
    assert expected in answer.error
    assert "run.toml" in answer.error
    assert not root.exists()


# -- run.json ----------------------------------------------------------------------------------


def _flip(path: Path, root: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _truncate(path: Path, root: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def _exchange(path: Path, root: Path) -> None:
    from ckpt_tasks.fencing.claim import open_run

    with open_store(str(root)) as store:
        open_run(store, RunLayout("other"), created_by="a test")
    path.write_bytes((root / "other" / "run.json").read_bytes())


@pytest.mark.parametrize("spoil", [_flip, _truncate, _exchange])
def test_a_damaged_identity_stops_the_run_and_costs_nothing(
    interrupted: TrainSpec,
    forks: AttemptForks,
    root: Path,
    finish: Callable[[TrainSpec], None],
    spoil: Callable[[Path, Path], None],
) -> None:
    """A spoilt run.json ends with 2 and touches nothing; put back, the run goes on."""
    identity = root / "toy" / "run.json"
    whole = identity.read_bytes()
    spoil(identity, root)
    before = contents(root)
    outcome = forks.run(interrupted).outcome
    assert outcome.code == EXIT_USAGE
    assert "toy/run.json" in outcome.message
    assert contents(root) == before
    identity.write_bytes(whole)
    finish(interrupted)


def test_a_damaged_identity_is_one_line_in_the_shell(
    interrupted: TrainSpec, train: Train, root: Path
) -> None:
    """The line names the damaged file, says what is safe, and what to do."""
    _flip(root / "toy" / "run.json", root)
    answer = train(TOY)
    assert answer.code == EXIT_USAGE
    assert "toy/run.json is damaged" in answer.error
    assert "Its checkpoints are untouched; restore run.json" in answer.error
