"""What ``runs``, ``ls``, ``show`` and ``verify`` print, and how they exit."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file
from support.made_ranks import commit_ranks, part_of_rank, sharded
from support.made_runs import MadeRun, State
from support.replays import DIVERGED

from ckpt_tasks.config import StoreConfig
from ckpt_tasks.format.blocks import share_of_rows
from ckpt_tasks.format.codec import encode
from ckpt_tasks.format.records import Heartbeat, now
from ckpt_tasks.store.local import LocalStore
from ckpt_tasks.tasks import report
from ckpt_tasks.types import CheckpointId

EXIT_NOT_FOUND = 4


def test_an_empty_store_says_so(call, store_path):
    """A store without runs is not an error, and is named."""
    Path(store_path).mkdir()
    answer = call("runs", "--store", store_path)
    assert answer.code == 0
    assert answer.out == f"no runs in file://{store_path}\n"
    assert call("runs", "--store", store_path, "--json").json == []


def test_runs_are_listed(call, store_path, stored):
    """Each run has its counts, its newest valid checkpoint, and whether it is complete."""
    answer = call("runs", "--store", store_path)
    header, row = answer.out.splitlines()
    assert header.split() == ["RUN", "ATTEMPTS", "CHECKPOINTS", "NEWEST", "STATE", "AGE"]
    assert row.startswith("digits cnn")
    assert row.split()[2:6] == ["2", "3", stored.newest, "incomplete"]
    (run,) = call("runs", "--store", store_path, "--json").json
    assert (run["name"], run["newest"], run["completed"]) == ("digits cnn", stored.newest, False)


def test_a_complete_run_is_shown_as_such(call, store_path, stored):
    """The completion marker is seen in the list and in the run's page."""
    stored.run.complete(stored.newest)
    assert " complete " in call("runs", "--store", store_path).out
    assert "complete since" in call("show", "digits cnn", "--store", store_path).out


def test_checkpoints_are_listed_newest_first(call, store_path, stored):
    """Position, size and standing of each checkpoint; a zombie's is told apart."""
    lines = call("ls", "digits cnn", "--store", store_path).out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == [stored.newest, stored.zombie, stored.first]
    assert lines[1].split()[1:7] == ["3", "1200", "3.15", "MB", "epoch", "valid"]
    assert "zombie" in lines[2]
    assert max(map(len, lines)) <= 100
    found = call("ls", "digits cnn", "--store", store_path, "--json").json
    assert [checkpoint["standing"] for checkpoint in found] == ["valid", "zombie", "valid"]


def test_a_run_is_shown_with_its_attempts(call, store_path, stored):
    """Identity, entry point, newest checkpoint, and what each attempt started from."""
    answer = call("show", "digits cnn", "--store", store_path)
    assert "entry point   toy:train\n" in answer.out
    assert stored.run.identity.uid in answer.out
    rows = [line for line in answer.out.splitlines() if "flow-run-" in line]
    assert "the beginning" in rows[0]
    assert stored.first in rows[1]
    view = call("show", "digits cnn", "--store", store_path, "--json").json
    assert [attempt["number"] for attempt in view["attempts"]] == [1, 2]
    assert view["replays"] == {}


def test_a_run_is_shown_with_what_it_did_again(call, store_path):
    """What each attempt has found of the steps that it did again, as a sentence and as numbers."""
    run = MadeRun(LocalStore(store_path), "replayed")
    run.begin().commit(10)
    second = run.begin()
    beat = Heartbeat(attempt=second.number, beat=1, at=now(), replay=DIVERGED)
    run.store.put(run.layout.heartbeat(second.number), encode(beat))
    answer = call("show", "replayed", "--store", store_path)
    assert answer.out.splitlines()[-1] == f"attempt 2 {DIVERGED}"
    (replay,) = call("show", "replayed", "--store", store_path, "--json").json["replays"].values()
    assert (replay["diverged_steps"], replay["largest"]["replayed"]) == (1, 0.75)
    (first, again) = report(StoreConfig(url=store_path), "replayed").attempts
    assert (first["replay"], again["replay"]) == (None, str(DIVERGED))


