import multiprocessing
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from mixer.data import packed
from mixer.data.images import find_images
from mixer.data.batches import Subset, Stream, split
from mixer.data.packed import pack, usable
from mixer.runtime.errors import InputError


@pytest.fixture
def folder(tmp_path):
    """Twelve one-coloured pictures: cat.N is (N, 0, 0), dog.N is (0, N, 0)."""
    root = tmp_path / "pictures"
    root.mkdir()
    for i in range(6):
        Image.new("RGB", (20, 10), (i * 10, 0, 0)).save(root / f"cat.{i}.png")
        Image.new("RGB", (10, 20), (0, i * 10, 0)).save(root / f"dog.{i}.png")
    return root


def count_decodes(monkeypatch, tmp_path):
    """A file that grows by a byte with every image decoded, in whatever process."""
    counter = tmp_path / "count"
    from mixer.data import images
    decode = images.decode

    def counting(data, size):
        with open(counter, "ab") as f:
            f.write(b".")
        return decode(data, size)
    monkeypatch.setattr(images, "decode", counting)
    counter.touch()
    return lambda: counter.stat().st_size


def test_rows_are_the_images_in_order(folder, tmp_path):
    images = find_images(folder)
    for workers in (1, 2, 5):
        array, faults = pack(images, 8, tmp_path / f"cache{workers}", workers)
        assert array.shape == (12, 8, 8, 3) and array.dtype == np.uint8 and not faults
        for i in range(6):
            assert (array[i] == (i * 10, 0, 0)).all() and (array[6 + i] == (0, i * 10, 0)).all()


def test_decoded_once_and_again_only_after_a_change(folder, tmp_path, monkeypatch):
    decoded = count_decodes(monkeypatch, tmp_path)
    cache = tmp_path / "cache"
    pack(find_images(folder), 8, cache)
    assert decoded() == 12
    pack(find_images(folder), 8, cache)
    assert decoded() == 12, "decoded again without need"
    pack(find_images(folder), 16, cache)
    assert decoded() == 24, "another size is another array"
    Image.new("RGB", (9, 9), (1, 2, 3)).save(folder / "cat.0.png")
    array, _ = pack(find_images(folder), 8, cache)
    assert decoded() == 36 and (array[0] == (1, 2, 3)).all()
    monkeypatch.setattr(packed, "DECODING", packed.DECODING + 1)
    pack(find_images(folder), 8, cache)
    assert decoded() == 48


def test_two_processes_decode_once(folder, tmp_path, monkeypatch):
    decoded, cache = count_decodes(monkeypatch, tmp_path), tmp_path / "cache"
    images = find_images(folder)
    context = multiprocessing.get_context("fork")
    others = [context.Process(target=pack, args=(images, 8, cache)) for _ in range(3)]
    for process in others:
        process.start()
    array, _ = pack(images, 8, cache)
    for process in others:
        process.join()
    assert [process.exitcode for process in others] == [0, 0, 0] and decoded() == 12
    assert (array[11] == (0, 50, 0)).all()


def test_what_a_killed_process_left_is_swept_up(folder, tmp_path):
    images, cache = find_images(folder), tmp_path / "cache"
    pack(images, 8, cache)
    npy = next(cache.glob("*.npy"))
    npy.with_suffix(".tmp").write_bytes(npy.read_bytes()[:500])  # half an array under its temporary name
    npy.unlink()
    array, _ = pack(images, 8, cache)
    assert (array[11] == (0, 50, 0)).all() and not list(cache.glob("*.tmp"))


@pytest.mark.parametrize("damage", [
    lambda npy, meta: npy.write_bytes(npy.read_bytes()[:-1]),
    lambda npy, meta: npy.unlink(),
    lambda npy, meta: meta.write_text("{"),
    lambda npy, meta: meta.unlink(),
    lambda npy, meta: np.save(npy, np.zeros(3)),
])
def test_a_damaged_cache_is_made_anew(folder, tmp_path, damage):
    images, cache = find_images(folder), tmp_path / "cache"
    pack(images, 8, cache)
    damage(next(cache.glob("*.npy")), next(cache.glob("*.json")))
    array, _ = pack(images, 8, cache)
    assert (array[11] == (0, 50, 0)).all()


def test_writing_to_the_array_leaves_the_file_alone(folder, tmp_path):
    images = find_images(folder)
    array, _ = pack(images, 8, tmp_path / "cache")
    array[:] = 255
    assert (pack(images, 8, tmp_path / "cache")[0][0] == 0).all()


def test_faults_are_kept_and_either_stop_or_are_left_out(folder, tmp_path, capsys):
    (folder / "cat.3.png").write_bytes(b"")
    (folder / "dog.5.png").write_bytes(b"<html>")
    images = find_images(folder)
    for _ in range(2):  # decoded, and found decoded
        _, faults = pack(images, 8, tmp_path / "cache")
        assert faults == {3: "empty file", 11: "not a JPEG, PNG, BMP, GIF or WEBP image"}
    with pytest.raises(InputError) as e:
        usable(images, faults, "report", tmp_path / "bad.csv")
    assert "2 of 12" in str(e.value) and "cat.3.png (empty file)" in str(e.value) and "--bad-images skip" in str(e.value)
    assert (tmp_path / "bad.csv").read_text().count("\n") == 3
    good = usable(images, faults, "skip", tmp_path / "bad.csv")
    assert good.tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 9, 10]
    assert "left out 2 of 12" in capsys.readouterr().out
    with pytest.raises(InputError, match="no image of class dog decodes"):
        usable(images, {i: "x" for i in range(6, 12)}, "skip", tmp_path / "bad.csv")


