import subprocess
import sys

import pytest

from mixer.runtime.errors import InputError
from mixer.runtime.files import read_csv, save_atomically, writable_folder, write_csv
from tests.helpers.commands import ROOT

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
    with pytest.raises(OSError, match="No space left on device$"):
        save_atomically(path, write_half)
    assert path.read_text() == "whole" and len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_cannot_be_written_to_is_reported_with_its_flag(tmp_path):
    assert writable_folder(tmp_path / "a" / "b", "--out").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="^--out: cannot write to .*file: File exists$"):
        writable_folder(tmp_path / "file", "--out")


def test_a_lock_is_held_by_one_process_at_a_time(tmp_path):
    """The second one is told, and may wait. A process that dies leaves no lock behind."""
    code = ("import sys, time; from mixer.runtime.files import locked\n"
            "with locked(sys.argv[1], lambda: print('busy', flush=True)):\n"
            "    print('held', flush=True); time.sleep(300)")
    command = [sys.executable, "-c", code, str(tmp_path / ".lock")]
    processes = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
                 for _ in range(2)]
    try:
        said = {process.stdout.readline(): process for process in processes}
        assert said.keys() == {"held\n", "busy\n"}
        said["held\n"].kill()
        assert said["busy\n"].stdout.readline() == "held\n"
    finally:
        for process in processes:
            process.kill()
