"""Runs the benchmarks one after the other and writes results/benchmarks.md: command, machine, date and table.

    python scripts/benchmarks.py                 # all of them, 20 minutes on two slow cores
    python scripts/benchmarks.py --only pm ppo   # those whose name begins so; the others' tables stay
    python scripts/benchmarks.py --accelerator   # what one GPU of 80 GB or TPU is asked, to results/accelerator.md
    python scripts/benchmarks.py --out FILE
"""

import argparse
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SMALL = "--layers 4 --width 256 --mlp-width 1024 --vocab 512"
RATES = "median_s share_of_ceiling compile_s"
# title: (arguments of `hhjax bench`, columns)
BENCHES = {
    "pm, 16 pairs of 64 + 64 tokens": (f"pm {SMALL}", f"pairs_per_s {RATES}"),
    "pm, 16 pairs of HH's lengths, packed": (f"pm {SMALL} --lengths hh", f"pairs_per_s useful_share {RATES}"),
    "pm, 16 pairs of HH's lengths, two rows a pair": (f"pm {SMALL} --lengths hh --no-packed", f"pairs_per_s useful_share {RATES}"),
    "pm 13M, 8 pairs of 256 tokens": ("pm --size 13M --vocab 8192 --batch 8 --prompt 128 --response 128 --no-packed --repeats 6", f"pairs_per_s {RATES}"),
    "lm 13M, 16 rows of 256 tokens": ("lm --size 13M --vocab 8192 --batch 16 --prompt 128 --response 128 --repeats 6", f"tokens_per_s {RATES}"),
    "generate 13M, 32 prompts of 128, 64 new tokens": (
        "generate --size 13M --vocab 8192 --batch 32 --prompt 128 --response 64 --repeats 6", "tokens_per_s decode_step_ms share_of_roofline prefill_s compile_s"),
    "generate, ragged, all 1,024 rows at once": (
        f"generate {SMALL} --batch 1024 --prompt 32 --response 128 --mean-length 24 --repeats 2 --warmup 1", "tokens_per_s slot_occupancy mean_reply decode_step_ms"),
    "generate, ragged, 1,024 rows in 32 slots": (
        f"generate {SMALL} --batch 1024 --prompt 32 --response 128 --mean-length 24 --slots 32 --repeats 2 --warmup 1", "tokens_per_s slot_occupancy mean_reply decode_step_ms"),
    "generate, 16 replies a prompt, prompts of 128": (
        f"generate {SMALL} --batch 64 --copies 16 --prompt 128 --response 32 --repeats 6", "tokens_per_s prefill_s"),
    "generate, the same, each prompt read 16 times": (
        f"generate {SMALL} --batch 64 --prompt 128 --response 32 --repeats 6", "tokens_per_s prefill_s"),
    "ppo, 16 prompts, 64 + 64 tokens": (f"ppo {SMALL}", "samples_per_s generate_s score_s train_s first_step_s"),
    "ppo, 64 prompts of HH's lengths up to 128, 32 new, packed": (
        f"ppo {SMALL} --batch 64 --prompt 128 --response 32 --lengths hh --packed --repeats 6", "samples_per_s generate_s score_s train_s useful_share"),
    "ppo, the same, a row a reply": (
        f"ppo {SMALL} --batch 64 --prompt 128 --response 32 --lengths hh --repeats 6", "samples_per_s generate_s score_s train_s useful_share"),
    "scale, 8 simulated devices, 16 pairs of 128 tokens": (f"scale {SMALL} --devices 8 --repeats 6", "mesh of_one_device median_s collectives"),
    "compile, by depth": ("compile", "program layers trace_s cold_s warm_s"),
}  # fmt: skip
# A pair of 512 + 256 + 256 tokens is a row of 1,024: 32 of them are 32,768 tokens an update.
LONG = "--vocab 50257 --prompt 512 --response 256 --batch 32 --repeats 8"
SHARE = "pairs_per_s median_s share_of_ceiling ceiling_gflops memory_gib compile_s"
DECODE = "tokens_per_s decode_step_ms share_of_roofline prefill_s memory_gib compile_s"
PHASES = "samples_per_s generate_s score_s train_s times_floor train_share_of_ceiling memory_gib first_step_s"
REPLIES = "--vocab 50257 --prompt 128 --response 128"
ACCELERATOR = {
    "ceiling": ("ceiling", "matmul_f32_gflops_median matmul_bf16_gflops_median copy_gbytes_median"),
    "pm 13M, 32 pairs of 1,024 tokens": (f"pm --size 13M {LONG}", SHARE),
    "pm 197M, 32 pairs of 1,024 tokens": (f"pm --size 197M {LONG}", SHARE),
    "pm 810M, 32 pairs of 1,024 tokens": (f"pm --size 810M {LONG}", SHARE),
    "pm 810M, layers unrolled": (f"pm --size 810M {LONG} --unroll 16", SHARE),
    "pm 810M, everything recomputed": (f"pm --size 810M {LONG} --remat full", SHARE),
    "pm 810M, everything recomputed, plain attention": (f"pm --size 810M {LONG} --remat full --attention plain", SHARE),
    "pm 2.7B, 16 pairs of 1,024 tokens, everything recomputed": (f"pm --size 2.7B {LONG} --batch 16 --remat full", SHARE),
    "lm 197M, 32 rows of 1,024 tokens": (f"lm --size 197M {LONG.replace('256', '512')}", SHARE.replace("pairs", "tokens")),
    **{f"generate {size}, {rows} prompts of 128, 128 new tokens": (f"generate --size {size} {REPLIES} --batch {rows} --repeats 4 --warmup 1", DECODE)
       for size, rows in (("197M", 256), ("810M", 64), ("810M", 512), ("2.7B", 64), ("2.7B", 256))},
    **{f"ppo {size}, {rows} prompts, 128 + 128 tokens": (f"ppo --size {size} {REPLIES} --batch {rows} --repeats 4 --warmup 2", PHASES)
       for size, rows in (("13M", 512), ("197M", 256), ("810M", 64))},
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[""], metavar="NAME", help="beginnings of names")
    parser.add_argument("--accelerator", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    benches, out = (ACCELERATOR, "accelerator.md") if args.accelerator else (BENCHES, "benchmarks.md")
    args.out = args.out or ROOT / "results" / out
    chosen = [title for title in benches if title.startswith(tuple(args.only))]
    kept = sections(args.out.read_text(), benches) if args.out.is_file() else {}
    failed = []
    for title in chosen:
        command, columns = benches[title]
        print(f"-- {title}: hhjax bench {command}", flush=True)
        try:
            kept[title] = section(command, columns.split(), measure(command))
        except subprocess.CalledProcessError as error:  # out of memory, mostly: the others may fit
            failed.append(title)
            kept[title] = f"    hhjax bench {command}\n\nfailed with exit {error.returncode}"
        text = [HEAD, *(f"## {name}\n\n{kept[name]}" for name in benches if name in kept), *([NOTES + kept[NOTES]] if NOTES in kept else [])]
        args.out.write_text("\n\n".join(part.strip("\n") for part in text) + "\n")
    if failed:
        sys.exit(f"failed: {'; '.join(failed)}")


HEAD = """# Benchmarks

Made by `python scripts/benchmarks.py`, on an accelerator with `--accelerator`; each table says when and where, and tables of other days ran beside another noise. `share_of_ceiling` is of this machine's own matrix products, read in the
same run; `of_one_device` the rate over one device's, in turn. `compile_s` and `first_step_s` depend on what the compilation cache held, and sum over all
shapes of a benchmark: only those that the notes took in turn are compared."""
NOTES = "## Notes\n\n"  # what follows is written by hand and kept


def sections(text: str, benches: dict) -> dict[str, str]:
    """Title -> text of each section of the file; that of the notes is NOTES."""
    text, _, notes = text.partition(NOTES)
    found = {title: body for title, body in re.findall(r"^## (.+?)\n\n(.*?)(?=^## |\Z)", text, re.M | re.S) if title in benches}
    return found | ({NOTES: notes} if notes else {})


def measure(command: str) -> list[dict]:
    """The JSON lines that the benchmark prints, in a process of its own. Raises CalledProcessError where it fails."""
    hhjax = Path(sys.executable).with_name("hhjax")
    done = subprocess.run([str(hhjax), "bench", *shlex.split(command)], stdout=subprocess.PIPE, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def section(command: str, columns: list[str], rows: list[dict]) -> str:
    """The command, where, when and at which commit it ran, and a table of the columns."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, stdout=subprocess.PIPE, text=True).stdout.strip() or "unknown"
    first, when = rows[0], f"{datetime.now(timezone.utc):%d %B %Y}"
    where = f"{when}, commit {commit}, {first['device']}, {os.cpu_count()} cores of {processor()}, jax {first['jax']}, load {first['load']}"
    ceiling = f", matrix products {first['ceiling_gflops']} GFLOP/s" if "ceiling_gflops" in first else ""
    table = [columns, ["---"] * len(columns), *([row[name] for name in columns] for row in rows)]
    lines = [f"    hhjax bench {command}", "", f"{where}{ceiling}", "", *("| " + " | ".join(map(str, line)) + " |" for line in table)]
    return "\n".join(lines)


def processor() -> str:
    """The processor's name where the system tells it."""
    if Path("/proc/cpuinfo").is_file() and (found := re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())):
        return found[1].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
