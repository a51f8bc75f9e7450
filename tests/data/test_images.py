import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mixer.data.images import MAX_BYTES, decode, find_images
from mixer.runtime.errors import InputError
from tests.helpers.pictures import encoded, zipped

JPEG = encoded(colour=(200, 30, 30))


def write(root, names, data=JPEG):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def write_zip(path: Path, members: dict) -> Path:
    path.write_bytes(zipped(members))
    return path


KAGGLE = [f"{kind}.{i}.jpg" for kind in ("cat", "dog") for i in range(3)]
PETS = [f"PetImages/{kind}/{i}.jpg" for kind in ("Cat", "Dog") for i in range(3)]


@pytest.mark.parametrize("names, classes, layout", [
    (KAGGLE, ["cat", "dog"], "class in the file name"),
    ([f"train/{name}" for name in KAGGLE], ["cat", "dog"], "class in the file name"),
    ([f"train/train/{name}" for name in KAGGLE], ["cat", "dog"], "class in the file name"),
    ([f"data/{name.upper()}" for name in KAGGLE], ["cat", "dog"], "class in the file name"),
    (PETS, ["Cat", "Dog"], "class folders"),
    ([f"{kind}/{deep}0.png" for kind in "abc" for deep in ("", "x/")], ["a", "b", "c"],
     "class folders"),
])
def test_layouts_are_recognised_in_folder_and_zip(tmp_path, names, classes, layout):
    others = ["Thumbs.db", "readme.txt", "__MACOSX/._cat.1.jpg"]
    folder = find_images(write(tmp_path / "folder", names + others))
    archive = find_images(write_zip(tmp_path / "some.zip", dict.fromkeys(names, JPEG)))
    for images in (folder, archive):
        assert images.classes == classes and images.layout.startswith(layout)
        assert len(images) == 6 and images.labels == sorted(images.labels)
        assert f"6 images in {images.path.name}" in str(images)
        assert f"{classes[0]} {6 // len(classes)}" in str(images)
        assert images.load(5, 16).shape == (16, 16, 3)
    assert folder.names == archive.names and folder.labels == archive.labels


def test_kaggles_zip_in_a_zip(tmp_path):
    inner = zipped({f"train/{name}": JPEG for name in KAGGLE})
    outer = {"train.zip": inner, "test1.zip": b"", "sampleSubmission.csv": b"id,label"}
    images = find_images(write_zip(tmp_path / "dogs-vs-cats.zip", outer))
    assert images.names == KAGGLE and images.labels == [0, 0, 0, 1, 1, 1]
    assert images.load(0, 8).shape == (8, 8, 3)


def test_train_and_val_folders_and_an_unlabelled_test(tmp_path):
    names = [f"{split}/{kind}/{i}.jpg" for split, count in (("train", 3), ("val", 2))
             for kind in ("cat", "dog") for i in range(count)]
    images = find_images(write(tmp_path, names + ["test1/1.jpg", "test1/2.jpg"]))
    assert images.splits == ["train"] * 6 + ["val"] * 4
    assert "6 train, 4 val; 2 unlabelled test images ignored" in str(images)


def test_unequal_classes_print_the_majority_baseline(tmp_path):
    images = find_images(write(tmp_path, [f"cat.{i}.jpg" for i in range(9)] + ["dog.0.jpg"]))
    assert "always answering cat would score 90.0%" in str(images)
    assert "always" not in str(find_images(write(tmp_path / "even", KAGGLE)))


@pytest.mark.parametrize("names, message", [
    ([], "no images"),
    (["notes.txt"], "it contains 1 other files"),
    (["dogs-vs-cats.zip"], "give its own path"),
    (["cat.0.jpg", "cat.1.jpg"], "only one class found"),
    (["train/1.jpg", "train/2.jpg"], "only one class found"),
    (["Cat/1.jpg", "Cat/2.jpg"], "only one class found"),
    (KAGGLE + ["cats.7.jpg", "kitten.jpg"], "2 of 8 images"),
    (["a/1.jpg", "b/1.jpg", "cat.0.jpg"], "1 images beside them (cat.0.jpg)"),
    (["train/cat/0.jpg", "train/dog/0.jpg", "val/cat/0.jpg", "val/wolf/0.jpg"],
     "differ: dog, wolf"),
    (["train/cat/0.jpg", "train/dog/0.jpg", "extra/cat/0.jpg", "cat.1.jpg"], "cat.1.jpg, extra/"),
])
def test_what_cannot_be_labelled_is_refused(tmp_path, names, message):
    with pytest.raises(InputError) as e:
        find_images(write(tmp_path, names))
    assert message in str(e.value) and str(tmp_path) in str(e.value)


