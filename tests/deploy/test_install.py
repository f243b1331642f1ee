"""The set-up, driven as a user drives it: a copy of the scripts, a tiny project, and no network."""

import ast
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
PLENTY_OF_DISK = "import shutil, types; shutil.disk_usage = lambda path: types.SimpleNamespace(free=10**12)"
NO_DISK = "import shutil, types; shutil.disk_usage = lambda path: types.SimpleNamespace(free=10**9)"

BACKEND = '''
"""A build backend without dependencies: an editable wheel that holds one path file."""
import zipfile
from pathlib import Path

def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    name = "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(Path(wheel_directory) / name, "w") as wheel:
        wheel.writestr("tiny.pth", str(Path.cwd()))
        wheel.writestr("tiny-1.0.dist-info/METADATA", "Metadata-Version: 2.1\\nName: tiny\\nVersion: 1.0\\n")
        wheel.writestr("tiny-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr("tiny-1.0.dist-info/RECORD", "")
    return name
'''
PYPROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
[project]
name = "tiny"
version = "1.0"
"""


def project(folder: Path, *requirements: str) -> Path:
    """Lay out a project that installs offline."""
    shutil.copytree(DEPLOY, folder / "deploy", ignore=shutil.ignore_patterns("guides", "demo_model", "__pycache__"))
    (folder / "pyproject.toml").write_text(PYPROJECT)
    (folder / "backend.py").write_text(BACKEND)
    (folder / "tiny_module.py").write_text("")
    lock(folder, *requirements)
    return folder


def lock(folder: Path, *requirements: str) -> None:
    (folder / "deploy" / "lock-cpu.txt").write_text("".join(f"{line}\n" for line in requirements))


def command(folder: Path, pretend: str = PLENTY_OF_DISK) -> list[str]:
    """Run the script as ``python deploy/install.py`` does, after a line that makes the machine another one."""
    script = str(folder / "deploy" / "install.py")
    start = (
        f"import runpy, sys; sys.path[0] = {str(folder / 'deploy')!r}; runpy.run_path({script!r}, run_name='__main__')"
    )
    return [sys.executable, "-c", f"{pretend}\n{start}"]


def offline(**changes: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "SPANFILL_"))}
    return kept | {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "SPANFILL_DEVICE": "cpu"} | changes


def install(folder: Path, pretend: str = PLENTY_OF_DISK, **changes: str) -> subprocess.CompletedProcess[str]:
    variables = {name: value for name, value in offline(**changes).items() if value}
    return subprocess.run(command(folder, pretend), env=variables, capture_output=True, text=True, timeout=120)


def venv_runs(folder: Path, code: str) -> bool:
    return subprocess.run([folder / ".venv" / "bin" / "python", "-c", code], cwd="/").returncode == 0


# What the script says before it changes anything


@pytest.mark.parametrize("name", ["install.py", "environment.py", "machine.py"])
def test_what_an_old_python_reads_has_old_syntax(name: str) -> None:
    ast.parse((DEPLOY / name).read_text(), feature_version=(3, 7))


@pytest.mark.parametrize(
    ("pretend", "words"),
    [
        ("import sys; sys.version_info = (3, 9, 2, 'final', 0)", ["Python 3.9.2 is too old"]),
        (NO_DISK, ["5.0 GB more"]),
        ("import platform; platform.system = lambda: 'Darwin'", ["macOS", "Docker"]),
    ],
)
def test_a_machine_that_lacks_something_is_refused_and_left_alone(
    tmp_path: Path, pretend: str, words: list[str]
) -> None:
    answer = install(project(tmp_path), pretend)
    assert answer.returncode == 2
    assert [word for word in words if word not in answer.stderr] == []
    assert "Traceback" not in answer.stderr
    assert not (tmp_path / ".venv").exists()


def test_an_unknown_device_is_refused(tmp_path: Path) -> None:
    answer = install(project(tmp_path), SPANFILL_DEVICE="tpu")
    assert answer.returncode == 2
    assert "'tpu'" in answer.stderr


@pytest.mark.parametrize(("status", "needed"), [(0, "16.0 GB"), (9, "6.0 GB")])
def test_the_gpu_is_chosen_only_where_its_driver_answers(tmp_path: Path, status: int, needed: str) -> None:
    folder = project(tmp_path / "project")
    driver = tmp_path / "nvidia-smi"
    driver.write_text(f"#!/bin/sh\necho 580.65.06\nexit {status}\n")
    driver.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    answer = install(folder, NO_DISK, SPANFILL_DEVICE="", PATH=path)
    assert answer.returncode == 2
    assert f"installing takes about {needed}" in answer.stderr


def test_a_folder_that_is_no_environment_is_refused_and_left_alone(tmp_path: Path) -> None:
    precious = project(tmp_path) / ".venv" / "precious.txt"
    precious.parent.mkdir()
    precious.write_text("mine")
    answer = install(tmp_path)
    assert answer.returncode == 2
    assert "no virtual environment" in answer.stderr
    assert precious.read_text() == "mine"


# Installing


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = project(tmp_path_factory.mktemp("installed"))
    answer = install(folder)
    assert answer.returncode == 0, answer.stderr
    return folder


def contents(folder: Path) -> dict[Path, int]:
    return {path: path.lstat().st_mtime_ns for path in (folder / ".venv").rglob("*")}


def test_the_project_can_be_imported_and_a_second_run_changes_nothing(installed: Path) -> None:
    assert venv_runs(installed, "import tiny_module")
    before = contents(installed)
    answer = install(installed)
    assert (answer.returncode, answer.stdout, answer.stderr) == (0, "", "")
    assert contents(installed) == before


def test_a_changed_lock_updates_in_place(installed: Path) -> None:
    there = installed / ".venv" / "kept.txt"
    there.write_text("")
    pip_version = subprocess.check_output(
        [installed / ".venv" / "bin" / "python", "-c", "import pip; print(pip.__version__)"], text=True
    ).strip()
    lock(installed, f"pip=={pip_version}")
    answer = install(installed)
    assert answer.returncode == 0, answer.stderr
    assert "Installing 1 packages" in answer.stderr
    assert there.exists()
    assert install(installed).stderr == ""


def test_a_failed_download_is_explained_and_running_again_repairs_it(tmp_path: Path) -> None:
    folder = project(tmp_path, "absent-package==1.0")
    answer = install(folder, PIP_NO_INDEX="", PIP_INDEX_URL="http://127.0.0.1:9/simple", PIP_RETRIES="1")
    assert answer.returncode == 1
    assert "Could not install absent-package==1.0: the network failed" in answer.stderr
    assert "safe to run the same command again" in answer.stderr
    assert "absent-package" in (folder / ".venv" / "install.log").read_text()
    half_made = folder / ".venv" / "half-made"
    half_made.mkdir()
    lock(folder)
    assert install(folder).returncode == 0
    assert venv_runs(folder, "import tiny_module")
    assert not half_made.exists()


def test_a_cpu_build_missing_from_the_index_is_taken_from_pytorchs_own(tmp_path: Path) -> None:
    folder = project(tmp_path / "project", "toy==1.0+cpu")
    write_wheel(tmp_path / "torch-index" / "toy", "toy", "1.0+cpu")
    steps = folder / "deploy" / "steps.py"
    steps.write_text(
        steps.read_text().replace("https://download.pytorch.org/whl/cpu", f"file://{tmp_path}/torch-index")
    )
    (tmp_path / "plain-index").mkdir()
    answer = install(folder, PIP_NO_INDEX="", PIP_INDEX_URL=f"file://{tmp_path}/plain-index")
    assert answer.returncode == 0, answer.stderr
    assert "asking file://" in answer.stderr
    assert venv_runs(folder, "import toy")


def write_wheel(folder: Path, name: str, version: str) -> None:
    folder.mkdir(parents=True)
    info, file = f"{name}-{version}.dist-info", f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(folder / file, "w") as wheel:
        wheel.writestr(f"{name}.py", "")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    (folder / "index.html").write_text(f'<a href="{file}">{file}</a>')


def test_an_interrupt_is_one_line_and_the_next_run_repairs_it(tmp_path: Path) -> None:
    folder = project(tmp_path)
    process = subprocess.Popen(
        command(folder), env=offline(), stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    with process:
        assert process.stderr is not None
        while "virtual environment" not in process.stderr.readline():
            assert process.poll() is None
        os.killpg(process.pid, signal.SIGINT)
        rest = process.stderr.read()
    assert process.returncode == 130
    assert [line for line in rest.splitlines() if line] == [
        "Interrupted. Run the same command again: pip reuses what its cache kept."
    ]
    assert install(folder).returncode == 0


# make


def run_make(folder: Path, *pythons: tuple[str, str]) -> subprocess.CompletedProcess[str]:
    """Run ``make install`` where only these shell scripts can be found as Pythons."""
    shutil.copy(DEPLOY.parent / "Makefile", folder)
    tools = folder / "tools"
    tools.mkdir()
    for name, script in pythons:
        (tools / name).write_text(f"#!/bin/sh\n{script}\n")
        (tools / name).chmod(0o755)
    make = shutil.which("make")
    assert make
    return subprocess.run([make, "install"], cwd=folder, env={"PATH": str(tools)}, capture_output=True, text=True)


def test_make_passes_over_a_python_that_does_not_start(tmp_path: Path) -> None:
    answer = run_make(tmp_path, ("python3.11", "exit 127"), ("python3", 'echo "python3 runs $*"'))
    assert answer.stdout.splitlines()[-1] == "python3 runs deploy/install.py"


def test_make_without_any_python_says_which_one_is_needed(tmp_path: Path) -> None:
    answer = run_make(tmp_path)
    assert answer.returncode == 2
    assert "Python 3.11, 3.12 or 3.13" in answer.stderr
