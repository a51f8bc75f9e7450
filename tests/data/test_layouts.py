import pytest

from mixer.data.images import find_images
from mixer.data.layouts import listed_split, name_before_number, role
from mixer.runtime.errors import InputError
from tests.helpers.pictures import encoded, zipped

JPEG = encoded()


def trees(*folders, classes=("cat", "dog"), count=2):
    return [f"{folder}/{name}/{i}.jpg" for folder in folders for name in classes
            for i in range(count)]


def folder_and_zip(root, members):
    """Both with the same files: {name: bytes}, or names of pictures."""
    if not isinstance(members, dict):
        members = dict.fromkeys(members, JPEG)
    for name, data in members.items():
        (root / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "folder" / name).write_bytes(data)
    (root / "archive.zip").write_bytes(zipped(members))
    return root / "folder", root / "archive.zip"


@pytest.mark.parametrize("train, val, test", [
    ("training_set", "validation_set", "test_set"), ("Training", "Validation", "Testing"),
    ("seg_train", "seg_val", "seg_test"), ("train_v2", "val_v2", "test_v2"),
    ("train2017", "val2017", "test2017"), ("TrainSet", "ValSet", "TestSet"),
    ("trainset", "valset", "testset"), ("TRAIN", "VALID", "TEST"), ("train", "dev", "pred"),
    ("imagenet_train", "imagenet_val", "imagenet_test"), ("a/b/train", "a/b/val", "a/b/test"),
    ("train_images", "val_images", "test_images"), ("train/train", "val/val", "test/test"),
])
def test_names_of_splits(tmp_path, train, val, test):
    for path in folder_and_zip(tmp_path / "three", trees(train, val, test)):
        images = find_images(path)
        assert images.classes == ["cat", "dog"] and images.splits == ["train"] * 4 + ["val"] * 4
        assert str(images).endswith("; 4 labelled test images ignored")
    for path in folder_and_zip(tmp_path / "two", trees(train, test)):
        images = find_images(path)
        assert images.classes == ["cat", "dog"] and images.splits == [""] * 4
    flat = [f"{train}/cat.0.jpg", f"{train}/dog.0.jpg", f"{test}/7.jpg"]
    for path in folder_and_zip(tmp_path / "flat", flat):
        assert find_images(path).classes == ["cat", "dog"]
        assert str(find_images(path)).endswith("; 1 unlabelled test images ignored")


@pytest.mark.parametrize("names, give", [
    (trees("fold_0", "fold_1", "fold_2"), "fold_0"),
    (trees("fold1") + ["fold2/cat/0.jpg"], "fold1"),
    (trees("a/fold0", "a/fold1"), "a/fold0"),
    (trees("train", "train_v2"), "train"),
    (trees("train", "extra"), "train"),
    (trees("train", "val", "valid"), "train"),
    (trees("train") + ["unlabeled/0.jpg", "unlabeled/1.jpg"], "train"),
    (trees("images", "masks"), "images"),
    (trees("day1", "day2"), "day1"),
    (trees("val", "test"), "test"),
    (trees("fold_0/train", "fold_0/val", "fold_1/train", "fold_1/val"), "fold_0"),
    (trees("train", "val", "copy/train", "copy/val"), "train"),
    (["cat/0.jpg", "dog/0.jpg", *trees("again")], "again"),
    (["a/cat.0.jpg", "a/dog.0.jpg", "b/cat.1.jpg", "b/dog.1.jpg"], "a"),
])
def test_parts_of_a_data_set_are_no_classes(tmp_path, names, give):
    """The message names them, and a path that works."""
    folder, archive = folder_and_zip(tmp_path, names)
    with pytest.raises(InputError, match="parts of a data set, not classes: ") as e:
        find_images(folder)
    assert f"such as {folder / give}, " in str(e.value)
    assert find_images(folder / give).classes == ["cat", "dog"]
    with pytest.raises(InputError, match=f"unpack it and give one of its folders, such as {give},"):
        find_images(archive)


@pytest.mark.parametrize("names, message", [
    (["images/0.jpg", "masks/0.jpg"], "images, masks"),
    (["fold_0/0.jpg", "fold_1/0.jpg"], "fold_0, fold_1"),
    (trees("cat", "dog", classes=("train", "test")), "put train and val above"),
    (["cats_train/0.jpg", "dogs_train/0.jpg", "cats_test/0.jpg", "dogs_test/0.jpg"],
     "make folders train and val"),
    (["Training/0.jpg", "Testing/0.jpg"], "only one class found"),
])
def test_parts_without_classes(tmp_path, names, message):
    for path in folder_and_zip(tmp_path, names):
        with pytest.raises(InputError, match=message):
            find_images(path)


