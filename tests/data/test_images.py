import shutil

import pytest

from mixer.data.cache import decode_to_cache
from mixer.data.images import describe, find_images, find_unlabelled
from mixer.runtime.errors import InputError
from tests.helpers.pictures import encoded, folder_and_zip, load, zipped

JPEG = encoded(colour=(200, 30, 30))
KAGGLE = [f"{kind}.{i}.jpg" for kind in ("cat", "dog") for i in range(3)]
PETS = [f"PetImages/{kind}/{i}.jpg" for kind in ("Cat", "Dog") for i in range(3)]


def images_in_zip(tmp_path, data):
    """What is found in a zip of these bytes."""
    (tmp_path / "x.zip").write_bytes(data)
    return find_images(tmp_path / "x.zip")


@pytest.mark.parametrize("names, classes, layout", [
    (KAGGLE, ["cat", "dog"], "class in the file name"),
    ([f"train/train/{name}" for name in KAGGLE], ["cat", "dog"], "class in the file name"),
    ([f"data/{name.upper()}" for name in KAGGLE], ["cat", "dog"], "class in the file name"),
    (PETS, ["Cat", "Dog"], "class folders"),
])
def test_layouts_are_recognised_in_folder_and_zip(tmp_path, names, classes, layout):
    folder, archive = map(find_images, folder_and_zip(
        tmp_path, [*names, "Thumbs.db", "readme.txt", "__MACOSX/._cat.1.jpg"]))
    for images, kind in ((folder, "folder"), (archive, "zip")):
        assert images.classes == classes and images.labels == sorted(images.labels)
        assert describe(images).startswith(
            f"6 images in {images.path.name} ({layout}, {kind}), {len(classes)} classes: "
            f"{classes[0]} {6 // len(classes)}")
        assert load(images, 5, 16).shape == (16, 16, 3)
    assert folder.names == archive.names and folder.labels == archive.labels


def test_kaggles_zip_in_a_zip(tmp_path):
    inner = zipped({f"train/{name}": JPEG for name in KAGGLE})
    outer = {"train.zip": inner, "test1.zip": b"", "sampleSubmission.csv": b"id,label"}
    images = images_in_zip(tmp_path, zipped(outer))
    assert images.names == KAGGLE and images.labels == [0, 0, 0, 1, 1, 1]
    assert load(images, 0, 8).shape == (8, 8, 3)
    with pytest.raises(InputError, match="holds a/train.zip, b/train.zip: unpack it"):
        images_in_zip(tmp_path, zipped({"a/train.zip": inner, "b/train.zip": inner}))
    with pytest.raises(InputError, match="damaged"):
        images_in_zip(tmp_path, zipped({**outer, "train.zip": inner[:100]}))


@pytest.mark.parametrize("names, message", [
    ([], "no images"), (["notes.txt"], "it contains 1 other files"),
    (["0.jp2", "1.jp2"], "left out: .jp2 2"),
    (["in/PetImages.zip"], r"contains .*in/PetImages.zip: give that zip itself \(unpacked\)$"),
])
def test_no_images(tmp_path, names, message):
    (tmp_path / "folder").mkdir()
    for path in folder_and_zip(tmp_path, names):
        with pytest.raises(InputError, match=message):
            find_images(path)


