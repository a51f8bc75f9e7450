"""The run that interrupted, refused and starved runs must become in the end."""
import pytest

from tests.helpers.commands import SHORT, Command


@pytest.fixture(scope="session")
def whole(pictures, tmp_path_factory):
    """The folder of the uninterrupted run of SHORT; beside it, the decoded images."""
    root = tmp_path_factory.mktemp("whole")
    arguments = [*SHORT, "--data", pictures, "--cache", root, "--out", root / "run"]
    result = Command("train.py", arguments, root / "streams").wait()
    assert result.returncode == 0, result.stderr
    return root / "run"
