"""Labels are never guessed: each of these trees is taken as it must be, or refused."""
import pytest

from mixer.data.images import describe, find_images
from mixer.data.layouts import role
from mixer.runtime.errors import InputError
from tests.helpers.pictures import encoded, folder_and_zip


def trees(*folders, classes=("cat", "dog"), count=2):
    return [f"{folder}/{name}/{i}.jpg" for folder in folders for name in classes
            for i in range(count)]


@pytest.mark.parametrize("train, val, test", [
    ("training_set", "validation_set", "test_set"), ("Training", "Validation", "Testing"),
    ("seg_train", "seg_val", "seg_test"), ("train2017", "val2017", "test2017"),
    ("TrainSet", "ValSet", "TestSet"), ("trainset", "valset", "testset"),
    ("TRAIN", "VALID", "TEST"), ("train", "dev", "pred"), ("a/b/train", "a/b/val", "a/b/test"),
    ("train_images", "val_images", "test_images"), ("train/train", "val/val", "test/test"),
    ("train", "eval", "test"), ("train", "Hold-Out", "test"),
])
def test_names_of_splits(tmp_path, train, val, test):
    for path in folder_and_zip(tmp_path / "three", trees(train, val, test)):
        images = find_images(path)
        assert images.classes == ["cat", "dog"] and images.splits == ["train"] * 4 + ["val"] * 4
        assert describe(images).endswith("; 4 train, 4 val; left out: test images 4")
    for path in folder_and_zip(tmp_path / "two", trees(train, test)):
        images = find_images(path)
        assert images.classes == ["cat", "dog"] and images.splits == [""] * 4
    flat = [f"{train}/cat.0.jpg", f"{train}/dog.0.jpg", f"{test}/7.jpg"]
    for path in folder_and_zip(tmp_path / "flat", flat):
        assert find_images(path).classes == ["cat", "dog"]
        assert describe(find_images(path)).endswith("; left out: test images 1")


def test_roles():
    assert role("seg_train") == "train" and role("my-Valid.Set2") == "val"
    assert role("contest") is role("images") is role("invalid") is role("7") is None


@pytest.mark.parametrize("names, message", [
    # folds, copies, masks
    *((names, "images lie at different depths, .*: .* and ") for names in (
        trees("fold_0", "fold_1", "fold_2"), trees("a/fold0", "a/fold1"), trees("val", "test"),
        trees("train", "train_v2"), trees("train", "extra"), trees("train", "val", "valid"),
        trees("train") + ["unlabeled/0.jpg", "unlabeled/1.jpg"], trees("images", "masks"),
        trees("day1", "day2", classes=("cat",)), ["train/a/b/0.jpg", "test/a/0.jpg"],
        trees("fold_0/train", "fold_0/val", "fold_1/train", "fold_1/val"),
        trees("train", "val", "copy/train", "copy/val"),
        ["cat/0.jpg", "dog/0.jpg", *trees("again")])),
    (trees("train/COVID", "train/Normal", "val/COVID", "val/Normal", classes=("images", "masks")),
     "COVID/images/0.jpg and val/Normal/masks/1.jpg"),
    (trees("cat", "dog", classes=("train", "test")), "or with train, val and test folders of such"),
    (["a/cat.0.jpg", "a/dog.0.jpg", "b/cat.1.jpg", "b/dog.1.jpg"], "a, b hold cats and dogs"),
    *((names, "may be parts of the data set") for names in (
        ["images/0.jpg", "masks/0.jpg"], ["cat/0.jpg", "dog/0.jpg", "masks/0.jpg"],
        ["cat/0.jpg", "dog/0.jpg", "cat_masks/0.jpg", "dog_masks/0.jpg"],
        ["fold_0/0.jpg", "fold_1/0.jpg"], ["train/0.jpg", "test/0.jpg", "extra/0.jpg"],
        ["images_001/0.jpg", "images_002/0.jpg"], ["JPEGImages/0.jpg", "SegmentationClass/0.jpg"],
        ["x_images_part_1/0.jpg", "x_images_part_2/0.jpg"],
        ["cats_train/0.jpg", "dogs_train/0.jpg", "cats_test/0.jpg", "dogs_test/0.jpg"])),
    # images beside class folders, or none in one
    (["a/1.jpg", "b/1.jpg", "cat.0.jpg"], "subfolders: cat.0.jpg and b/1.jpg"),
    (["cat/0.jpg", "dog/0.jpg", "bird/0.tif", "bird/1.TIFF"], "only bird/0.tif, bird/1.TIFF"),
    (["cat.0.jpg", "dog.0.avif"], "only dog.0.avif"),
    (trees("train") + ["val/cat/0.jpg", "val/dog/0.psd"], "only val/dog/0.psd"),
    # one class, or other ones in val
    (["train/cat/0.jpg", "train/cat/1.jpg", "test/cat/0.jpg"], "only one class found: cat"),
    (["pug_1.jpg", "pug_2.jpg"], "only one class found: pug"),
    (trees("train") + ["val/cat/0.jpg", "val/wolf/0.jpg"], "differ: dog, wolf"),
    (["train/cat.0.jpg", "train/dog.0.jpg", "val/cat.1.jpg"], "differ: dog"),
    # two spellings of one class
    (["caf\u00e9/0.jpg", "cafe\u0301/0.jpg", "tea/0.jpg"], r"'cafe\\u0301' and 'caf\\xe9'"),
    (["Cat/0.jpg", "cat/0.jpg"], "'Cat' and 'cat'"),
    (["cat/0.jpg", "cat /0.jpg"], "'cat' and 'cat '"),
    # names that give no class
    (["Cat/1.jpg", "Cat/2.jpg"], "2 of 2 images give no class: 1.jpg, 2.jpg"),
    (["Training/0.jpg", "Testing/0.jpg"], "1 of 1 images give no class"),
    (["cat.0.jpg", "dog.0.jpg", "cat.jpg", "cats.7.jpg", "kitten.jpg", "wolf.1.jpg"],
     "4 of 6 images give no class: cat.jpg, cats.7.jpg, kitten.jpg and 1 more"),
    (["cat.0.jpg", "dog.0.jpg", "pug_1.jpg"], "1 of 3 images give no class: pug_1.jpg"),
    (["video1_frame_7.jpg", "video2_frame_7.jpg"], "2 of 2 images give no class"),
    (["person3_virus_12.jpg", "person4_bacteria_12.jpg"], "2 of 2 images give no class"),
    (["IMG_20210101_1.jpg", "IMG_20210102_1.jpg"], "2 of 2 images give no class"),
    (["IMG_1.jpg", "DSC_1.jpg"], "say a split or a source, not a class: DSC, IMG"),
    (["patient_left_1.jpg", "patient_right_1.jpg"], "not a class: patient_left, patient_right"),
    (["Labelled_1.jpg", "pug_1.jpg"], "not a class: Labelled"),
    (["images/Train_0.jpg", "images/Test_0.jpg", "train.csv", "test.parquet", "a.json"],
     "not a class: Test, Train.* labels in a.json, test.parquet, train.csv are not read"),
])
def test_what_cannot_be_labelled_is_refused(tmp_path, names, message):
    for path in folder_and_zip(tmp_path, names):
        with pytest.raises(InputError, match=message) as e:
            find_images(path)
        assert f"the classes in {path} are ambiguous" in str(e.value)


