"""Markdown tables, read back; the committed results of bench.py."""
from pathlib import Path

RESULTS = Path(__file__).parent.parent.parent / "results"
COMMITTED = sorted([*RESULTS.glob("*/bench.json"), *RESULTS.glob("*/kernels.json")])


def cells(text, first=""):
    """The cells of each line of the tables in `text` whose first cell starts with `first`."""
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()
            if line.startswith(f"| {first}")]
