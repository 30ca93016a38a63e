"""Does an online loop beat more comparisons of the first kind?

Question   With the same number of comparisons, is a policy better when two thirds of them come from rejection sampling and from an
           earlier policy, rather than all from the first model? And does its preference model know how good it is?
Figures    Elo against samples, by raters and as the training PM guesses it (paper Figures 16 and 35); accuracy by tranche.
Expected   Paper section 4.5: at equal numbers of comparisons the loop ends higher; a PM's own scores promise more Elo than
           people find, the more so the further a policy has gone.
Cost       About 20 minutes on 2 cores at three seeds beside quickstart.py, whose world and language model it shares.
Command    hhjax run experiments/clinic_online.py --jobs 2
           python scripts/plot_elo.py runs/experiments/clinic_online.json
"""

from dataclasses import replace

from quickstart import HELPFUL, LM_LARGE, MIXED, RL, shared, small

from hhjax.clinic.gold import Raters
from hhjax.data.comparisons import ComparisonData
from hhjax.experiment import Comparisons, Elo, Evaluate, Experiment, edit, grid

EACH = 1300  # comparisons of a tranche
SHARED = shared(LM_LARGE)
SAMPLED = {"data": HELPFUL, "prompt_len": RL.prompt_len, "sampling": RL.sampling, "batch_size": 256}
POLICY = replace(RL, data=HELPFUL, tests=(), save_every=25, keep=10)  # snapshots that can be deployed and rated


def pm(name: str, tranches: tuple[str, ...], number: int):
    """From scratch on all tranches in equal shares, as after every week of the paper's loop."""
    return replace(MIXED, name=name, data=ComparisonData(tranches, shares=(1.0,) * len(tranches), limit=number))


def tranche(name: str, number: int, **changes) -> Comparisons:
    return Comparisons(name, raters=Raters(), prompts=number, **SAMPLED | changes)


LOOP = (
    tranche("base", 4 * EACH, policies=("lm_large",)),
    pm("pm_base", ("base",), EACH),
    tranche("rejection", 4 * EACH // 3, policies=("lm_large",), ranker="pm_base", best_of=4),
    replace(POLICY, name="ppo_base", reward="pm_base", steps=50),
    tranche("online", 4 * EACH // 3, policies=("ppo_base@25", "ppo_base")),  # two snapshots side by side
    pm("pm_online", ("base", "rejection", "online"), 3 * EACH),
    pm("pm_control", ("base",), 3 * EACH),  # as many, of the first tranche only
)
SECOND = tuple(replace(POLICY, name=f"ppo_{arm}", reward=f"pm_{arm}") for arm in ("online", "control"))
SNAPSHOTS = tuple(f"ppo_{arm}{at}" for arm in ("online", "control") for at in ("@25", "@50", ""))
ELO = Elo("elo", policies=("lm_large", *SNAPSHOTS), guesses=("pm_online", "pm_control"), **SAMPLED | {"prompts": 512})
TESTS = tuple(Evaluate(f"eval_{arm}", of=f"pm_{arm}", data=ComparisonData(("base", "rejection", "online")), baselines=False, raters=Raters())
              for arm in ("online", "control"))  # fmt: skip
BASE = Experiment("clinic_online", (*SHARED, *LOOP, *SECOND, *TESTS, ELO))


FAST = {"base.prompts": 400, "rejection.prompts": 150, "online.prompts": 150, "elo.prompts": 32, "online.policies": ("ppo_base@5", "ppo_base"),
        "elo.policies": ("lm_large", "ppo_online@5", "ppo_online", "ppo_control@5", "ppo_control"),
        "ppo_base.save_every": 5, "ppo_online.save_every": 5, "ppo_control.save_every": 5}  # fmt: skip


def runs(fast: bool = False, seeds: int = 3):
    base = small(BASE) if fast else BASE
    for path, value in FAST.items() if fast else ():
        base = edit(base, path, value)
    return grid(base, {"seed": range(seeds)})
