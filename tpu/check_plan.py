"""Are `hhjax plan`'s bytes right? Its prediction for eight devices against this backend's own memory analysis, and against use.

    python tpu/check_plan.py [--size 3M]

Eight simulated CPU devices, data 2 x fsdp 2 x tensor 2, f32, steps of experiments/pods.py cut to a small batch. Prints a table in MiB a
device: state by the plan's formula against the compiled program's arguments (batch, key and state; what is held beside them taken
off), and temporaries as the plan has them from libtpu for v5e:2x4 against the CPU compiler's. Without libtpu that column is empty.
"""

import argparse
import importlib.util
import os
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402

from hhjax import lowering, pods  # noqa: E402
from hhjax.chips import parse_topology  # noqa: E402
from hhjax.experiment import Run, edit  # noqa: E402
from hhjax.flags import load_file  # noqa: E402
from hhjax.model.generate import Sampling  # noqa: E402
from hhjax.model.transformer import RunConfig  # noqa: E402
from hhjax.sharding import MeshConfig  # noqa: E402

MIB = 2**20
SMALL = {
    **{f"{name}.mesh": MeshConfig(2, 2, 2) for name in ("lm", "pm", "ppo")},
    **{f"{name}.run": RunConfig(dtype="float32", remat="none", attention="plain") for name in ("lm", "pm", "ppo")},
    **{f"{name}.batch_size": 16 for name in ("lm", "pm", "ppo")},
    **{f"{name}.seq_len": 256 for name in ("lm", "pm")},
    "ppo.prompt_len": 64, "ppo.sampling": Sampling(64), "tok.vocab": 4096,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="3M", help="of all models")
    experiment = load_file(Path(__file__).resolve().parents[1] / "experiments" / "pods.py").BASE
    for path, value in {"lm.model": parser.parse_args().size, **SMALL}.items():
        experiment = edit(experiment, path, value)
    print("| step | held, planned | arguments, CPU | temporaries, planned (v5e:2x4) | temporaries, CPU | peak, planned | peak, CPU |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for step in pods.steps_of(Run(experiment), None):
        lowered, facts, _ = lowering.lower_on(step, jax.devices())
        real = lowered.compile().memory_analysis()
        held = dict(facts["held"])
        cache = held.pop("cache", 0)
        state = sum(held.values()) - facts["beside"]
        temporaries = planned_temporaries(step)
        cells = (state, real.argument_size_in_bytes, temporaries, real.temp_size_in_bytes,
                 temporaries and state + temporaries, real.argument_size_in_bytes + real.temp_size_in_bytes)  # fmt: skip
        name = step.stage.name if step.phase == "update" and step.stage.name != "ppo" else f"{step.stage.name} {step.phase}"
        name += f" (cache {cache / MIB:.2f})" if cache else ""
        print(" | ".join([f"| {name}", *("" if c is None else f"{c / MIB:.2f}" for c in cells)]), "|", flush=True)


def planned_temporaries(step: lowering.Step) -> int | None:
    """What the plan says of a v5e slice of eight chips, cache included; None without libtpu."""
    if not importlib.util.find_spec("libtpu"):
        return None
    memory = pods.estimate(step, parse_topology("v5e:2x4")).memory
    return memory["activations"] + memory.get("cache", 0)


if __name__ == "__main__":
    main()
