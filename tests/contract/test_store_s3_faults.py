"""S3 over a network that fails, on servers that are not what they claim, and without a key."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.certificates import self_signed
from support.s3_proxy import Faults, Request, s3_proxy
from support.s3_servers import S3Server, free_port

from ckpt_tasks.config import StoreConfig
from ckpt_tasks.errors import ConfigError, ObjectExistsError, StoreError
from ckpt_tasks.store import Store, create_once, open_store, retry, s3_client

pytestmark = pytest.mark.usefixtures("s3_credentials")

LARGE = bytes(range(256)) * (20 * 4096)  # 20 MiB: three parts


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same number of tries as always, without the waits between them."""
    monkeypatch.setattr(retry, "_DELAYS", (0.0,) * len(retry._DELAYS))


def config_of(server: S3Server, **options: object) -> StoreConfig:
    bucket, place = server.new_place()
    return StoreConfig(
        url=f"s3://{bucket}/{place}", options={"endpoint_url": server.endpoint}, **options
    )


@pytest.fixture
def store(s3_credentials: dict[str, str], faulty_s3: tuple[S3Server, Faults]) -> Iterator[Store]:
    store = open_store(config_of(faulty_s3[0]))
    yield store
    store.close()


@pytest.fixture
def faults(faulty_s3: tuple[S3Server, Faults]) -> Faults:
    return faulty_s3[1]


def is_part(request: Request, number: int) -> bool:
    return request.method == "PUT" and f"partNumber={number}&" in f"{request.path}&"


def uploads_left(store: Store) -> list[str]:
    """Keys of this test's uploads that are neither completed nor aborted."""
    bucket, _, place = store.url.removeprefix("s3://").partition("/")
    listed = store._fs.call_s3("list_multipart_uploads", Bucket=bucket).get("Uploads", [])
    return [upload["Key"] for upload in listed if upload["Key"].startswith(place)]


def is_beginning(request: Request) -> bool:
    return request.method == "POST" and request.path.endswith("?uploads")


def is_completion(request: Request) -> bool:
    return request.method == "POST" and "uploadId=" in request.path


class TestServerThatIgnoresConditions:
    """It overwrites what `create` must not: found out by a probe."""

    def test_refused_for_writing(self, faulty_s3: tuple[S3Server, Faults]) -> None:
        """It may be read, but two attempts must not write to it; the error says what to do."""
        server, faults = faulty_s3
        faults.strip_conditions = True
        config = config_of(server)
        open_store(config)
        with pytest.raises(ConfigError, match="single_writer = true"):
            open_store(config, for_writing=True)

    def test_single_writer_may_write(self, faulty_s3: tuple[S3Server, Faults]) -> None:
        """Declared single-writer it is used, says what it lacks, and still never overwrites."""
        server, faults = faulty_s3
        faults.strip_conditions = True
        store = open_store(config_of(server, single_writer=True), for_writing=True)
        assert not store.supports_conditional_create
        store.create("run/x", b"first")
        with pytest.raises(ObjectExistsError):
            store.create("run/x", b"second")
        assert store.read("run/x") == b"first"

    def test_probe_leaves_nothing(self, faulty_s3: tuple[S3Server, Faults]) -> None:
        """The object that the probe makes is gone afterwards, whatever the answer was."""
        server, faults = faulty_s3
        config = config_of(server, single_writer=True)
        bucket, _, place = config.url.removeprefix("s3://").partition("/")
        for strip in (False, True):
            faults.strip_conditions = strip
            open_store(config, for_writing=True)
            assert server.client().list_objects_v2(Bucket=bucket, Prefix=place)["KeyCount"] == 0

    def test_probed_once(self, faulty_s3: tuple[S3Server, Faults]) -> None:
        """A process asks a store once; a store that honours conditions says so."""
        server, faults = faulty_s3
        config = config_of(server)
        assert open_store(config, for_writing=True).supports_conditional_create
        asked = len(faults.seen)
        assert open_store(config, for_writing=True).supports_conditional_create
        assert [request.method for request in faults.seen[asked:]] == ["GET"]


