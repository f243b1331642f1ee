"""``/v1/files``: what is stored, where, and for whom."""

import asyncio
import os
import stat
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fastapi.responses import FileResponse
from sqlalchemy.orm import Session
from starlette.testclient import TestClient
from starlette.types import ASGIApp

from jobs.api.config import RoutesConfig
from jobs.api.database import Database, Page, new_id
from jobs.api.replies import download
from jobs.api.shelf import Shelf
from serving.errors import ConfigError, DatabaseAwayError, NotFoundError
from serving.tenants.database import database_address
from serving.tenants.tables import FileRow
from tests.jobs.routed import IDLE, as_tenant, ask, create_batch, jsonl, routed, upload
from tests.serving.tenants.conftest import Clock

pytestmark = pytest.mark.usefixtures("home")

MIB = 1 << 20
FORM = "multipart/form-data; boundary=b"


@pytest.fixture
def client() -> Iterator[TestClient]:
    """Of a gateway that runs nothing."""
    with routed() as found:
        yield found


def stored(home: Path) -> list[Path]:
    """All files of all tenants, whatever they are called."""
    return [path for path in (home / "files").rglob("*") if path.is_file()]


def form(data: bytes, *, name: bytes = b"x", purpose: bytes = b"batch", end: bytes = b"--b--\r\n") -> bytes:
    """A form as it goes over the wire."""
    head = b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\n' + purpose + b"\r\n"
    file = b'--b\r\nContent-Disposition: form-data; name="file"; filename="' + name + b'"\r\n\r\n' + data + b"\r\n"
    return head + file + end


def post(client: TestClient, body: bytes, content_type: str = FORM) -> Any:
    return client.post("/v1/files", content=body, headers={"Content-Type": content_type})


def test_a_file_is_told_of_read_listed_and_deleted(client: TestClient, home: Path) -> None:
    answer = client.post("/v1/files", files={"file": ("my lines.jsonl", b"{}\n")}, data={"purpose": "batch"})
    told = answer.json()
    file_id, created = told["id"], told["created_at"]
    assert told == {
        "id": file_id,
        "object": "file",
        "bytes": 3,
        "created_at": created,
        "filename": "my lines.jsonl",
        "purpose": "batch",
        "status": "processed",
        "expires_at": created + 30 * 86_400,
    }
    assert client.get(f"/v1/files/{file_id}").json() == told
    content = client.get(f"/v1/files/{file_id}/content")
    assert (content.content, content.headers["x-content-type-options"]) == (b"{}\n", "nosniff")
    assert content.headers["content-disposition"] == f'attachment; filename="{file_id}"'
    assert client.get("/v1/files").json()["data"] == [told]
    (path,) = stored(home)
    assert path.name == file_id
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert client.delete(f"/v1/files/{file_id}").json() == {"id": file_id, "object": "file", "deleted": True}
    assert client.get(f"/v1/files/{file_id}").status_code == 404
    assert stored(home) == []


@pytest.mark.parametrize(
    ("wanted", "status", "told"),
    [
        ("bytes=2-4", 206, b"234"),
        ("bytes=-3", 206, b"789"),
        ("bytes=10-", 416, "no_such_range"),
        ("bytes=4-2", 400, "bytes=FROM-TO"),
        ("bytes", 400, "bytes=FROM-TO"),
        ("lines=0-5", 200, b"0123456789"),
    ],
)
def test_a_range_is_answered_or_refused_as_all_is(
    client: TestClient, wanted: str, status: int, told: bytes | str
) -> None:
    path = f"/v1/files/{upload(client, b'0123456789')}/content"
    answer = client.get(path, headers={"Range": wanted})
    assert answer.status_code == status
    if isinstance(told, bytes):
        assert answer.content == told
    else:
        assert told in str(answer.json()["error"])
        assert answer.headers.get("content-range") == ("bytes */10" if status == 416 else None)


