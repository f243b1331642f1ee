"""Which modules of the standard library the demo model has never seen."""

import hashlib

HELD_OUT_SHARE = 0.05
EXCLUDED_FOLDERS = frozenset(
    ("test", "tests", "idle_test", "site-packages", "__pycache__", "encodings", "pydoc_data"),
)
"""Tests, and tables rather than code: neither trained on nor drawn from."""
FEWEST_CHARS = 201
"""Shorter files are neither trained on nor drawn from."""

REPEATED = {
    "chunk.py": 0.73,
    "distutils/command/install_headers.py": 0.58,
    "lib2to3/fixes/fix_nonzero.py": 0.67,
    "tomllib/__init__.py": 0.57,
}
"""Left out of training but not drawn: this share of their lines of 12 characters or more stands in files trained on."""

HELD_OUT = frozenset(
    (
        "concurrent/futures/process.py",
        "copyreg.py",
        "distutils/__init__.py",
        "distutils/command/install_lib.py",
        "email/__init__.py",
        "email/_encoded_words.py",
        "email/contentmanager.py",
        "idlelib/autocomplete.py",
        "idlelib/iomenu.py",
        "importlib/_abc.py",
        "importlib/_bootstrap_external.py",
        "lib2to3/fixer_base.py",
        "lib2to3/fixes/fix_itertools_imports.py",
        "lib2to3/pgen2/parse.py",
        "multiprocessing/connection.py",
        "opcode.py",
        "sched.py",
        "secrets.py",
        "tkinter/constants.py",
        "tkinter/dialog.py",
        "token.py",
        "traceback.py",
        "turtledemo/penrose.py",
        "venv/__init__.py",
        "xml/sax/xmlreader.py",
        "zoneinfo/__init__.py",
    )
)
"""The modules of Python 3.11 that ``left_out`` names, less those excluded, too short or repeated elsewhere.

A list, because other versions moved texts: ``zipfile/__init__.py`` of 3.12 hashes to the modules left out, while its
text was trained on as 3.11's ``zipfile.py``.
"""


def left_out(path: str) -> bool:
    """Whether training leaves out the module at ``path`` (POSIX, relative to the standard library), by its hash."""
    digest = hashlib.sha256(path.encode()).digest()
    return int.from_bytes(digest[:4]) < HELD_OUT_SHARE * 2**32


def held_out(path: str) -> bool:
    """Whether demo, tests and evaluation draw from the module at ``path``: its text was never trained on."""
    return path in HELD_OUT


def excluded(path: str) -> bool:
    """Whether the module at ``path`` is of no use on either side, whatever its hash."""
    return not EXCLUDED_FOLDERS.isdisjoint(path.split("/"))