class TestLostAnswers:
    """A request that landed though its sender was told otherwise."""

    @pytest.mark.parametrize("lost", [1, 2, 4, 6])
    def test_create_once_finds_its_own(self, store: Store, faults: Faults, lost: int) -> None:
        """However many answers are lost, in one call or over several, the object is ours."""
        faults.drop_answers = lost
        assert create_once(store, "run/x", b"ours", sleep=lambda seconds: None) is True
        assert faults.drop_answers == 0
        assert store.read("run/x") == b"ours"
        assert create_once(store, "run/x", b"theirs") is False

    def test_lost_request_is_repeated(self, store: Store, faults: Faults) -> None:
        """A create that never arrived is sent again."""
        faults.drop_requests = 5
        assert create_once(store, "run/x", b"ours", sleep=lambda seconds: None) is True
        assert store.read("run/x") == b"ours"

    def test_small_write_finds_its_own(self, store: Store, faults: Faults) -> None:
        """A data object whose answer was lost is there, and is not somebody else's."""
        faults.drop_answers = 1
        store.write("run/data/w/x", [b"bytes"], 5)
        assert faults.drop_answers == 0
        assert store.read("run/data/w/x") == b"bytes"

    def test_large_write_finds_its_own(self, store: Store, faults: Faults) -> None:
        """So is one uploaded in parts, when the answer to its completion is lost."""
        faults.matching = is_completion
        faults.drop_answers = 1
        store.write("run/data/w/x", [LARGE], len(LARGE))
        assert faults.drop_answers == 0
        assert store.read("run/data/w/x") == LARGE

    @pytest.mark.parametrize("status", [404, 412])
    def test_completed_upload_is_unknown(self, store: Store, faults: Faults, status: int) -> None:
        """Servers refuse to complete again what they have completed, as gone or as existing."""

        def matching(request: Request) -> bool:
            if is_completion(request) and faults.drop_answers == 0:
                faults.answer_status, faults.answer_status_times = status, 1
            return is_completion(request)

        faults.matching = matching
        faults.drop_answers = 1
        store.write("run/data/w/x", [LARGE], len(LARGE))
        assert store.read("run/data/w/x") == LARGE
        refused = [request for request in faults.seen if is_completion(request)]
        assert len(refused) == 2

    @pytest.mark.parametrize("lost", [1, 2, 10_000])
    def test_upload_without_a_name_is_aborted(
        self, store: Store, faults: Faults, lost: int
    ) -> None:
        """An upload that was begun, and whose name was lost with the answer, is not left over."""
        faults.matching = is_beginning
        faults.drop_answers = lost
        if lost > 2:
            with pytest.raises(StoreError, match="run/data/w/x"):
                store.write("run/data/w/x", [LARGE], len(LARGE))
        else:
            store.write("run/data/w/x", [LARGE], len(LARGE))
        assert faults.drop_answers == max(lost - len(retry._DELAYS) - 1, 0)
        assert uploads_left(store) == []


class TestServerThatFails:
    """Errors of the server and of the network."""

    def test_busy_server_is_asked_again(self, store: Store, faults: Faults) -> None:
        """A few answers of 503, 429 or 500 delay an operation, and are no error."""
        faults.matching = lambda request: True
        statuses = itertools.cycle((503, 429, 500))
        for act in (
            lambda: store.create("run/x", b"1"),
            lambda: store.read("run/x"),
            lambda: store.exists("run/x"),
            lambda: store.list_objects(""),
            lambda: store.put("run/x", b"2"),
            lambda: store.write("run/y", [b"1"], 1),
            lambda: store.delete("run/x"),
        ):
            faults.answer_status = next(statuses)
            faults.answer_status_times = 3
            act()
            assert faults.answer_status_times == 0

    def test_retries_draw_no_random_numbers(self, store: Store, faults: Faults) -> None:
        """A save with retries leaves the global generator, which is the training's, alone."""
        before = random.getstate()
        faults.matching = lambda request: True
        faults.answer_status = 503
        faults.answer_status_times = 3
        store.write("run/data/w/x", [LARGE], len(LARGE))
        faults.drop_requests = 2
        assert create_once(store, "run/x", b"1")
        assert random.getstate() == before

    def test_lasting_failure_is_a_store_error(self, store: Store, faults: Faults) -> None:
        """A server that stays broken raises an error worth retrying, which names the object."""
        faults.matching = lambda request: True
        faults.answer_status = 500
        faults.answer_status_times = 10_000
        for act in (
            lambda: store.create("run/x", b"1"),
            lambda: store.read("run/x"),
            lambda: store.exists("run/x"),
            lambda: store.put("run/x", b"2"),
            lambda: store.write("run/x", [b"1"], 1),
            lambda: store.delete("run/x"),
        ):
            with pytest.raises(StoreError, match="run/x") as caught:
                act()
            assert type(caught.value) is StoreError
        with pytest.raises(StoreError):
            store.list_objects("")

    def test_failed_upload_is_aborted(self, store: Store, faults: Faults) -> None:
        """When a part cannot be sent, no object and no hidden, paid-for parts are left."""
        faults.matching = lambda request: is_part(request, 2)
        faults.drop_requests = 10_000
        with pytest.raises(StoreError, match="run/data/w/x"):
            store.write("run/data/w/x", [LARGE], len(LARGE))
        assert not store.exists("run/data/w/x")
        assert uploads_left(store) == []

    def test_large_object_is_not_overwritten(self, store: Store) -> None:
        """An upload in parts to a name that is taken is refused."""
        store.create("run/data/w/x", b"first")
        with pytest.raises(ObjectExistsError):
            store.write("run/data/w/x", [LARGE], len(LARGE))
        assert store.read("run/data/w/x") == b"first"

    def test_nothing_listens(self) -> None:
        """A server that is away is an error worth retrying, which names the store."""
        config = StoreConfig(
            url="s3://bucket/x", options={"endpoint_url": f"http://127.0.0.1:{free_port()}"}
        )
        with pytest.raises(StoreError, match=r"cannot reach s3://bucket/x"):
            open_store(config)