def test_unknown_names_are_listed(tmp_path):
    with pytest.raises(InputError, match="cats.7.jpg, kitten.jpg"):
        find_images(write(tmp_path, KAGGLE + ["cats.7.jpg", "kitten.jpg"]))


def test_bad_zips(tmp_path):
    good = zipped(dict.fromkeys(KAGGLE, JPEG))
    encrypted = bytearray(good)
    for i in range(len(good) - 4):
        if good[i:i + 4] == b"PK\x01\x02":
            encrypted[i + 8] |= 1
    for data, message in ((b"no zip", "not a zip"), (good[:len(good) // 2], "truncated"),
                          (bytes(encrypted), "encrypted")):
        (tmp_path / "bad.zip").write_bytes(data)
        with pytest.raises(InputError, match=message):
            find_images(tmp_path / "bad.zip")
    with pytest.raises(InputError, match="missing.zip does not exist"):
        find_images(tmp_path / "missing.zip")


def test_a_damaged_member_is_a_bad_image_not_a_crash(tmp_path):
    data = zipped(dict.fromkeys(KAGGLE, JPEG))
    at = data.index(JPEG) + 20
    (tmp_path / "x.zip").write_bytes(data[:at] + bytes([data[at] ^ 255]) + data[at + 1:])
    images = find_images(tmp_path / "x.zip")
    with pytest.raises(ValueError, match="CRC"):
        images.load(0, 8)
    assert images.load(1, 8).shape == (8, 8, 3)


def test_decode_is_upright_rgb(tmp_path):
    left_red = Image.new("RGB", (40, 20), (0, 0, 255))
    left_red.paste((255, 0, 0), (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180 degrees
    data = io.BytesIO()
    left_red.save(data, "JPEG", exif=exif, quality=95)
    out = decode(data.getvalue(), 20)
    assert out[10, 3].argmax() == 2 and out[10, 16].argmax() == 0  # the red half is on the right


@pytest.mark.parametrize("data, expected", [
    (encoded("L", colour=100, format="PNG"), (100, 100, 100)),
    (encoded("CMYK", colour=(0, 255, 255, 0)), (254, 0, 0)),
    (encoded("P", colour=0, format="PNG"), (0, 0, 0)),
    (encoded("RGBA", colour=(0, 0, 0, 0), format="PNG"), (255, 255, 255)),
    (encoded("LA", colour=(0, 0), format="PNG"), (255, 255, 255)),
    (encoded("I;16", colour=100 * 256, format="PNG"), (100, 100, 100)),
    (encoded("1", colour=1, format="PNG"), (255, 255, 255)),
    (encoded(colour=(10, 20, 30), format="BMP"), (10, 20, 30)),
    (encoded("P", colour=0, format="GIF"), (0, 0, 0)),
    (encoded(colour=(10, 20, 30), format="WEBP", lossless=True), (10, 20, 30)),
], ids=["grey", "CMYK", "palette", "RGBA", "LA", "16 bit", "1 bit", "BMP", "GIF", "WebP"])
def test_every_mode_becomes_rgb(data, expected):
    out = decode(data, 12)
    assert out.shape == (12, 12, 3) and out.dtype == np.uint8
    assert np.abs(out.astype(int) - expected).max() <= 2  # JPEG's rounding


@pytest.mark.parametrize("data, fault", [
    (b"", "empty file"),
    (JPEG[:len(JPEG) // 2], "(?i)truncated"),
    (JPEG[:-40], "(?i)truncated"),
    (bytes(range(256)) * 8, "not a JPEG"),
    (b"<html><body>429 Too Many Requests</body></html>", "not a JPEG"),
    (encoded(format="TIFF"), "not a JPEG"),
    (encoded("1", size=(9000, 9000), format="PNG"), "9000x9000 pixels are over the limit"),
], ids=["empty", "cut in half", "cut at the end", "random", "HTML", "TIFF", "huge"])
def test_damaged_files_are_refused(data, fault):
    with pytest.raises(ValueError, match=fault):
        decode(data, 16)


def test_an_oversized_file_is_not_read(tmp_path):
    images = find_images(write(tmp_path, KAGGLE))
    images.sizes[0] = MAX_BYTES + 1
    with pytest.raises(ValueError, match="over the limit"):
        images.load(0, 8)