@pytest.mark.parametrize("headers", [{}, {"Range": "bytes=2-4"}])
def test_a_file_that_is_deleted_while_it_is_asked_for_is_not_found(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, headers: dict[str, str]
) -> None:
    def found_and_gone(path: str, name: str) -> FileResponse:
        Path(path).unlink()
        return download(path, name)

    monkeypatch.setattr("jobs.api.files.download", found_and_gone)
    answer = client.get(f"/v1/files/{upload(client, b'0123456789')}/content", headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")


def test_what_was_written_is_whole_although_the_answer_is_lost(
    client: TestClient, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The database has done it, the connection broke before it said so: the client may not, but others see it."""
    sent = {"input_file_id": upload(client, jsonl(ask("a"))), "completion_window": "24h"}
    begin = Database.session

    @contextmanager
    def lossy(database: Database, *, writes: bool = False) -> Iterator[Session]:
        with begin(database, writes=writes) as session:
            yield session
        if writes:
            raise DatabaseAwayError("the connection broke.", remedy="Try again.")

    with monkeypatch.context() as broken:
        broken.setattr(Database, "session", lossy)
        assert post(client, form(b"x")).status_code == 503
        assert client.post("/v1/batches", json=sent | {"endpoint": "/v1/completions"}).status_code == 503
    (newest, _) = client.get("/v1/files").json()["data"]
    assert client.get(f"/v1/files/{newest['id']}/content").content == b"x"
    (batch,) = client.get("/v1/batches").json()["data"]
    shelf = Shelf(Database(database_address()), home / "files", most_bytes=1, most_files=1)
    assert shelf.work_folder("acme", batch["id"]).source("batch").read_bytes() == jsonl(ask("a"))


def test_lists_come_in_pages_and_by_purpose(client: TestClient) -> None:
    ids = [upload(client, b"x", purpose=purpose) for purpose in ("batch", "job", "batch")]
    newest = client.get("/v1/files", params={"limit": 2}).json()
    assert [file["id"] for file in newest["data"]] == ids[:0:-1]
    assert (newest["first_id"], newest["last_id"], newest["has_more"]) == (ids[2], ids[1], True)
    rest = client.get("/v1/files", params={"limit": 2, "after": ids[1]}).json()
    assert ([file["id"] for file in rest["data"]], rest["has_more"]) == (ids[:1], False)
    oldest = client.get("/v1/files", params={"order": "asc", "purpose": "batch"}).json()
    assert [file["id"] for file in oldest["data"]] == [ids[0], ids[2]]
    for wrong in ({"limit": 0}, {"limit": 101}, {"order": "up"}, {"purpose": "vision"}):
        assert client.get("/v1/files", params=wrong).status_code == 400


def test_other_tenants_files_are_not_there(client: TestClient) -> None:
    file_id, other = upload(client, b"secret"), as_tenant("zeta")
    for answer in (
        client.get(f"/v1/files/{file_id}", headers=other),
        client.get(f"/v1/files/{file_id}/content", headers=other),
        client.delete(f"/v1/files/{file_id}", headers=other),
        client.get("/v1/files", params={"after": file_id}, headers=other),
    ):
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "not_found"
        assert "secret" not in answer.text
    assert client.get("/v1/files", headers=other).json()["data"] == []
    assert client.get(f"/v1/files/{file_id}/content").content == b"secret"


@pytest.mark.parametrize(
    "name",
    [b"../../../../etc/cron.d/x", b"/etc/passwd", b"..", b".", b"a\x00b", b"C:\\x", b"x" * 3_000, b"\xff\xfe", b"\\"],
)
def test_a_hostile_name_is_no_path(client: TestClient, home: Path, name: bytes) -> None:
    answer = post(client, form(b"{}", name=name))
    assert answer.status_code == 200, answer.text
    told = answer.json()
    assert len(told["filename"]) <= 255
    assert told["filename"].isprintable()
    assert [path.name for path in stored(home)] == [told["id"]]
    assert len(list((home / "files").iterdir())) == 1


@pytest.mark.parametrize(
    "file_id",
    [
        "..",
        "%2e%2e",
        "..%2f..%2fspanfill.db",
        "file-..%2f..%2fspanfill.db",
        "file-" + "0" * 32,
        "a" * 300,
        "%00",
        "%ff",
    ],
)
def test_an_id_leads_nowhere_but_to_a_row(client: TestClient, file_id: str) -> None:
    for path in (f"/v1/files/{file_id}", f"/v1/files/{file_id}/content"):
        assert client.get(path).status_code in (400, 404)


def answer_of(app: ASGIApp, headers: dict[str, str], chunks: Iterable[bytes]) -> tuple[int, int]:
    """The status of an upload that comes in chunks, and how many were taken."""
    left, statuses, taken = iter(chunks), list[int](), 0
    scope: dict[str, Any] = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
        "path": "/v1/files", "raw_path": b"/v1/files", "root_path": "", "query_string": b"", "client": ("test", 1),
        "server": ("test", 80), "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
    }  # fmt: skip

    async def receive() -> dict[str, Any]:
        nonlocal taken
        chunk = next(left, None)
        taken += chunk is not None
        return {"type": "http.request", "body": chunk or b"", "more_body": chunk is not None}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    async def main() -> None:
        await app(scope, receive, send)

    asyncio.run(main())
    return statuses[0], taken


def test_what_says_that_it_is_too_large_is_refused_unread(home: Path) -> None:
    with routed() as client:
        headers = {"content-type": FORM, "content-length": str((512 << 20) + 1 + (64 << 10))}
        assert answer_of(client.app, headers, [b"x"] * 10) == (413, 0)
    assert stored(home) == []


def test_what_turns_out_to_be_too_large_is_refused_and_gone(home: Path) -> None:
    with routed(IDLE.model_copy(update={"upload_bytes": 4 * MIB})) as client:
        head, tail = form(b"|").split(b"|")
        chunks = [head, *[bytes(MIB)] * 4]
        assert answer_of(client.app, {"content-type": FORM}, [*chunks, b"\0", tail]) == (413, 6)
        assert stored(home) == []
        assert answer_of(client.app, {"content-type": FORM}, [*chunks, tail])[0] == 200
    (path,) = stored(home)
    assert path.stat().st_size == 4 * MIB


@pytest.mark.parametrize(
    ("body", "content_type", "words"),
    [
        (b"{}", "application/json", "no form"),
        (b"{}", "multipart/form-data", "no form"),
        (form(b"x"), "multipart/form-data; boundary=" + "b" * 300, "malformed"),
        (form(b"x"), "multipart/form-data; boundary=c", "malformed"),
        (form(b"x", end=b""), FORM, "ends before its end"),
        (form(b"x", end=b"")[:-40], FORM, "ends before its end"),
        (form(b"x", end=form(b"y")), FORM, "two files"),
        (form(b"x", purpose=b"fine-tune"), FORM, "neither batch nor job"),
        (form(b"x", purpose=b"p" * 2_000), FORM, "too long"),
        (b'--b\r\nContent-Disposition: form-data; name="x"\r\n\r\n1\r\n' * 2_000 + form(b"x"), FORM, "65,536 bytes"),
        (b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--b--\r\n', FORM, "no file"),
    ],
)
def test_what_is_no_form_with_one_file_is_refused_and_gone(
    client: TestClient, home: Path, body: bytes, content_type: str, words: str
) -> None:
    answer = post(client, body, content_type)
    assert (answer.status_code, words in answer.text) == (400, True), answer.text
    assert stored(home) == []


def test_a_tenant_stores_so_much_and_no_more(home: Path) -> None:
    with routed(IDLE.model_copy(update={"tenant_bytes": 100})) as client:
        first = upload(client, b"x" * 60)
        assert post(client, form(b"x" * 60)).status_code == 413
        upload(client, b"x" * 60, tenant="zeta")
        upload(client, b"x" * 40)
        full = post(client, form(b"x"))
        assert (full.status_code, "100 bytes" in full.text) == (403, True)
        client.delete(f"/v1/files/{first}")
        upload(client, b"x" * 60)
    assert sum(path.stat().st_size for path in stored(home)) == 160


@pytest.mark.parametrize("told", [True, False], ids=["its length told", "in chunks"])
def test_uploads_that_are_open_count(home: Path, told: bool) -> None:
    body, others = form(bytes(2 * MIB)), list[int]()
    headers = {"content-type": FORM} | ({"content-length": str(len(body))} if told else {})

    with routed(IDLE.model_copy(update={"tenant_bytes": 3 * MIB})) as client, ThreadPoolExecutor(1) as pool:

        def status(size: int, tenant: str = "acme") -> int:
            form_of = {"content-type": FORM, "content-length": str(size), "authorization": f"Bearer {tenant}"}
            return pool.submit(answer_of, client.app, form_of, [form(bytes(size))]).result()[0]

        def chunks() -> Iterator[bytes]:
            yield body[:MIB]
            others.extend([status(2 * MIB), status(MIB // 2), status(2 * MIB, "zeta")])
            yield body[MIB:]

        assert answer_of(client.app, headers, chunks())[0] == 200
        assert others == ([413, 200, 200] if told else [403, 403, 200])
        assert answer_of(client.app, {"content-type": FORM}, [b"no form"])[0] == 400
        assert status(MIB // 2) == 200


def test_what_a_batch_reads_counts_until_it_ends() -> None:
    with routed(IDLE.model_copy(update={"tenant_bytes": 400})) as client:
        batch = create_batch(client, ask("a"))
        size = client.get(f"/v1/files/{batch['input_file_id']}").json()["bytes"]
        client.delete(f"/v1/files/{batch['input_file_id']}")
        assert post(client, form(b"x" * (401 - size))).status_code == 413
        upload(client, b"x" * (400 - size))


def test_a_tenant_stores_so_many_files_and_no_more() -> None:
    with routed(IDLE.model_copy(update={"tenant_files": 2})) as client:
        first = upload(client, b"x")
        upload(client, b"x")
        full = post(client, form(b"x"))
        assert (full.status_code, "2 files" in full.text) == (403, True)
        upload(client, b"x", tenant="zeta")
        client.delete(f"/v1/files/{first}")
        upload(client, b"x")


def test_a_file_is_kept_for_as_long_as_was_asked(client: TestClient) -> None:
    def sent(seconds: str, anchor: str = "created_at") -> Any:
        fields = {"purpose": "batch", "expires_after[anchor]": anchor, "expires_after[seconds]": seconds}
        return client.post("/v1/files", files={"file": ("x", b"x")}, data=fields)

    told = sent("3600").json()
    assert told["expires_at"] == told["created_at"] + 3_600
    for wrong in (sent("3599"), sent("2592001"), sent("soon"), sent("3600", "yesterday")):
        assert wrong.status_code == 400


def test_what_nobody_knows_of_is_swept_when_it_is_old(client: TestClient, home: Path) -> None:
    create_batch(client, ask("a"))
    shelf = Shelf(Database(database_address()), home / "files", most_bytes=MIB, most_files=9)
    lost = shelf.work_folder("acme", new_id("batch_")).path
    (lost / "results").mkdir(parents=True)
    known = [path for path in lost.parent.iterdir() if path != lost]
    shelf.sweep()
    assert lost.exists(), "it may be on its way into the database"
    for path in [*known, lost]:
        os.utime(path, (0, 0))
    shelf.sweep()
    assert list(lost.parent.iterdir()) == known


def test_an_old_file_is_gone_at_once_and_swept_later(home: Path) -> None:
    clock = Clock()
    shelf = Shelf(Database(database_address(), clock=clock), home / "files", most_bytes=MIB, most_files=9)
    row = FileRow(
        id=new_id("file-"), tenant="acme", key="k", purpose="batch", name="x", bytes=1, created=clock.now,
        expires=clock.now + 10,
    )  # fmt: skip
    with shelf.incoming("acme") as path:
        path.write_bytes(b"x")
        shelf.store(row, path)
    assert shelf.find("acme", row.id).name == "x"
    shelf.sweep()
    assert len(stored(home)) == 1
    clock.now += 10
    with pytest.raises(NotFoundError):
        shelf.find("acme", row.id)
    shelf.sweep()
    assert stored(home) == []
    assert shelf.page("acme", Page(10)) == ([], False)


@pytest.mark.parametrize("prefix", ["file:///data/", "/data/", "s3://bucket", "http://intranet/", "s3://a/../b/"])
def test_an_operator_cannot_allow_the_servers_own_disk_or_network(prefix: str) -> None:
    with pytest.raises(ConfigError, match="input_prefixes"):
        RoutesConfig.parse({"input_prefixes": [prefix]})
