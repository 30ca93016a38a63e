"""Can the activations of a small language model tell red-team prompts from requests for help?

Question   AUROC of out-of-distribution scores of harmless-base openings, fitted to helpful-base openings, and of probes that are
           shown 1, 10 or 100 of what is outside.
Figure     Paper Figures 22 and 23, section 5.4.
Expected   The paper: the simplified relative score beats the plain Mahalanobis distance, 0.85 at 52B in middle layers; a probe shown
           ten examples has 0.94 at 52B and 0.86 at 13M. A model of 0.4M should have less: it was near chance (results/hh.md). Openings
           alone, since dialogues differ in length too; training and test openings are told by their hash, so that none is on both sides.
Cost       A minute a layer and split on 2 cores that three other jobs shared, beside pm_hh.py, whose tokenizer and language model it shares.
Command    hhjax run experiments/detection_hh.py
           python scripts/plot_detection.py runs/experiments/detection_hh.json --only '*layer=1*'
"""

from dataclasses import replace

from pm_hh import FAST, HH, KINDS, TEXT

from hhjax.experiment import Experiment, edit, grid
from hhjax.stages import Detect

INSIDE, OUTSIDE = (replace(HH, sources=KINDS[kind]) for kind in ("helpful", "harmless"))
DETECT = Detect("detect", of="lm", inside=INSIDE, outside=OUTSIDE, openings=True, fit=1000)
BASE = Experiment("detection_hh", (*TEXT, DETECT))
FOLD = ("detect.inside.fold", "detect.outside.fold")


def runs(fast: bool = False, folds: int = 3):
    """folds: splits into training and test openings, of the five; the paper has three."""
    base = BASE
    for path, value in (FAST | {"detect.fit": 100, "detect.exposure": (1, 10)}).items() if fast else ():
        base = edit(base, path, value)
    return grid(base, {"detect.layer": (1, 2), FOLD: range(folds)})
