"""Disks that are full, folders that two runs want, runs that last: nothing half-written, nothing
that grows."""
import os
import random
import re
import resource
import shutil
import signal
import statistics
import time
from pathlib import Path

import pytest

from mixer.runtime.files import read_csv
from tests.helpers.commands import SHORT, TINY, assert_error, running, succeeded, wait_until
from tests.helpers.runs import assert_same_run, assert_whole_files


@pytest.mark.parametrize("count", [25, pytest.param(500, marks=pytest.mark.campaign)])
def test_a_disk_that_fills_up(train, pictures, tmp_path, whole, tally, count):
    """No file may grow beyond a limit, drawn anew for each run: it ends with 1, naming the file,
    leaves all files whole, and is resumed with another limit; at last without one, to the end of
    the whole run."""
    rng, refused, done, out = random.Random(8), set(), 0, tmp_path / "run0"
    largest = max(path.stat().st_size for path in whole.iterdir())
    for _ in range(count):
        # where nothing is decoded yet, or where all is
        cache = rng.choice([tmp_path / "cache", whole.parent, whole.parent])
        arguments = [*SHORT, "--data", pictures, "--out", out, "--cache", cache, "--resume", "auto"]
        # from less than the smallest file, but for the message on stderr, to more than the
        # decoded images, which are 123 KB
        limit = rng.choice([rng.randrange(700, 3000), rng.randrange(3000, largest),
                            rng.randrange(largest // 2, 150_000)])
        result = train(*arguments, limits={resource.RLIMIT_FSIZE: limit})
        assert_whole_files(out)
        assert not list(out.glob(".*.tmp*")) and not list((tmp_path / "cache").glob("*.tmp*"))
        if result.returncode == 0:
            assert_same_run(whole, out)
            done += 1
            out = tmp_path / f"run{done}"
        else:
            assert_error(result, 1)
            name = re.search(r"cannot write .*?([\w.]+): File too large", result.stderr)[1]
            refused.add("decoded images" if name.endswith(".uint8") else name)
    succeeded(train(*arguments))
    assert_same_run(whole, Path(arguments[arguments.index("--out") + 1]))
    assert {"decoded images", "best.pt", "last.pt"} <= refused, refused
    tally("disk that fills up", count, count)


def test_figures_and_summary_on_a_full_disk(train, pictures, out, whole):
    """A run that has only these left to write, which are smaller than its checkpoints."""
    shutil.copytree(whole, out)
    arguments = [*SHORT, "--data", pictures, "--out", out, "--cache", whole.parent,
                 "--resume", "auto"]
    (out / "summary.json").unlink()
    for name, limit in (("log.csv", 900), ("split.json", 500)):
        result = train(*arguments, limits={resource.RLIMIT_FSIZE: limit})
        assert_error(result, 1, f"cannot write {out / name}: File too large")
        assert_whole_files(out)

    # a picture is not worth a run
    result = succeeded(train(*arguments, limits={resource.RLIMIT_FSIZE: 5000}))
    assert "curves.png is not drawn: " in result.stderr
    assert_whole_files(out)
    assert_same_run(whole, out)


def test_two_runs_in_one_folder(train, pictures, tmp_path, whole):
    """Started at the same moment, again and again: one trains, the others are refused, the run is
    what it would have been alone."""
    for i in range(3):
        out = tmp_path / f"run{i}"
        arguments = [*SHORT, "--data", pictures, "--out", out, "--resume", "auto"]
        results = [process.wait() for process in [train.start(*arguments) for _ in range(3)]]
        codes = sorted(result.returncode for result in results)
        assert codes in ([0, 2, 2], [0, 0, 2], [0, 0, 0]), codes  # a late one finds it done
        assert all("another process is training in" in result.stderr
                   for result in results if result.returncode == 2)
        assert_same_run(whole, out)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_bench_stopped_takes_its_row_along(command, tmp_path, signum):
    """What it leaves behind would slow down what the next bench.py measures."""
    process = command("bench.py", "--device", "cpu", "--rows", "resnet18", "--repeats", 100_000,
                      "--out", tmp_path / "out")
    wait_until(lambda: running(parent=process.pid), process)
    process.send(signum)
    assert process.wait().returncode == (130 if signum == signal.SIGINT else -signum)
    process.wait_for_its_children()
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("steps", [3_000, pytest.param(200_000, marks=pytest.mark.campaign)])
def test_many_steps_take_no_more_memory_than_some(train, pictures, out, steps):
    """Resident memory and open files of the process, looked at from outside; the slope over the
    later three quarters."""
    tiny = [*TINY, "--dim", 4, "--batch-size", 2, "--patch", 16, "--image-size", 16]
    process = train.start(*tiny, "--data", pictures, "--steps", steps, "--log-every", steps // 8,
                          "--out", out)
    seen = watch(process.wait_for("into"), steps)
    succeeded(process.wait())
    assert read_csv(out / "log.csv")[-1]["step"] == steps

    # memory: the log's rows, a dict of ten numbers each, are some KiB; one leaked batch a step
    # would be 1.5 MiB per 1,000 steps
    later = [(step, mib) for step, mib, _ in seen if step >= steps / 4]
    slope = statistics.linear_regression(*zip(*later, strict=True)).slope * 1000
    files = [files for *_, files in seen]
    assert slope < 0.2, slope

    # files: one more now and then, while a checkpoint is written
    half = len(files) // 2
    assert min(files[half:]) <= min(files[:half]), "open files grow"


def watch(process, steps):
    """[(step of the last row, resident MiB, open files)] of a command until it draws its figures,
    which take memory of their own: at the end, since there are fewer than ten rows."""
    seen = []
    while process.code() is None:
        rows = process.output().count("\nstep ")
        try:
            with open(f"/proc/{process.pid}/statm") as f:
                mib = int(f.read().split()[1]) * resource.getpagesize() / 2**20
            files = len(os.listdir(f"/proc/{process.pid}/fd"))
        except (OSError, IndexError):  # it has ended
            break
        if rows < 8:
            seen.append((rows * steps // 8, mib, files))
        time.sleep(0.05)
    return seen
