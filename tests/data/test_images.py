import contextlib
from pathlib import Path

import pytest

from mixer.data.images import MAX_BYTES, find_images
from mixer.data.sources import UNREAD
from mixer.runtime.errors import InputError
from tests.helpers.pictures import encoded, make_unreadable, zipped

JPEG = encoded(colour=(200, 30, 30))


def write(root, names, data=JPEG):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            (root / name).mkdir()
        else:
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
    (["train/cat/0.jpg", "train/dog/0.jpg", "extra/cat/0.jpg", "cat.1.jpg"],
     "1 images beside them (cat.1.jpg)"),
    (["train/cat.0.jpg", "train/dog.0.jpg", "val/cat.1.jpg"], "differ: dog"),
    (["cat/0.jpg", "dog/0.jpg", "bird/"], "bird is empty"),
    (["cat/0.jpg", "dog/0.jpg", "bird/.DS_Store", "bird/Thumbs.db"], "bird is empty"),
    (["cat/0.jpg", "dog/"], "the folder dog beside it is empty"),
    (["cat/0.jpg", "dog/0.jpg", "bird/0.tif", "bird/1.TIFF"], "other formats: .tif 1, .tiff 1"),
    (["cat/0.jpg", "dog/0.heic"], "dog beside it holds only files of other formats: .heic 1"),
    (["cat.0.jpg", "dog.0.avif"], "dog holds only files of other formats: .avif 1"),
    (["0.jp2", "1.jp2"], "other formats: .jp2 2"),
    (["train/cat/0.jpg", "train/dog/0.jpg", "val/cat/0.jpg", "val/dog/0.svg"], "val/dog holds"),
    (["train/cat/0.jpg", "train/dog/0.jpg", "val/cat/0.psd"], "folder val"),
    (["train/cat/0.tif", "train/dog/0.tif", "test/cat/0.jpg", "test/dog/0.jpg"], "folder train"),
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


JUNK = ["Cat/@eaDir/0.jpg/SYNOPHOTO_THUMB_XL.jpg", "@eaDir/x.jpg", "#recycle/0.jpg",
        "$RECYCLE.BIN/S-1-5/$R1.jpg", "$Recycle.Bin/0.png", ".Trash-1000/files/0.jpg",
        ".Spotlight-V100/0.jpg", "Cat/.thumbnails/0.png", "lost+found/0.jpg",
        "System Volume Information/0.jpg", "Cat/.ipynb_checkpoints/0-checkpoint.jpg",
        "._AppleDouble/0.jpg", "Dog/._0.jpg", "__MACOSX/Dog/._0.jpg", "@Recycle/0.tif"]


def test_thumbnails_and_wastebaskets_are_left_out_and_counted(tmp_path):
    names = [f"{kind}/{i}.jpg" for kind in ("Cat", "Dog") for i in range(3)]
    others = ["Thumbs.db", "Cat/desktop.ini", ".DS_Store"]
    folder = find_images(write(tmp_path / "x", names + JUNK + others))
    archive = find_images(write_zip(tmp_path / "x.zip", dict.fromkeys(names + JUNK, JPEG)))
    for images in (folder, archive):
        assert images.names == names and images.classes == ["Cat", "Dog"]
        assert "; 15 images left out: @eaDir 2" in str(images) and "#recycle 1" in str(images)
    # a name that only looks so
    names = ["recycle/0.jpg", "trash/0.jpg", "@home/0.jpg", "$5/0.jpg"]
    assert len(find_images(write(tmp_path / "y", names)).classes) == 4


def test_a_wastebasket_that_cannot_be_read_is_no_hindrance(tmp_path, monkeypatch):
    """A link in one may lead anywhere."""
    write(tmp_path, ["Cat/0.jpg", "Dog/0.jpg", "lost+found/0.jpg", "@eaDir/0.jpg"])
    (tmp_path / "@eaDir" / "back").symlink_to(tmp_path)
    make_unreadable(monkeypatch, "lost+found")
    assert len(find_images(tmp_path)) == 2


