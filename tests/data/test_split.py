import numpy as np
import pytest

from mixer.data.split import split
from mixer.runtime.errors import InputError


class Names:
    """The attributes of an ImageSet that `split` reads."""

    def __init__(self, names, classes=("cat", "dog"), splits=None, digests=None):
        self.names, self.classes = names, list(classes)
        self.labels = [self.classes.index(name.split(".")[0]) for name in names]
        self.splits = splits or [""] * len(names)
        self.digests = digests or list(range(len(names)))

    def split(self, val_fraction=0.1, seed=0):
        train, val = split(self, np.arange(len(self.names)), self.digests, val_fraction, seed)
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
    four = Names(["cat.0", "cat.1", "dog.0", "dog.1"])
    assert len(four.split(0.01)[1]) == len(four.split(0.99)[0]) == 2
    assert Names(["cat.0", "cat.1", "dog.0"]).split()[1] < {"cat.0", "cat.1"}
    assert len(Names(["cat.0", "dog.0"]).split(0)[0]) == 2


def test_split_follows_the_source():
    names = Names(["cat.0", "dog.0", "cat.1", "dog.1"], splits=["train", "train", "val", "val"])
    assert names.split() == ({"cat.0", "dog.0"}, {"cat.1", "dog.1"})


def test_identical_images_stay_on_one_side(capsys):
    """Each second image is a copy of the one before; two of a cat are called dogs."""
    digests = [i - i % 2 for i in range(250)]
    digests[200:202] = [0, 0]
    for seed in range(20):
        train, val = split(Names(NAMES), np.arange(250), digests, 0.1, seed)
        sides = {digests[i] for i in train}, {digests[i] for i in val}
        assert not sides[0] & sides[1] and not {0, 1, 200, 201} & set(val)
        assert sum(i < 200 for i in val) == 20 and sum(i >= 200 for i in val) == 4
    said = capsys.readouterr().out
    assert "250 images are byte-identical to another, and stay on one side" in said
    # large groups, and a class that is one group
    names = Names(["cat.0", "cat.1", "cat.2", "dog.0", "dog.1", "dog.2"],
                  digests=[0, 0, 2, 3, 3, 5])
    assert names.split(0.01)[1] == {"cat.2", "dog.2"}
    assert len(Names(["cat.0", "cat.1", "dog.0", "dog.1"], digests=[0, 1, 2, 2]).split()[1]) == 1
    assert "class dog has too few distinct images for validation" in capsys.readouterr().out


def test_training_goes_without_its_copies_of_the_sources_validation_images(capsys):
    names = Names(["cat.0", "cat.1", "dog.0", "cat.2", "dog.1"], splits=["train"] * 3 + ["val"] * 2)
    train, val = split(names, np.arange(5), [0, 1, 2, 0, 4], 0.1, 0)
    assert train.tolist() == [1, 2] and val.tolist() == [3, 4]
    assert "left out 1 training images" in capsys.readouterr().out
    with pytest.raises(InputError, match="no training image is left of class dog"):
        split(names, np.arange(5), [0, 1, 2, 0, 2], 0.1, 0)
