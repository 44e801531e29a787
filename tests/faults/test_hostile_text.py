"""Names, reasons and messages that others wrote into a store do nothing where they are shown."""

from __future__ import annotations

import json
import re
from pathlib import Path

import msgspec
import pytest
from support.made_runs import MadeRun, State, Tensor, elsewhere

from ckpt_tasks.checkpointer.marks import mark
from ckpt_tasks.cli import main
from ckpt_tasks.config import StoreConfig
from ckpt_tasks.escaping import markdown_code, markdown_text, printable, printable_json
from ckpt_tasks.events import CheckpointQuarantined
from ckpt_tasks.format.records import CommitRecord
from ckpt_tasks.integrations.mlflow.description import checkpoint_description
from ckpt_tasks.store.local import LocalStore
from ckpt_tasks.tasks.narrate import narrate
from ckpt_tasks.tasks.report import report
from ckpt_tasks.training.registration.story import tell_story
from ckpt_tasks.types import CheckpointId

TITLE = "\x1b]0;owned\x07"
CLEAR = "\x9b2J\r\x1b[2J"
MARKUP = "<img src=x onerror=alert(1)> [here](javascript:alert(1)) `|` ![x](http://x)"
EVIL = f"a{TITLE}{CLEAR}\nerror: all is lost\u202e\u2028 {MARKUP} | b"
CONTROLS = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202e]")
NAME = f"run {TITLE}\n<b>`|[x](y)"


@pytest.fixture
def run(tmp_path: Path) -> MadeRun:
    """A run in which everything that is free text is hostile."""
    run = MadeRun(LocalStore(str(tmp_path / "store")), NAME)
    attempt = run.begin(EVIL, entrypoint=EVIL, hyperparameters={EVIL: EVIL})
    tensor = Tensor(EVIL[:20], EVIL, b"weights")
    saved = attempt.save(4, State({EVIL[:20]: {}}, [tensor]), metrics={EVIL: 0.5}, nonfinite=[EVIL])
    newest = attempt.save(8, State({EVIL[:20]: {}}, [tensor]), metrics={EVIL: 0.5})
    mark(run.store, run.layout, "pins", saved, why=EVIL, by=EVIL)
    mark(run.store, run.layout, "quarantined", newest, why=EVIL, by=EVIL)
    run.fail(1, f"ValueError: {EVIL}", step=9)
    run.put_claim(2, invocation=EVIL, process=msgspec.structs.replace(elsewhere(), host=EVIL))
    return run


def assert_harmless(markdown: str) -> None:
    """No HTML, no link or image, no row that is none, no code that goes on."""
    assert CONTROLS.search(markdown) is None
    outside = re.sub(r"`[^`\n]*`", "", re.sub(r"\\.", "", markdown))
    assert "`" not in outside
    assert not re.search(r"[<>]|\]\(", outside), outside


def test_command_line_shows_it_as_it_is(
    run: MadeRun, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a terminal nothing moves, is hidden or takes another line; JSON says the same."""
    monkeypatch.setenv("CKPT_TASKS_STORE_URL", run.store.url)
    ids = [f"{NAME}@step-0000000{n}-a1-s{n // 4}" for n in (4, 8)]
    asked = [
        ["runs"],
        ["ls", NAME],
        ["show", NAME],
        ["expire", NAME, "--dry-run"],
        ["verify", NAME],
    ]
    asked += [["collect", NAME, "--dry-run"], ["ls", "\x1b[31mnone"], ["verify", NAME, "--all"]]
    asked += [["show", each, *more] for each in ids for more in ([], ["--tensors"])]
    spoke = 0
    for arguments in asked:
        for more in ([], ["--json"]):
            with pytest.raises(SystemExit):
                main([*arguments, *more])
            told = capsys.readouterr()
            assert CONTROLS.search(told.out + told.err) is None, arguments
            assert not re.search(r"^error: all is lost", told.out + told.err, re.MULTILINE)
            spoke += "\\x1b]0;owned\\x07" in told.out + told.err
            if more and told.out:
                json.loads(told.out)
    assert spoke >= 8


def test_pages_show_it_as_it_is(run: MadeRun) -> None:
    """In MLflow's description of the run and of a checkpoint, and in orchestrators' reports."""
    record: CommitRecord = run.record(CheckpointId(4, 1, 1))
    for page in (
        report(StoreConfig(url=run.store.url), NAME).markdown,
        tell_story(run.store, run.layout),
        checkpoint_description(record, run=NAME, uri=f"file:///x/{EVIL}", manifest=b""),
    ):
        assert "onerror" in page
        assert_harmless(page)


def test_logs_show_it_as_it_is() -> None:
    """An event is one line of a log."""
    event = CheckpointQuarantined(checkpoint="step-00000004-a1-s1", why=EVIL)
    described = narrate(event)
    assert described is not None
    assert CONTROLS.search(described[1]) is None
    assert "\n" not in described[1]


def test_escapes_change_nothing_else() -> None:
    """Letters of all kinds stay; JSON decodes to the same; twice is once."""
    text = "plain (ü) 日本 🙂 [x] a_b*c #1 \\n"
    assert printable(text) == text
    assert printable(printable(EVIL)) == printable(EVIL)
    assert printable("\ud800") == "\\ud800"
    value = {"a": EVIL, "b": [1, text]}
    told = printable_json(msgspec.json.format(msgspec.json.encode(value)).decode())
    assert json.loads(told) == value
    assert CONTROLS.search(told) is None
    assert markdown_text("a|b <c> [d](e) x_y") == r"a\|b \<c\> \[d\](e) x_y"
    assert markdown_code("a`b|c\n") == "`ab/c `"
