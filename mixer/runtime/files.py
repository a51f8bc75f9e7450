"""Files that are whole or absent, and folders with one user at a time."""
import contextlib
import csv
import fcntl
import json
import os
import tempfile
from pathlib import Path

from .errors import InputError


def writable_folder(path, flag):
    """The folder that `flag` names, made if need be. Raises InputError where nothing can be written there."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()  # what permissions say is not all: a disk may be full or read-only
    except OSError as e:
        raise InputError(f"{flag}: cannot write to {path}: {e.strerror}") from e
    return Path(path)


def save_atomically(path, write):
    """Call `write(temporary path)`, then rename: the file at `path` is the old one or the whole new one, never a part.

    A failure leaves the old file and no temporary one. Raises OSError, naming `path`, where the disk is full or broken.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")  # the suffix stays: figures are written by it
    try:
        write(temporary)
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as e:
        before = "; the one before it is untouched" if path.exists() else ""
        raise OSError(f"cannot write {path}: {e.strerror or e}{before}") from e
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path, text):
    save_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path, contents):
    write_text(path, json.dumps(contents, indent=1) + "\n")


def write_csv(path, rows):
    """A list of dicts with the same keys -> one header and a line each; None is an empty field."""
    def write(temporary):
        with open(temporary, "w", newline="", encoding="utf-8", errors="backslashreplace") as f:  # file names need not be text
            writer = csv.DictWriter(f, rows[0] if rows else ["step"], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    save_atomically(path, write)


def read_csv(path):
    """What `write_csv` wrote, numbers as floats and empty fields as None."""
    with open(path, newline="") as f:
        return [{key: float(value) if value else None for key, value in row.items()} for row in csv.DictReader(f)]


@contextlib.contextmanager
def locked(path, when_busy):
    """Hold the lock file `path`; the system lets go of it should this process die, whatever children it leaves.

    Where another process holds it, `when_busy()` is called: it raises, or returns to wait.
    """
    with open(path, "w") as f:
        try:
            fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a process's own lock, which a forked child does not share
        except (BlockingIOError, PermissionError):
            when_busy()
            fcntl.lockf(f, fcntl.LOCK_EX)
        yield
