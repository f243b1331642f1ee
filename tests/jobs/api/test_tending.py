"""How often a work is tried whose process fails, and what becomes of it then; the process is a fake."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jobs.api import tending
from jobs.api.config import RoutesConfig
from jobs.api.database import Database
from jobs.api.office import Office
from jobs.api.order import Kind, Mode, Outcome, Plan, Problem, UnitUsage, WorkFolder
from jobs.api.queue import Queue
from jobs.api.shelf import Shelf
from jobs.api.submission import new_work, submit
from jobs.api.tending import MOST_TRIES, Tending
from serving.tenants.caller import Caller
from serving.tenants.database import database_address
from serving.tenants.store import open_store
from serving.tenants.tables import WorkRow
from tests.jobs.routed import GATEWAY
from tests.serving.api.scripted import Scripted
from tests.serving.tenants.conftest import Clock

DAY = 86_400.0


class Failing:
    """A process that has ended with a traceback as soon as it is looked at."""

    def __init__(self, folder: WorkFolder, mode: Mode) -> None:
        self._polls = 0

    def poll(self) -> int | None:
        """The first time it runs still."""
        self._polls += 1
        return None if self._polls == 1 else 1

    def stop(self) -> None:
        """It stops by itself."""

    def end(self) -> None:
        """It ends by itself."""


@pytest.fixture
def office(home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Office]:
    """Of a gateway whose works' processes fail, at a time that the test says."""
    monkeypatch.setattr(tending, "WorkProcess", Failing)
    with closing(open_store()) as store, closing(Database(database_address(), clock=Clock())) as database:
        yield Office(
            queue=Queue(database, unfinished=9),
            shelf=Shelf(database, tmp_path / "files", most_bytes=1 << 20, most_files=9),
            add_usage=store.add_usage,
            gateway=GATEWAY,
            service=Scripted(),
            config=RoutesConfig(),
            holder="here",
            stopping=threading.Event(),
        )


def queued(office: Office, kind: Kind) -> WorkRow:
    details: dict[str, Any] = {"endpoint": "/v1/completions", "metadata": None, "kept": DAY, "options": {}}
    seconds = DAY if kind == "batch" else None
    work = new_work(kind, Caller("acme", "k"), "demo", "file-x", details, office.queue.clock(), seconds)
    return submit(work, None, 1.0, office.shelf, office.queue)


def tended(office: Office, *, closing: bool = False) -> WorkRow:
    """The work after it was tried once more, as soon as it may be."""
    clock = office.queue.clock
    assert isinstance(clock, Clock)
    clock.now += 301
    work = office.queue.claim("here", ["demo"], closing=closing)
    assert work is not None
    Tending(office, work).run()
    return office.queue.find("acme", "batch" if work.kind == "batch" else "job", work.id)


def test_a_job_whose_process_always_fails_fails_in_the_end(office: Office) -> None:
    queued(office, "job")
    tries = [tended(office) for _ in range(MOST_TRIES)]
    assert [work.status for work in tries] == ["in_progress"] * (MOST_TRIES - 1) + ["failed"]
    assert "exit code 1" in tries[-1].told["problem"]["message"]


def test_parts_of_a_job_that_runs_count_as_stored(office: Office) -> None:
    work = queued(office, "job")
    folder = office.shelf.work_folder("acme", work.id)
    folder.source("job").write_bytes(bytes(1 << 19))
    data = folder.results() / "data"
    data.mkdir(parents=True)
    (data / "part-00000-0123456789ab.parquet").write_bytes(bytes(1 << 18))
    assert tended(office).status == "in_progress"
    assert office.shelf.room("acme") == 1 << 18


