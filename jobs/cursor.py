"""``FILE:LINE:COL`` -> the text before and after a cursor."""

from pathlib import Path

from serving.errors import UsageError


def split_at(cursor: str) -> tuple[str, str]:
    """The file's text before and after the cursor; LINE and COL count from 1, COL in characters.

    Raises ``UsageError`` naming the part that is wrong.
    """
    name, _, column = cursor.rpartition(":")
    name, _, line = name.rpartition(":")
    if not (name and line.isdecimal() and column.isdecimal() and int(line) and int(column)):
        raise UsageError(
            f"{cursor!r} is no FILE:LINE:COL.", remedy="Write for example src/main.py:12:8, counted from 1."
        )
    try:
        lines = [f"{text}\n" for text in Path(name).read_bytes().decode().split("\n")]
    except OSError as error:
        raise UsageError(f"{name} cannot be read: {error.strerror}.", remedy="Check the path.") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{name} is not UTF-8 at byte {error.start}.", remedy="Convert it.") from None
    lines[-1] = lines[-1].removesuffix("\n")
    if int(line) > len(lines):
        raise UsageError(f"{name} has {len(lines)} lines, no line {line}.", remedy="Choose a line of the file.")
    row = lines[int(line) - 1]
    length = len(row.rstrip("\r\n"))
    if int(column) > length + 1:
        raise UsageError(
            f"line {line} of {name} has {length} characters.", remedy=f"Choose a column from 1 to {length + 1}."
        )
    at = sum(map(len, lines[: int(line) - 1])) + int(column) - 1
    text = "".join(lines)
    return text[:at], text[at:]
