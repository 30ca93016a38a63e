"""What does RLHF on people's comparisons cost a small model on public exams?

Question   Accuracy on ARC-easy, HellaSwag, MMLU and the last words of LAMBADA before and after PPO, by size, with and without
           examples; and the nats of the right option among four, which resolve more. Options are scored whole and their lengths weigh
           tens of nats, so that only the change on the same questions says something.
Figure     Capability before and after by size (paper Figures 3 and 28).
Expected   The paper: a tax for small models, a bonus for large ones. Models of 0.1M and 0.4M parameters are near chance (0.25) on what
           must be known, so that little is there to lose; last words and continuations are what they can choose at all.
Cost       11 minutes on 2 cores of 145 GFLOP/s beside robustness.py and rlhf_hh.py, whose language models it shares.
Command    hhjax run experiments/tax_hh.py --jobs 2
           python scripts/plot_tax.py runs/experiments/tax_hh.json
"""

from dataclasses import replace

from pm_hh import TEXT
from tension_hh import PAID, POLICY, TESTS, small

from hhjax.data.sources import ExamData
from hhjax.experiment import Experiment, edit, grid
from hhjax.stages import Exam, Questions

LM_SMALL = replace(TEXT[1], name="lm_small", model="0.1M")
# One preference model pays both sizes, as in the paper's first scan (section 4.2).
LARGE = replace(POLICY, reward="pm_both")
SMALL = replace(LARGE, name="ppo_small", policy="lm_small")
# 500 questions of each exam, of at most 300 characters; two examples still fit into about 300 tokens.
EXAMS = tuple(Exam(f"exam_{of}", of=of, data="questions", shots=(0, 2)) for of in ("lm_small", "lm", "ppo_small", "ppo"))
BASE = Experiment("tax_hh", (*TEXT, LM_SMALL, PAID["both"], *TESTS, LARGE, SMALL, Questions("questions", data=ExamData()), *EXAMS))


def runs(fast: bool = False, seeds: int = 1):
    base = edit(small(BASE), "questions.data.limit", 8) if fast else BASE
    return grid(base, {"seed": range(seeds)})
