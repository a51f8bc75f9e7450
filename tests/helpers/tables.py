"""Markdown tables, read back; the committed results of bench.py."""
import re
from pathlib import Path

RESULTS = Path(__file__).parent.parent.parent / "results"
COMMITTED = sorted([*RESULTS.glob("*/bench.json"), *RESULTS.glob("*/kernels.json")])


def cells(text, first=""):
    """The cells of each line of the tables in `text` whose first cell starts with `first`."""
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()
            if line.startswith(f"| {first}")]


def headings(text):
    """Those of each table in `text`."""
    return [cells(line)[0] for line in re.findall(r"^(\|.*\|)\n\|-", text, flags=re.M)]