def test_pictures_of_other_formats_are_counted(tmp_path):
    others = ["cat/0.tif", "cat/1.TIF", "dog/0.jfif", "logo.svg", "dog/notes.txt"]
    images = find_images(write(tmp_path, ["cat/0.jpg", "dog/0.jpg", *others]))
    assert "; 4 files of other formats ignored: .tif 2, .jfif 1, .svg 1" in str(images)
    assert {".tiff", ".heic", ".avif", ".jp2", ".psd", ".raw", ".dng", ".jxl"} < set(UNREAD)


def test_a_runs_own_folder_is_no_class(tmp_path):
    write(tmp_path, ["cat/0.jpg", "dog/0.jpg", "runs/first/.lock"])
    assert find_images(tmp_path).classes == ["cat", "dog"]
    write(tmp_path, [f"runs/first/{name}" for name in ("config.json", "curves.png")])
    assert find_images(tmp_path).classes == ["cat", "dog"]


@pytest.mark.parametrize("change", [lambda name: f"./{name}", lambda name: name.replace("/", "\\"),
                                    lambda name: f"/{name}", lambda name: name.replace("/", "//")])
def test_zips_of_other_programs(tmp_path, change):
    images = find_images(write_zip(tmp_path / "x.zip", {change(name): JPEG for name in PETS}))
    assert images.classes == ["Cat", "Dog"] and images.names[0] == "Cat/0.jpg"
    assert images.load(5, 8).shape == (8, 8, 3)


def test_the_hint_names_a_path_that_can_be_given(tmp_path):
    archive = write_zip(tmp_path / "archive.zip", {"in/PetImages.zip": zipped({})})
    with pytest.raises(InputError, match="unpack it and give the path of in/PetImages.zip$"):
        find_images(archive)


def test_a_folder_without_a_name_is_named(tmp_path, monkeypatch):
    write(tmp_path / "pets" / "Cat", ["0.jpg"])
    write(tmp_path / "pets" / "Dog", ["0.jpg"])
    monkeypatch.chdir(tmp_path / "pets" / "Cat")
    assert "2 images in pets (" in str(find_images(".."))
    monkeypatch.chdir(tmp_path / "pets")
    assert "2 images in pets (" in str(find_images("."))


def test_identical_pictures_are_counted(tmp_path):
    other = encoded(colour=(1, 2, 3))
    members = {**dict.fromkeys(["Cat/0.jpg", "Cat/1.jpg", "Dog/2.jpg"], JPEG), "Dog/0.jpg": other}
    assert ("; 3 are byte-identical to another, and stay together; 1 of these copies have another "
            "class") in str(find_images(write_zip(tmp_path / "x.zip", members)))


def test_a_copy_and_a_zip_are_the_same_images(tmp_path):
    def images_of(path):
        images = find_images(path)
        for index in range(len(images)):
            with contextlib.suppress(ValueError):
                images.load(index, 8)
        return images.identity, images.contents
    members = {name: encoded(colour=(i, 0, 0)) for i, name in enumerate(PETS)}
    for root in ("one", "two"):
        for name, data in members.items():
            write(tmp_path / root, [name], data)
    (tmp_path / "two" / PETS[0]).touch()
    first = images_of(tmp_path / "one")
    assert first == images_of(tmp_path / "two") == images_of(write_zip(tmp_path / "x.zip", members))
    write(tmp_path / "two", PETS[:1], members[PETS[0]][:-1] + b"?")
    assert first[0] == images_of(tmp_path / "two")[0] and first[1] != images_of(tmp_path / "two")[1]


def test_an_oversized_file_is_not_read(tmp_path):
    images = find_images(write(tmp_path, KAGGLE))
    images.sizes[0] = MAX_BYTES + 1
    with pytest.raises(ValueError, match="over the limit"):
        images.load(0, 8)