def test_bad_zips(tmp_path):
    good = zipped(dict.fromkeys(KAGGLE, JPEG))

    def changed(offset, value):
        data = bytearray(good)
        for i in range(len(good) - 4):
            if good[i:i + 4] == b"PK\x01\x02":
                data[i + offset] = value
        return bytes(data)
    for data, message in ((b"no zip", "not a zip"), (good[:len(good) // 2], "damaged"),
                          (changed(8, 1), "encrypted"), (changed(10, 9), "Deflate64"),
                          (b"7z\xbc\xaf\x27\x1c", "unpack a tar, 7z or rar")):
        with pytest.raises(InputError, match=message):
            images_in_zip(tmp_path, data)
    for path in (tmp_path / "missing.zip", ""):
        with pytest.raises(InputError, match="does not exist"):
            find_images(path)


def test_a_damaged_member_is_a_bad_image_not_a_crash(tmp_path):
    data = zipped(dict.fromkeys(KAGGLE, JPEG))
    at = data.index(JPEG) + 20
    images = images_in_zip(tmp_path, data[:at] + bytes([data[at] ^ 255]) + data[at + 1:])
    with pytest.raises(ValueError, match="CRC"):
        load(images, 0, 8)
    assert load(images, 1, 8).shape == (8, 8, 3)


@pytest.mark.parametrize("change", [lambda name: f"./{name}", lambda name: name.replace("/", "\\"),
                                    lambda name: f"/{name}", lambda name: name.replace("/", "//")])
def test_zips_of_other_programs(tmp_path, change):
    images = images_in_zip(tmp_path, zipped({change(name): JPEG for name in PETS}))
    assert images.classes == ["Cat", "Dog"] and images.names[0] == "Cat/0.jpg"
    assert load(images, 5, 8).shape == (8, 8, 3)


def test_names_in_utf8_without_the_flag_are_read_as_utf8(tmp_path):
    """As Macs write them: the same names as in a folder."""
    data = zipped({f"{name}/{i}.jpg": JPEG for name in ("caf##", "tea") for i in range(2)})
    images = images_in_zip(tmp_path, data.replace(b"caf##", "caf\u00e9".encode()))
    assert images.classes == ["caf\u00e9", "tea"] and len(load(images, 0, 8)) == 8


@pytest.mark.parametrize("classes", [  # 0x5c is a backslash, but here a letter's second byte
    [b"\x95\x5c\x96\xca", b"\x95\x5c\x8e\x86", b"\x97\xa0\x96\xca"],
    [b"\xa5\x5c", b"\xb3\x5c", b"\xa5\x40"]], ids=["code page 932", "Big5"])
@pytest.mark.parametrize("slash", ["/", "\\"])
def test_names_in_code_pages_of_windows_stay_apart(tmp_path, classes, slash):
    """Right, or refused."""
    data = zipped({f"{i}{'#' * (len(name) - 1)}{slash}{n}.jpg": JPEG
                   for i, name in enumerate(classes) for n in range(2)})
    for i, name in enumerate(classes):
        data = data.replace(f"{i}{'#' * (len(name) - 1)}{slash}".encode(), name + slash.encode())
    try:
        assert sorted(images_in_zip(tmp_path, data).labels) == [0, 0, 1, 1, 2, 2]
    except InputError:
        assert slash == "\\"


JUNK = ["Cat/@eaDir/0.jpg/SYNOPHOTO_THUMB_XL.jpg", "@eaDir/x.jpg", "#recycle/0.jpg",
        "$Recycle.Bin/S-1-5/$R1.jpg", ".Trash-1000/files/0.jpg", "lost+found/0.jpg",
        "System Volume Information/0.jpg", "Cat/.ipynb_checkpoints/0-checkpoint.jpg",
        "Dog/._0.jpg", "__MACOSX/Dog/._0.jpg", "@Recycle/0.tif", "Thumbs.db", "Cat/desktop.ini"]


def test_thumbnails_and_wastebaskets_are_no_images(tmp_path):
    names = [name.removeprefix("PetImages/") for name in PETS]
    folder, archive = folder_and_zip(tmp_path, names + JUNK)
    (folder / "@eaDir" / "back").symlink_to(folder)
    for images in map(find_images, (folder, archive)):
        assert images.names == names and images.classes == ["Cat", "Dog"] and images.note == ""


def test_what_is_left_out_is_counted(tmp_path):
    others = ["cat/0.tif", "cat/1.TIF", "dog/0.jfif", "cat/0_mask.png", "dog/0-seg_1.png",
              "runs/first/curves.png", "answers/predictions.csv", "answers/attention.png",
              "table.md", "val_acc_flops.png", "runs/starts/.lock"]
    for path in folder_and_zip(tmp_path, ["cat/0.jpg", "dog/0.jpg", *others]):
        images = find_images(path)
        assert images.files == ["cat/0.jpg", "dog/0.jpg"] and images.classes == ["cat", "dog"]
        assert images.note == "left out: figures of results 3, .tif 2, masks 2, .jfif 1"


def test_a_folder_without_a_name_is_named(tmp_path, monkeypatch):
    folder, _ = folder_and_zip(tmp_path, PETS)
    for place, path in ((folder / "PetImages" / "Cat", ".."), (folder / "PetImages", ".")):
        monkeypatch.chdir(place)
        assert "6 images in PetImages (" in describe(find_images(path))


def test_unlabelled_images_are_found_once_and_in_order(pictures, tmp_path):
    names = sorted(path.name for path in pictures.iterdir())
    folder = tmp_path / "some"
    (folder / "sub").mkdir(parents=True)
    for target in ("sub/b.png", ".hidden.png", "a.JPG", "scan.tif", "notes.txt"):
        shutil.copy(pictures / names[0], folder / target)
    nameless = shutil.copy(pictures / names[1], tmp_path / "no-ending")
    one = str(pictures / names[2])
    images = find_unlabelled([one, str(folder), str(nameless), one])
    assert images.files == [one, f"{folder}/a.JPG", f"{folder}/sub/b.png", str(nameless)]
    assert images.classes == [] and images.labels == [0] * 4
    assert images.note == "left out: .tif 1"
    array, faults, _ = decode_to_cache(images, 16, tmp_path / "cache")
    assert not faults and (array[1] == array[2]).all() and (array[0] != array[1]).any()

    # other images, in the same place of the cache
    array, _, _ = decode_to_cache(find_unlabelled([one]), 16, tmp_path / "cache")
    assert (array[0] == load(find_unlabelled([one]), 0, 16)).all()
    assert len(list((tmp_path / "cache").glob("*.uint8"))) == 1
