import errno
import fcntl
import os
import pwd

import pytest

from mixer.runtime.errors import InputError
from mixer.runtime.files import (
    cache_home,
    locked,
    read_csv,
    reserve,
    save_atomically,
    writable_folder,
    write_csv,
)

LOG = [{"step": step, "train_loss": 0.7 - step / 1000, "val_acc": 0.5, "skipped": 0}
       for step in (100, 200)]


def test_csv_comes_back_as_it_was(tmp_path):
    rows = [{**LOG[0], "val_acc": None}, LOG[1]]
    write_csv(tmp_path / "log.csv", rows)
    assert read_csv(tmp_path / "log.csv") == rows
    text = (tmp_path / "log.csv").read_text()
    assert text.count("step") == 1 and text.count("\n") == 3


def test_a_failed_write_leaves_the_old_file(tmp_path):
    write_csv(tmp_path / "log.csv", LOG)
    before = (tmp_path / "log.csv").read_bytes()
    with pytest.raises(ValueError):
        write_csv(tmp_path / "log.csv", LOG + [{"other": 1}])
    assert (tmp_path / "log.csv").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_leaves_the_old_file_and_is_reported_by_its_name(tmp_path):
    def write_half(path):
        path.write_text("ha")
        raise OSError(28, "No space left on device")
    path = tmp_path / "x.txt"
    with pytest.raises(OSError, match=r"^cannot write .*x.txt: No space left on device$"):
        save_atomically(path, write_half)
    assert not list(tmp_path.iterdir())
    path.write_text("whole")
    with pytest.raises(OSError, match="No space left on device; the one before it is untouched$"):
        save_atomically(path, write_half)
    assert path.read_text() == "whole" and len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_cannot_be_written_to_is_reported_with_its_flag(tmp_path):
    assert writable_folder(tmp_path / "a" / "b", "--out").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="^--out: cannot write to .*file: File exists$"):
        writable_folder(tmp_path / "file", "--out")


NO_LOCKS = [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL]


def failing(number):
    def fail(*args):
        raise OSError(number, os.strerror(number))
    return fail


@pytest.mark.parametrize("number", NO_LOCKS)
def test_a_file_system_without_locks_is_named_with_the_flag(monkeypatch, tmp_path, capsys, number):
    monkeypatch.setattr(fcntl, "lockf", failing(number))
    with locked(tmp_path / ".lock", pytest.fail, "--out", required=False):
        pass
    assert capsys.readouterr().err == (f"--out: the file system of {tmp_path} has no locks: "
                                       "start no second run in this folder\n")
    with pytest.raises(InputError, match=f"^--cache: the file system of {tmp_path} has no locks"):
        with locked(tmp_path / ".lock", pytest.fail, "--cache"):
            pytest.fail("not locked")


def test_a_lock_that_fails_is_named_with_the_flag(monkeypatch, tmp_path):
    monkeypatch.setattr(fcntl, "lockf", failing(errno.EIO))
    for path, reason in ((tmp_path / ".lock", "Input/output error"), (tmp_path, "Is a directory")):
        with pytest.raises(InputError, match=f"^--out: cannot lock {path.parent}: {reason}$"):
            with locked(path, pytest.fail, "--out", required=False):
                pytest.fail("not locked")


def test_an_error_inside_a_lock_is_no_error_of_the_lock(tmp_path):
    with pytest.raises(OSError, match="of the body"), locked(tmp_path / "l", pytest.fail, "--out"):
        raise OSError(errno.ENOLCK, "of the body")


@pytest.mark.parametrize("number", NO_LOCKS)
def test_a_file_system_that_cannot_flush_or_reserve(monkeypatch, tmp_path, number):
    monkeypatch.setattr(os, "fsync", failing(number))
    monkeypatch.setattr(os, "posix_fallocate", failing(number))
    write_csv(tmp_path / "log.csv", LOG)
    reserve(tmp_path / "log.csv")
    assert read_csv(tmp_path / "log.csv") == LOG
    monkeypatch.setattr(os, "posix_fallocate", failing(errno.ENOSPC))
    with pytest.raises(OSError, match="No space left"):
        reserve(tmp_path / "log.csv")


def test_the_cache_is_never_in_a_folder_called_tilde(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert str(cache_home()) == "/home/me/.cache"
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert str(cache_home()) == "/cache"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
    for home in (None, "", "~", "relative"):
        monkeypatch.setenv("HOME", home or "")
        if home is None:
            monkeypatch.delenv("HOME")
        with pytest.raises(InputError, match="^--cache: this user has no home folder"):
            cache_home()