class TestReadingRanges:
    """What a load does: many ranges, each in one request."""

    SIZE = 3 * 1024 * 1024
    CONTENT = random.Random(1).randbytes(SIZE)  # noqa: S311

    @pytest.fixture(autouse=True)
    def content(self, store: Store, faults: Faults) -> None:
        store.write("run/data/w/x", [self.CONTENT], self.SIZE)
        faults.seen.clear()
        faults.matching = lambda request: request.method == "GET"

    def test_one_request_each(self, store: Store, faults: Faults) -> None:
        """A range costs one request: nobody asks for the object's size first."""
        buffer = memoryview(bytearray(2000))
        store.read_into("run/data/w/x", 1000, 3000, buffer)
        assert bytes(buffer) == self.CONTENT[1000:3000]
        assert store.read_range("run/data/w/x", 0, self.SIZE) == self.CONTENT
        assert [request.method for request in faults.seen] == ["GET", "GET"]

    def test_cut_answer_goes_on(self, store: Store, faults: Faults) -> None:
        """An answer that is cut off is continued where it was cut, not begun again."""
        faults.cut_answers = 2
        buffer = memoryview(bytearray(self.SIZE - 500))
        store.read_into("run/data/w/x", 500, self.SIZE, buffer)
        assert buffer == self.CONTENT[500:]
        ranges = [request.headers["Range"] for request in faults.seen]
        starts = [int(asked.removeprefix("bytes=").partition("-")[0]) for asked in ranges]
        assert len(starts) == 3
        assert 500 == starts[0] < starts[1] < starts[2]

    def test_cut_answer_of_a_whole_object(self, store: Store, faults: Faults) -> None:
        """A whole object, such as a record, is read again."""
        faults.cut_answers = 2
        assert store.read("run/data/w/x") == self.CONTENT
        assert faults.cut_answers == 0

    def test_silent_server(
        self,
        faulty_s3: tuple[S3Server, Faults],
        store: Store,
        faults: Faults,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """A server that takes a request and never answers is given up, and asked again."""
        monkeypatch.setitem(s3_client.TIMEOUTS, "read_timeout", 1.0)
        url = store.url
        with open_store(
            StoreConfig(url=url, options={"endpoint_url": faulty_s3[0].endpoint})
        ) as hasty:
            faults.stall_answers = 1
            assert hasty.read_range("run/data/w/x", 10, 20) == self.CONTENT[10:20]
            faults.matching = lambda request: is_part(request, 2)
            faults.stall_answers = 1
            hasty.write("run/data/w/y", [LARGE], len(LARGE))
        assert faults.stall_answers == 0
        assert store.read("run/data/w/y") == LARGE

    def test_lasting_cut_is_a_store_error(self, store: Store, faults: Faults) -> None:
        """Answers that never come whole raise an error worth retrying, which names the object."""
        faults.cut_answers = 10_000
        for read in (
            lambda: store.read("run/data/w/x"),
            lambda: store.read_range("run/data/w/x", 0, self.SIZE),
        ):
            with pytest.raises(StoreError, match="run/data/w/x") as caught:
                read()
            assert type(caught.value) is StoreError


class TestChangedBytes:
    """A bit flips on the way; the emulator compares nothing, so its ETags are looked at."""

    @pytest.mark.parametrize("part", [1, 2, 3])
    def test_part_is_sent_again(self, store: Store, faults: Faults, part: int) -> None:
        """A part that arrived changed is replaced before the upload is completed."""
        faults.matching = lambda request: is_part(request, part)
        faults.corrupt_bodies = 2
        store.write("run/data/w/x", [LARGE], len(LARGE))
        assert faults.corrupt_bodies == 0
        assert store.read("run/data/w/x") == LARGE

    def test_without_checksums(
        self, store: Store, faults: Faults, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Where botocore is told to send no checksums, none are sent, and the ETag suffices."""
        monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
        faults.matching = lambda request: is_part(request, 2)
        faults.corrupt_bodies = 1
        store.write("run/data/w/x", [LARGE], len(LARGE))
        store.write("run/data/w/y", [b"small"], 5)
        assert faults.corrupt_bodies == 0
        assert store.read("run/data/w/x") == LARGE
        names = {name.lower() for request in faults.seen for name in request.headers}
        assert not any(name.startswith("x-amz-checksum") for name in names)

    def test_never_completed(self, store: Store, faults: Faults) -> None:
        """If it arrives changed each time, the write fails, and nothing is left of it."""
        faults.matching = lambda request: is_part(request, 2)
        faults.corrupt_bodies = 10_000
        with pytest.raises(StoreError, match="changed on the way"):
            store.write("run/data/w/x", [LARGE], len(LARGE))
        assert not store.exists("run/data/w/x")
        assert uploads_left(store) == []

    def test_small_object_is_sent_again(self, store: Store, faults: Faults) -> None:
        """An object of one request is replaced as well, or if that never helps, removed."""
        faults.corrupt_bodies = 2
        store.write("run/data/w/x", [b"0123456789"], 10)
        assert faults.corrupt_bodies == 0
        assert store.read("run/data/w/x") == b"0123456789"
        faults.corrupt_bodies = 10_000
        with pytest.raises(StoreError, match="changed on the way"):
            store.write("run/data/w/y", [b"0123456789"], 10)
        assert not store.exists("run/data/w/y")


def test_real_server_asks_for_a_changed_part_again(seaweedfs: S3Server) -> None:
    """A part that a real server refused, as its bits had flipped, is sent again."""
    with s3_proxy(seaweedfs) as (server, faults):
        store = open_store(config_of(server))
        for number in (1, 3):
            faults.matching = lambda request, number=number: is_part(request, number)
            faults.corrupt_bodies = 2
            store.write(f"run/data/w/{number}", [LARGE], len(LARGE))
            assert faults.corrupt_bodies == 0
            assert store.read(f"run/data/w/{number}") == LARGE
        store.close()


def test_over_tls(seaweedfs: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bodies are not signed, as TLS protects them; a changed one is known by its checksum alone."""
    certificate = self_signed(tmp_path / "certificate.pem")
    monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate))
    with s3_proxy(seaweedfs, certificate=certificate) as (server, faults):
        store = open_store(config_of(server))
        faults.matching = lambda request: is_part(request, 2)
        faults.corrupt_bodies = 1
        store.write("run/data/w/x", [LARGE], len(LARGE))
        assert faults.corrupt_bodies == 0
        assert store.read("run/data/w/x") == LARGE
        assert store.read_range("run/data/w/x", 5, 5000) == LARGE[5:5000]
        store.close()
    parts = [request.headers for request in faults.seen if "partNumber" in request.path]
    assert len(parts) == 4
    for headers in parts:
        assert headers["X-Amz-Content-SHA256"] == "UNSIGNED-PAYLOAD"
        assert headers["x-amz-checksum-crc32"]
        assert "Expect" not in headers


