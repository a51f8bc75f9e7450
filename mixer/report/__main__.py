"""Write table and figures of finished runs again.

python -m mixer.report FOLDER

FOLDER is the --out of `train.py --arch all` or `--seeds`. Nothing is trained; neither images nor
checkpoints are needed.
"""
import sys
from pathlib import Path

from ..runtime.cli import run
from ..runtime.errors import UsageError
from .comparison import write_comparison


def main(argv: list[str]) -> None:
    if len(argv) != 1 or not list(Path(argv[0]).glob("*/summary.json")):
        raise UsageError(["name a folder that holds finished runs: python -m mixer.report FOLDER"])
    print(write_comparison(Path(argv[0]), failed={}))


if __name__ == "__main__":
    run(main, sys.argv[1:])
