"""Paper Figures 4, 13, 33: reward on train and test PMs against samples and sqrt(KL), with a linear fit.

    python scripts/plot_reward_vs_sqrt_kl.py OUT/experiments/rlhf_hh.json ... [--only GLOB] [--stage GLOB,...] [--most X] [--to FOLDER]
"""

import argparse
from pathlib import Path

import numpy as np

from hhjax.analysis.rlhf import load_curves, reward_figure

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("index", type=Path, nargs="+", help="OUT/experiments/<experiment>.json; several are drawn as one")
    parser.add_argument("--only", default="*", help="runs whose names match")
    parser.add_argument("--stage", default="*", help="stages whose names match one of these, parted by commas")
    parser.add_argument("--most", type=float, default=np.inf, help="fit up to this sqrt(KL)")
    parser.add_argument("--to", type=Path, help="folder for the figure")
    options = parser.parse_args()
    first = options.index[0]
    to = options.to or first.parent.parent / "figures" / first.stem
    try:
        loaded = [load_curves(index, options.only, options.stage) for index in options.index]
        curves, best = ([x for part in loaded for x in part[i]] for i in (0, 1))
        found = reward_figure(curves, best, to / "reward_vs_sqrt_kl", options.most)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    print(found)
    print(f"{to / 'reward_vs_sqrt_kl'}.png and .csv, from {len(curves)} runs")
