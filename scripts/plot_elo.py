"""Paper Figures 16 and 35: Elo of policies against PPO samples, by raters and as their preference models guess it.

    python scripts/plot_elo.py OUT/experiments/clinic_online.json [--only GLOB] [--to FOLDER]
"""

import argparse
from pathlib import Path

from hhjax.analysis.elo import elo_figure, load_ratings

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("index", type=Path, help="OUT/experiments/<experiment>.json")
    parser.add_argument("--only", default="*", help="runs whose names match")
    parser.add_argument("--to", type=Path, help="folder for the figure")
    options = parser.parse_args()
    to = options.to or options.index.parent.parent / "figures" / options.index.stem
    try:
        found = load_ratings(options.index, options.only)
        print(elo_figure(found, to / "elo"))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    print(f"{to / 'elo'}.png and .csv, from {len(found)} Elo stages")
