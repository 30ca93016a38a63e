"""Does an online loop beat more comparisons of the first kind?

Question   With the same number of comparisons, is a policy better when two thirds of them come from rejection sampling and from an
           earlier policy, rather than all from the first model? And does its preference model know how good it is?
Figures    Elo against samples, by raters, as the training PM guesses it, and as gold would (paper Figures 16 and 35).
Expected   Paper section 4.5: at equal numbers of comparisons the loop ends higher; a PM's own scores promise more Elo than
           people find. Some of that is arithmetic, and happens to gold's utilities too. Here the loop
           ended higher in the mean of three seeds and lower in that of an earlier version: results/clinic.md.
Cost       10 minutes on 2 fast cores, 18 on slow ones, at three seeds beside quickstart.py, whose world and language model it shares.
Command    hhjax run experiments/clinic_online.py --jobs 2
           python scripts/plot_elo.py runs/experiments/clinic_online.json
"""

from dataclasses import replace

from quickstart import HELPFUL, LM_LARGE, MIXED, RL, shared, small

from hhjax.clinic.gold import Raters
from hhjax.data.comparisons import ComparisonData
from hhjax.experiment import Experiment, edit, grid
from hhjax.stages import Comparisons, Elo, Evaluate

PROMPTS, EACH = 1790, 1000  # prompts of a tranche, and comparisons a PM takes of it: a fifth is held out, a fifth of policies' replies are equal
SHARED = shared(LM_LARGE)
SAMPLED = {"data": HELPFUL, "prompt_len": RL.prompt_len, "sampling": RL.sampling, "batch_size": 256}
POLICY = replace(RL, data=HELPFUL, tests=(), save_every=25, keep=10)  # snapshots that can be deployed and rated


def pm(name: str, *tranches: str):
    """From scratch on all tranches, as after every week of the paper's loop."""
    return replace(MIXED, name=name, data=ComparisonData(tranches, shares=(1.0,) * len(tranches), limit=EACH * len(tranches)))


def tranche(name: str, number: int, **changes) -> Comparisons:
    """The number-th third of the prompts: both arms see the same prompts, and differ in who answers them and how."""
    return Comparisons(name, raters=Raters(), prompts=PROMPTS, skip=number * PROMPTS, **SAMPLED | changes)


LOOP = (
    tranche("base", 0, policies=("lm_large",)),
    pm("pm_base", "base"),
    tranche("rejection", 1, policies=("lm_large",), ranker="pm_base", best_of=4),
    replace(POLICY, name="ppo_base", reward="pm_base", steps=50),
    tranche("online", 2, policies=("ppo_base@25", "ppo_base")),  # two snapshots side by side
    pm("pm_online", "base", "rejection", "online"),
    *(tranche(f"base_{number + 1}", number, policies=("lm_large",)) for number in (1, 2)),
    pm("pm_control", "base", "base_2", "base_3"),  # as many, of the first kind only
)
SECOND = tuple(replace(POLICY, name=f"ppo_{arm}", reward=f"pm_{arm}") for arm in ("online", "control"))
SNAPSHOTS = tuple(f"ppo_{arm}{at}" for arm in ("online", "control") for at in ("@25", "@50", ""))
ELO = Elo("elo", policies=("lm_large", *SNAPSHOTS), guesses=("pm_online", "pm_control"), **SAMPLED | {"prompts": 512})
TESTS = tuple(Evaluate(f"eval_{arm}", of=f"pm_{arm}", data=ComparisonData(("base", "rejection", "online")), baselines=False, raters=Raters())
              for arm in ("online", "control"))  # fmt: skip
BASE = Experiment("clinic_online", (*SHARED, *LOOP, *SECOND, *TESTS, ELO))


FAST = {f"{name}.prompts": 160 for name in ("base", "rejection", "online", "base_2", "base_3")} | {"elo.prompts": 64} | {
    f"{name}.data.limit": 60 * tranches for name, tranches in (("pm_base", 1), ("pm_online", 3), ("pm_control", 3))} | {
    f"ppo_{name}.save_every": 5 for name in ("base", "online", "control")} | {
    "online.policies": ("ppo_base@5", "ppo_base"),
    "elo.policies": ("lm_large", "ppo_online@5", "ppo_online", "ppo_control@5", "ppo_control")}  # fmt: skip


def runs(fast: bool = False, seeds: int = 3):
    base = small(BASE) if fast else BASE
    for path, value in FAST.items() if fast else ():
        base = edit(base, path, value)
    return grid(base, {"seed": range(seeds)})
