"""Usage is counted once, whatever dies, goes away or fails between a request and the database."""

import errno
import itertools
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from serving.errors import DatabaseAwayError
from serving.tenants.journal import Delivery, Journal, deliver_orphans
from serving.tenants.metering import Meter, collect, open_meter
from serving.tenants.store import TenantStore, open_store
from serving.tenants.usage import Numbered, UsageRecord
from tests.serving.tenants.conftest import of_a_later_spanfill, until
from tests.serving.tenants.postgres import Postgres

ROOT = Path(__file__).parents[3]
GATEWAY = """
import itertools, pathlib, sys, time
from serving.tenants.metering import Meter
from serving.tenants.store import open_store
from serving.tenants.usage import UsageRecord

meter = Meter(open_store(sys.argv[1]).add_usage, pathlib.Path(sys.argv[2]))
for number in itertools.count(int(sys.argv[3])):
    meter.add(UsageRecord("acme", "k", "m", 10, 4, 3, time.time(), str(number)))
    print(number, flush=True)
    time.sleep(0.001)
"""
"""A gateway whose every record is a job of its own, so that sums tell which records were counted, and how often."""


def record(job: object) -> UsageRecord:
    return UsageRecord("acme", "k", "m", 10, 4, 3, 1_800_014_400.0, str(job))


def counted(store: TenantStore) -> dict[str, int]:
    """How often each job was counted."""
    return {line.job: line.requests for line in store.usage(["job"])}


def once(*jobs: object) -> dict[str, int]:
    return {str(job): 1 for job in jobs}


def journals(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir())


