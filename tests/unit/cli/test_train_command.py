"""``train``: checks before anything is started, then one supervised attempt and its exit code."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import support.toy_training
from torch.distributed.run import get_args_parser

from ckpt_tasks.cli.train import train as train_command

TOY = f"{support.toy_training.__file__}:train"


@pytest.fixture
def train(call, store_path):
    """Run ``ckpt-tasks train`` on the toy training."""

    def run(*arguments: str, entrypoint: str = TOY):
        return call("train", entrypoint, "--run", "toy", "--store", store_path, *arguments)

    return run


def test_a_run_is_trained_then_found_complete(train, call, store_path):
    """The first call trains and tells of its saves; the next one has nothing left to do."""
    answer = train("-p", "epochs=2", "-p", "lr=3e-3", "--every-steps", "5")
    assert answer.code == 0, answer
    assert answer.err.startswith(f"run 'toy' in the store {store_path}\n")
    assert "starts from the beginning" in answer.err
    assert "saved step-00000005-a1-s1" in answer.err
    shown = call("show", "toy", "--store", store_path, "--json").json
    assert shown["attempts"][0]["claim"]["hyperparameters"]["lr"] == 3e-3
    assert shown["completed"]["position"]["step"] == 16
    again = train("-p", "epochs=2", "-p", "lr=3e-3")
    assert again.code == 0
    assert "complete" in again.err
    assert "hyperparameters" not in again.err


def test_a_complete_run_asked_with_others_says_how_to_train_on(train, call, store_path):
    """Asked for with other hyperparameters, a complete run names those that differ and how to
    train on; doing so trains what is left.
    """
    assert train("-p", "epochs=1").code == 0
    again = train("-p", "epochs=2", "-p", "lr=0.01")
    assert again.code == 0
    assert "epochs was 1 and is 2 now" in again.err
    assert "lr" not in again.err.rpartition("hyperparameters")[2]
    (newest, *_) = call("ls", "toy", "--store", store_path, "--json").json
    assert f"--resume {newest['id']} trains on" in again.err
    assert "--resume fresh" in again.err
    assert train("-p", "epochs=2", "--resume", newest["id"]).code == 0
    shown = call("show", "toy", "--store", store_path, "--json").json
    assert shown["completed"]["position"]["step"] == 16


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["-p", "learning_rate=1"], "has no hyperparameter 'learning_rate'"),
        (["-p", "lr"], "not KEY=VALUE"),
        (["-p", "lr=1", "-p", "lr=2"], "given twice"),
        (["-p", "lr=fast"], "lr = 'fast' is no number"),
        (["-p", "epochs=2.5"], "epochs = '2.5' is no integer"),
        (["--every", "soon"], "'10m'"),
        (["--every-steps", "0"], "schedule.every_steps = 0"),
        (["--python", "no/such/python"], "no/such/python"),
        (["--resume", "latest"], "auto or fresh"),
    ],
)
def test_mistakes_are_found_before_anything_starts(train, store_path, arguments, expected):
    """A wrong argument exits with 2 and one line, and leaves no trace in the store."""
    answer = train(*arguments)
    assert answer.code == 2
    assert expected in answer.err
    assert answer.err.count("\n") == 1
    assert not Path(store_path).exists()


def test_a_wrong_entry_point_names_the_nearest(train):
    """A misspelt function is found without starting anything."""
    answer = train(entrypoint=TOY.replace(":train", ":trian"))
    assert (answer.code, "did you mean 'train'" in answer.err) == (2, True)


def test_another_interpreter_is_asked_for_its_path(train):
    """With --python, the signature is looked for where that interpreter would look."""
    answer = train("--python", sys.executable, "-p", "epoch=2")
    assert (answer.code, "did you mean 'epochs'" in answer.err) == (2, True)


def test_an_exception_in_the_training_is_worth_a_retry(train, tmp_path):
    """A training that raises exits with 1, and says what was raised."""
    failing = tmp_path / "failing.py"
    failing.write_text("def train(run):\n    raise RuntimeError('out of luck')\n")
    answer = train(entrypoint=f"{failing}:train")
    assert answer.code == 1
    assert "out of luck" in answer.err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_a_second_call_goes_on(train, store_path, number):
    """A signal ends with 75 after a save; its last line names that signal, the checkpoint, and
    what to do, and calls it no failure; the next call resumes there and completes the run.
    """
    command = [sys.executable, "-m", "ckpt_tasks", "train", TOY, "--run", "toy"]
    process = subprocess.Popen(
        [*command, "--store", store_path, "--every-steps", "2"],
        env={**os.environ, "TOY_STEP_SECONDS": "0.2"},
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        for line in process.stderr:
            if line.startswith("saved "):
                process.send_signal(number)
                break
        rest = process.stderr.read()
    assert process.returncode == 75, rest
    assert "(signal: " in rest
    saved = re.findall(r"^saved (\S+),", rest, re.MULTILINE)[-1]
    assert rest.splitlines()[-1] == (
        f"stopped: received {number.name}; newest checkpoint: {saved}; run the same command again "
        "to go on"
    )
    answer = train()
    assert answer.code == 0
    assert "resumed from " in answer.err


def test_torchrun_says_how_many_ranks_there_are(train, monkeypatch, store_path):
    """The flag that starts ranks would start them once for each of its workers."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    answer = train("--nproc", "2")
    assert answer.code == 2
    assert "--nproc-per-node" in answer.err
    assert not Path(store_path).exists()


