import torch
from PIL import Image

from mixer.bench.data import measure_data


def test_data_stages(tmp_path, monkeypatch):
    monkeypatch.setattr("mixer.bench.data.MOST_IMAGES", 4)
    for i in range(6):
        Image.new("RGB", (40, 30)).save(tmp_path / f"{'cat' if i % 2 else 'dog'}.{i}.jpg")
    (tmp_path / "cat.0.jpg").write_bytes(b"no image")
    stages = measure_data(tmp_path, 24, 2, torch.device("cpu"), 3)
    assert [row["stage"] for row in stages] == ["decoding, all cores", "reading a batch",
                                                "augmenting it"]
    assert all(0 < row["p20"] <= row["images_per_s"] <= row["p80"] for row in stages)
