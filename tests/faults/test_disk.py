"""Disks that are full, streams that go away, folders that two runs want, runs that last: nothing half-written, nothing that grows."""
import contextlib
import os
import random
import re
import resource
import shutil
import signal
import statistics
import subprocess
import time
from pathlib import Path

import pytest
from tests.helpers.commands import TINY, same_run, session_members, wait_until
from tests.faults.test_interruption import SHORT, assert_whole_files, whole  # noqa: F401: a fixture

from mixer.runtime.files import read_csv


@pytest.mark.parametrize("count", [25, pytest.param(500, marks=pytest.mark.campaign)])
def test_a_disk_that_fills_up(train, pictures, tmp_path, whole, tally, count):  # noqa: F811
    """No file may grow beyond a limit, drawn anew for each run: it ends with 1, naming the file, leaves all files whole, and is resumed
    with another limit; at last without one, to the end of the whole run."""
    rng, refused, done, out = random.Random(8), set(), 0, tmp_path / "run0"
    largest = max(path.stat().st_size for path in whole.iterdir())
    for i in range(count):
        cache = rng.choice([tmp_path / "cache", whole.parent, whole.parent])  # where nothing is decoded yet, and where all is
        arguments = [*SHORT, "--data", pictures, "--out", out, "--cache", cache, "--resume", "auto"]
        # from less than the smallest file, but for the message on stderr, to more than the decoded images, which are 123 KB
        limit = rng.choice([rng.randrange(700, 3000), rng.randrange(3000, largest), rng.randrange(largest // 2, 150_000)])
        result = train(*arguments, limits={resource.RLIMIT_FSIZE: limit}, streams={1: "/dev/null"})
        assert_whole_files(out)
        assert not list(out.glob(".*.tmp*")) and not list((tmp_path / "cache").glob("*.tmp*"))
        if result.returncode == 0:
            same_run(whole, out)
            done += 1
            out = tmp_path / f"run{done}"
            continue
        assert result.returncode == 1 and result.stderr.count("\n") == 1, result.stderr
        said = re.search(r"cannot (?:write|keep) .*?(?:([\w.]+): |MiB of (decoded images) .*)File too large", result.stderr)
        assert said, result.stderr
        refused.add(said[1] or said[2])
    assert train(*arguments).returncode == 0
    same_run(whole, Path(arguments[arguments.index("--out") + 1]))
    assert {"decoded images", "best.pt", "last.pt"} <= refused, refused
    tally("disk that fills up", count, count)


def test_a_real_disk_that_is_full(train, pictures, tmp_path, whole):  # noqa: F811
    """A file system of 700 KiB that something else fills to the brim: then to 40 KiB below it; then no more."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700k", "none", disk], capture_output=True).returncode:
        pytest.skip("only root may mount a small file system")
    try:
        arguments = [*SHORT, "--data", pictures, "--out", disk / "run", "--cache", disk / "cache", "--resume", "auto"]
        for room in (0, 8, 40, 160):
            filler = disk / "filler"
            filler.unlink(missing_ok=True)
            full = os.open(filler, os.O_WRONLY | os.O_CREAT)
            with contextlib.suppress(OSError):
                while True:
                    os.write(full, bytes(4096))
            os.ftruncate(full, os.fstat(full).st_size - room * 1024)
            os.close(full)
            result = train(*arguments)
            assert result.returncode in (1, 2) and "No space left on device" in result.stderr and result.stderr.count("\n") == 1, result
            assert_whole_files(disk / "run")
            assert not [path for path in disk.rglob("*.tmp*")]
        filler.unlink()
        assert train(*arguments).returncode == 0
        same_run(whole, disk / "run")
    finally:
        subprocess.run(["umount", disk], check=True)


def test_figures_and_summary_on_a_full_disk(train, pictures, tmp_path, whole):  # noqa: F811
    """A run that has only these left to write, which are smaller than its checkpoints."""
    out = shutil.copytree(whole, tmp_path / "run")
    arguments = [*SHORT, "--data", pictures, "--out", out, "--cache", whole.parent, "--resume", "auto"]
    (out / "summary.json").unlink()
    for name, limit in (("log.csv", 1000), ("split.json", 500), ("curves.png", 5000)):
        result = train(*arguments, limits={resource.RLIMIT_FSIZE: limit}, streams={1: "/dev/null"})
        assert result.returncode == 1 and f"cannot write {out / name}: File too large; the one before it is untouched" in result.stderr, result
        assert_whole_files(out)
    assert train(*arguments).returncode == 0
    same_run(whole, out)


def test_a_log_on_a_full_disk_does_not_end_the_run(train, pictures, tmp_path, whole):  # noqa: F811
    result = train(*SHORT, "--data", pictures, "--out", tmp_path / "run", streams={1: "/dev/full"})
    assert result.returncode == 0 and result.stderr == "standard output is gone (No space left on device): going on without it\n"
    same_run(whole, tmp_path / "run")


@pytest.mark.parametrize("streams, fresh", [({1: None}, False), ({2: None}, False), ({0: None, 1: None, 2: None}, False),
                                            ({0: None, 1: None, 2: None}, True), ({1: "/dev/full", 2: "/dev/full"}, False), ({2: "/dev/full"}, False)],
                         ids=["no stdout", "no stderr", "no streams", "no streams, a new Python", "both full", "stderr full"])
def test_streams_that_are_closed_or_full(train, pictures, tmp_path, whole, streams, fresh):  # noqa: F811
    assert train(*SHORT, "--data", pictures, "--out", tmp_path / "run", streams=streams, fresh=fresh).returncode == 0
    same_run(whole, tmp_path / "run")
    # and an error still has its exit code
    assert train("--data", tmp_path / "none", "--out", tmp_path / "other", streams=streams).returncode == 2


@pytest.mark.parametrize("stream", [1, 2])
def test_a_pipe_whose_reader_goes(train, pictures, tmp_path, whole, stream):  # noqa: F811
    """As with `| head -1`: the run goes on, says so once on the other stream, and is the same run."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    process = train.start(*SHORT, "--data", pictures, "--out", tmp_path / "run", streams={stream: pipe})
    with open(pipe) as reader:
        if stream == 1:
            assert reader.readline().startswith("config: ")
    result = process.wait()
    assert result.returncode == 0
    assert result.stderr == ("standard output is gone (Broken pipe): going on without it\n" if stream == 1 else "")
    same_run(whole, tmp_path / "run")


def test_a_log_in_a_file_is_plain_lines(train, pictures, tmp_path):
    result = train(*SHORT, "--data", pictures, "--out", tmp_path / "run", streams={2: tmp_path / "run.log", 1: tmp_path / "run.log"})
    lines = (tmp_path / "run.log").read_text().splitlines()
    assert result.returncode == 0 and all(line.isprintable() for line in lines)
    assert [int(line[4:10]) for line in lines if line.startswith("step ")] == list(range(5, 61, 5))


def test_two_runs_in_one_folder(train, pictures, tmp_path, whole):  # noqa: F811
    """Started at the same moment, again and again: one trains, the others are refused, the run is what it would have been alone."""
    for i in range(4):
        arguments = [*SHORT, "--data", pictures, "--out", tmp_path / f"run{i}", "--resume", "auto"]
        results = [process.wait() for process in [train.start(*arguments) for _ in range(3)]]
        codes = sorted(result.returncode for result in results)
        assert codes in ([0, 2, 2], [0, 0, 2], [0, 0, 0]), codes  # one that comes late finds it done
        assert all("another process is training in" in r.stderr for r in results if r.returncode == 2)
        same_run(whole, tmp_path / f"run{i}")


def test_bench_stops_and_leaves_nothing(command, tmp_path):
    """SIGTERM and Ctrl-C while a row is measured: its process goes too, and no table is written."""
    for signum, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        process = command("bench.py", "--device", "cpu", "--rows", "resnet18", "--out", tmp_path / "out", "--repeats", 100_000, fresh=True)
        wait_until(lambda: row_of(process))
        process.send(signum)
        result = process.wait()
        assert result.returncode == code
        assert result.stderr.splitlines() == ["measuring ResNet-18, visit 1 of 3", f"stopped by {signum.name}"]
        assert not list((tmp_path / "out").iterdir())
        wait_until(lambda: not session_members(process.pid))


def row_of(process):
    """The process in which bench.py measures a row, if it runs."""
    for pid in session_members(process.pid):
        with contextlib.suppress(OSError):
            if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return pid


def test_bench_killed_takes_its_rows_along(command):
    process = command("bench.py", "--device", "cpu", "--rows", "resnet18", "--repeats", 100_000, fresh=True)
    wait_until(lambda: row_of(process))
    process.send(signal.SIGKILL)
    process.wait()
    wait_until(lambda: not session_members(process.pid))


def test_bench_cannot_write_its_results(command, tmp_path):
    (tmp_path / "file").touch()
    result = command("bench.py", "--device", "cpu", "--out", tmp_path / "file").wait()
    assert result.returncode == 2 and result.stderr == f"error: --out: cannot write to {tmp_path / 'file'}: File exists\n"


@pytest.mark.parametrize("steps", [10_000, pytest.param(200_000, marks=pytest.mark.campaign)])
def test_ten_thousand_steps_take_no_more_memory_than_some(train, pictures, tmp_path, steps, record_property):
    """Resident memory and open files of the process, looked at from outside; the slope over the later three quarters."""
    tiny = [*TINY, "--dim", 4, "--batch-size", 2, "--patch", 16, "--image-size", 16]
    process = train.start(*tiny, "--data", pictures, "--steps", steps, "--log-every", steps // 40, "--out", tmp_path / "run").wait_for("into")
    seen = []
    while process.code() is None:
        try:
            with open(f"/proc/{process.pid}/statm") as f:
                resident = int(f.read().split()[1]) * resource.getpagesize() / 2**20
            rows = process.said().count("\nstep ")
            if rows < 40:  # the figures at the end take memory of their own
                seen.append((rows * steps // 40, resident, len(os.listdir(f"/proc/{process.pid}/fd"))))
        except (OSError, IndexError):
            break
        time.sleep(0.05)
    assert process.wait().returncode == 0 and read_csv(tmp_path / "run" / "log.csv")[-1]["step"] == steps
    later = [(step, resident) for step, resident, _ in seen if step >= steps / 4]
    slope = statistics.linear_regression(*zip(*later)).slope * 1000
    record_property("note", f"resident memory over {steps:,} steps: {slope:+.4f} MiB per 1,000 steps, {later[0][1]:.0f} MiB at a quarter, "
                             f"{later[-1][1]:.0f} MiB at the end, {min(files for *_, files in seen)} to {max(files for *_, files in seen)} open files")
    # the log's rows, a dict of ten numbers each 250 steps, are some KiB; one leaked batch a step would be 1.5 MiB per 1,000 steps
    assert slope < 0.2, slope
    files = [files for *_, files in seen]  # one more now and then, while a checkpoint is written
    assert min(files[len(files) // 2:]) <= min(files[:len(files) // 2]), "open files grow"