def test_usage_that_waits_for_a_database_of_another_address_is_named(
    tmp_path: Path, sqlite_store: TenantStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SPANFILL_HOME", str(tmp_path))
    usage = tmp_path / "usage"
    open_meter(sqlite_store).close()
    assert not caplog.messages
    other = Journal(usage / "0123456789ab")
    other.append([record(1)])
    open_meter(sqlite_store).close()
    assert not caplog.messages, "its gateway lives"
    other.close()
    open_meter(sqlite_store).close()
    (told,) = caplog.messages
    assert str(usage / "0123456789ab") in told
    assert str(usage / sqlite_store.fingerprint) in told


def test_records_reach_the_store_while_the_gateway_lives_and_when_it_ends(store: TenantStore, tmp_path: Path) -> None:
    meter = Meter(store.add_usage, tmp_path / "usage")
    for job in range(10):
        meter.add(record(job))
    until(lambda: counted(store) == once(*range(10)))
    meter.add(record("last"))
    meter.close()
    assert counted(store) == once(*range(10), "last")
    assert journals(tmp_path / "usage") == []


@pytest.mark.parametrize("seed", range(3))
def test_a_killed_gateway_loses_nothing_and_nothing_counts_twice(url: str, tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    store, root = open_store(url), tmp_path / "usage"
    store.tenants()
    seen: dict[str, int] = {}
    for turn in range(2):
        begin = turn * 1_000_000
        gateway = subprocess.Popen(
            [sys.executable, "-c", GATEWAY, url, str(root), str(begin)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert gateway.stdout is not None
        first = gateway.stdout.readline()
        time.sleep(draw.uniform(1, 3))
        gateway.kill()
        lines = [first, *gateway.stdout]
        gateway.wait()
        made = [int(line) for line in lines if line.endswith("\n")]
        assert len(journals(root)) == 1, "what the gateway before left behind was adopted and deleted"
        Meter(store.add_usage, root).close()
        seen = counted(store)
        numbers = sorted(int(job) for job in seen if int(job) >= begin)
        assert set(seen.values()) == {1}
        assert numbers == list(range(begin, begin + len(numbers)))
        assert made[-1] <= numbers[-1] <= made[-1] + 1, "the last line may not have been printed whole"
    total = store.usage([])[0]
    assert (total.requests, total.prompt_tokens) == (len(seen), 10 * len(seen))
    assert journals(root) == []
    store.close()


def test_a_record_whose_answer_is_lost_counts_once(store: TenantStore, tmp_path: Path) -> None:
    calls = itertools.count()

    def add(source: str, numbered: Sequence[Numbered]) -> None:
        store.add_usage(source, numbered)
        if next(calls) % 2 == 0:
            raise DatabaseAwayError("the answer was lost")

    meter = Meter(add, tmp_path / "usage")
    for job in range(10):
        meter.add(record(job))
    until(lambda: counted(store) == once(*range(10)))
    meter.add(record("last"))
    meter.close()
    deliver_orphans(tmp_path / "usage", store.add_usage)
    assert counted(store) == once(*range(10), "last")


def test_an_outage_delays_usage_and_loses_none(postgres: Postgres, tmp_path: Path) -> None:
    store = open_store(postgres.new_database())
    meter = Meter(store.add_usage, tmp_path / "usage")
    meter.add(record("before"))
    until(lambda: counted(store) == once("before"))
    with postgres.away():
        for job in range(10):
            meter.add(record(job))
        time.sleep(2)
    until(lambda: counted(store) == once("before", *range(10)))
    meter.close()
    assert journals(tmp_path / "usage") == []
    store.close()


def test_a_gateway_that_ends_in_an_outage_leaves_its_journal_to_the_next(store: TenantStore, tmp_path: Path) -> None:
    def away(source: str, numbered: Sequence[Numbered]) -> None:
        raise DatabaseAwayError("away")

    meter = Meter(away, tmp_path / "usage")
    meter.add(record(1))
    meter.close()
    assert counted(store) == {}
    Meter(store.add_usage, tmp_path / "usage").close()
    assert counted(store) == once(1)
    assert journals(tmp_path / "usage") == []


def test_a_living_gateways_journal_is_left_alone(sqlite_store: TenantStore, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "usage")
    journal.append([record(1)])
    deliver_orphans(tmp_path / "usage", sqlite_store.add_usage)
    assert counted(sqlite_store) == {}
    journal.close()
    deliver_orphans(tmp_path / "usage", sqlite_store.add_usage)
    assert counted(sqlite_store) == once(1)


def test_a_journal_that_comes_back_from_the_dead_counts_no_more(sqlite_store: TenantStore, tmp_path: Path) -> None:
    """As after a loss of power, when the disk forgot that it was deleted."""
    journal = Journal(tmp_path / "usage")
    journal.append([record(1), record(2)])
    journal.close()
    shutil.copytree(journal.folder, tmp_path / "copy")
    deliver_orphans(tmp_path / "usage", sqlite_store.add_usage)
    shutil.copytree(tmp_path / "copy", journal.folder)
    deliver_orphans(tmp_path / "usage", sqlite_store.add_usage)
    assert counted(sqlite_store) == once(1, 2)


def test_a_line_that_was_cut_off_is_left_out(sqlite_store: TenantStore, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "usage")
    journal.append([record(1), record(2)])
    journal.close()
    (segment,) = journal.folder.glob("*.jsonl")
    segment.write_bytes(segment.read_bytes()[:-5])
    deliver_orphans(tmp_path / "usage", sqlite_store.add_usage)
    assert counted(sqlite_store) == once(1)


def test_a_line_that_cannot_be_read_is_passed_over(sqlite_store: TenantStore, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "usage")
    journal.append([record(1), record(2), record(3)])
    journal.close()
    (segment,) = journal.folder.glob("*.jsonl")
    lines = segment.read_bytes().splitlines(keepends=True)
    segment.write_bytes(lines[0] + b"\0" * 20 + b"\n" + b"[]\n" + lines[2])
    deliver_orphans(tmp_path / "usage", sqlite_store.add_usage)
    assert counted(sqlite_store) == once(1, 3)


def test_a_journal_stays_small(sqlite_store: TenantStore, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "usage", segment_bytes=200)
    delivery = Delivery(journal.folder, sqlite_store.add_usage)
    for job in range(30):
        journal.append([record(job)])
        delivery.run(is_finished=False)
        assert len(list(journal.folder.glob("*.jsonl"))) <= 2
    assert counted(sqlite_store) == once(*range(30))
    journal.close()


def test_a_disk_that_fails_in_between_loses_and_doubles_nothing(
    sqlite_store: TenantStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(tmp_path / "usage")
    delivery = Delivery(journal.folder, sqlite_store.add_usage)
    journal.append([record(1)])
    write = os.write

    def full(file: int, data: bytes) -> int:
        write(file, data[: len(data) * 2 // 3])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as failing:
        failing.setattr("serving.tenants.journal.os.write", full)
        for _ in range(2):
            with pytest.raises(OSError, match="No space left"):
                journal.append([record(2), record(3)])
    delivery.run(is_finished=False)
    assert counted(sqlite_store) == once(1, 2)
    journal.append([record(2), record(3), record(4)])
    journal.sync()
    delivery.run(is_finished=False)
    assert counted(sqlite_store) == once(1, 2, 3, 4)
    journal.close()


def test_a_meter_keeps_what_a_full_disk_does_not_take(
    sqlite_store: TenantStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meter = Meter(sqlite_store.add_usage, tmp_path / "usage")
    meter.add(record(1))

    def full(file: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as failing:
        failing.setattr("serving.tenants.journal.os.write", full)
        for job in (2, 3):
            meter.add(record(job))
        time.sleep(0.3)
    until(lambda: counted(sqlite_store) == once(1, 2, 3))
    meter.add(record(4))
    meter.close()
    assert counted(sqlite_store) == once(1, 2, 3, 4)


def test_journals_for_two_databases_are_kept_apart(
    sqlite_store: TenantStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPANFILL_HOME", str(tmp_path / "home"))
    other = open_store(f"sqlite:///{tmp_path / 'other.db'}")
    journal = Journal(tmp_path / "home" / "usage" / other.fingerprint)
    journal.append([record(1)])
    journal.close()
    open_meter(sqlite_store).close()
    assert counted(sqlite_store) == {}
    collect(other)
    assert counted(other) == once(1)
    other.close()


def test_where_no_gateway_was_nothing_is_left_to_count(
    sqlite_store: TenantStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPANFILL_HOME", str(tmp_path / "home"))
    collect(sqlite_store)
    assert counted(sqlite_store) == {}
    assert not (tmp_path / "home").exists()


def test_usage_waits_while_the_database_is_of_a_later_spanfill(
    tmp_path: Path, sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.tenants.metering.DELIVER_SECONDS", 0.05)
    store = open_store(sqlite_url)
    store.create_tenant("acme")
    later = open_store(sqlite_url)
    with of_a_later_spanfill(sqlite_url):
        meter = Meter(later.add_usage, tmp_path / "usage")
        meter.add(record(1))
        time.sleep(0.5)
        assert counted(store) == {}
    until(lambda: counted(store) == once(1))
    meter.close()
    later.close()
    store.close()
