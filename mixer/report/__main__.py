"""Write table and figures of finished runs again, or put several folders side by side.

python -m mixer.report FOLDER
python -m mixer.report FOLDER FOLDER --out FOLDER

FOLDER is the --out of `train.py --arch all` or `--seeds`. Nothing is trained; neither images nor
checkpoints are needed.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

from ..runtime.cli import option, parse, run
from ..runtime.errors import InputError
from ..runtime.files import writable_folder
from .comparison import write_comparison
from .runs import find_runs
from .studies import write_studies


@dataclass(frozen=True)
class Config:
    """What to report."""

    folders: list[str] = option((), "folders of finished runs")
    out: str | None = option(None, "with several folders: the folder for table.md")


def main(argv: list[str]) -> None:
    config = Config(**parse(Config, argv, __doc__, words="folders"))
    folders = [Path(folder) for folder in config.folders]
    if not folders or not all(map(find_runs, folders)):
        raise InputError("name a folder that holds finished runs, the --out of train.py with "
                         "--arch all or --seeds: python -m mixer.report FOLDER")
    if (len(folders) > 1) != (config.out is not None):
        raise InputError("several folders need --out; with one folder, leave it out")
    if config.out:
        print(write_studies(folders, writable_folder(config.out, "--out")))
    else:
        print(write_comparison(folders[0], failed={}))


if __name__ == "__main__":
    run(main, sys.argv[1:])
