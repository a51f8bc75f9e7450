"""train.py on damaged, strange or hostile images, folders and zips: skipped or refused by name."""
import io
import json
import os
import random
import resource
import shutil
import signal
import zipfile
import zlib
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from mixer.data.demo import render
from mixer.data.images import find_images
from mixer.runtime.errors import InputError
from tests.helpers.commands import TINY, assert_error, forked, succeeded
from tests.helpers.pictures import copied, encoded, load, png, zipped
from tests.helpers.runs import read_json, read_rows

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
    """`data` after one to four faults: a piece cut out, doubled, overwritten or replaced."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        # half of the faults are in the header
        start = rng.randrange(len(data) if rng.random() < 0.5 else min(600, len(data)))
        end = min(len(data), start + rng.choice([1, 2, 4, 16, 100, len(data)]))
        other = rng.choice(others)
        at = rng.randrange(len(other))
        data[start:end] = rng.choice([
            b"", data[start:end] + data[start:end][:4096], rng.randbytes(min(end - start, 64)),
            other[at:at + end - start], b"\0" * (end - start), b"\xff" * (end - start)])
        data = data or bytearray(b"\0")
    return bytes(data)


def faults_of(train, data, out):
    """{image: fault} of bad_images.csv, from a run that leaves these images out."""
    result = succeeded(train(*RUN, "--data", data, "--out", out, "--bad-images", "skip"))
    assert result.stderr == "", result.stderr
    return {row["image"]: row["fault"] for row in read_rows(out / "bad_images.csv")}


@pytest.mark.parametrize("count", [300, pytest.param(50_000, marks=pytest.mark.campaign)])
def test_damaged_jpegs_are_skipped_and_counted(train, tmp_path, out, tally, count):
    """Beside forty good ones. Exit code 0; every image is either decoded or in bad_images.csv."""
    originals, rng, folder = jpegs(12), random.Random(1), tmp_path / "jpegs"
    folder.mkdir()
    for i in range(count):
        data = damaged(rng, originals[i % 12], originals)
        (folder / f"{('cat', 'dog')[i % 2]}.{i}.jpg").write_bytes(data)
    for i in range(40):
        (folder / f"{('cat', 'dog')[i % 2]}.{count + i}.jpg").write_bytes(originals[i % 12])
    faults = faults_of(train, folder, out)
    split = read_json(out / "split.json")
    decoded = {*split["train"], *split["val"]}
    assert decoded.isdisjoint(faults) and len(decoded) + len(faults) == count + 40
    assert all(int(name.split(".")[1]) < count for name in faults)
    assert count * 0.2 < len(faults) < count * 0.9
    assert_error(train(*RUN, "--data", folder, "--out", tmp_path / "other"), 2,
                 f"{len(faults):,} of {count + 40:,} images do not decode")
    tally("damaged JPEG decoded or left out", count, count)


def read_damaged_zips(seeds, folder):
    """For each seed, damage a zip, then find and decode its images; writes outcomes.json."""
    resource.setrlimit(resource.RLIMIT_AS, (12 * 2**30, 12 * 2**30))
    small = [encoded(colour=(40 * i, 0, 0)) for i in range(6)]
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
                assert load(images, i, 16).shape == (16, 16, 3)
                outcomes["images decoded"] += 1
            except ValueError:
                outcomes["images damaged"] += 1
        outcomes["opened"] += 1
        (folder / "outcomes.json").write_text(json.dumps({**outcomes, "seed": seed}))
    (folder / "outcomes.json").write_text(json.dumps(outcomes))


@pytest.mark.parametrize("count", [500, pytest.param(50_000, marks=pytest.mark.campaign)])
def test_damaged_zips_are_refused_or_read(tmp_path, tally, count):
    process = forked(read_damaged_zips, range(count), tmp_path)
    process.join()
    outcomes = read_json(tmp_path / "outcomes.json")
    assert process.exitcode == 0, outcomes
    for outcome in ("refused", "opened", "images decoded", "images damaged"):
        assert outcomes[outcome] > count / 20, outcomes
    tally("damaged zip refused or read", count, outcomes["refused"] + outcomes["opened"])


def test_hostile_files_are_skipped_one_by_one(train, tmp_path, out, pictures):
    """Each is named with its reason. Only FORMATS are decoded. Memory stays within bounds."""
    data = shutil.copytree(pictures, tmp_path / "data")
    bomb = zlib.compress(bytes(100_000_000), 9)
    hostile = {
        "empty": (b"", "not a JPEG"),
        "text": (png(8, 8, 8, 2, (b"zTXt", b"a\0\0" + bomb)), "too large"),  # not unpacked
        "html": (b"<html>429 Too Many Requests</html>", "not a JPEG"),
        "tiff": (encoded(format="TIFF"), "not a JPEG"),
        "huge": (png(60_000, 60_000, 8, 2, (b"IDAT", bomb)), "pixels"),
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
    faults = faults_of(train, data, out)
    for i, (_, fault) in enumerate(hostile.values(), 100):
        assert fault.lower() in faults.pop(f"cat.{i}.jpg").lower()
    assert "cannot be read" in faults.pop("dog.100.jpg")
    assert "over the limit" in faults.pop("dog.101.jpg") and not faults


def test_hostile_zips(train, tmp_path, out, pictures):
    member, path = (pictures / "cat.1.png").read_bytes(), tmp_path / "x.zip"

    def write(names):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
            for name in names:
                z.writestr(name, bytes(200_000_000) if "99" in name else member)
    write(["../../escaped/cat.1.png", "/up/dog.1.png", "cat.2.png", "C:\\dog.2.png", "dog.3.png"])
    assert_error(train(*RUN, "--data", path, "--out", out), 2, "x.zip are ambiguous: images lie")
    names = [f"/up/{kind}.{i}.png" for kind in ("cat", "dog") for i in range(9)]
    write([*names, "/up/dog.99.png", ".cat.3.png"])
    result = succeeded(train(*RUN, "--data", path, "--out", out, "--bad-images", "skip"))
    assert ("skipped 1 of 19 images that do not decode: up/dog.99.png (200,000,000 bytes"
            in result.stdout)
    assert not any(Path(folder, "up").exists() for folder in (tmp_path, tmp_path.parent, "/", "."))


def test_strange_folders(train, tmp_path, out, pictures):
    data = shutil.copytree(pictures, tmp_path / "data" / "train", dirs_exist_ok=True).parent
    (data / "train" / "again").symlink_to(data / "train")  # its images would count twice, or more
    assert_error(train(*RUN, "--data", data, "--out", out), 2, "would count twice", "again")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for flag, path, message in (("--data", pipe, "neither a folder nor a file"),
                                ("--resume", pipe, "not a file"),
                                ("--data", "/dev/zero", "neither a folder nor a file")):
        process = train.start(*RUN, "--data", pictures, flag, path, "--out", out)
        assert_error(process.wait(), 2, message)


def test_a_folder_that_cannot_be_read_is_no_empty_one(tmp_path, pictures, monkeypatch):
    """By a patch, because root can read every folder."""
    data, scandir = tmp_path / "data", os.scandir
    for folder in ("cat", "dog", "dog/more"):
        shutil.copytree(pictures, data / folder, dirs_exist_ok=True)

    def refusing(path):
        if Path(path).name == "more":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)
    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(InputError, match="more cannot be read: Permission denied"):
        find_images(data)


def test_a_run_goes_on_after_its_images_were_copied(train, tmp_path, out, pictures):
    """With other times, or in a zip; but not where the size or the name of one differs."""
    copy, archive = tmp_path / "copy", tmp_path / "archive.zip"
    shutil.copytree(pictures, copy, copy_function=shutil.copyfile)
    archive.write_bytes(zipped({path.name: path.read_bytes() for path in copy.iterdir()}))
    run = [*TINY, "--out", out, "--resume", "auto"]
    for steps, data in enumerate([pictures, copy, archive], 1):
        result = succeeded(train(*run, "--steps", steps, "--data", data))
        assert steps == 1 or f"resumed at step {steps - 1}" in result.stdout
    with open(copy / "cat.1.png", "ab") as f:
        f.write(b"?")
    for change in (lambda: None, lambda: (copy / "cat.1.png").rename(copy / "cat.101.png")):
        change()
        assert_error(train(*run, "--steps", 4, "--data", copy), 2, "another run: images was")


def test_results_among_the_images_are_no_images(train, tmp_path, pictures):
    data = shutil.copytree(pictures, tmp_path / "data")
    for steps in (1, 2):
        result = succeeded(train(*TINY, "--data", data, "--out", data, "--steps", steps,
                                 "--resume", "auto"))
        assert "40 images in data" in result.stdout, result
    assert "left out: figures of results 3" in result.stdout and "resumed at" in result.stdout


def test_a_val_folder_excludes_val_fraction(train, tmp_path, out, pictures):
    data = copied(pictures, tmp_path / "data",
                  lambda i, name: f"{('train', 'val')[i // 4 % 2]}/{name[:3]}/{name}")
    run = [*RUN, "--data", data, "--out", out]
    refused = train(*run, "--val-fraction", 0.1)  # the default, but given
    assert_error(refused, 2, "comes with a validation set")
    assert "20 training and 20 validation images" in train(*run).stdout


def test_names_of_any_bytes(train, tmp_path, pictures, tally):
    """File and folder names, not all text: trained on and resumed, or named readably."""
    rng, tried = random.Random(0), 6
    for i in range(tried):
        names = [rng.randbytes(rng.randrange(1, 60)).translate(None, b"/\0") for _ in range(5)]
        names += ["\x1b[2J\n\u202e".encode(), "\ud800 '\"".encode(errors="surrogatepass")]
        folders, files = [b"a" + name for name in names[-2:]], [b"z" + name for name in names]
        root, spoilt = os.fsencode(tmp_path / f"data{i}"), i % 3 == 2
        for label, folder in enumerate(folders):
            os.makedirs(os.path.join(root, folder))
            for file in files:
                path = os.path.join(root, folder, file + b".png")
                shutil.copy(pictures / f"{('dog', 'cat')[label]}.{label}.png", path)
        if spoilt:
            open(path, "wb").close()
        arguments = [*RUN, "--batch-size", 4, "--data", os.fsdecode(root), "--out",
                     tmp_path / f"run{i}"]
        result = train(*arguments, env={"PYTHONIOENCODING": "ascii"} if i % 2 else {})
        assert result.returncode == (2 if spoilt else 0), (result, path)
        assert all(line.isprintable() for line in (result.stdout + result.stderr).splitlines())
        assert result.stderr.count("\n") == spoilt
        if not spoilt:
            split = read_json(tmp_path / f"run{i}" / "split.json")
            assert len(split["train"]) + len(split["val"]) == 2 * len(files)
            succeeded(train(*arguments, "--resume", "auto"))
    tally("names of any bytes", tried, tried)