def test_a_checkpoint_is_shown(call, store_path, stored):
    """Position, trigger, metrics, hyperparameters and lineage of one checkpoint."""
    answer = call("show", f"digits cnn@{stored.newest}", "--store", store_path)
    for text in ("step 1200 (end of epoch 3)", "loss=0.5", "lr=0.1", f"from {stored.first}"):
        assert text in answer.out
    shown = call("show", f"digits cnn@{stored.newest}", "--store", store_path, "--json").json
    assert shown["record"]["position"]["step"] == 1200


def test_the_files_of_a_checkpoint_can_be_opened(call, store_path, stored):
    """Each tracked name's file is shown, relative to the store and in full, with its size; the
    library that people know opens it.
    """
    answer = call("show", f"digits cnn@{stored.newest}", "--store", store_path)
    (row,) = [line for line in answer.out.splitlines() if line.endswith(".safetensors")]
    name, size, unit, path = row.split(maxsplit=3)
    assert (name, size, unit) == ("model", "3.15", "MB")
    assert load_file(path)["weight"].numel() == 3 * 2**20
    shown = call("show", f"digits cnn@{stored.newest}", "--store", store_path, "--json").json
    (file,) = shown["files"]
    assert (file["name"], file["url"]) == ("model", path)
    assert Path(store_path, file["path"]) == Path(path)
    assert file["size"] == Path(path).stat().st_size


def test_the_tensors_of_a_checkpoint_are_listed(call, store_path, stored):
    """With dtype, shape and size, from the index alone: also where their file is gone."""
    checkpoint = CheckpointId.parse(stored.newest)
    stored.run.store.delete(stored.run.tensors_path(checkpoint))
    asked = ("show", f"digits cnn@{stored.newest}", "--tensors", "--store", store_path)
    rows = [line.split(maxsplit=3) for line in call(*asked).out.splitlines()]
    assert ["model", "weight", "U8", "[3145728]  3.15 MB"] in rows
    (tensor,) = call(*asked, "--json").json["tensors"]
    assert tensor == {
        "name": "model", "ranks": [0], "key": "weight", "dtype": "U8", "shape": [3 * 2**20],
        "size": 3 * 2**20,
    }  # fmt: skip


def test_the_tensors_of_several_ranks_are_whole(call, store_path):
    """As they were before ranks cut them, and who has which."""
    run = MadeRun(LocalStore(store_path), "cut")
    parts = [share_of_rows((6, 4), rank, 2) for rank in (0, 1)]
    states = [
        State(
            {"model": {"w": sharded((6, 4), part, 0)}},
            [part_of_rank("model", "w", bytes(24), (6, 4), part)],
        )
        for part in parts
    ]
    checkpoint = commit_ranks(run, states)
    answer = call("show", f"cut@{checkpoint}", "--tensors", "--store", store_path)
    row = answer.out.splitlines()[-1]
    assert row.split() == ["model", "w", "U8", "[6,", "4]", "24", "bytes", "0,", "1"]


def test_tensors_are_those_of_one_checkpoint(call, store_path, stored):
    """Of a run they cannot be listed; the error says how to ask."""
    answer = call("show", "digits cnn", "--tensors", "--store", store_path)
    assert (answer.code, "RUN@ID --tensors" in answer.err) == (2, True)


def test_files_that_cannot_be_told(call, store_path, stored):
    """A damaged index is told; the rest of the checkpoint is shown all the same."""
    stored.run.damage(stored.run.index_path(CheckpointId.parse(stored.newest)))
    answer = call("show", f"digits cnn@{stored.newest}", "--store", store_path, "--json")
    assert (answer.code, answer.json["files"]) == (0, [])
    assert "its files cannot be told" in answer.err


