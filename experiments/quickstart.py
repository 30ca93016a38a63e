"""The whole paper in a simulated clinic, with nothing downloaded: from text to policies and one report.

Question   Do the paper's phenomena appear in a small world whose annotators are known: reward against sqrt(KL) and
           over-optimisation, helpfulness against harmlessness, calibration, the alignment tax, rejection sampling, detection?
Figures    1, 3, 4, 7, 9, 13, 19, 22, 26, 36 of the paper, in report.html, each with the paper's claim and what was found.
Expected   docs/clinic.md. Gold turns down while the training PM goes on rising: with few comparisons in every draw so far, with all of
           them in none (results/quickstart.md).
Cost       One seed: 8 minutes on 2 cores of 515 GFLOP/s together, 16 on two of 145 (13 when compiled before); --fast under 3.
Command    hhjax run experiments/quickstart.py --jobs 2
"""

from dataclasses import replace

from hhjax.analysis.clinic import write_report
from hhjax.clinic.gold import Raters, watch
from hhjax.data.comparisons import ComparisonData
from hhjax.data.sources import TextData
from hhjax.experiment import Experiment, edit, grid
from hhjax.model.generate import Sampling
from hhjax.stages import LM, PM, PPO, BestOfN, Clinic, Detect, Evaluate, Exam, Report, Tokenizer
from hhjax.train.state import OptimConfig

TEXT = TextData(("text",))
BOTH = ComparisonData(("helpful", "harmless"))
HELPFUL, HARMLESS = (replace(BOTH, sources=(name,)) for name in BOTH.sources)
WORLD = (
    Clinic("text", part="text", size=40000),
    Clinic("helpful", part="helpful", size=6000),
    Clinic("harmless", part="harmless", size=6000),
    Clinic("questions", part="exam", size=300),
    Tokenizer("tok", data=TEXT, vocab=1024, algorithm="bpe"),  # names are whole pieces, which is what makes them easy to repeat
)
# Many small batches: at 32 rows and a quarter of the updates, the same tokens, neither model learns to take a name from the request.
LM_LARGE = LM("lm_large", tokenizer="tok", model="0.4M", data=TEXT, seq_len=128, batch_size=8, steps=4000, log_every=80, save_every=0,
              optim=OptimConfig(lr=6e-3, schedule="cosine", warmup_steps=200, weight_decay=0.1))  # fmt: skip
LM_SMALL = replace(LM_LARGE, name="lm_small", model="0.1M", steps=6000, optim=replace(LM_LARGE.optim, lr=8e-3))

MIXED = PM("pm", init="lm_large", data=replace(BOTH, half="A"), seq_len=96, batch_size=8, log_every=80, save_every=0,
           optim=OptimConfig(lr=5e-4, warmup_steps=20))  # fmt: skip
FEW = {"epochs": 4.0}  # of 250 pairs
SMALL = {"init": "lm_small", "optim": replace(MIXED.optim, lr=1e-3)}


def pm(name: str, limit: int | None = None, **changes) -> PM:
    return replace(MIXED, name=name, **{"data": replace(MIXED.data, limit=limit)} | changes)


PMS = (
    MIXED,  # what policies are trained on ...
    pm("pm_test", data=replace(BOTH, half="B")),  # ... and what they never see (section 4.2)
    pm("pm_250", 250, **FEW),
    pm("pm_helpful", data=HELPFUL),
    pm("pm_harmless", data=HARMLESS),
    pm("pm_25", data=replace(BOTH, shares=(3, 1), limit=6000)),
    pm("pm_75", data=replace(BOTH, shares=(1, 3), limit=6000)),
    pm("pm_1000", 1000),
    pm("pm_small_250", 250, **SMALL | FEW),
    pm("pm_small_1000", 1000, **SMALL),
    pm("pm_small", **SMALL),
)
RL = PPO("ppo", policy="lm_large", reward="pm", tests=("pm_test",), data=BOTH, prompt_len=56, batch_size=64, steps=75, watch=watch,
         sampling=Sampling(max_new_tokens=40), optim=OptimConfig(lr=2e-4, warmup_steps=10), value_optim=OptimConfig(lr=1e-3, warmup_steps=10),
         eval_prompts=256, save_every=0)  # fmt: skip
POLICIES = (
    RL,
    replace(RL, name="ppo_small", policy="lm_small"),
    replace(RL, name="ppo_250", reward="pm_250"),  # over-optimisation: a PM of few comparisons
    replace(RL, name="ppo_helpful", reward="pm_helpful", tests=()),  # these PMs have read both halves: no test PM is new
    replace(RL, name="ppo_harmless", reward="pm_harmless", tests=()),
)
BEST = BestOfN("best", policy="lm_large", reward="pm", tests=("pm_test",), data=BOTH, prompts=64, prompt_len=56, sampling=RL.sampling,
               batch_size=256, watch=watch)  # fmt: skip
EXAMS = tuple(Exam(f"exam_{of}", of=of, data="questions") for of in ("lm_small", "lm_large", "ppo_small", "ppo"))
DETECT = Detect("detect", of="lm_large", inside=HELPFUL, outside=HARMLESS, prompt_len=56, noise=0.3)


def shared(*lms: LM) -> tuple:
    """One world and the same language models for all seeds of an experiment, which then differ in PMs and policies."""
    return tuple(replace(stage, seed=0) if stage.seeded else stage for stage in (*WORLD, *lms))


def evaluations(pms) -> tuple[Evaluate, ...]:
    return tuple(Evaluate(f"eval_{each.name}", of=each.name, data=BOTH, baselines=False, raters=Raters()) for each in pms)


TRAINED = (LM_LARGE, LM_SMALL, *PMS, *POLICIES)
JUDGED = (*evaluations(p for p in PMS if p.name != "pm_test"), BEST, *EXAMS, DETECT)
REPORT = Report("report", of=tuple(s.name for s in (*POLICIES, *JUDGED)), draw=write_report)
BASE = Experiment("quickstart", (*WORLD, *TRAINED, *JUDGED, REPORT))


def runs(fast: bool = False, seeds: int = 1):
    base = small(BASE) if fast else BASE
    return grid(base, {"seed": range(seeds)}) if seeds > 1 else base


def small(base: Experiment) -> Experiment:
    """--fast: few steps, so that every path is walked in minutes."""
    changes = {"lm": {"steps": 400}, "pm": {"data.limit": 250}, "ppo": {"steps": 15, "eval_prompts": 64},
               "best_of_n": {"ns": (1, 4), "prompts": 16}, "detect": {"fit": 100}}  # fmt: skip
    for stage in base.stages:
        for path, value in changes.get(stage.kind, {}).items():
            base = edit(base, f"{stage.name}.{path}", value)
    return base
