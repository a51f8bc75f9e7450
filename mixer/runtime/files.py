"""Files that are complete or absent, and folders with one user at a time."""
import contextlib
import csv
import fcntl
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from .errors import InputError


def writable_folder(path: Path | str, flag: str) -> Path:
    """The folder that `flag` names, created if needed. Raises InputError if it is not writable."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()  # the disk may be full or read-only
    except OSError as e:
        raise InputError(f"{flag}: cannot write to {path}: {e.strerror}") from e
    return Path(path)


def save_atomically(path: Path | str, write: Callable[[Path], object]) -> None:
    """Call `write(temporary path)`, then rename: `path` is the old or the complete new file.

    A failure leaves the old file and no temporary one. Raises OSError, naming `path`, if the disk
    is full or broken.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")  # figures need the suffix
    try:
        write(temporary)
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as e:
        raise OSError(f"cannot write {path}: {e.strerror or e}") from e
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path | str, text: str) -> None:
    save_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path | str, contents) -> None:
    write_text(path, json.dumps(contents, indent=1) + "\n")


def write_csv(path: Path | str, rows: list[dict]) -> None:
    """A list of dicts with the same keys -> a header and one line each. None is an empty field."""
    def write(temporary):
        # a file name need not be text
        with open(temporary, "w", newline="", encoding="utf-8", errors="backslashreplace") as f:
            writer = csv.DictWriter(f, rows[0] if rows else ["step"], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    save_atomically(path, write)


def read_csv(path: Path | str) -> list[dict[str, float | None]]:
    """The rows of a file of `write_csv` that holds numbers. An empty field is None."""
    with open(path, newline="") as f:
        return [{key: float(value) if value else None for key, value in row.items()}
                for row in csv.DictReader(f)]


@contextlib.contextmanager
def locked(path: Path | str, when_busy: Callable[[], object]) -> Iterator[None]:
    """Hold the lock file `path`. The system releases it if this process dies.

    If another process holds it, `when_busy()` is called: it raises, or returns to wait.
    """
    with open(path, "w") as f:
        try:
            fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            when_busy()
            fcntl.lockf(f, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def claimed_folder(out: Path, resume: str | None, rank: int) -> Iterator[None]:
    """Rank 0 creates, checks and locks the folder of a run. Raises InputError if it is taken."""
    def busy():
        raise InputError(f"--out: another process is training in {out}")
    if rank:
        yield
        return
    with locked(writable_folder(out, "--out") / ".lock", busy):
        if (out / "config.json").exists() and resume != "auto":
            raise InputError(f"--out: {out} holds another run; add --resume auto to continue it, "
                             "or choose another --out")
        yield