def test_bytes_changed_on_the_way_are_refused(seaweedfs: S3Server) -> None:
    """A real server notices a bit that flips on the way, and the write fails."""
    with s3_proxy(seaweedfs) as (server, faults):
        store = open_store(config_of(server))
        for data in (b"0123456789" * 100, LARGE):
            faults.corrupt_bodies = 10_000
            with pytest.raises(StoreError):
                store.write("run/data/w/x", [data], len(data))
            assert faults.corrupt_bodies < 10_000
            faults.corrupt_bodies = 0
            assert not store.exists("run/data/w/x")
        store.close()


class TestAccess:
    """What is wrong with credentials or the bucket is said once, early, in plain words."""

    def test_missing_bucket(self, moto_server: S3Server) -> None:
        """A bucket that does not exist is a mistake in the configuration."""
        config = StoreConfig(url="s3://not-here/x", options={"endpoint_url": moto_server.endpoint})
        with pytest.raises(ConfigError, match="there is no bucket 'not-here'"):
            open_store(config)

    def test_only_the_own_prefix_is_listed(self, faulty_s3: tuple[S3Server, Faults]) -> None:
        """An account that may list nothing but the store's prefix of the bucket can use it."""
        server, faults = faulty_s3
        config = config_of(server)
        open_store(config).close()
        listed = [request.path for request in faults.seen if "list-type=2" in request.path]
        assert listed
        place = config.url.rpartition("/")[2]
        assert all(f"prefix={place}%2F" in path for path in listed), listed

    def test_missing_credentials(
        self, moto_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path
    ) -> None:
        """Without credentials the message names the variables to set."""
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
            monkeypatch.setenv(name, str(tmp_path / "none"))
        with pytest.raises(ConfigError, match="AWS_ACCESS_KEY_ID"):
            open_store(config_of(moto_server))

    def test_wrong_credentials(self, seaweedfs: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
        """Refused credentials are no reason to retry, and the secret is not in the message."""
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush-hush")
        with pytest.raises(ConfigError, match="denied") as caught:
            open_store(config_of(seaweedfs))
        assert "hush-hush" not in str(caught.value)
