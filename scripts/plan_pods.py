"""docs/pods.md: what the seven sizes need on TPU slices and GPUs, planned without any.

    python scripts/plan_pods.py [--chips v5e,v5p,v6e,h100] [--sizes 13M,...,52B] [--stage pm] [--work runs/plans] [--out docs/pods.md]

Plans every size of experiments/pods.py on the slice that the file gives it, a process each, and writes the tables. What is in
--work already is not planned again: remove a file of it to have it anew. With --stage that stage alone is planned, and the rows of the
others stay as they are.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXPERIMENT = ROOT / "experiments" / "pods.py"
HEAD = """# Pods: what the paper's sizes need

Made by `python scripts/plan_pods.py`: each row is `hhjax plan experiments/pods.py --chip CHIP --topology SLICE --only SIZE`, compiled
by {compilers} and jax {jax} on a machine without TPU or GPU. **Nothing here was measured on one.**

- Stages: a PM of 160,800 pairs (batches of 32, a prompt and a reply of at most 1,024 tokens); PPO of 200,000 samples (batches of 512, 128
  tokens of prompt and 128 of reply, separate value network, one epoch). All keep matrix products for the backward pass and compute the
  rest anew. The language model's 400 billion tokens in batches of a million are there to show what pretraining would cost.
- A PM's pairs lie end to end in rows of 1,280 tokens, at least one row a way of the mesh. How many they fill is assumed to be as with
  HH's (`hhjax/lowering.py`): 7, or on more ways than one the next multiple of data x fsdp: 8, 16 or 32. *tokens/s* counts all positions of them.
- *PPO's* replies are planned at full length, two to a row of 520 positions, where packing saves nothing and attention looks over twice the width.
- *mesh* is data x fsdp x tensor; PPO samples on a mesh of its own, in brackets: weights are resharded once an iteration, in bf16.
- *GiB* is what a device holds at the worst moment, state of phases that wait included, of what its compiler calls available (GPUs: of nine tenths, which hhjax takes).
- *s* is a PM or LM update, or a whole PPO iteration with its parts: sampling, scoring, update. Predicted: the instructions of the compiled
  program one after another, each by its products or its bytes, or its exchanges where they take longer, at {attainable} of the
  peaks. These shares are assumed. Latencies of small
  collectives are not in it, of which decoding on a tensor axis has two a layer and token; nor is the resharding between the meshes.
- *MFU* counts model FLOPs by formula; recomputation is not among them.
"""

CHECKED = "## Against a compiler that can run it"  # a section that is not made here, and stays


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", default="v5p,v5e,v6e,h100")
    parser.add_argument("--sizes", default="13M,42M,197M,810M,2.7B,13B,52B")
    parser.add_argument("--stage", default="", help="lm, pm or ppo alone")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "plans")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "pods.md")
    parser.add_argument("--only-write", action="store_true", help="from what is in --work, planning nothing")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    found = {}
    for size in options.sizes.split(","):
        for chip in options.chips.split(","):
            path = options.work / f"{'-'.join(filter(None, (chip, size, options.stage)))}.json"
            if not path.is_file() and not options.only_write:
                plan(chip, size, options.stage, path)
            if path.is_file():
                found[chip, size] = json.loads(path.read_text())
    versions = next(iter(found.values()))
    compilers = ", ".join(dict.fromkeys(filter(None, (plan["compiler"] for plan in found.values()))))
    parts = [HEAD.format(compilers=compilers, jax=versions["jax"], attainable=shares(versions["attainable"]))]
    if options.stage:
        rows = [table_row(size, plan, row) for (_, size), plan in found.items() for row in plan["rows"]]
        options.out.write_text(parts[0] + "\n" + with_rows(options.out.read_text(), rows))
        print(f"{len(rows)} rows of {options.stage} in {options.out}")
        return
    parts += [section(chip, {s: plan for (c, s), plan in found.items() if c == chip}) for chip in options.chips.split(",")]
    missing = [f"{size} on {chip}" for size in options.sizes.split(",") for chip in options.chips.split(",") if (chip, size) not in found]
    parts += [f"Not planned yet: {', '.join(missing)}.\n"] if missing else []
    _, mark, checked = options.out.read_text().partition(CHECKED) if options.out.is_file() else ("", "", "")
    options.out.write_text("\n".join([*parts, mark + checked] if mark else parts))
    print(f"{len(found)} plans in {options.out}")


def with_rows(text: str, rows: list[str]) -> str:
    """The tables and what follows them, each row in the place of the one of its size, slice and stage. Raises KeyError where there is none."""
    key = lambda row: tuple(row.split(" | ")[:3])  # noqa: E731
    new, lines = {key(row): row for row in rows}, text[text.index("## ") :].splitlines(keepends=True)
    kept = [new.pop(key(line), line.rstrip("\n")) for line in lines]
    if new:
        raise KeyError(f"no row of {', '.join(map(' '.join, new))}; plan all stages first, without --stage")
    return "\n".join(kept) + "\n"


def plan(chip: str, size: str, stage: str, path: Path) -> None:
    """One size on one chip's slice, by the command that a user would give; the slice is the experiment file's."""
    sys.path.insert(0, str(EXPERIMENT.parent))
    from pods import SLICES

    topology = f"{chip}:{SLICES[chip][size][0]}"
    argv = ["plan", EXPERIMENT, "--chip", chip, "--topology", topology, "--only", size, "--json", path, *(["--stage", stage] if stage else [])]
    done = subprocess.run([sys.executable, "-m", "hhjax.cli", *map(str, argv)])
    print(f"{chip} {size} on {topology}: exit {done.returncode}", flush=True)


def shares(attainable: dict) -> str:
    return ", ".join(f"{share:.0%} ({name})" for name, share in attainable.items())


def section(chip: str, plans: dict) -> str:
    """A chip's table."""
    columns = "size, slice (chips), stage, mesh, GiB, fits, bound, s, tokens/s, MFU, days, chip-hours, planned in s".split(", ")
    lines = [f"## {chip}", "", f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    for size, found in plans.items():
        for row in found["rows"]:
            lines.append(table_row(size, found, row))
    return "\n".join([*lines, ""])


def table_row(size: str, found: dict, row: dict) -> str:
    phases = {s["phase"]: s for s in found["steps"] if s["stage"] == row["stage"]}
    mesh, seconds = row["mesh"], number(row["seconds"])
    if "sample" in phases:
        mesh += f" ({'x'.join(str(n) for n in phases['sample']['mesh'].values())})"
        seconds += f" ({', '.join(number(phases[p]['predicted']) for p in phases)})"
    whole = lambda x: "" if x is None else f"{x:,.0f}" if x >= 10 else number(x)  # noqa: E731
    cells = [size, f"{found['topology']} ({found['chips']})", row["stage"], mesh, f"{row['gib']:.1f} of {row['capacity_gib']:.1f}",
             "yes" if row["fits"] else "**no**", row["bound"], seconds, whole(row["tokens_per_s"]),
             "" if row["mfu"] is None else f"{row['mfu']:.2f}", number(row["days"]), whole(row["chip_hours"]), f"{row['compile_s']:.0f}"]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def number(x: float | None) -> str:
    return "" if x is None else f"{x:.3g}"


if __name__ == "__main__":
    main()
