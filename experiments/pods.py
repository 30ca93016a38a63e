"""What does the paper's system cost, size by size, and on which slice does it fit?

Question   For the seven sizes of Bai et al. 2022, 13M to 52B: memory, time and chip-hours of the language model, the preference
           model and PPO on TPU slices and H100s, before any of them is rented.
Figure     docs/pods.md: one table for each generation of chips, made by scripts/plan_pods.py.
Expected   Training holds 12 bytes a parameter over all chips (f32 weights and two moments): 52B needs 64 v5p, or 256 v5e or v6e. PPO
           trains two such models and holds two frozen ones, 28 bytes a parameter.
Cost       Planning: seconds a step function on 2 cores, minutes for sampling from the largest. Running: what the plan says.
Command    hhjax plan experiments/pods.py --topology v5p:4x4x4 --only 52B
           hhjax plan experiments/pods.py --chip v5e --topology v5e:16x16 --only 52B --stage pm --search
           hhjax plan experiments/pods.py --chip h100 --topology h100:64 --only 52B
"""

from hhjax.data.comparisons import ComparisonData
from hhjax.data.sources import TextData
from hhjax.experiment import Experiment, Run, edit
from hhjax.fields import names_in
from hhjax.model.generate import Sampling
from hhjax.sharding import MeshConfig
from hhjax.stages import LM, PM, PPO, Tokenizer
from hhjax.train.state import OptimConfig

HH = ComparisonData(("helpful-base", "harmless-base"), overlap="drop")
BASE = Experiment("pods", (
    Tokenizer("tok", data=TextData(), vocab=50_257),  # the size of GPT-2's
    # 400 billion tokens (Askell et al. 2021) in batches of a million.
    LM("lm", tokenizer="tok", model="13M", data=TextData(), seq_len=1024, batch_size=1024, steps=381_470,
       optim=OptimConfig(lr=1e-4, schedule="cosine", warmup_steps=3000, weight_decay=0.1)),
    # One epoch of the static data set, 160,800 pairs in the public release, context 1024 (section 3.1, appendix A.2).
    PM("pm", init="lm", data=HH, seq_len=1024, batch_size=32, steps=5025, optim=OptimConfig(lr=1e-6)),
    # 200,000 samples of at most 128 tokens (section 4.1, figure 13), one epoch.
    PPO("ppo", policy="lm", reward="pm", data=HH, prompt_len=128, sampling=Sampling(128), batch_size=512, steps=390,
        optim=OptimConfig(lr=1e-6), value_optim=OptimConfig(lr=1e-6))))  # fmt: skip

# Chip -> size -> (slice, fsdp, tensor, tensor while sampling, parts of an LM's batch, of PPO's). The data axis takes the rest. The
# smallest slices of a usual shape that fit, and no more ways than the PM's 32 pairs. From 2.7B on there is a tensor axis: where fsdp is
# alone the compiler sums gradients whole instead of scattering them.
SLICES = {
    "v5p": {"13M": ("2x2x1", 1, 1, 1, 8, 1), "42M": ("2x2x1", 1, 1, 1, 8, 1), "197M": ("2x2x1", 4, 1, 1, 16, 4),
            "810M": ("2x2x2", 8, 1, 1, 16, 4), "2.7B": ("2x2x4", 4, 4, 1, 16, 4), "13B": ("2x4x4", 16, 2, 2, 16, 4),
            "52B": ("4x4x4", 16, 4, 4, 16, 2)},
    "v5e": {"13M": ("2x2", 1, 1, 1, 32, 8), "42M": ("2x2", 1, 1, 1, 64, 8), "197M": ("2x4", 8, 1, 1, 64, 8),
            "810M": ("4x4", 16, 1, 1, 64, 8), "2.7B": ("4x8", 8, 4, 4, 32, 8), "13B": ("8x16", 16, 8, 8, 32, 8),
            "52B": ("16x16", 16, 16, 16, 32, 8)},
    "v6e": {"13M": ("2x2", 1, 1, 1, 16, 4), "42M": ("2x2", 1, 1, 1, 32, 4), "197M": ("2x2", 4, 1, 1, 64, 8),
            "810M": ("2x4", 8, 1, 1, 64, 8), "2.7B": ("4x4", 4, 4, 1, 32, 8), "13B": ("8x8", 8, 8, 8, 16, 4),
            "52B": ("16x16", 16, 16, 16, 16, 4)},
    "h100": {"13M": ("1", 1, 1, 1, 8, 2), "42M": ("1", 1, 1, 1, 16, 2), "197M": ("8", 8, 1, 1, 8, 1), "810M": ("8", 8, 1, 1, 16, 2),
             "2.7B": ("8", 8, 1, 1, 32, 4), "13B": ("32", 32, 1, 1, 16, 2), "52B": ("64", 32, 2, 4, 8, 2)},
}  # fmt: skip
SLICES["h200"] = SLICES["h100"]


def runs(fast: bool = False, chip: str = "v5p", sizes: str = ",".join(SLICES["v5p"])):
    """chip: whose slices' meshes the stages get. sizes: of all models, with commas between."""
    slices, found = SLICES[names_in(chip, SLICES)[0]], []
    for size in names_in("13M" if fast else sizes, slices):
        _, fsdp, tensor, decode, lm_parts, ppo_parts = slices[size]
        mesh = MeshConfig(-1, fsdp, tensor)
        fields = {"lm.model": size, "lm.mesh": mesh, "lm.micro_batches": lm_parts, "pm.mesh": mesh, "ppo.mesh": mesh,
                  "ppo.micro_batches": ppo_parts, "ppo.rollout_mesh": MeshConfig(-1, 1, decode)}  # fmt: skip
        changed = BASE
        for path, value in fields.items():
            changed = edit(changed, path, value)
        found.append(Run(changed, (("lm.model", size),)))
    return tuple(found)
