"""Does a small preference model, trained on a few thousand human comparisons, beat simple rules?

Question   How accurate is a PM on held-out helpful and harmless comparisons, beside the length of the replies and a bag
           of words, and what does language-model pretraining add?
Figures    Calibration against 1/(1+exp(-difference)) (paper Figure 9), accuracy by turn (Figure 8), one table.
Expected   The paper's 13M model reaches about 0.64 with 160,000 pairs; a few thousand pairs and 27 MB of pretraining text
           resolve less. Length rules reach 0.59.
Cost       One fold and seed: under 15 minutes on 2 cores. --folds 5 --seeds 3 --arms all: about 3 hours.
Command    hhjax run experiments/pm_hh.py
"""

from dataclasses import replace

from hhjax.data.comparisons import ComparisonData
from hhjax.data.sources import TextData
from hhjax.experiment import LM, PM, Evaluate, Experiment, Report, Tokenizer, edit, grid
from hhjax.objectives.lm import LMLoss
from hhjax.objectives.preference import PreferenceLoss
from hhjax.train.state import OptimConfig

HH = ComparisonData(("helpful-base", "harmless-base"))
BASE = Experiment("pm_hh", (
    Tokenizer("tok", data=TextData(), vocab=4096),
    # The text holds no HH record, so folds and seeds share this stage.
    LM("lm", tokenizer="tok", model="0.4M", data=TextData(), seq_len=256, batch_size=32, steps=1000, seed=0,
       loss=LMLoss(chunk=32), optim=OptimConfig(lr=4e-3, schedule="cosine", warmup_steps=50, weight_decay=0.1)),
    PM("pm", init="lm", data=HH, seq_len=384, batch_size=32, epochs=1,
       loss=PreferenceLoss(lm_coef=0.0), optim=OptimConfig(lr=1e-3, warmup_steps=10, weight_decay=0.1)),
    Evaluate("eval", of="pm", data=HH),
    Report("report", of=("eval",))))  # fmt: skip

PRETRAINED = BASE.stage("pm")
ARMS = {
    "lm": PRETRAINED,
    "aux": replace(PRETRAINED, loss=PreferenceLoss(lm_coef=0.3)),  # and a language-model loss on the chosen dialogues
    "scratch": replace(PRETRAINED, init=None, tokenizer="tok", model="0.4M"),  # no pretraining at all
}
FAST = {"tok.vocab": 1024, "lm.steps": 20, "pm.seq_len": 128, "pm.data.limit": 320}


def runs(fast: bool = False, folds: int = 1, seeds: int = 1, arms: str = "lm"):
    """folds: of the five, each once the test. arms: "lm", "aux", "scratch", or several with commas between."""
    axes = {("pm.data.fold", "eval.data.fold"): range(folds), "seed": range(seeds)}
    found = ()
    for arm in arms.split(","):
        stages = tuple(ARMS[arm] if s.name == "pm" else s for s in BASE.stages)
        base = Experiment(BASE.name if arm == "lm" else f"{BASE.name}_{arm}", stages)
        for path, value in FAST.items() if fast else ():
            base = edit(base, path, value)
        found += grid(base, axes)
    return found
