"""Several runs, each in a process of its own: none inherits the memory of another."""
import sys
from pathlib import Path

from ..report.comparison import write_comparison
from ..runtime.errors import Interrupted, printable
from ..runtime.processes import Stop


def train_all(command: list[str], runs: list[tuple[str, str, list[str]]], out: Path,
              rank: int) -> None:
    """Run `command` (train.py) for each of `several_runs`; their folders are in `out`.

    Raises Interrupted when a signal came, and RuntimeError, at the end, if a run failed.
    """
    # the runs, until a signal comes
    done, failed = 0, {}
    with Stop() as stop:
        for title, folder, arguments in runs:
            print(f"\n{title}", flush=True)
            code = stop.run([*command, *arguments, f"--out={out / folder}", "--resume=auto"])
            if stop.signum:
                break
            if code:
                failed[folder] = f"failed (exit code {code})"
                print(f"{title} failed with exit code {code}; continuing", file=sys.stderr)
            else:
                done += 1

    # the table, and how it ended
    if rank == 0:
        table = write_comparison(out, failed)
        print(f"\n{table}\n{done} of {len(runs)} runs done; table and figures are in "
              f"{printable(out)}")
    if stop.signum:
        raise Interrupted(stop.signum, f" in {title}; continue with the same command "
                                       "and --resume auto")
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(runs)} runs failed; run again with "
                           "--resume auto")
