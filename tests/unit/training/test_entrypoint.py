"""Entry points: found without import, checked before anything starts, loaded in the trainer."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ckpt_tasks.errors import ConfigError
from ckpt_tasks.training.entrypoints.entrypoint import (
    check_params,
    load_entrypoint,
    parse_entrypoint,
    read_signature,
)

TRAIN = """
from typing import Literal
raise RuntimeError("imported")

def train(
    run,
    lr: float = 1e-3,
    epochs: int = 3,
    optimizer: Literal["adam", "sgd"] = "adam",
    sizes: list[int] | None = None,
    augment: bool = True,
    api_key: int = 0,
    anything=None,
    *,
    name: str,
): ...

def evaluate(run): ...
def no_run(): ...
async def later(run): ...
made = lambda run: None
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with a user's package, whose import raises; left unimported after."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    package = tmp_path / "userpkg"
    (package / "sub").mkdir(parents=True)
    (package / "__init__.py").write_text("from .sub.work import train as exported\nimport os\n")
    (package / "sub" / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (package / "sub" / "work.py").write_text(TRAIN)
    (package / "broken.py").write_text("def train(run:\n")
    (tmp_path / "script.py").write_text(TRAIN)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


@pytest.mark.parametrize(
    "entrypoint",
    ["userpkg.sub.work:train", "script.py:train", "userpkg/sub/work.py:train", "userpkg:exported"],
)
def test_a_signature_is_read_without_importing(project: Path, entrypoint: str) -> None:
    """Modules, files and one re-export are followed, though importing any of them would raise."""
    signature = read_signature(entrypoint)
    names = [parameter.name for parameter in signature.hyperparameters]
    assert names[:3] == ["lr", "epochs", "optimizer"]
    assert signature.function == "train"
    assert not {"userpkg", "script"} & set(sys.modules)


def test_a_search_path_is_looked_through_too(project: Path, tmp_path: Path) -> None:
    """Another interpreter's modules are found in its folders."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "other.py").write_text("def go(run, x=1): ...")
    assert read_signature("other:go", search_path=[str(folder)]).function == "go"


@pytest.mark.parametrize("entrypoint", ["beside:go", "beside.py:go", "nested/beside.py:go"])
def test_code_is_found_in_the_folders_where_it_lies(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entrypoint: str
) -> None:
    """Modules and files, read and imported alike, with what lies beside them."""
    folder = tmp_path / "elsewhere"
    for place in (folder, folder / "nested"):
        place.mkdir()
        (place / "beside.py").write_text("from helper_beside import y\ndef go(run, x=1): ...")
    (folder / "helper_beside.py").write_text("y = 2")
    monkeypatch.setattr(sys, "path", list(sys.path))
    folders = [str(project), str(folder)]

    assert read_signature(entrypoint, folders=folders).hyperparameters[0].default == 1
    assert load_entrypoint(entrypoint, folders=folders).__globals__["y"] == 2
    assert {str(project), str(folder)} <= set(sys.path)

    for name in ("beside", "helper_beside"):
        del sys.modules[name]


@pytest.mark.parametrize(
    ("entrypoint", "expected"),
    [
        ("train", "MODULE:FUNCTION"),
        ("userpkg:", "MODULE:FUNCTION"),
        (":train", "MODULE:FUNCTION"),
        ("user/pkg:train", "no slashes"),
        ("userpkg.none:train", "no module 'userpkg.none'"),
        ("script.sub:train", "no module 'script.sub'"),
        ("none.py:train", "no file none.py"),
        ("userpkg.sub.work:trian", "did you mean 'train'"),
        ("userpkg.broken:train", "broken.py:1"),
        ("script.py:no_run", "first one is the run"),
        ("script.py:later", "plain 'def'"),
        ("script.py:made", "plain 'def'"),
        ("sys:exit", "no Python source"),
    ],
)
def test_a_wrong_entry_point_says_what_is_wrong(
    project: Path, entrypoint: str, expected: str
) -> None:
    """Each mistake has a message that names it, or the nearest function."""
    with pytest.raises(ConfigError) as caught:
        read_signature(entrypoint)
    assert expected in str(caught.value)
    assert caught.value.exit_code == 2


def test_texts_become_what_annotations_say(project: Path) -> None:
    """Values typed on a command line take the annotated types."""
    params = {"lr": "3e-4", "epochs": "5", "sizes": "[1, 2]", "augment": "false", "name": "7"}
    checked = check_params(read_signature("script.py:train"), params)
    assert checked == {"lr": 3e-4, "epochs": 5, "sizes": [1, 2], "augment": False, "name": "7"}
    assert type(checked["epochs"]) is int


@pytest.mark.parametrize(
    ("value", "text", "expected"),
    [("3", True, 3), ("adam", True, "adam"), ("3", False, "3"), ({"a": 1}, False, {"a": 1})],
)
def test_unknown_types_are_read_as_json_only_from_a_command_line(
    project: Path, value: Any, text: bool, expected: Any
) -> None:
    """A parameter without a type takes JSON from typed text, and other values as they are."""
    signature = read_signature("script.py:train")
    checked = check_params(signature, {"name": "x", "anything": value}, text=text)
    assert checked["anything"] == expected


@pytest.mark.parametrize("null", ["none", "null", "None"])
def test_none_can_be_typed(project: Path, null: str) -> None:
    """An optional parameter takes none and null as None."""
    signature = read_signature("script.py:train")
    assert check_params(signature, {"name": "x", "sizes": null})["sizes"] is None


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"name": "x", "l": 1}, "did you mean 'lr'"),
        ({"name": "x", "eppochs": 1}, "did you mean 'epochs'"),
        ({}, "needs name"),
        ({"name": "x", "lr": "fast"}, "lr = 'fast'"),
        ({"name": "x", "epochs": "1.5"}, "epochs = '1.5'"),
        ({"name": "x", "epochs": True}, "epochs = True"),
        ({"name": "x", "optimizer": "adamw"}, "optimizer = 'adamw'"),
        ({"name": "x", "sizes": "[1"}, "sizes = '[1'"),
        ({"name": "x", "api_key": "hunter2"}, "api_key = ***"),
    ],
)
def test_wrong_hyperparameters_are_refused(
    project: Path, params: dict[str, Any], expected: str
) -> None:
    """An unknown name, a missing one and a wrong value are named; secrets are not shown."""
    with pytest.raises(ConfigError) as caught:
        check_params(read_signature("script.py:train"), params)
    assert expected in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_a_module_function_is_loaded(project: Path) -> None:
    """The named function itself comes back, from the working directory."""
    (project / "fine.py").write_text("def train(run): return 42")
    assert load_entrypoint("fine:train")(None) == 42


def test_a_file_function_is_loaded_with_its_neighbours(project: Path) -> None:
    """A file's own folder is importable, as when it is run by Python."""
    folder = project / "deep"
    folder.mkdir()
    (folder / "helper_of_file.py").write_text("ANSWER = 42")
    (folder / "main_of_file.py").write_text(
        "from helper_of_file import ANSWER\ndef train(run): return ANSWER"
    )
    function = load_entrypoint("deep/main_of_file.py:train")
    assert function(None) == 42
    assert sys.modules[function.__module__].train is function


@pytest.mark.parametrize(
    ("source", "entrypoint", "expected"),
    [
        ("", "absent_module:train", "no module 'absent_module'"),
        ("", "absent.py:train", "no file"),
        ("def train(run): ...", "usercode:trian", "did you mean 'train'"),
        ("train = 5", "usercode:train", "is a int, not a function"),
        ("import absent_dependency", "usercode:train", "'absent_dependency' (*usercode.py:1"),
        ("def f():\n    1 / 0\nf()", "usercode:train", "ZeroDivisionError*usercode.py:2 in f"),
        ("def train(run:", "usercode.py:train", "SyntaxError*usercode.py:1"),
        ("import sys; sys.exit(3)", "usercode.py:train", "SystemExit: 3*usercode.py:1"),
    ],
)
def test_what_cannot_be_loaded_is_a_configuration_error(
    project: Path, source: str, entrypoint: str, expected: str
) -> None:
    """Every way an import fails becomes one sentence with the place in the user's code."""
    (project / "usercode.py").write_text(source)
    with pytest.raises(ConfigError) as caught:
        load_entrypoint(entrypoint)
    position = 0
    for part in expected.split("*"):
        position = str(caught.value).find(part, position)
        assert position >= 0, str(caught.value)


@pytest.mark.parametrize("read", [read_signature, load_entrypoint])
def test_a_syntax_error_names_its_place_once(project: Path, read: Callable[[str], object]) -> None:
    """File and line, and what Python says of them, which would add both again."""
    (project / "usercode.py").write_text("x = 1\ndef train(run:\n")
    with pytest.raises(ConfigError) as caught:
        read("usercode.py:train")
    assert str(caught.value).count("usercode.py:2") == 1
    assert "line 2" not in str(caught.value)


def test_parsing_tells_modules_from_files() -> None:
    """A target that ends in .py is a file, also with a colon or a dot elsewhere."""
    assert parse_entrypoint("a.b:f").module == "a.b"
    assert parse_entrypoint("dir.x/a.py:f").file == Path("dir.x/a.py")
