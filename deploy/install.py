"""Install the locked packages and spanfill itself into ``.venv``; run again, it finds nothing to do.

``SPANFILL_DEVICE=cpu`` or ``gpu`` overrules what the machine shows. Exit codes: 0 ready, 1 a download or
installation failed, 2 this machine lacks something (nothing was changed), 130 interrupted. Kept to the
syntax of Python 3.6, so that an old Python reads a sentence and not a SyntaxError.
"""

import os
import shutil
import sys

import environment
import machine


def main() -> int:
    """Make the environment ready and return the exit code."""
    try:
        return install(choose_device())
    except KeyboardInterrupt:
        print("\nInterrupted. Run the same command again: pip reuses what its cache kept.", file=sys.stderr)
        return 130


def install(device: str) -> int:
    """Bring ``.venv`` to what the lock file says, touching nothing when it is so already."""
    if device not in ("cpu", "gpu"):
        return refuse([f"SPANFILL_DEVICE is {device!r}; it can be cpu or gpu."])
    if environment.state(device) == "current":
        return 0
    driver = machine.nvidia_driver() if device == "gpu" else ""
    here = machine.inspect(device, str(environment.ROOT), reusable_bytes=environment.size_on_disk(), driver=driver)
    found = machine.problems(here)
    if environment.state(device) == "foreign":
        found.append(f"{environment.VENV} is there but is no virtual environment: move it away, then run this again.")
    if found:
        return refuse(found)
    for note in machine.notes(here):
        print(f"Note: {note}", file=sys.stderr)
    import steps  # its syntax is newer than the Pythons that were refused above

    return steps.bring_up_to_date(device)


def refuse(reasons: "list[str]") -> int:
    """Print each reason and return the exit code for a machine that lacks something."""
    print("spanfill cannot be installed here:", file=sys.stderr)
    for reason in reasons:
        print(f"- {reason}", file=sys.stderr)
    return 2


def choose_device() -> str:
    """Take the user's word, else what was installed, else what the machine shows."""
    chosen = os.environ.get("SPANFILL_DEVICE", "").strip().lower()
    if chosen:
        return chosen
    if environment.stamp().get("device") == "gpu":
        return "gpu"
    return "gpu" if shutil.which("nvidia-smi") and machine.nvidia_driver() else "cpu"


if __name__ == "__main__":
    sys.exit(main())
