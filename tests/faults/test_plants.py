"""A planted fault that never happens fails its test: it would show nothing."""
import signal

import pytest

from tests.helpers.commands import TINY
from tests.helpers.plants import Explode, Plant


@pytest.mark.parametrize("plant", [
    Plant("mixer.training.evaluate.evaluate", signal.SIGTERM),        # the trainer has its own
    Plant("mixer.training.trainer.train_step", signal.SIGTERM, 3),     # there are two steps
    Explode(step=3)], ids=lambda plant: f"{plant.where}-{plant.call}")
def test_a_fault_that_never_happens(train, pictures, out, plant):
    process = train.start(*TINY, "--steps", 2, "--data", pictures, "--out", out, plants=[plant])
    with pytest.raises(AssertionError, match="planted, but never happened"):
        process.wait()
    process.plants.clear()  # else the fixture asks again
