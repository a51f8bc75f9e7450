"""What a confusion matrix says."""
import math

import pytest

from mixer.report.evaluation import evaluation, evaluation_text
from mixer.report.intervals import wilson


@pytest.mark.parametrize("correct,n", [(0, 10), (10, 10), (7, 10), (391, 400)])
def test_the_interval_holds_the_accuracies_that_the_count_does_not_refuse(correct, n):
    """Wilson's interval inverts the score test: at its ends, z is 1.96."""
    for end in wilson(correct, n):
        if 0 < end < 1:
            z = abs(correct / n - end) / math.sqrt(end * (1 - end) / n)
            assert z == pytest.approx(1.96)
        else:
            assert end == pytest.approx(round(end), abs=1e-12)


def test_accuracy_recall_and_the_most_frequent_confusion():
    e = evaluation([[8, 1, 1], [0, 0, 0], [3, 0, 7]], 0.5, ["cat", "dog", "newt"])
    assert e["accuracy"] == 15 / 20 and e["images"] == 20
    assert e["recall"] == {"cat": 0.8, "dog": None, "newt": 0.7}
    lines = evaluation_text(e).splitlines()
    assert lines[0].startswith("accuracy 0.7500 (95 % interval 0.5313 to 0.8881), loss 0.5000")
    assert lines[2].split() == ["newt", "10", "0.700", "cat", "(3)"], "the lowest recall first"
    assert len(lines) == 4 and "dog" not in lines[2] + lines[3], "no image, no recall"