@pytest.mark.parametrize("names, classes", [
    (["train/0.jpg", "bus/0.jpg"], ["bus", "train"]),
    (["test/0.jpg", "control/0.jpg"], ["control", "test"]),
    (trees("train", classes=("steam", "diesel")) + trees("bus", classes=("city", "coach")),
     ["bus", "train"]),
    (trees("train", "val", classes=("train", "bus")), ["bus", "train"]),
    (trees("mammals") + trees("birds", classes=("owl", "eagle")), ["birds", "mammals"]),
    (trees("cat", "dog", classes=("images",)), ["cat", "dog"]),  # as in Tiny ImageNet
    (["cats/cat.0.jpg", "dogs/dog.0.jpg"], ["cats", "dogs"]),
    (["with_mask/0.jpg", "without_mask/0.jpg"], ["with_mask", "without_mask"]),
    (["valid/0.jpg", "invalid/0.jpg"], ["invalid", "valid"]),
    (["c0/0.jpg", "c1/0.jpg"], ["c0", "c1"]),
    (["0/0.jpg", "1/0.jpg"], ["0", "1"]),
    (["cat/0.jpg", "dog/0.jpg", "logo.svg", "notes/0.txt"], ["cat", "dog"]),
    (["pets/cat/0.jpg", "pets/dog/0.jpg", "notes/0.txt"], ["cat", "dog"]),
])
def test_classes_are_what_they_are_called(tmp_path, names, classes):
    for path in folder_and_zip(tmp_path, names):
        images = find_images(path)
        assert images.classes == classes and len(images) == sum(".jpg" in name for name in names)


def test_a_file_with_the_name_of_a_folder(tmp_path):
    archive = tmp_path / "x.zip"
    files = {"pets": b"", "pets/cat": b""}
    archive.write_bytes(zipped({**dict.fromkeys(trees("pets"), JPEG), **files}))
    assert find_images(archive).classes == ["cat", "dog"]


def test_roles():
    assert role("seg_train", {"seg"}) == "train" and role("seg_train") is None
    assert role("my-Valid.Set2", {"my"}) == "val" and role("contest") is None
    assert role("images") == role("fold_3") == "part" and role("7") is None


PETS = [f"images/{name}_{i}.jpg" for name in ("Maine_Coon", "beagle") for i in range(4)]


def test_oxfords_pets(tmp_path):
    """Flat, the class before the number, trimaps and .mat files beside."""
    others = ["images/beagle_0.mat", "annotations/trimaps/beagle_0.png", "annotations/list.txt",
              "annotations/trimaps/._beagle_0.png"]
    for path in folder_and_zip(tmp_path, PETS + others):
        images = find_images(path)
        assert images.classes == ["Maine_Coon", "beagle"] and images.labels == [0] * 4 + [1] * 4
        assert set(images.splits) == {""} and "annotations/trimaps 1" in str(images)
        assert "ignored: .mat 1" in str(images)


def test_oxfords_split(tmp_path):
    lists = {"annotations/trainval.txt": b"#name class\nMaine_Coon_0 1 1 1\nMaine_Coon_1 1 1 1\n"
                                         b"beagle_3 2 2 1\n",
             "annotations/test.txt": b"Maine_Coon_2 1 1 1\r\nbeagle_0 2 2 1\r\n\r\n"}
    for path in folder_and_zip(tmp_path / "x", {**dict.fromkeys(PETS, JPEG), **lists}):
        images = find_images(path)
        assert dict(zip(images.names, images.splits, strict=True)) == {
            "Maine_Coon_0.jpg": "train", "Maine_Coon_1.jpg": "train", "beagle_3.jpg": "train",
            "Maine_Coon_2.jpg": "val", "beagle_0.jpg": "val"}
        assert "in neither list of annotations 3" in str(images)
    lists["annotations/test.txt"] = b"Maine_Coon_2\n"
    for path in folder_and_zip(tmp_path / "y", {**dict.fromkeys(PETS, JPEG), **lists}):
        with pytest.raises(InputError, match="differ: beagle"):
            find_images(path)
    assert listed_split(b"a_1 1\n", b"") == {"a_1": "train"}


@pytest.mark.parametrize("names, message", [
    (["pug_1.jpg", "pug_2.jpg"], "only one class found in .*: pug"),
    (["pug_1.jpg", "beagle_1.jpg", "boxer_1.jpg", "x.jpg"], "1 of 4 images .*: x.jpg"),
    (["IMG_1.jpg", "DSC_1.jpg"], "only one class found"),
    (["IMG_20210101_1.jpg", "IMG_20210102_1.jpg"], "only one class found"),
    (["cat.0.jpg", "dog.0.jpg", "pug_1.jpg"], "neither cat.* nor dog.*: pug_1.jpg"),
    (["1_1.jpg", "2_1.jpg"], "only one class found"),
])
def test_names_that_give_no_class(tmp_path, names, message):
    for path in folder_and_zip(tmp_path, names):
        with pytest.raises(InputError, match=message):
            find_images(path)


def test_the_name_before_the_number():
    assert name_before_number("american_pit_bull_terrier_10.JPG") == "american_pit_bull_terrier"
    assert name_before_number("cat.0.jpg") is None and name_before_number("cat_x.jpg") is None
