"""What ``maintain`` prints, and how it exits."""

from __future__ import annotations

from support.made_runs import MadeRun


def test_a_store_is_maintained(call, store_path, stored):
    """A table of what changed and a total; what is wrong with a run names itself, and exits with 1
    after the others. A replica is left alone, and is no trouble.
    """
    broken = MadeRun(stored.run.store, "broken")
    maintain = ("maintain", "--store", store_path, "--keep-latest", "1", "--grace", "0.001s")
    told = call(*maintain, "--dry-run")
    assert (told.code, "no registry is configured" in told.err) == (0, True)
    assert told.out.splitlines()[-1].startswith("2 runs: 0 checkpoints would be registered; ")
    assert "2 checkpoints would be expired" in told.out
    assert stored.first in call("ls", "digits cnn", "--store", store_path).out

    elsewhere = f"{store_path}-copy"
    call("copy", "digits cnn", "--to", elsewhere, "--store", store_path)
    replica = call("maintain", "--store", elsewhere, "--keep-latest", "1", "--json")
    assert (replica.code, replica.json["total"]["expired"], replica.json["total"]["kept"]) == (
        (0, 0, 3)
    )

    broken.damage(broken.layout.run_record, position=3)
    done = call(*maintain)
    lines = done.out.splitlines()
    assert lines[0].split()[:2] == ["RUN", "REGISTERED"]
    assert lines[1].split()[:6] == ["digits", "cnn", "0", "0", "2", "2"]
    assert len(lines) == 3
    assert (done.code, "broken: " in done.err) == (1, True)

    chosen = call(*maintain, "--run-pattern", "digits*", "--json")
    assert (chosen.code, chosen.json["total"]["kept"]) == (0, 1)
    assert [run["run"] for run in chosen.json["runs"]] == ["digits cnn"]
