"""train.py on damaged, strange or hostile images, folders and zips: skipped or refused by name."""
import csv
import io
import json
import os
import random
import resource
import shutil
import signal
import struct
import zipfile
import zlib
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from mixer.data.demo import render
from mixer.data.images import find_images
from mixer.runtime.errors import InputError
from tests.helpers.commands import TINY, forked
from tests.helpers.pictures import make_unreadable, zipped

RUN = [*TINY, "--steps", 1, "--lr", 1e-9]


def jpegs(count):
    """JPEG files of many sizes and kinds: drawings, and photographs of DOGS_VS_CATS, if set."""
    found = []
    if path := os.environ.get("DOGS_VS_CATS"):
        images = find_images(path)
        indices = random.Random(0).sample(range(len(images)), count // 2)
        found = [images.read(i) for i in indices]
    for i in range(count - len(found)):
        file = io.BytesIO()
        picture = Image.fromarray(render(i, 40 + 9 * i)).convert(("RGB", "L", "CMYK")[i % 3])
        picture.save(file, "JPEG", quality=30 + 5 * i, progressive=i % 2 == 1)
        found.append(file.getvalue())
    return found


def damaged(rng, data, others):
    """`data` after one to four faults: bytes flipped, or a piece cut out, doubled, overwritten or
    replaced by a piece of another file."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        # half of the faults are in the header
        start = rng.randrange(len(data) if rng.random() < 0.5 else min(600, len(data)))
        end = min(len(data), start + rng.choice([1, 2, 4, 16, 100, len(data)]))
        kind = rng.randrange(6)
        if kind == 0:
            for i in range(start, min(end, start + 16)):
                data[i] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[start:end] = b""
        elif kind == 2:
            data[start:start] = data[start:end][:4096]
        elif kind == 3:
            data[start:end] = rng.randbytes(min(end - start, 64))
        elif kind == 4:
            other = rng.choice(others)
            at = rng.randrange(len(other))
            data[start:end] = other[at:at + end - start]
        else:
            data[start:start + 4] = rng.choice([b"\0\0\0\0", b"\xff\xff\xff\xff",
                                                b"\x7f\xff\xff\xff", b"\0\0\0\x01"])
        data = data or bytearray(b"\0")
    return bytes(data)


def faults_of(run):
    """{image: fault} of bad_images.csv."""
    with open(run / "bad_images.csv", newline="") as f:
        return {row["image"]: row["fault"] for row in csv.DictReader(f)}


@pytest.mark.parametrize("count", [1000, pytest.param(50_000, marks=pytest.mark.campaign)])
def test_damaged_jpegs_are_skipped_and_counted(train, tmp_path, tally, count):
    """Beside forty good ones. Exit code 0; every image is either decoded or in bad_images.csv."""
    originals, rng, folder = jpegs(12), random.Random(1), tmp_path / "jpegs"
    folder.mkdir()
    for i in range(count):
        data = damaged(rng, originals[i % 12], originals)
        (folder / f"{('cat', 'dog')[i % 2]}.{i}.jpg").write_bytes(data)
    for i in range(40):
        (folder / f"{('cat', 'dog')[i % 2]}.{count + i}.jpg").write_bytes(originals[i % 12])
    result = train(*RUN, "--data", folder, "--out", tmp_path / "run", "--bad-images", "skip")
    assert result.returncode == 0 and result.stderr == "", result.stderr
    faults = faults_of(tmp_path / "run")
    split = json.loads((tmp_path / "run" / "split.json").read_text())
    decoded = {*split["train"], *split["val"]}
    assert decoded.isdisjoint(faults) and len(decoded) + len(faults) == count + 40
    assert all(int(name.split(".")[1]) < count for name in faults)
    assert count * 0.2 < len(faults) < count * 0.9
    stopped = train(*RUN, "--data", folder, "--out", tmp_path / "other")
    assert stopped.returncode == 2
    assert f"{len(faults):,} of {count + 40:,} images do not decode" in stopped.stderr
    assert stopped.stderr.count("\n") == 1
    tally("damaged JPEG decoded or left out", count, count)


def read_damaged_zips(seeds, folder):
    """For each seed, damage a zip, then find and decode its images; writes outcomes.json."""
    resource.setrlimit(resource.RLIMIT_AS, (12 * 2**30, 12 * 2**30))
    small = []
    for i in range(6):
        file = io.BytesIO()
        Image.fromarray(render(i, 24)).save(file, "JPEG")
        small.append(file.getvalue())
    flat = zipped({f"train/{('cat', 'dog')[i % 2]}.{i}.jpg": small[i] for i in range(6)})
    by_class = zipped({f"PetImages/{('Cat', 'Dog')[i % 2]}/{i}.jpg": small[i] for i in range(6)})
    bases = [flat, by_class, zipped({"train.zip": flat, "x.csv": b""})]
    outcomes = Counter()
    for seed in seeds:
        rng, path = random.Random(seed), folder / "damaged.zip"
        base = rng.choice(bases)
        if rng.random() < 0.5:  # the directory at the end is where a zip is read from
            at = base.rindex(b"PK\x01\x02") if rng.random() < 0.5 else base.index(b"PK\x01\x02")
            path.write_bytes(base[:at] + damaged(rng, base[at:], bases))
        else:
            path.write_bytes(damaged(rng, base, bases))
        signal.alarm(30)
        try:
            images = find_images(path)
        except InputError as e:
            assert "--data: " in str(e)
            outcomes["refused"] += 1
            continue
        for i in range(len(images)):
            try:
                assert images.load(i, 16).shape == (16, 16, 3)
                outcomes["images decoded"] += 1
            except ValueError:
                outcomes["images damaged"] += 1
        outcomes["opened"] += 1
        (folder / "outcomes.json").write_text(json.dumps({**outcomes, "seed": seed}))
    (folder / "outcomes.json").write_text(json.dumps(outcomes))


@pytest.mark.parametrize("count", [1000, pytest.param(50_000, marks=pytest.mark.campaign)])
def test_damaged_zips_are_refused_or_read(train, tmp_path, tally, count):
    process = forked(read_damaged_zips, range(count), tmp_path)
    process.join()
    outcomes = json.loads((tmp_path / "outcomes.json").read_text())
    assert process.exitcode == 0, outcomes
    for outcome in ("refused", "opened", "images decoded", "images damaged"):
        assert outcomes[outcome] > count / 20, outcomes
    tally("damaged zip refused or read", count, outcomes["refused"] + outcomes["opened"])


@pytest.mark.parametrize("count", [10, pytest.param(300, marks=pytest.mark.campaign)])
def test_damaged_zips_given_to_the_command(train, tmp_path, tally, count):
    rng, path = random.Random(2), tmp_path / "damaged.zip"
    originals = jpegs(12)
    base = zipped({f"{('cat', 'dog')[i % 2]}.{i}.jpg": originals[i % 12] for i in range(24)})
    for i in range(count):
        path.write_bytes(damaged(rng, base, [base]))
        result = train(*RUN, "--data", path, "--out", tmp_path / f"run{i}", "--bad-images", "skip")
        assert result.returncode in (0, 2) and "Traceback" not in result.stderr
        assert result.stderr.count("\n") == (result.returncode == 2), result.stderr
    runs = {f"run{i}" for i in range(count)}  # and nothing is extracted
    assert {p.name for p in tmp_path.iterdir()} <= {"damaged.zip", "streams", "cache", *runs}
    tally("damaged zip given to train.py", count, count)


def png(width, height, *chunks):
    """A PNG that declares a size, with any chunks (kind, data) in it."""
    def chunk(kind, data):
        length, crc = struct.pack(">I", len(data)), struct.pack(">I", zlib.crc32(kind + data))
        return length + kind + data + crc
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), *chunks, (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, data) for kind, data in chunks)


def test_hostile_files_are_skipped_one_by_one(train, tmp_path, pictures):
    """Each is named with its reason. Only FORMATS are decoded. Memory stays within bounds."""
    data = shutil.copytree(pictures, tmp_path / "data")
    tiff = io.BytesIO()
    Image.new("RGB", (8, 8)).save(tiff, "TIFF")
    bomb = zlib.compress(bytes(100_000_000), 9)
    hostile = {
        "empty": (b"", "empty file"),
        "text": (png(8, 8, (b"zTXt", b"a\0\0" + bomb)), "too large"),  # not unpacked
        "html": (b"<html>429 Too Many Requests</html>", "not a JPEG"),
        "tiff": (tiff.getvalue(), "not a JPEG"),
        "random": (random.Random(0).randbytes(5000), "not a JPEG"),
        "huge": (png(60_000, 60_000, (b"IDAT", bomb)), "pixels"),
        "large": (png(9_000, 9_000, (b"IDAT", bomb)), "over the limit"),
        "cut": ((pictures / "cat.1.png").read_bytes()[:900], "truncated"),
        "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
                       b"(%pipe%touch hacked) (w) file\n", "not a JPEG"),
    }
    for i, (content, _) in enumerate(hostile.values(), 100):
        (data / f"cat.{i}.jpg").write_bytes(content)
    (data / "dog.100.jpg").symlink_to("nowhere")
    with open(data / "dog.101.jpg", "wb") as f:
        f.truncate(10**11)  # a hundred gigabytes, declared
    os.mkfifo(data / "dog.102.jpg")  # not a file, so not read
    result = train(*RUN, "--data", data, "--out", tmp_path / "run", "--bad-images", "skip")
    assert result.returncode == 0 and result.stderr == "", result.stderr
    faults = faults_of(tmp_path / "run")
    for i, (_, fault) in enumerate(hostile.values(), 100):
        assert fault.lower() in faults.pop(f"cat.{i}.jpg").lower()
    assert "cannot be read" in faults.pop("dog.100.jpg")
    assert "over the limit" in faults.pop("dog.101.jpg") and not faults


def test_hostile_zips(train, tmp_path, pictures):
    member, out = (pictures / "cat.1.png").read_bytes(), tmp_path / "run"
    path = tmp_path / "x.zip"

    def write(names):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
            for name in names:
                z.writestr(name, bytes(200_000_000) if "99" in name else member)
    write(["../../escaped/cat.1.png", "/up/dog.1.png", "cat.2.png", "C:\\dog.2.png", "dog.3.png"])
    result = train(*RUN, "--data", path, "--out", out)
    assert result.returncode == 2 and "not sure which folders" in result.stderr
    names = [f"/up/{kind}.{i}.png" for kind in ("cat", "dog") for i in range(9)]
    write([*names, "/up/dog.99.png", ".cat.3.png"])
    result = train(*RUN, "--data", path, "--out", out, "--bad-images", "skip")
    assert result.returncode == 0, result
    assert ("skipped 1 of 19 images that do not decode: up/dog.99.png (200,000,000 bytes"
            in result.stdout)
    assert not any(Path(folder, "up").exists() for folder in (tmp_path, tmp_path.parent, "/", "."))


def test_strange_folders(train, tmp_path, pictures):
    data = shutil.copytree(pictures, tmp_path / "data" / "train", dirs_exist_ok=True).parent
    (data / "train" / "again").symlink_to(data / "train")  # its images would count twice, or more
    result = train(*RUN, "--data", data, "--out", tmp_path / "run")
    assert result.returncode == 2
    assert "would count twice" in result.stderr and "again" in result.stderr
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for flag, path, message in (("--data", pipe, "neither a folder nor a file"),
                                ("--resume", pipe, "not a file"),
                                ("--data", "/dev/zero", "neither a folder nor a file")):
        result = train.start(*RUN, "--data", pictures, flag, path, "--out", tmp_path / "run").wait()
        assert result.returncode == 2 and message in result.stderr, result.stderr


def test_a_folder_that_cannot_be_read_is_no_empty_one(tmp_path, pictures, monkeypatch):
    data = tmp_path / "data"
    for folder in ("cat", "dog", "dog/more"):
        shutil.copytree(pictures, data / folder, dirs_exist_ok=True)
    make_unreadable(monkeypatch, "more")
    with pytest.raises(InputError, match="more cannot be read: Permission denied"):
        find_images(data)


def test_a_run_goes_on_after_its_images_were_copied(train, tmp_path, pictures):
    """With other times, or in a zip; but not where the size or the name of one differs."""
    copy, archive = tmp_path / "copy", tmp_path / "archive.zip"
    shutil.copytree(pictures, copy, copy_function=shutil.copyfile)
    archive.write_bytes(zipped({path.name: path.read_bytes() for path in copy.iterdir()}))
    out = ["--out", tmp_path / "run", "--resume", "auto"]
    for steps, data in enumerate([pictures, copy, archive], 1):
        result = train(*TINY, "--steps", steps, "--data", data, *out)
        assert result.returncode == 0, result.stderr
        assert steps == 1 or f"resumed at step {steps - 1}" in result.stdout
    with open(copy / "cat.1.png", "ab") as f:
        f.write(b"?")
    for change in (lambda: None, lambda: (copy / "cat.1.png").rename(copy / "cat.101.png")):
        change()
        result = train(*TINY, "--steps", 4, "--data", copy, *out)
        assert result.returncode == 2 and "another run: images was" in result.stderr


def test_names_of_any_bytes(train, tmp_path, pictures, tally):
    """File and folder names from hypothesis, not all text: trained on, or named readably."""
    hypothesis = pytest.importorskip("hypothesis")
    st, tried = hypothesis.strategies, 0
    text = st.text(min_size=1, max_size=20).map(lambda t: t.encode(errors="surrogatepass"))
    names = st.one_of(st.binary(min_size=1, max_size=60), text)
    names = names.map(lambda b: b.replace(b"/", b"").replace(b"\0", b""))
    names = names.filter(lambda b: b.strip(b".") and not b.startswith(b".") and len(b) < 200)
    run_once = [*TINY, "--batch-size", 4, "--steps", 1]

    @hypothesis.settings(max_examples=15, deadline=None, derandomize=True, database=None,
                         suppress_health_check=[hypothesis.HealthCheck.too_slow])
    @hypothesis.given(st.lists(names, min_size=2, max_size=2, unique=True),
                      st.lists(names, min_size=4, max_size=8, unique=True), st.booleans())
    def run(classes, files, spoilt):
        nonlocal tried
        tried += 1
        root = os.fsencode(tmp_path / f"data{tried}")
        for label, kind in enumerate(classes):
            os.makedirs(os.path.join(root, kind))
            for file in files:
                path = os.path.join(root, kind, file + b".png")
                shutil.copy(pictures / f"{('dog', 'cat')[label]}.{label}.png", path)
        if spoilt:
            with open(path, "wb"):
                pass
        out = tmp_path / f"run{tried}"
        arguments = [*run_once, "--data", os.fsdecode(root), "--out", out]
        result = train(*arguments, env={"PYTHONIOENCODING": "ascii"} if tried % 2 else {})
        assert result.returncode == (2 if spoilt else 0), (result, path)
        for line in (result.stdout + result.stderr).splitlines():
            assert line.isprintable(), result
        assert result.stderr.count("\n") == spoilt
        if not spoilt:
            split = json.loads((out / "split.json").read_text())
            assert len(split["train"]) + len(split["val"]) == 2 * len(files)
            assert train(*arguments, "--resume", "auto").returncode == 0
    run()
    tally("names of any bytes", tried, tried)
