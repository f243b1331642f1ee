"""Attempts that an earlier run of the same settings left in its report."""

import json
import sys
from pathlib import Path
from typing import Any

Rounds = dict[str, list[dict[str, Any]]]
"""Each contestant's figures, round by round."""


def begun(path: Path, about: dict[str, Any]) -> Rounds:
    """The figures that the report holds; none where there is no report, or one of other settings.

    More rounds and further contestants are no other settings. An attempt that failed is one that was made. Raises
    ``ValueError`` for a file that is not JSON.
    """
    if not path.exists():
        return {}
    report = json.loads(path.read_text())
    ours = _settings(json.loads(json.dumps(about)))
    theirs = _settings({key: value for key, value in report.items() if key in about})
    theirs["rounds"] = ours["rounds"]
    if set(theirs.get("contestants", ())) <= set(ours["contestants"]):
        theirs["contestants"] = ours["contestants"]
    if other := sorted(key for key in ours if ours[key] != theirs.get(key)):
        print(f"{path} is of other settings ({', '.join(other)}); it is written anew", file=sys.stderr)
        return {}
    found = {name: result["rounds"] for name, result in report.get("results", {}).items()}
    made = sum(map(len, found.values()))
    asked = about["rounds"] * len(about["contestants"])
    print(f"going on with {path}: {made} of {asked} attempts are made", file=sys.stderr)
    return found


def _settings(about: dict[str, Any]) -> dict[str, Any]:
    """What must be alike for attempts to stand in one table: neither the command's words nor the load."""
    machine = {key: value for key, value in about.get("machine", {}).items() if key != "load_before"}
    return {key: value for key, value in about.items() if key != "command"} | {"machine": machine}
