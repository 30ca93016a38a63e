"""On people's prompts, does an online loop beat more comparisons of the first kind? The labels are a preference model's.

Question   With the same number of comparisons, does a policy gain more when two thirds of them come from rejection sampling and
           from an earlier policy? There are no raters for HH here: a "gold" PM, trained on people's comparisons of one half of the
           openings, labels all fresh pairs, as in Gao et al. 2022, and is what the policies are judged by. So this asks whether the
           loop learns that PM's taste; of what people would say it tells nothing.
Figures    Reward on the paying PM and on gold against samples and sqrt(KL), an arm a colour (paper Figure 16, Gao et al. Figure 1).
Expected   Paper section 4.5: the loop ends higher at equal numbers. Here both ended alike, the loop nearer to where it began
           (results/hh.md). In the clinic it ended higher once and lower once (results/clinic.md).
Cost       10 minutes on 2 cores of 145 GFLOP/s at one seed beside rlhf_hh.py, whose tokenizer, language model and pm_test it shares.
Command    hhjax run experiments/online_hh.py --jobs 2
           python scripts/plot_reward_vs_sqrt_kl.py runs/experiments/online_hh.json --stage ppo
"""

from dataclasses import replace

from pm_hh import MIXED, TEXT
from rlhf_hh import HALVES, HELPFUL, RL
from tension_hh import small

from hhjax.data.comparisons import ComparisonData
from hhjax.experiment import Experiment, Run, edit
from hhjax.stages import Comparisons

PROMPTS, EACH = 600, 400  # prompts of a tranche, and comparisons a PM takes of it: a quarter is held out, some replies cannot be used
GOLD = replace(HALVES[1], name="gold")
SAMPLED = {"data": HELPFUL, "prompt_len": RL.prompt_len, "sampling": RL.sampling}
# The better reply by gold always wins: its differences between replies are small beside the noise of a Bradley-Terry label.
FRESH = Comparisons("base", policies=("lm",), labeler="gold", noise=0.0, prompts=PROMPTS, **SAMPLED)
POLICY = replace(RL, tests=("gold",), steps=100, save_every=25)


def pm(name: str, *tranches: str):
    """From scratch on all tranches, as after every week of the paper's loop. Their openings are none of fold 0's test, so that another
    fold must say what is held out."""
    return replace(MIXED, name=name, data=ComparisonData(tranches, shares=(1.0,) * len(tranches), limit=EACH * len(tranches), fold=1))


def tranche(name: str, number: int, **changes) -> Comparisons:
    """The number-th third of the prompts: both arms see the same prompts, and differ in who answers them and how."""
    return replace(FRESH, name=name, skip=number * PROMPTS, **changes)


ARMS = {
    "online": (
        pm("pm_base", "base"),
        tranche("rejection", 1, ranker="pm_base", best_of=4),
        replace(POLICY, name="ppo_base", reward="pm_base", steps=50),
        tranche("online", 2, policies=("ppo_base@25", "ppo_base")),  # two snapshots side by side
        pm("pm_online", "base", "rejection", "online"),
    ),
    "control": (
        *(tranche(f"base_{number + 1}", number) for number in (1, 2)),
        pm("pm_control", "base", "base_2", "base_3"),
    ),
}
FAST = {"pm_base.data.limit": 32, "pm_online.data.limit": 96, "pm_control.data.limit": 96, "online.policies": ("lm", "ppo_base")} | {
    f"{name}.prompts": 320 for name in ("base", "rejection", "online", "base_2", "base_3")} | {
    f"{name}.skip": 320 * number for name, number in (("rejection", 1), ("online", 2), ("base_2", 1), ("base_3", 2))}  # fmt: skip


def runs(fast: bool = False, seeds: int = 1):
    found = []
    for arm, stages in ARMS.items():
        base = Experiment("online_hh", (*TEXT, GOLD, FRESH, *stages, replace(POLICY, reward=f"pm_{arm}")))
        names = {stage.name for stage in base.stages}
        base = small(base) if fast else base
        for path, value in FAST.items() if fast else ():
            base = edit(base, path, value) if path.split(".")[0] in names else base
        found += [Run(edit(base, "seed", seed), (("arm", arm), ("seed", str(seed)))) for seed in range(seeds)]
    return found