def test_a_decoder_that_dies_is_a_bad_image(folder, tmp_path, monkeypatch):
    from mixer.data import images as module
    decode = module.decode

    def deadly(data, size):
        if np.asarray(Image.open(module.io.BytesIO(data)))[0, 0, 1] == 20:
            os.kill(os.getpid(), signal.SIGKILL)
        return decode(data, size)
    monkeypatch.setattr(module, "decode", deadly)
    array, faults = pack(find_images(folder), 8, tmp_path / "cache", 2)
    assert faults == {8: f"its decoder died twice, with exit code {-signal.SIGKILL}"}
    assert (array[9] == (0, 30, 0)).all() and (array[10] == (0, 40, 0)).all()


def test_an_image_may_not_take_all_time_or_memory(folder, tmp_path):
    Image.new("L", (10_000, 6_000)).save(folder / "dog.3.png")  # 60 MB, and 180 more as RGB
    code = f"""
import time
from mixer.data import images, packed
hanging, decode = open({str(folder / 'dog.2.png')!r}, "rb").read(), images.decode
def slow(data, size):
    if data == hanging:
        time.sleep(60)
    return decode(data, size)
images.decode, packed.MAX_DECODING_SECONDS, packed.MAX_DECODING_BYTES = slow, 10, 2**27
print(packed.pack(images.find_images({str(folder)!r}), 8, {str(tmp_path / 'cache')!r}, 2)[1])
"""  # in a process of its own: what pytest's has freed but not given back would come on top of the limit
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "{8: 'its decoder took more than 10 s', 9: 'MemoryError'}\n", result.stderr


def test_a_full_disk_leaves_nothing_behind(folder, tmp_path):
    code = f"""
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
from mixer.data.images import find_images
from mixer.data.packed import pack
try:
    pack(find_images({str(folder)!r}), 64, {str(tmp_path / 'cache')!r})
except OSError as e:
    sys.exit("said: " + str(e))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "said: cannot keep 0 MiB of decoded images" in result.stderr and "--cache" in result.stderr
    assert not [p for p in (tmp_path / "cache").iterdir() if p.suffix != ".lock"]


class Names:
    """As much of an ImageSet as `split` looks at."""

    def __init__(self, names, classes=("cat", "dog"), splits=None):
        self.names, self.classes = names, list(classes)
        self.labels = [self.classes.index(name.split(".")[0]) for name in names]
        self.splits = splits or [""] * len(names)

    def split(self, val_fraction=0.1, seed=0):
        train, val = split(self, np.arange(len(self.names)), val_fraction, seed)
        assert sorted([*train, *val]) == list(range(len(self.names)))
        return {self.names[i] for i in train}, {self.names[i] for i in val}


NAMES = [f"{kind}.{i}.jpg" for kind, n in (("cat", 200), ("dog", 50)) for i in range(n)]


def test_split_is_stratified_and_depends_on_names_and_seed_only():
    _, val = Names(NAMES).split()
    assert sum(name.startswith("cat") for name in val) == 20 and len(val) == 25
    assert Names(NAMES[::-1]).split()[1] == val
    assert Names(NAMES).split(seed=1)[1] != val
    kept = val & Names(NAMES + [f"cat.{i}.jpg" for i in range(200, 210)]).split()[1]
    assert len(kept) >= 22  # ten newcomers take at most a place or two
    assert Names(NAMES).split(val_fraction=0)[1] == set()


def test_split_of_tiny_classes():
    assert len(Names(["cat.0", "cat.1", "dog.0", "dog.1"]).split(0.01)[1]) == 2
    assert len(Names(["cat.0", "cat.1", "dog.0", "dog.1"]).split(0.99)[0]) == 2
    with pytest.raises(InputError, match="class dog has a single image"):
        Names(["cat.0", "cat.1", "dog.0"]).split()
    assert len(Names(["cat.0", "dog.0"]).split(0)[0]) == 2


def test_split_follows_the_source():
    assert Names(["cat.0", "dog.0", "cat.1", "dog.1"], splits=["train", "train", "val", "val"]).split() == (
        {"cat.0", "dog.0"}, {"cat.1", "dog.1"})


def test_every_image_comes_once_an_epoch_whatever_the_batch():
    streams = {size: Stream(10, size, seed=4) for size in (1, 3, 4, 10)}
    seen = {size: np.concatenate([np.stack(s.batch(step)) for step in range(-(-60 // size))], axis=1)[:, :60]
            for size, s in streams.items()}
    for size, (epochs, samples) in seen.items():
        assert (epochs == np.repeat(np.arange(6), 10)).all()
        assert all(sorted(samples[epochs == e]) == list(range(10)) for e in range(6))
        assert (samples == seen[1][1]).all(), "the order depends on the batch size"
    orders = seen[1][1].reshape(6, 10).tolist()
    assert len(set(map(tuple, orders))) == 6
    assert (Stream(10, 3, seed=5).batch(0)[1] != streams[3].batch(0)[1]).any()


def test_the_stream_starts_anywhere():
    through = Stream(7, 5, seed=0)
    batches = [through.batch(step)[1].tolist() for step in range(20)]
    assert Stream(7, 5, seed=0).batch(13)[1].tolist() == batches[13]
    assert [Stream(7, 5, seed=0).steps(e) for e in (1, 5, 0.5)] == [2, 7, 1]


def test_part_takes_its_own_rows():
    images = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1).expand(6, 2, 2, 3)
    part = Subset(images, torch.arange(6), np.array([1, 3, 5]))
    x, y = part.batch(np.array([2, 0]), torch.device("cpu"))
    assert y.tolist() == [5, 1] and x[:, 0, 0, 0].tolist() == [5, 1] and len(part) == 3
