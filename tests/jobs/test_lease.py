"""One runner at a time: who is refused, who takes over, and what a holder hears that was taken over."""

import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

import jobs.lease
from jobs.lease import Holder, Lease, machine, read_holder
from jobs.process import birth
from jobs.store import Location, create, list_files, locate
from serving.errors import JobHeldError, LeaseLostError, StorageError

CONTENDER = """
import sys
import time
import jobs.lease
from jobs.store import locate
from serving.errors import JobHeldError, LeaseLostError

jobs.lease.BEAT_SECONDS = 0.1
print("ready", flush=True)
sys.stdin.readline()
try:
    lease = jobs.lease.Lease.take(locate(sys.argv[1]), say=lambda text: None)
    print("won", flush=True)
except JobHeldError:
    print("held", flush=True)
sys.stdin.readline()
try:
    while True:
        lease.check()
        time.sleep(0.02)
except LeaseLostError as error:
    print(error.message, flush=True)
"""
"""A process that tries once when it is told to, says how it went, and when told again, how it lost the lease."""


@pytest.fixture(autouse=True)
def quick_beat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.lease.BEAT_SECONDS", 0.05)


@pytest.fixture
def output(tmp_path: Path) -> Location:
    return locate(str(tmp_path / "out"))


@contextmanager
def taken(output: Location, said: list[str] | None = None) -> Iterator[Lease]:
    lease = Lease.take(output, say=(said if said is not None else []).append)
    try:
        yield lease
    finally:
        lease.release()