@pytest.mark.parametrize("names, message", [
    (["cat/0.jpg", "dog/0.jpg", "bird/.DS_Store", "bird/Thumbs.db"], "readable image, only bird/"),
    (["cat/0.jpg", "dog/"], "only dog/"),
    (trees("train") + ["val/"], "subfolders: val/ and train/dog/1.jpg"),
])
def test_an_empty_folder_is_no_class(tmp_path, names, message):
    folder, _ = folder_and_zip(tmp_path, names)
    with pytest.raises(InputError, match=message):
        find_images(folder)


@pytest.mark.parametrize("names, classes", [
    (["train/0.jpg", "bus/0.jpg"], ["bus", "train"]),
    (["test/0.jpg", "control/0.jpg"], ["control", "test"]),
    (trees("train", "val", classes=("train", "bus")), ["bus", "train"]),
    (["cats/cat.0.jpg", "dogs/dog.0.jpg"], ["cats", "dogs"]),
    (["with_mask/0.jpg", "without_mask/0.jpg"], ["with_mask", "without_mask"]),
    (["valid/0.jpg", "invalid/0.jpg"], ["invalid", "valid"]),
    (["c0/0.jpg", "c1/0.jpg"], ["c0", "c1"]), (["0/0.jpg", "1/0.jpg"], ["0", "1"]),
    (["cat/0.jpg", "dog/0.jpg", "logo.svg", "notes/0.txt"], ["cat", "dog"]),
    (["pets/cat/0.jpg", "pets/dog/0.jpg", "notes/0.txt"], ["cat", "dog"]),
    (["recycle/0.jpg", "trash/0.jpg", "@home/0.jpg", "$5/0.jpg"],
     ["$5", "@home", "recycle", "trash"]),
])
def test_classes_are_what_they_are_called(tmp_path, names, classes):
    for path in folder_and_zip(tmp_path, names):
        images = find_images(path)
        assert images.classes == classes and len(images) == sum(".jpg" in name for name in names)


def test_images_one_folder_deeper(tmp_path):
    """As in Tiny ImageNet; the line says so."""
    for path in folder_and_zip(tmp_path, trees("cat", "dog", classes=("images",))):
        images = find_images(path)
        assert images.classes == ["cat", "dog"]
        assert "(class folders, one deeper: images, " in describe(images)


PETS = [f"images/{name}_{i}.jpg" for name in ("Maine_Coon", "beagle") for i in range(4)]


def test_oxfords_pets(tmp_path):
    others = ["images/beagle_0.mat", "annotations/trimaps/beagle_0.png", "annotations/list.txt",
              "annotations/trimaps/._beagle_0.png"]
    for path in folder_and_zip(tmp_path, PETS + others):
        images = find_images(path)
        assert images.classes == ["Maine_Coon", "beagle"] and images.labels == [0] * 4 + [1] * 4
        assert set(images.splits) == {""} and describe(images).endswith("left out: masks 1")


def test_oxfords_split(tmp_path):
    lists = {"annotations/trainval.txt": b"#name class\nMaine_Coon_0 1 1 1\nMaine_Coon_1 1 1 1\n"
                                         b"beagle_3 2 2 1\n",
             "annotations/test.txt": b"Maine_Coon_2 1 1 1\r\nbeagle_0 2 2 1\r\n\r\n"}
    pets = dict.fromkeys(PETS, encoded())
    for path in folder_and_zip(tmp_path / "x", pets | lists):
        images = find_images(path)
        assert dict(zip(images.names, images.splits, strict=True)) == {
            "Maine_Coon_0.jpg": "train", "Maine_Coon_1.jpg": "train", "beagle_3.jpg": "train",
            "Maine_Coon_2.jpg": "val", "beagle_0.jpg": "val"}
        assert "in neither list of annotations 3" in describe(images)
    for text, message in ((b"Maine_Coon_2\n", "differ: beagle"), (b"", "differ")):
        for path in folder_and_zip(tmp_path / message, {**pets, **lists,
                                                        "annotations/test.txt": text}):
            with pytest.raises(InputError, match=message):
                find_images(path)
