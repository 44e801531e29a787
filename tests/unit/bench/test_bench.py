"""The benchmark: fair, complete, and gone without a trace."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import msgspec
import pytest
from support.launches import wait_until
from support.shell import COMMAND, ckpt_tasks
from torch.distributed.checkpoint import FileSystemWriter

from ckpt_tasks.bench.advice import interval
from ckpt_tasks.bench.asynchronous import alternate_async
from ckpt_tasks.bench.dcp import DcpProcess, DcpThread
from ckpt_tasks.bench.measure import Contestant, Measured, alternate
from ckpt_tasks.bench.peers import peers
from ckpt_tasks.bench.places import LocalPlace
from ckpt_tasks.bench.report import BenchReport, figures_of
from ckpt_tasks.bench.run import run_bench
from ckpt_tasks.bench.states import STATES, make_state
from ckpt_tasks.bench.training import NotMeasuredError, Training
from ckpt_tasks.config import StoreConfig
from ckpt_tasks.errors import ConfigError


def test_contestants_take_turns_and_the_first_round_does_not_count() -> None:
    """What disturbs the machine for a while disturbs all of them."""
    calls: list[str] = []

    def contestant(name: str) -> Contestant:
        return Contestant(
            name=name,
            prepare=lambda number: calls.append(f"prepare {name} {number}"),
            run=lambda number: calls.append(f"{name} {number}"),
        )

    measured = alternate([contestant("a"), contestant("b")], rounds=2)

    assert [call for call in calls if "prepare" not in call] == [
        *("a 0", "b 0"),
        *("a 1", "b 1"),
        *("a 2", "b 2"),
    ]
    assert calls[:2] == ["prepare a 0", "a 0"]
    assert {name: len(each.seconds) for name, each in measured.items()} == {"a": 2, "b": 2}


def test_figures_are_medians_and_ratios() -> None:
    """Of the state's bytes, the fastest first, against the one that is named."""
    slow = Measured(name="slow", seconds=[4.0, 100.0, 3.0], cpu_seconds=[1.0, 2.0, 9.0])
    fast = Measured(name="fast", seconds=[1.0, 1.0, 1.0], cpu_seconds=[0.5, 0.5, 0.5])

    first, second = figures_of({"slow": slow, "fast": fast}, 2_000_000_000, against="slow")

    assert (first.name, first.seconds, first.ratio) == ("fast", 1.0, 0.25)
    assert (first.gigabytes_per_second, first.cpu_seconds_per_gigabyte) == (2.0, 0.25)
    assert (second.seconds, second.ratio, second.cpu_seconds_per_gigabyte) == (4.0, 1.0, 1.0)
    (alone,) = figures_of({"fast": fast}, 1_000_000_000, against="slow")
    assert alone.ratio is None


@pytest.mark.parametrize(
    ("cost", "between", "expected"),
    [(1.0, 7200.0, math.sqrt(2 * 7200.0)), (10.0, 100.0, 10.0 / 0.035), (0.5, 1.0, 0.5 / 0.035)],
)
def test_interval_is_youngs_unless_saves_would_take_too_much(
    cost: float, between: float, expected: float
) -> None:
    """The optimum of cost and expected loss, bounded by a budget of 3.5 %."""
    assert interval(cost, between) == pytest.approx(expected)


def test_states_are_as_large_as_their_names_say() -> None:
    """Bytes of parameters and optimizer, within a few percent; the global generator is as it was.

    Only the two that take no gigabytes.
    """
    import torch

    before = torch.random.get_rng_state()
    from ckpt_tasks.state.capture import capture

    for name, size in (("mlp-300MB", 300e6), ("many-100MB", 100e6), ("40MB", 40e6)):
        images = capture(make_state(name)).tensors
        assert sum(image.nbytes for image in images) == pytest.approx(size, rel=0.02)
    assert torch.equal(before, torch.random.get_rng_state())
    assert "gpt-1.5GB" in STATES


