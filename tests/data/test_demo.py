"""The drawn pictures: functions of their index, and always the same."""
import numpy as np

from mixer.data.demo import render


def test_an_image_depends_on_its_index_alone():
    forwards = [render(i, 32) for i in range(6)]
    backwards = [render(i, 32) for i in reversed(range(6))][::-1]
    np.testing.assert_array_equal(forwards, backwards)
    assert len({picture.tobytes() for picture in forwards}) == 6
    assert forwards[0].shape == (32, 32, 3) and forwards[0].dtype == np.uint8
