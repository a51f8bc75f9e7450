"""The run that interrupted, refused and starved runs must become in the end."""
import pytest

from tests.helpers.commands import SHORT, Command, succeeded


@pytest.fixture(scope="session")
def whole(pictures, tmp_path_factory):
    """The folder of the uninterrupted run of SHORT; beside it, the decoded images."""
    root = tmp_path_factory.mktemp("whole")
    arguments = [*SHORT, "--data", pictures, "--cache", root, "--out", root / "run"]
    succeeded(Command("train.py", arguments, root / "streams").wait())
    return root / "run"
