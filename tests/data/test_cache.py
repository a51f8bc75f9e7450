import hashlib
import multiprocessing
import os
import signal

import pytest
from PIL import Image

from mixer.data import cache as cache_module
from mixer.data.cache import decode_to_cache
from mixer.data.images import ImageSet, find_images
from mixer.data.split import drop_damaged
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
    """A file that grows by a byte for every image read, in any process."""
    counter = tmp_path / "count"
    read = ImageSet.read

    def counting(images, index):
        with open(counter, "ab") as f:
            f.write(b".")
        return read(images, index)
    monkeypatch.setattr(ImageSet, "read", counting)
    counter.touch()
    return lambda: counter.stat().st_size


def test_decoded_once_and_again_only_after_a_change(folder, tmp_path, monkeypatch):
    decoded = count_decodes(monkeypatch, tmp_path)
    cache = tmp_path / "cache"
    array, *_ = decode_to_cache(find_images(folder), 8, cache)
    array[:] = 255  # the file stays as it is
    array, *_ = decode_to_cache(find_images(folder), 8, cache)
    assert decoded() == 12, "decoded again without need"
    for i in range(6):
        assert (array[i] == (i * 10, 0, 0)).all() and (array[6 + i] == (0, i * 10, 0)).all()
    decode_to_cache(find_images(folder), 16, cache)
    assert decoded() == 24, "another size is another array"
    Image.new("RGB", (9, 9), (1, 2, 3)).save(folder / "cat.0.png")
    array, *_ = decode_to_cache(find_images(folder), 8, cache)
    assert decoded() == 36 and (array[0] == (1, 2, 3)).all()
    monkeypatch.setattr(cache_module, "DECODING", cache_module.DECODING + 1)
    decode_to_cache(find_images(folder), 8, cache)
    assert decoded() == 48


def test_the_bytes_of_the_files_are_known_once_they_were_decoded(folder, tmp_path):
    (folder / "cat.4.png").write_bytes((folder / "cat.0.png").read_bytes())
    (folder / "dog.1.png").write_bytes(b"no image")
    images = find_images(folder)
    for _ in range(2):  # decoded, and found decoded
        digests = decode_to_cache(images, 8, tmp_path / "cache")[2]
        assert digests == [hashlib.blake2b((folder / name).read_bytes(), digest_size=16).hexdigest()
                           for name in images.files]
    assert len(set(digests)) == 11 and digests[0] == digests[4]


def test_two_processes_decode_once(folder, tmp_path, monkeypatch):
    decoded, cache = count_decodes(monkeypatch, tmp_path), tmp_path / "cache"
    images = find_images(folder)
    context = multiprocessing.get_context("fork")
    others = [context.Process(target=decode_to_cache, args=(images, 8, cache)) for _ in range(3)]
    for process in others:
        process.start()
    array, *_ = decode_to_cache(images, 8, cache)
    for process in others:
        process.join()
    assert [process.exitcode for process in others] == [0, 0, 0] and decoded() == 12
    assert (array[11] == (0, 50, 0)).all()


def test_a_process_that_is_killed_while_it_decodes_leaves_no_cache(folder, tmp_path, monkeypatch):
    images, cache = find_images(folder), tmp_path / "cache"
    with monkeypatch.context() as patch:
        patch.setattr(cache_module.os, "pwrite", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        process = multiprocessing.get_context("fork").Process(target=decode_to_cache,
                                                              args=(images, 8, cache))
        process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL and not list(cache.glob("[!.]*.uint8"))
    assert (decode_to_cache(images, 8, cache)[0][11] == (0, 50, 0)).all()


@pytest.mark.parametrize("damage", [
    lambda data: data[:-1], lambda data: b"", lambda data: data + b"x",
    lambda data: data.replace(b', {}, ', b', [], '), lambda data: data[:12 * 8 * 8 * 3] + b"[]"],
    ids=["cut", "empty", "longer", "faults of another kind", "no description"])
def test_a_damaged_cache_is_made_anew(folder, tmp_path, monkeypatch, damage):
    decoded = count_decodes(monkeypatch, tmp_path)
    images, cache = find_images(folder), tmp_path / "cache"
    before = decode_to_cache(images, 8, cache)[0].copy()
    path, = cache.glob("*.uint8")
    damaged = damage(path.read_bytes())
    assert damaged != path.read_bytes()
    path.write_bytes(damaged)
    array, faults, _ = decode_to_cache(images, 8, cache)
    assert (array == before).all() and not faults and decoded() == 24
    assert decode_to_cache(images, 8, cache)[0].shape == (12, 8, 8, 3) and decoded() == 24


def test_a_full_disk_is_an_error_and_leaves_what_was_there(folder, tmp_path, monkeypatch):
    def full(file, pixels, *_):
        if len(pixels) <= 8 * 8 * 3 - 100:  # the rest, after a part was written
            raise OSError(28, "No space left on device")
        return 100
    decode_to_cache(find_images(folder), 8, tmp_path / "cache")
    before = {path: path.read_bytes() for path in (tmp_path / "cache").iterdir()}
    (folder / "cat.0.png").write_bytes(b"another")
    monkeypatch.setattr(cache_module.os, "pwrite", full)
    with pytest.raises(OSError, match="cannot write .*uint8: No space"):
        decode_to_cache(find_images(folder), 8, tmp_path / "cache")
    assert {path: path.read_bytes() for path in (tmp_path / "cache").iterdir()} == before


def test_what_could_not_be_read_is_tried_again(folder, tmp_path):
    images, broken = find_images(folder), ["cat.3.png"]
    read = images.read_file
    images.read_file = lambda name: read("absent" if name in broken else name)
    for faults in ([3], []):
        assert list(decode_to_cache(images, 8, tmp_path / "cache")[1]) == faults
        broken.clear()


def test_faults_are_kept_and_either_stop_or_are_left_out(folder, tmp_path, capsys):
    (folder / "cat.3.png").write_bytes(b"")
    (folder / "dog.5.png").write_bytes(b"<html>")
    images = find_images(folder)
    for _ in range(2):  # decoded, and found decoded
        _, faults, _ = decode_to_cache(images, 8, tmp_path / "cache")
        assert faults == dict.fromkeys((3, 11), "not a JPEG, PNG, BMP, GIF or WEBP image")
    with pytest.raises(InputError) as e:
        drop_damaged(images, faults, "report", tmp_path / "bad.csv")
    for words in ("2 of 12", "cat.3.png (not a JPEG", "bad.csv", "--bad-images skip"):
        assert words in str(e.value)
    assert (tmp_path / "bad.csv").read_text().count("\n") == 3
    with pytest.raises(InputError, match="listed in .*other.csv"):
        drop_damaged(images, faults, "report", tmp_path / "other.csv", rank=1)
    assert not (tmp_path / "other.csv").exists(), "rank 0 writes it"
    good = drop_damaged(images, faults, "skip", tmp_path / "bad.csv")
    assert good.tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 9, 10]
    assert "skipped 2 of 12" in capsys.readouterr().out
