"""Retention on an object store: its clock, its listings, and uploads that were never completed."""

from __future__ import annotations

from support.retained_runs import RetainedRun, state_of
from support.s3_servers import S3Server

from ckpt_tasks.config import StoreConfig
from ckpt_tasks.retention import collect
from ckpt_tasks.store import open_store


def test_what_has_expired_goes_with_abandoned_uploads(
    moto_server: S3Server, s3_credentials: dict[str, str]
) -> None:
    """Shared bytes stay, the rest goes; so does an upload that is old enough."""
    bucket, place = moto_server.new_place()
    config = StoreConfig(
        url=f"s3://{bucket}/{place}", options={"endpoint_url": moto_server.endpoint}
    )
    run = RetainedRun(open_store(config))
    attempt = run.begin()
    for step in range(1, 5):
        attempt.save(step, state_of(step))
    key = f"{place}/{run.layout.data}a0001-s0009-dead/model.rank0000.safetensors"
    moto_server.client().create_multipart_upload(Bucket=bucket, Key=key)
    plan = collect(run.store, run.name, grace=3600.0, by="a test", dry_run=True)
    assert (plan.uploads, plan.removed) == (1, [])
    report = run.expire_and_collect(latest=2)
    # moto says of every upload that it was begun in 2010; real ages: test_store_s3_link.
    assert (len(report.removed), report.uploads, report.refused) == (2, 1, None)
    assert [c.step for c in run.left()] == [3, 4]
    run.check_whole()
    assert run.collect().uploads == 0
