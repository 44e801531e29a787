"""What ``expire``, ``collect``, ``pin`` and ``unpin`` do and print, and how they exit."""

from __future__ import annotations

import re

GRACE = "0.001s"


def test_each_verdict_has_its_reason(call, store_path, stored):
    """A dry run tells what an expiry then does, and of which checkpoint why."""
    asked = ("expire", "digits cnn", "--store", store_path, "--keep-latest", "1")
    told = call(*asked, "--dry-run")
    assert (told.code, told.err) == (0, "")
    lines = told.out.splitlines()
    assert lines[0].split() == ["CHECKPOINT", "SIZE", "VERDICT", "WHY"]
    assert lines[1].endswith("keep     the newest that a retry would start from; latest 1")
    assert re.search(r"expire   zombie: a later attempt went on", lines[2])
    assert lines[3].endswith("expire   no rule keeps it")
    assert "expired" not in call("ls", "digits cnn", "--store", store_path).out
    assert call(*asked).out == told.out
    assert call("ls", "digits cnn", "--store", store_path).out.count(" expired ") == 2
    verdicts = call(*asked, "--json").json["verdicts"]
    assert [verdict["keep"] for verdict in verdicts] == [True, False, False]


def test_what_has_expired_is_collected(call, store_path, stored):
    """After the grace, which is told; the rest of the store stays."""
    call("expire", "digits cnn", "--store", store_path, "--keep-latest", "1")
    collect = ("collect", "digits cnn", "--store", store_path)
    assert f"{stored.first}: stays: 3600 s of grace left" in call(*collect).out
    told = call(*collect, "--grace", GRACE, "--dry-run").out
    assert f"{stored.first}: would be removed" in told
    done = call(*collect, "--grace", GRACE, "--json").json
    assert sorted(done["removed"]) == [stored.first, stored.zombie]
    assert done["verified"] == stored.newest
    assert call("verify", "digits cnn", "--all", "--store", store_path).code == 0


def test_a_pinned_one_stays(call, store_path, stored):
    """Also one that has expired; unpinned, it is left to the rules again."""
    at = f"digits cnn@{stored.first}"
    expire = ("expire", "digits cnn", "--store", store_path, "--keep-latest", "1")
    call(*expire)
    assert call("pin", at, "--why", "the paper", "--store", store_path).code == 0
    assert "pinned: the paper (ckpt-tasks on " in call(*expire).out
    call("collect", "digits cnn", "--grace", GRACE, "--store", store_path)
    assert stored.first in call("ls", "digits cnn", "--store", store_path).out
    assert "is no longer pinned" in call("unpin", at, "--store", store_path).out
    assert "was not pinned" in call("unpin", at, "--store", store_path).out


def test_one_is_expired_by_hand(call, store_path, stored):
    """Any but those that must stay; the error names why."""
    expired = call("expire", f"digits cnn@{stored.first}", "--store", store_path)
    assert expired.out == f"{stored.first} of run 'digits cnn' is no longer kept\n"
    refused = call("expire", f"digits cnn@{stored.newest}", "--store", store_path)
    assert refused.code == 2
    assert "stays: the newest that a retry would start from" in refused.err


def test_mistakes(call, store_path, stored):
    """Each names itself."""
    assert call("pin", "digits cnn", "--store", store_path).code == 2
    missing = call("pin", "digits cnn@step-00000009-a9-s9", "--store", store_path)
    assert (missing.code, "has no checkpoint" in missing.err) == (4, True)
    assert call("collect", "digitz", "--store", store_path).code == 4
    wrong = call("expire", "digits cnn", "--store", store_path, "--keep-best", "loss")
    assert (wrong.code, "which way is better" in wrong.err) == (2, True)


def test_nothing_is_deleted_where_needs_are_unknown(call, store_path, stored):
    """It says so, and exits with 1."""
    call("expire", "digits cnn", "--store", store_path, "--keep-latest", "1")
    run = stored.run
    run.store.put(f"{run.layout.root}/mlflow.json", b"{}")
    refused = call("collect", "digits cnn", "--grace", GRACE, "--store", store_path)
    assert refused.code == 1
    assert "stopped: what the registry holds is not known" in refused.err
    assert stored.first in call("ls", "digits cnn", "--store", store_path).out
