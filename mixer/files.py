"""Files that are whole or absent, and folders with one user at a time."""
import contextlib
import csv
import fcntl
import json
import os
from pathlib import Path


def save_atomically(path, write):
    """Call `write(temporary path)`, then rename: the file at `path` is the old one or the whole new one, never a part.

    A failure (a full disk, say) leaves the old file and no temporary one, and is raised.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")  # the suffix stays: figures are written by it
    try:
        write(temporary)
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, contents):
    save_atomically(path, lambda temporary: temporary.write_text(json.dumps(contents, indent=1) + "\n"))


def write_csv(path, rows):
    """A list of dicts with the same keys -> one header and a line each; None is an empty field."""
    def write(temporary):
        with open(temporary, "w", newline="") as f:
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
    """Hold the lock file `path`; the system lets go of it should this process die.

    Where another process holds it, `when_busy()` is called: it raises, or returns to wait.
    """
    with open(path, "w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            when_busy()
            fcntl.flock(f, fcntl.LOCK_EX)
        yield