def test_torchrun_passes_every_option_on():
    """It would take one for an abbreviation of several of its own: each has a name that it does
    not.
    """
    arguments = ["-m", "ckpt_tasks", "train", TOY]
    parser = get_args_parser()
    for option in train_command.params[1:]:
        if option.name == "nproc":
            continue
        passed = [name for name in option.opts if _is_passed_on(parser, [*arguments, name, "1"])]
        assert passed, option.opts


def _is_passed_on(parser, arguments):
    try:
        return parser.parse_args(arguments).training_script_args == arguments[2:]
    except SystemExit:
        return False


def test_ranks_are_those_of_the_flag_else_of_the_configuration(train, tmp_path, monkeypatch):
    """The file's ranks train; the flag's, whatever file and environment say."""
    code = tmp_path / "ranks.py"
    code.write_text(
        "import os\n"
        "from pathlib import Path\n"
        "def train(run):\n"
        "    told = os.environ.get('RANK', '0') + '-of-' + os.environ.get('WORLD_SIZE', '1')\n"
        f"    Path({str(tmp_path)!r}, told).touch()\n"
        "    run.track(nothing=[])\n"
    )
    file = tmp_path / "ckpt.toml"
    file.write_text("[attempt]\nnproc = 2\n")
    arguments = ("--config", str(file), "--resume", "fresh")

    answer = train(*arguments, entrypoint=f"{code}:train")
    assert answer.code == 0, answer
    ranks_of_two = {"0-of-2", "1-of-2"}
    assert {told.name for told in tmp_path.glob("*-of-*")} == ranks_of_two

    monkeypatch.setenv("CKPT_TASKS_ATTEMPT_NPROC", "3")
    answer = train(*arguments, "--nproc", "1", entrypoint=f"{code}:train")
    assert answer.code == 0, answer
    assert {told.name for told in tmp_path.glob("*-of-*")} == {*ranks_of_two, "0-of-1"}


def test_the_outcome_is_told_to_programs(train, tmp_path):
    """As JSON, whole; what an earlier start has left is gone when this one begins."""
    path = tmp_path / "told" / "outcome.json"
    path.parent.mkdir()
    assert train("-p", "epochs=1", "--outcome", str(path)).code == 0
    told = json.loads(path.read_bytes())
    assert (told["code"], told["attempt"], told["position"]["step"]) == (0, 1, 8)
    assert told["checkpoint"].startswith("step-00000008-")
    failed = train("--outcome", str(path), entrypoint=TOY.replace(":train", ":nothing"))
    told = json.loads(path.read_bytes())
    assert told["code"] == failed.code == 2
    assert told["message"] in failed.err
    assert list(path.parent.iterdir()) == [path]


def test_no_rank_is_no_training(train):
    """At least one has to train."""
    answer = train("--nproc", "0")
    assert answer.code == 2
    assert "--nproc" in answer.err
