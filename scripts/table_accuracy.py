"""Tables over folds and seeds: accuracy beside the baselines, and what one arm has over another, with intervals.

    python scripts/table_accuracy.py OUT/experiments/pm_hh.json [OUT/experiments/pm_hh_scratch.json ...]

The runs of an index are an arm; preference models of one size, one mixture and about as many pairs are pooled over folds and seeds. Intervals
and tests resample opening prompts, so that the seeds of one pair do not pass for independent evidence.
"""

import argparse
from pathlib import Path

from hhjax.analysis.runs import Result, alike, load_results
from hhjax.analysis.scores import accuracy_rows, accuracy_table, pooled
from hhjax.analysis.stats import correct, paired_difference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("index", type=Path, nargs="+")
    parser.add_argument("--only", default="*", help="runs whose names match")
    options = parser.parse_args()
    found = {id(r): (r, index) for index in options.index for r in load_results(index, options.only)}
    for kind, results in alike([r for r, _ in found.values()]).items():
        by_arm = {}
        for r in results:
            by_arm.setdefault(found[id(r)][1], []).append(r)
        by_arm = {index.stem if len({i.stem for i in by_arm}) == len(by_arm) else str(index): rows for index, rows in by_arm.items()}
        (first, ours), *others = by_arm.items()
        for arm, results in by_arm.items():
            print(f"{arm}, {kind}: {len(results)} evaluations")
            print(accuracy_table(accuracy_rows(pooled([r.scores for r in results]))), end="\n\n")
        for arm, theirs in others:
            print("\n".join(lead(first, ours, arm, theirs)), end="\n\n")


def lead(name: str, ours: list[Result], other: str, theirs: list[Result]) -> list[str]:
    """A line for each test source: how much more accurate one arm is than another on the pairs that both scored."""
    a, b = ({r.run: r.scores for r in results} for results in (ours, theirs))
    shared = [run for run in a if run in b]
    lines = [f"{name} leads {other}, on {len(shared)} shared folds and seeds:"]
    if not shared:
        return lines
    a, b = (pooled([scores[run] for run in shared]) for scores in (a, b))
    for source in dict.fromkeys(a.source.tolist()):
        here = a.source == source
        gain, p = paired_difference(correct(a.margin[here]), correct(b.margin[here]), a.opening[here])
        lines.append(f"{source:<16}{gain.value:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]  p {p:.4f}  {gain.n} pairs")
    return lines


if __name__ == "__main__":
    main()