@contextmanager
def contender(output: Location) -> Iterator["subprocess.Popen[str]"]:
    process = subprocess.Popen(
        [sys.executable, "-c", CONTENDER, output.path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert heard(process) == "ready"
        yield process
    finally:
        process.kill()
        process.communicate()


def heard(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def poke(process: "subprocess.Popen[str]") -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def stranger(**changes: object) -> Holder:
    """A live runner on another machine."""
    now = time.time()
    return replace(Holder("far-away", "another machine", 4_321, 0, "token", now, now), **changes)  # type: ignore[arg-type]


def write(output: Location, holder: Holder, number: int = 1) -> Path:
    """Put a holder's file where it would have written it itself."""
    path = Path(output.path) / "_spanfill" / "lease" / f"{number:08d}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".new")
    beside.write_text(json.dumps(asdict(holder)))
    beside.replace(path)
    return path


def lease_files(output: Location) -> list[str]:
    """Without those that are being written at this moment."""
    names = (path.name for path in (Path(output.path) / "_spanfill" / "lease").iterdir())
    return sorted(name for name in names if not name.startswith("."))


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def refusal(lease: Lease) -> LeaseLostError:
    """What ``check`` raises sooner or later."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            lease.check()
        except LeaseLostError as error:
            return error
        time.sleep(0.02)
    raise AssertionError("check() never raised")


def test_a_free_folder_is_taken_without_a_word(output: Location) -> None:
    assert read_holder(output) is None
    said: list[str] = []
    with taken(output, said) as lease:
        lease.check()
        holder = read_holder(output)
        assert holder is not None
        assert (holder.pid, holder.host, holder.machine) == (os.getpid(), platform.node(), machine())
        assert not holder.is_gone
    assert said == []


def test_a_second_runner_is_refused_and_told_who_holds_the_folder(output: Location) -> None:
    with contender(output) as process:
        poke(process)
        assert heard(process) == "won"
        said: list[str] = []
        with pytest.raises(JobHeldError, match=rf"process {process.pid} on {platform.node()}"):
            Lease.take(output, say=said.append)
        assert len(said) == 1
        assert "waiting to see whether it is alive" in said[0]
        assert lease_files(output) == ["00000001.json"]


def test_a_released_folder_is_taken_at_once(output: Location) -> None:
    with taken(output):
        pass
    holder = read_holder(output)
    assert holder is not None
    assert holder.released
    said: list[str] = []
    with taken(output, said) as lease:
        lease.check()
    assert said == []


def test_a_killed_process_of_this_machine_is_succeeded_at_once(output: Location) -> None:
    with contender(output) as process:
        poke(process)
        assert heard(process) == "won"
        process.send_signal(signal.SIGKILL)
        process.wait()
        said: list[str] = []
        with taken(output, said) as lease:
            lease.check()
        assert said == [f"taking over from process {process.pid} on {platform.node()}, which is gone"]


def test_a_killed_process_that_nobody_has_buried_is_succeeded_at_once(output: Location) -> None:
    """In a container whose first process is no init, a dead runner stays a zombie for ever."""
    with contender(output) as process:
        poke(process)
        assert heard(process) == "won"
        process.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        holder = read_holder(output)
        assert holder is not None
        assert holder.is_gone


def test_a_process_number_that_was_given_away_again_is_no_holder(output: Location) -> None:
    born = birth(os.getppid())
    assert born is not None
    assert stranger(machine=machine(), pid=os.getppid(), born=born - 1_000).is_gone
    assert not stranger(machine=machine(), pid=os.getppid(), born=born).is_gone


def test_a_lease_that_this_process_could_not_release_is_not_held(output: Location) -> None:
    """Its store failed at the end; the same process may run the job again at once."""
    write(output, stranger(machine=machine(), pid=os.getpid(), born=birth(os.getpid())), 7)
    with taken(output):
        holder = read_holder(output)
        assert holder is not None
        assert not holder.is_gone


def test_a_holder_elsewhere_that_goes_on_beating_is_refused(output: Location) -> None:
    over = threading.Event()

    def beat() -> None:
        beats = 0
        while not over.wait(0.05):
            beats += 1
            write(output, stranger(beats=beats))

    write(output, stranger())
    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(JobHeldError, match="process 4321 on far-away"):
            Lease.take(output, say=lambda text: None)
    finally:
        over.set()
        thread.join()
    assert lease_files(output) == ["00000001.json"]


@pytest.mark.parametrize("clock", [-1e6, 0, 1e6])
def test_a_silent_holder_elsewhere_is_succeeded_whatever_its_clock_says(
    output: Location, monkeypatch: pytest.MonkeyPatch, clock: float
) -> None:
    monkeypatch.setattr("jobs.lease.SILENT_SECONDS", 0.6)
    write(output, stranger(beat=time.time() + clock, beats=9))
    said: list[str] = []
    with taken(output, said):
        assert lease_files(output) == ["00000002.json"]
    assert [line.split(";")[0] for line in said] == [
        f"{output} is held by process 4321 on far-away",
        "taking over from process 4321 on far-away, which is gone",
    ]


def test_a_holder_that_releases_while_somebody_waits_is_succeeded(output: Location) -> None:
    write(output, stranger())
    release = threading.Timer(0.2, write, (output, stranger(beats=1, released=True)))
    release.start()
    try:
        with taken(output) as lease:
            lease.check()
    finally:
        release.join()


def nobody(output: Location) -> None:
    """A folder that was never held."""


def released(output: Location) -> None:
    write(output, stranger(released=True), 7)


def dead(output: Location) -> None:
    write(output, stranger(machine=machine(), pid=os.getppid(), born=0), 7)


def damaged(output: Location) -> None:
    write(output, stranger(), 7).write_bytes(b'{"host": ')


@pytest.mark.parametrize("before", [nobody, released, dead, damaged])
def test_of_many_threads_one_wins(output: Location, before: Callable[[Location], None]) -> None:
    before(output)
    count = 12
    barrier = threading.Barrier(count)

    def contend(_: int) -> Lease | None:
        barrier.wait()
        try:
            return Lease.take(output, say=lambda text: None)
        except JobHeldError:
            return None

    with ThreadPoolExecutor(count) as pool:
        won = [lease for lease in pool.map(contend, range(count)) if lease is not None]
    assert len(won) == 1
    won[0].check()
    won[0].release()


def test_of_many_processes_one_wins(output: Location) -> None:
    dead(output)
    with contender(output) as a, contender(output) as b, contender(output) as c, contender(output) as d:
        contenders = (a, b, c, d)
        for process in contenders:
            poke(process)
        answers = [heard(process) for process in contenders]
        assert sorted(answers) == ["held", "held", "held", "won"]
        holder = read_holder(output)
        assert holder is not None
        assert holder.pid == contenders[answers.index("won")].pid


def test_one_that_slept_through_two_other_runners_is_refused(output: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    """It looked, slept, and wakes after the next number was taken, released and removed by the one after that."""
    released(output)
    others: list[Lease] = []

    def sleepy(location: Location, data: bytes) -> bool:
        monkeypatch.setattr(jobs.lease, "create", create)
        with taken(output):
            pass
        others.append(Lease.take(output, say=lambda text: None))
        return create(location, data)

    monkeypatch.setattr(jobs.lease, "create", sleepy)
    try:
        with pytest.raises(JobHeldError):
            Lease.take(output, say=lambda text: None).release()
    finally:
        for lease in others:
            lease.release()


def test_one_that_saw_an_empty_folder_during_a_takeover_is_refused(
    output: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A listing beside a takeover may miss the new file, which came late, and the old one, which is gone already."""
    damaged(output)
    with taken(output):
        listings: list[list[Any]] = [[]]

        def unlucky(folder: Location) -> list[Any]:
            mine = threading.current_thread() is threading.main_thread()
            return listings.pop() if mine and listings else list_files(folder)

        monkeypatch.setattr("jobs.lease.list_files", unlucky)
        with pytest.raises(JobHeldError):
            Lease.take(output, say=lambda text: None).release()


def test_a_holder_that_was_taken_over_hears_so_and_leaves_the_other_alone(output: Location) -> None:
    lease = Lease.take(output, say=lambda text: None)
    write(output, stranger(), 2)
    error = refusal(lease)
    assert "taken over by process 4321 on far-away" in error.message
    lease.release()
    holder = read_holder(output)
    assert holder is not None
    assert (holder.machine, holder.released) == ("another machine", False)


def test_a_stopped_process_is_taken_over_and_hears_so_when_it_wakes(
    output: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.lease.SILENT_SECONDS", 0.6)
    with contender(output) as process:
        poke(process)
        assert heard(process) == "won"
        process.send_signal(signal.SIGSTOP)
        with taken(output) as lease:
            monkeypatch.setattr("jobs.lease.SILENT_SECONDS", 30.0)
            process.send_signal(signal.SIGCONT)
            poke(process)
            assert f"was taken over by process {os.getpid()} on {platform.node()}" in heard(process)
            lease.check()


def refuse(*_: object) -> None:
    raise StorageError("no space left.")


def test_a_lease_that_cannot_be_renewed_goes_on_and_says_so_to_who_asks(
    output: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = Lease.take(output, say=lambda text: None)
    with monkeypatch.context() as broken:
        broken.setattr("jobs.lease.publish_bytes", refuse)
        lease.check()
        with pytest.raises(StorageError, match="no space left"):
            lease.renew()
        lease.check()
    lease.renew()
    with monkeypatch.context() as broken:
        broken.setattr("jobs.lease.publish_bytes", refuse)
        lease.release()
    holder = read_holder(output)
    assert holder is not None
    assert not holder.released


def test_renewing_tells_at_once_that_the_lease_was_lost(output: Location) -> None:
    lease = Lease.take(output, say=lambda text: None)
    write(output, stranger(), 2)
    with pytest.raises(LeaseLostError, match="process 4321 on far-away"):
        lease.renew()
    lease.release()


def test_one_failed_renewal_loses_nothing(output: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    with taken(output) as lease:
        with monkeypatch.context() as broken:
            broken.setattr("jobs.lease.publish_bytes", refuse)
            time.sleep(0.2)
            lease.check()
        before = read_holder(output)
        assert before is not None
        until(lambda: (now := read_holder(output)) is not None and now.beats > before.beats)
        lease.check()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"\xff\xfe", b'{"host": "a"}', b'{"unheard": "of"}'])
def test_a_damaged_file_counts_as_released(output: Location, content: bytes) -> None:
    write(output, stranger(), 3).write_bytes(content)
    holder = read_holder(output)
    assert holder is not None
    assert holder.is_gone
    said: list[str] = []
    with taken(output, said) as lease:
        lease.check()
        assert lease_files(output) == ["00000004.json"]
    assert said == []


def test_old_numbers_are_removed_and_strange_files_left_alone(output: Location) -> None:
    for number in (1, 2, 9):
        write(output, stranger(released=True), number)
    (Path(output.path) / "_spanfill" / "lease" / "notes.txt").write_text("mine")
    with taken(output):
        assert lease_files(output) == ["00000010.json", "notes.txt"]


def test_what_the_job_tells_comes_with_the_next_renewal(output: Location) -> None:
    with taken(output) as lease:
        lease.tell(rows=7, error_codes={"bad_input": 1})
        path = Path(output.path) / "_spanfill" / "lease" / "00000001.json"
        until(lambda: json.loads(path.read_text())["told"] == {"rows": 7, "error_codes": {"bad_input": 1}})
        first = read_holder(output)
        assert first is not None
        lease.tell(rows=8)
        until(lambda: (now := read_holder(output)) is not None and now.told == {"rows": 8})
        second = read_holder(output)
        assert second is not None
        assert second.beats > first.beats
        assert second.since == first.since
        assert second.token == first.token
    last = read_holder(output)
    assert last is not None
    assert (last.released, last.told) == (True, {"rows": 8})


def test_a_lease_works_on_an_fsspec_store() -> None:
    output = locate(f"memory://lease-{os.getpid()}/out")
    with taken(output) as lease:
        with pytest.raises(JobHeldError):
            Lease.take(output, say=lambda text: None)
        lease.check()
    with taken(output) as lease:
        lease.check()
