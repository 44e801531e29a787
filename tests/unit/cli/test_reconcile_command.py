"""What ``reconcile`` prints, and how it exits."""

from __future__ import annotations


def test_one_run_and_all_of_a_store(call, store_path, stored):
    """What is wrong with a run names itself and exits with 1; one run is JSON, all are a list."""
    told = call("reconcile", "digits cnn", "--store", store_path, "--dry-run")
    assert (told.code, told.out) == (0, "run 'digits cnn': nothing to change\n")
    assert "no registry is configured" in told.err
    assert call("reconcile", "digits cnn", "--store", store_path, "--json").json["changes"] == []
    stored.run.store.put(f"{stored.run.layout.root}/run.json", b"{}")
    broken = call("reconcile", "--store", store_path, "--json")
    assert broken.code == 1
    (report,) = broken.json
    assert "cannot be identified" in report["problem"]
    assert call("reconcile", "none", "--store", store_path).code == 4
