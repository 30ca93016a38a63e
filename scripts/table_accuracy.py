"""One table over folds and seeds: accuracy of each arm on each kind of test, beside the baselines, with intervals.

    python scripts/table_accuracy.py OUT/experiments/pm_hh.json [OUT/experiments/pm_hh_scratch.json ...]

The runs of one index are one arm. Folds are pooled, each pair counted once a seed; intervals and tests resample
opening prompts, so that the seeds of one pair do not pass for independent evidence.
"""

import argparse
from pathlib import Path

from hhjax.analysis.runs import load_results
from hhjax.analysis.scores import accuracy_rows, accuracy_table, pooled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("index", type=Path, nargs="+")
    parser.add_argument("--only", default="*", help="runs whose names match")
    options = parser.parse_args()
    for index in options.index:
        results = load_results(index, options.only)
        print(f"{index.stem}: {len(results)} evaluations")
        print(accuracy_table(accuracy_rows(pooled([r.scores for r in results]))), end="\n\n")


if __name__ == "__main__":
    main()