def test_unknown_state_is_told() -> None:
    """With the nearest that there is."""
    with pytest.raises(ConfigError, match="did you mean 'many-100MB'"):
        make_state("many-10MB")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """A report of a small state, and the folder in which it was measured."""
    folder = tmp_path_factory.mktemp("bench")
    (folder / "mine").write_text("kept")
    done = ckpt_tasks(
        *("bench", "--store", str(folder), "--state", "20MB", "--rounds", "1", "--json"),
        *("--plot", str(folder / "plot.svg")),
        folder=folder,
    )
    assert done.code == 0, done.err
    (report,) = done.json
    return report, folder


def test_command_measures_us_and_others(measured: tuple[dict[str, Any], Path]) -> None:
    """Each operation has a time, and peers that are installed are there."""
    report, _ = measured
    parts = ("limits", "saves", "loads", "async_saves")
    names = {part: {figure["name"] for figure in report[part]} for part in parts}
    assert names["limits"] == {"copy", "hash", "raw write", "raw read"}
    assert names["saves"] == {"ckpt-tasks", "torch.save + fsync", "safetensors + fsync", "DCP"}
    assert names["loads"] == {
        *("ckpt-tasks", "ckpt-tasks, model only", "torch.load", "safetensors", "DCP")
    }
    assert names["async_saves"] == {
        *("ckpt-tasks", "ckpt-tasks, overlapped", "DCP, thread", "DCP, process")
    }
    assert report["missing"] == []
    assert all(f["seconds"] > 0 for part in parts[:3] for f in report[part])
    assert all(0 < f["stall"] < f["stall"] + f["drain"] for f in report["async_saves"])
    assert report["planning"] > 0


def test_what_follows_is_said(measured: tuple[dict[str, Any], Path]) -> None:
    """What bounds each, and the interval that pays, from what an asynchronous save costs."""
    advice = measured[0]["advice"]
    assert "bounds a blocking save" in advice["save"]
    assert "bounds what an asynchronous save holds training up" in advice["asynchronous"]
    assert "bounds a load" in advice["load"]
    assert advice["every"] >= math.sqrt(2 * advice["cost"] * 6 * 3600) * 0.999


def test_what_has_not_changed_is_not_written(measured: tuple[dict[str, Any], Path]) -> None:
    """Of a model that is mostly frozen, a save writes little."""
    for resave in measured[0]["resaves"]:
        assert 0 < resave["written"] < 0.4


def test_report_is_typed(measured: tuple[dict[str, Any], Path]) -> None:
    """What is printed as JSON is a `BenchReport`."""
    report = msgspec.convert(measured[0], BenchReport)
    assert msgspec.to_builtins(report) == measured[0]


def test_memory_stays_as_it_is(measured: tuple[dict[str, Any], Path]) -> None:
    """It holds the state once, whatever is measured beside it, and no more with each save.

    Beside a state this small, the writer's own memory is about as large: three times would be
    two arenas.
    """
    memory = measured[0]["memory"]
    assert 1 <= memory["after_first"] < 3
    assert abs(memory["after_last"] - memory["after_first"]) < 0.5


def test_nothing_is_left(measured: tuple[dict[str, Any], Path]) -> None:
    """The store is as it was."""
    assert sorted(path.name for path in measured[1].iterdir()) == ["mine", "plot.svg"]


def test_bars_are_as_long_as_seconds_are_many(measured: tuple[dict[str, Any], Path]) -> None:
    """Within a section, of a picture that is well-formed."""
    report, folder = measured
    root = ElementTree.parse(folder / "plot.svg").getroot()  # noqa: S314 - of our own making
    space = "{http://www.w3.org/2000/svg}"
    widths = [float(bar.get("width", 0)) for bar in root.iter(f"{space}rect")][1:]
    seconds = [figure["seconds"] for figure in report["saves"]]
    first = widths[: len(seconds)]
    for width, value in zip(first, seconds, strict=True):
        assert width == pytest.approx(max(first) * value / max(seconds), abs=2)


