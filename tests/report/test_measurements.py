import json

import pytest

from mixer.report.measurements import Memory, ModelMeasurement, StepMeasurement, from_json
from tests.helpers.tables import COMMITTED


def test_a_flat_row_and_back():
    memory = Memory(90.0, None, None, 690.0, 600.0)  # on a CPU
    m = StepMeasurement(row="ConvMixer 24", way="ours", batch_size=8, memory=memory)
    row = m.as_row()
    assert list(row) == ["row", "way", "batch_size", "training_mib", "allocated_mib",
                         "reserved_mib", "process_mib", "before_mib"]
    assert row["allocated_mib"] is None and StepMeasurement.from_row(row) == m
    failed = ModelMeasurement("ConvMixer 24", 8, failed="out of memory: all of it")
    assert list(failed.as_row()) == ["row", "batch_size", "failed"]
    assert ModelMeasurement.from_row(failed.as_row()) == failed
    with pytest.raises(TypeError, match="speed_of_light"):
        ModelMeasurement.from_row({**failed.as_row(), "speed_of_light": 1})


@pytest.mark.parametrize("path", COMMITTED, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_committed_rows_are_written_again_as_they_are(path):
    result = json.loads(path.read_text())
    lists = from_json(result)
    assert {"models", "memory"} <= set(lists) or {"blocks", "shapes", "steps"} <= set(lists)
    for name, measured in lists.items():
        assert json.dumps([m.as_row() for m in measured]) == json.dumps(result[name])
