"""What every scripts/plot_*.py does: read an experiment's finished evaluations, draw one figure, say what it shows."""

import argparse
from collections.abc import Callable
from pathlib import Path

from hhjax.analysis.runs import load_results


def plot(figure: Callable, name: str, description: str) -> None:
    """Draws `figure(results, path)` for the experiment index on the command line, into OUT/figures/<experiment>/NAME."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("index", type=Path, nargs="+", help="OUT/experiments/<experiment>.json; several are drawn as one")
    parser.add_argument("--only", default="*", help="runs whose names match")
    parser.add_argument("--stage", default="*", help="Evaluate stages whose names match")
    parser.add_argument("--to", type=Path, help="folder for the figure")
    options = parser.parse_args()
    first = options.index[0]
    to = options.to or first.parent.parent / "figures" / first.stem
    try:
        results = [r for index in options.index for r in load_results(index, options.only, options.stage)]
        found = figure(results, to / name)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    print(found)
    print(f"{to / name}.png and .csv, from {len(results)} evaluations")
