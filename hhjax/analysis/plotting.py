"""What every scripts/plot_*.py does: read an experiment's finished stages, draw one figure, say what it shows."""

import argparse
from collections.abc import Callable
from pathlib import Path

from hhjax.analysis.runs import load_results


def plot(figure: Callable, name: str, description: str, load: Callable = load_results) -> None:
    """Draws `figure(results, path)` for the experiment indices on the command line, into OUT/figures/<experiment>/NAME.

    load: (index, runs' glob, stages' glob) -> a list of what is drawn; ValueError where there is nothing.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("index", type=Path, nargs="+", help="OUT/experiments/<experiment>.json; several are drawn as one")
    parser.add_argument("--only", default="*", help="runs whose names match")
    parser.add_argument("--stage", default="*", help="stages whose names match one of these, parted by commas")
    parser.add_argument("--to", type=Path, help="folder for the figure")
    options = parser.parse_args()
    first = options.index[0]
    to = options.to or first.parent.parent / "figures" / first.stem
    try:
        results = [r for index in options.index for r in load(index, options.only, options.stage)]
        found = figure(results, to / name)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    print(found)
    print(f"{to / name}.png and .csv, from {len(results)} results")