def test_one_that_is_not_installed_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a word on each, and the others are measured."""
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "torch.distributed.checkpoint.state_dict_saver", None)
    saves, loads, missing = peers(LocalPlace(tmp_path), make_state("1MB"))

    assert [each.name for each in saves] == ["torch.save + fsync"]
    assert [each.name for each in loads] == ["torch.load"]
    assert missing[0] == "safetensors: not installed"
    assert missing[1].startswith("DCP: ")
    assert len(missing) == 2


def test_one_that_hangs_is_left_out(tmp_path: Path) -> None:
    """In time, with a word, and without the process that hangs; the others go on."""
    items = make_state("1MB")
    place = LocalPlace(tmp_path)
    before = set(multiprocessing.active_children())
    thread = DcpThread(place, items)
    process = DcpProcess(place, items, scratch=tmp_path, limit=60)
    (child,) = set(multiprocessing.active_children()) - before
    assert child.pid is not None
    os.kill(child.pid, signal.SIGSTOP)
    try:
        rounds = alternate_async(Training(), [process, thread], lambda: None, 1, limit=2)
    finally:
        thread.stop()
        process.stop()

    assert list(rounds.saves) == [thread.name]
    assert rounds.missing == [f"{process.name}: not durable after 2 s"]
    assert not child.is_alive()


@pytest.mark.parametrize(("raised", "told"), [(KeyboardInterrupt, "Ctrl-C"), (OSError, "no room")])
def test_what_dcp_wraps_is_raised_as_it_is(
    raised: type[BaseException], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the midst of its save is no save that failed, after which others are measured."""

    def prepare(*_: object) -> None:
        raise raised(told)

    monkeypatch.setattr(FileSystemWriter, "prepare_local_plan", prepare)
    place, items = LocalPlace(tmp_path), make_state("1MB")
    saves, _, _ = peers(place, items)
    with pytest.raises(raised, match=told):
        saves[-1].run(1)
    thread = DcpThread(place, items)
    thread.begin(1)
    wait_until(thread._future.done, "the save has failed")  # type: ignore[union-attr]
    with pytest.raises((KeyboardInterrupt, NotMeasuredError), match=told) as told_of:
        thread.is_done()
    assert isinstance(told_of.value, KeyboardInterrupt) == (raised is KeyboardInterrupt)
    with contextlib.suppress(KeyboardInterrupt):
        thread.stop()
    assert not (tmp_path / "peer-async.dcp").exists()


def test_interrupt_leaves_nothing(tmp_path: Path) -> None:
    """Ctrl-C ends a writer and DCP's process too, and removes what they had written."""
    store = tmp_path / "store"  # made by the command
    command = subprocess.Popen(
        [COMMAND, "bench", "--store", str(store), "--state", "1MB", "--rounds", "5"],
        cwd=tmp_path,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    try:
        while not list(store.glob(".ckpt-tasks-bench-*/peers/peer-async.dcp")):
            assert command.poll() is None
            time.sleep(0.05)
        os.killpg(command.pid, signal.SIGINT)
        _, said = command.communicate(timeout=60)  # until the writer has closed it as well
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(command.pid, signal.SIGKILL)

    assert command.returncode == 130, said
    assert list(tmp_path.iterdir()) == []


def test_a_plot_that_cannot_be_is_refused_at_once(tmp_path: Path) -> None:
    """Before minutes of measuring."""
    for name, says in (("plot.png", "ends with .svg"), ("nowhere/plot.svg", "no such folder")):
        done = ckpt_tasks("bench", "--plot", str(tmp_path / name), folder=tmp_path)
        assert done.code == 2
        assert says in done.err


def test_other_stores_are_measured_too() -> None:
    """What is written there is removed; what only this process sees has no writer beside it."""
    from ckpt_tasks.store import open_store

    config = StoreConfig(url="memory://bench")
    report = run_bench(config, "20MB", rounds=1, mean_time_between_failures=3600)

    assert report.size == pytest.approx(20e6, rel=0.05)
    with open_store(config) as store:
        assert store.list_objects("") == []
