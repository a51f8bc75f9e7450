"""Images without labels: files, folders, zips, and zips in zips."""
import shutil
import zipfile

import pytest

from mixer.data.packed import pack
from mixer.data.unlabelled import find_unlabelled
from mixer.runtime.errors import InputError


def test_everything_is_found_once_and_in_order(pictures, tmp_path):
    names = sorted(path.name for path in pictures.iterdir())
    folder = tmp_path / "some"
    (folder / "sub").mkdir(parents=True)
    (folder / "@eaDir").mkdir()
    for target in ("sub/b.png", "@eaDir/a.png", ".hidden.png", "a.JPG", "scan.tif", "notes.txt"):
        shutil.copy(pictures / names[0], folder / target)
    nameless = shutil.copy(pictures / names[1], tmp_path / "no-ending")
    one = str(pictures / names[2])
    images = find_unlabelled([one, str(folder), str(nameless), one])
    assert images.files == [one, f"{folder}/a.JPG", f"{folder}/sub/b.png", str(nameless)]
    assert images.classes == [] and images.labels == [0] * 4
    assert images.notes == ["1 files of other formats ignored: .tif 1",
                            "2 images left out: hidden files 1, @eaDir 1"]
    array, faults = pack(images, 16, tmp_path / "cache")
    assert not faults and (array[1] == array[2]).all() and (array[0] != array[1]).any()


def test_what_was_predicted_before_is_replaced_in_the_cache(pictures, tmp_path):
    first, second = sorted(map(str, pictures.iterdir()))[:2]
    for path in (first, second):
        array, _ = pack(find_unlabelled([path]), 16, tmp_path / "cache")
        assert (array[0] == find_unlabelled([path]).load(0, 16)).all()
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 1


def test_the_test_images_of_kaggles_zip_are_read_in_place(pictures, tmp_path):
    one = next(pictures.iterdir())
    with zipfile.ZipFile(tmp_path / "test1.zip", "w") as file:
        file.write(one, "test1/1.png")
    for name, members in (("all.zip", ["test1.zip", "train.zip"]), ("none.zip", ["train.zip"])):
        with zipfile.ZipFile(tmp_path / name, "w") as file:
            for member in members:
                file.write(tmp_path / "test1.zip", member)
    images = find_unlabelled([str(tmp_path / "all.zip")])
    assert images.files == [f"{tmp_path}/all.zip/test1/1.png"]
    assert images.load(0, 8).shape == (8, 8, 3)
    with pytest.raises(InputError, match="to use the zip in it"):
        find_unlabelled([str(tmp_path / "none.zip")])
    (tmp_path / "cut.zip").write_bytes((tmp_path / "test1.zip").read_bytes()[:-30])
    with pytest.raises(InputError, match="is not a zip file"):
        find_unlabelled([str(tmp_path / "cut.zip")])