def test_a_job_ends_whose_files_are_more_than_its_tenant_may_store(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = queued(office, "job")
    being_written = office.shelf.work_folder("acme", work.id).results() / "data" / ".part-00000.tmp"
    being_written.parent.mkdir(parents=True)
    being_written.write_bytes(bytes(1 << 19))
    assert tended(office).status == "in_progress"
    being_written.write_bytes(bytes(1 << 20))
    ended = tended(office)
    assert (ended.status, ended.told["problem"]["code"]) == ("failed", "no_room")
    assert "may store 1,048,576 bytes" in ended.told["problem"]["message"]


@pytest.mark.parametrize(
    ("kind", "file", "text"), [("batch", "plan.json", '{"of": "another version"}'), ("job", "order.json", "{")]
)
def test_a_work_that_another_version_began_ends_and_says_so(office: Office, kind: Kind, file: str, text: str) -> None:
    folder = office.shelf.work_folder("acme", queued(office, kind).id)
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.path.joinpath(file).write_text(text)
    ended = tended(office)
    problem = ended.told["errors"][0] if kind == "batch" else ended.told["problem"]
    assert (ended.status, problem["code"]) == ("failed", "version_mismatch")
    assert folder.path.exists() == (kind == "job")


def test_a_job_that_gets_on_in_between_is_tried_again(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    queued(office, "job")
    monkeypatch.setattr(tending, "finished_units", one_more_each_time())
    assert [tended(office).tries for _ in range(2 * MOST_TRIES)] == [1] * 2 * MOST_TRIES


def one_more_each_time() -> Callable[..., list[UnitUsage]]:
    """The units of a job of which a part is finished whenever somebody looks."""
    found = 0

    def finished(_: WorkFolder, known: set[str]) -> list[UnitUsage]:
        nonlocal found
        found += 1
        return [UnitUsage(name=f"0/{unit}", rows=1) for unit in range(found) if f"0/{unit}" not in known]

    return finished


class Refusing(Failing):
    """A process that finds the work's input wrong, and what an unfinished unit of it used when it is to count that."""

    def __init__(self, folder: WorkFolder, mode: Mode) -> None:
        super().__init__(folder, mode)
        folder.results().mkdir(parents=True, exist_ok=True)
        partial = (UnitUsage(name="0/0", rows=2, prompt_tokens=20, completion_tokens=5),) if mode == "count" else ()
        problem = None if partial else Problem(code="bad_input", message="No.", may_pass=False)
        folder.outcome.write_text(Outcome(partial=partial, problem=problem).model_dump_json())

    def poll(self) -> int | None:
        """It ends well."""
        return None if super().poll() is None else 0


@pytest.mark.parametrize("kind", ["batch", "job"])
def test_what_a_work_used_that_fails_is_counted_once(
    office: Office, monkeypatch: pytest.MonkeyPatch, kind: Kind
) -> None:
    monkeypatch.setattr(tending, "WorkProcess", Refusing)
    used = Counter[str]()
    office = replace(office, add_usage=lambda source, records: used.update({source: records[0][1].completion_tokens}))
    work = queued(office, kind)
    ended = tended(office)
    assert (ended.status, ended.told["usage"]["completion_tokens"]) == ("failed", 5)
    assert used == {f"{work.id}/0/0": 5}


def test_a_batch_is_tried_until_its_time_is_over_and_a_few_times_more(office: Office) -> None:
    work = queued(office, "batch")
    tried = [tended(office) for _ in range(2 * MOST_TRIES)]
    assert {work.status for work in tried} == {"validating"}
    clock = office.queue.clock
    assert isinstance(clock, Clock)
    clock.now += DAY
    ended = tended(office, closing=True)
    assert (ended.id, ended.status) == (work.id, "failed")
    assert "exit code 1" in ended.told["errors"][0]["message"]


def test_of_lines_with_many_prompts_the_share_that_is_done_is_told(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = office.shelf.work_folder("acme", queued(office, "batch").id)
    folder.results().mkdir(parents=True)
    folder.plan.write_text(Plan(total=12, asking=10, prompts=400).model_dump_json())
    monkeypatch.setattr(tending, "read_status", lambda _: SimpleNamespace(rows=100, errors=40))
    assert tended(office).told["counts"] == {"total": 12, "completed": 1, "failed": 3}


def test_what_nobody_serves_any_more_ends_as_it_was_cut_short(office: Office) -> None:
    office.service.models = ()  # type: ignore[misc]
    work = queued(office, "batch")
    office.queue.cancel("acme", "batch", work.id)
    assert tended(office, closing=True).status == "cancelled"
