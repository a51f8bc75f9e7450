import pytest
import torch
from PIL import Image

from mixer.bench.data import measure_data
from mixer.bench.measure import Load
from mixer.data.images import find_images
from mixer.runtime.errors import InputError

LOAD = Load(2, 24, torch.device("cpu"), None)


def test_data_stages(tmp_path):
    for i in range(6):
        Image.new("RGB", (40, 30)).save(tmp_path / f"{'cat' if i % 2 else 'dog'}.{i}.jpg")
    stages = measure_data(tmp_path, LOAD, 3, most=4)
    assert [row["stage"] for row in stages] == ["decoding, one process", "packing, all cores",
                                         "reading a batch", "augmenting it"]
    assert all(0 < row["p20"] <= row["images_per_s"] <= row["p80"] for row in stages)
    for path in tmp_path.iterdir():
        path.write_bytes(b"no image")
    assert find_images(tmp_path)
    with pytest.raises(InputError, match="none of 6 images"):
        measure_data(tmp_path, LOAD, 3)
