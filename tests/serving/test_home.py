"""Where spanfill's home is."""

from pathlib import Path

import pytest

from serving.home import database_url, find_home


@pytest.mark.parametrize(
    ("environment", "platform", "folder"),
    [
        ({"SPANFILL_HOME": "/srv/spanfill", "XDG_DATA_HOME": "/x"}, "linux", "/srv/spanfill"),
        ({"SPANFILL_HOME": "/srv/spanfill"}, "darwin", "/srv/spanfill"),
        ({"XDG_DATA_HOME": "/x"}, "linux", "/x/spanfill"),
        ({"XDG_DATA_HOME": "relative"}, "linux", "/home/ana/.local/share/spanfill"),
        ({"XDG_DATA_HOME": ""}, "linux", "/home/ana/.local/share/spanfill"),
        ({}, "linux", "/home/ana/.local/share/spanfill"),
        ({}, "darwin", "/home/ana/Library/Application Support/spanfill"),
        ({"SPANFILL_HOME": "~/state"}, "linux", "/home/ana/state"),
    ],
)
def test_the_home_is_chosen_or_in_the_users_data_folder(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], platform: str, folder: str
) -> None:
    monkeypatch.setenv("HOME", "/home/ana")
    assert find_home(environment, platform) == Path(folder)


def test_an_empty_url_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPANFILL_DATABASE_URL", "")
    assert database_url() is None