@pytest.mark.parametrize(
    ("command", "run", "expected"),
    [
        ("ls", "digits cn", "did you mean 'digits cnn'?"),
        ("show", "digits cnn@step-00000101-a1-s1", "no checkpoint step-00000101-a1-s1"),
        ("verify", "none of them", "runs in this store: digits cnn"),
    ],
)
def test_what_is_not_there_is_named_with_the_nearest(
    call, store_path, stored, command, run, expected
):
    """A missing run or checkpoint exits with 4 and one line that helps."""
    answer = call(command, run, "--store", store_path)
    assert answer.code == EXIT_NOT_FOUND
    assert expected in answer.err
    assert answer.err.count("\n") == 1


def test_an_id_that_is_none_is_a_usage_error(call, store_path, stored):
    """A text behind @ that begins like an id must be one."""
    answer = call("show", "digits cnn@step-12", "--store", store_path)
    assert answer.code == 2
    assert "step-00001200-a2-s7" in answer.err


def test_a_run_name_may_contain_an_at_sign(call, store_path, stored):
    """Only an id is taken off behind @."""
    assert "no run 'digits@home'" in call("ls", "digits@home", "--store", store_path).err
    assert "no run 'digits@home'" in call("show", "digits@home", "--store", store_path).err


def test_verification_reads_the_newest_valid_one(call, store_path, stored):
    """Without an id, the checkpoint a retry would take is verified."""
    answer = call("verify", "digits cnn", "--store", store_path)
    assert answer.code == 0
    assert answer.out.startswith(f"ok       {stored.newest}")
    assert len(answer.out.splitlines()) == 1


def test_verification_finds_damage_and_fails(call, store_path, stored):
    """One flipped byte makes the checkpoint damaged, and the command exit with 1."""
    stored.run.damage_tensors(stored.first)
    answer = call("verify", "digits cnn", "--all", "--store", store_path)
    assert answer.code == 1
    lines = {line.split()[1]: line for line in answer.out.splitlines()}
    assert lines[stored.first].startswith("DAMAGED")
    assert ".safetensors" in lines[stored.first]
    assert lines[stored.newest].startswith("ok")
    reports = call("verify", f"digits cnn@{stored.first}", "--store", store_path, "--json")
    assert (reports.code, reports.json[0]["ok"]) == (1, False)


def test_one_checkpoint_and_all_exclude_each_other(call, store_path, stored):
    """An id together with --all is refused."""
    answer = call("verify", f"digits cnn@{stored.first}", "--all", "--store", store_path)
    assert answer.code == 2


def test_a_run_without_checkpoints_says_so(call, store_path, stored):
    """A run that was only claimed is listed, and has nothing to verify."""
    MadeRun(stored.run.store, "young").begin()
    assert "no checkpoints yet (1 attempt)" in call("ls", "young", "--store", store_path).out
    answer = call("verify", "young", "--store", store_path)
    assert answer.code == EXIT_NOT_FOUND


def test_a_damaged_run_does_not_hide_the_others(call, store_path, stored):
    """A run whose identity cannot be read is reported; the list still shows the rest."""
    (Path(store_path) / "broken").mkdir()
    (Path(store_path) / "broken" / "run.json").write_text("{")
    answer = call("runs", "--store", store_path)
    assert answer.code == 0
    assert "digits cnn" in answer.out
    assert "damaged" in answer.out
    assert "run.json" in answer.err
    shown = call("show", "broken", "--store", store_path)
    assert (shown.code, shown.err.count("\n")) == (2, 1)


def test_store_and_config_come_from_the_environment(
    call, store_path, stored, monkeypatch, tmp_path
):
    """Without flags, the variables decide; a configuration file does too."""
    monkeypatch.setenv("CKPT_TASKS_STORE_URL", store_path)
    assert "digits cnn" in call("runs").out
    monkeypatch.delenv("CKPT_TASKS_STORE_URL")
    file = tmp_path / "run.toml"
    file.write_text(f'[store]\nurl = "{store_path}"\n')
    assert "digits cnn" in call("runs", "--config", str(file)).out
