"""The `hhjax` command: run, sweep, plan, ls, show, chat, export, fetch, check-data, tokenizer train, bench."""

import json
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import tyro

from hhjax.io.bucket import LISTED, reading_copy
from hhjax.io.metrics import clock, read_events, read_rows
from hhjax.io.rundir import list_runs, read_state
from hhjax.process import collect_rarely, compile_quickly, hold_memory, keep_compiled, take_memory, tell_stacks

Positional = tyro.conf.Positional

USAGE = """usage: hhjax COMMAND

  run FILE [flags]      train what an experiment file defines; `hhjax run FILE --help` lists its flags
  sweep FILE --jobs N   the same, stages side by side in N processes
  plan FILE --topology T  memory, time and cost on a pod that is not there, such as v5p:4x4x4
  ls [OUT]              list the run directories
  show RUN [--samples]  a run's config and metrics, and rows of its data as text; PPO's replies beside the first ones
  chat RUN              talk to a trained model
  export RUN FOLDER     write a model as a Hugging Face folder
  fetch ADDRESS FOLDER  copy run directories from a bucket, checkpoints aside, to draw figures from
  check-data PATH       report the malformed rows of comparison files
  tokenizer train       train a SentencePiece tokenizer on text
  bench WHAT            ceiling (what this machine's matrix products reach), lm, pm, generate, score, ppo: seconds, rates, shares of that;
                        scale (what a mesh costs), compile"""


def main(argv: Sequence[str] | None = None) -> int:
    """The console script. Ends the process with the exit code."""
    if argv is None:  # a process of its own, whose memory and logging are ours
        hold_memory()
        keep_compiled()
        compile_quickly()
        take_memory()
        collect_rarely()
        tell_stacks()
        log_once()
    from hhjax.launch import exit_code

    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        sys.exit(0 if argv else 2)
    if argv[0] == "--version":
        print(f"hhjax {version('hhjax')}")
        sys.exit(0)
    if argv[0] not in COMMANDS:
        from hhjax.fields import nearest

        print(f"error: unknown command {argv[0]!r}{nearest(argv[0], COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    try:
        code = exit_code(lambda: COMMANDS[argv[0]](argv[1:]))
        sys.stdout.flush()
    except BrokenPipeError:  # `hhjax show RUN | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code)


def run(argv: Sequence[str]) -> int:
    from hhjax import workers

    return workers.run(argv)


def sweep(argv: Sequence[str]) -> int:
    from hhjax import sweep

    return sweep.run(argv)


def plan(argv: Sequence[str]) -> int:
    from hhjax import pods
    from hhjax.flags import parse

    return pods.run(*parse(argv, "hhjax plan", pods.PlanFlags))


@dataclass(frozen=True)
class Ls:
    """List the run directories under OUT: state, step, main metric, and how long ago the last sign of life was."""

    out: Positional[str] = "runs"
    """A folder, or gs://BUCKET/PREFIX."""


def ls(argv: Sequence[str]) -> int:
    args = tyro.cli(Ls, args=argv, prog="hhjax ls")
    with reading_copy(args.out, LISTED) as out:
        return list_states(out, args.out)


def list_states(out: Path, shown_as: str) -> int:
    states = list_runs(out)
    rows = [("run", "stage", "state", "step", "metric", "age", "made by")]
    for s in states:
        step = "" if s.step is None else str(s.step)
        rows.append((str(s.dir.relative_to(out)), s.name, s.state, step, s.metric, clock(s.age_s), s.made_by))
    print(table(rows) if states else f"no runs under {shown_as}")
    return 0


@dataclass(frozen=True)
class Show:
    """Show a run: its config, its last metrics, and with --samples the first rows that it was given."""

    run: Positional[str]
    """A run directory, here or at gs://BUCKET/PREFIX/KIND/NAME."""
    samples: bool = False


def show(argv: Sequence[str]) -> int:
    args = tyro.cli(Show, args=argv, prog="hhjax show")
    with reading_copy(args.run) as folder:
        return show_run(folder, args)


def show_run(folder: Path, args: Show) -> int:
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{args.run} is no run directory: it holds no config.json; `hhjax ls` lists them, and steps are not shown apart")
    config, state = json.loads((folder / "config.json").read_text()), read_state(folder)
    print(f"{config['kind']} {config['name']!r} of {config['experiment']} ({config['run']}): {state.state}")
    print(f"{args.run}, seed {config['seed']}, size {config['size']}, last sign of life {clock(state.age_s)} ago\n")
    print(table(sorted((k, shown(v) or "-") for k, v in flat_config(config["config"]).items())), end="\n\n")
    results = [folder / "evals" / "table.txt", folder / "report.txt"]
    texts = [metrics_table(read_rows(folder / "metrics.jsonl")), *(p.read_text() for p in results if p.is_file())]
    print("\n\n".join(text.rstrip() for text in texts if text) or "no metrics yet", end="\n\n")
    print("\n".join(event_text(event) for event in read_events(folder)[-5:]))
    if args.samples:
        print(samples_text(folder / "samples"))
    return 0


@dataclass(frozen=True)
class Chat:
    """Talk to a trained policy or language model: each line is a Human turn; an empty line ends."""

    run: Positional[str]
    """A run directory, here or at gs://BUCKET/PREFIX/KIND/NAME, RUN@STEP, or a Hugging Face folder."""
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 128
    seed: int = 0


def chat(argv: Sequence[str]) -> int:
    from hhjax.loops.chat import talk
    from hhjax.model.generate import Sampling
    from hhjax.stages import split_step

    args = tyro.cli(Chat, args=argv, prog="hhjax chat")
    sampling = Sampling(args.max_new_tokens, args.temperature, top_p=args.top_p)
    address, step = split_step(args.run)
    with reading_copy(address) as folder:
        require_folder(folder, args.run)
        warn_of_scorer(folder, args.run)
        talk(str(folder) if step is None else f"{folder}@{step}", sampling, args.seed)
    return 0


def require_folder(folder: Path, asked: str) -> None:
    """Raises FileNotFoundError where a model is asked for that is no folder."""
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {asked}; `hhjax ls` lists the run directories, and RUN@STEP takes a number")


def warn_of_scorer(folder: Path, asked: str) -> None:
    """Says so where a model that is to write replies is a preference model."""
    from hhjax.placing import read_config

    if read_config(folder).get("kind") == "pm":
        print(f"{asked} is a preference model: its head, which scores replies, is not used here, and its next tokens are what its training has "
              f"left of a language model's", file=sys.stderr)  # fmt: skip


@dataclass(frozen=True)
class Export:
    """Write a trained policy or language model as a Hugging Face folder, with its tokenizer; the score head is left out."""

    run: Positional[str]
    """A run directory, here or at gs://BUCKET/PREFIX/KIND/NAME, or RUN@STEP."""
    to: Positional[Path]
    """A new folder here."""


def export(argv: Sequence[str]) -> int:
    import jax

    from hhjax.fields import ConfigError
    from hhjax.io import huggingface
    from hhjax.loops.supervised import load_model
    from hhjax.sharding import make_mesh
    from hhjax.stages import split_step

    args = tyro.cli(Export, args=argv, prog="hhjax export")
    if args.to.exists():
        raise ConfigError(f"{args.to} is there already; name a new folder")
    address, step = split_step(args.run)
    with reading_copy(address) as folder:
        require_folder(folder, args.run)
        warn_of_scorer(folder, args.run)
        model, params, tokenizer = load_model(folder, step, make_mesh())
    family, config, params = huggingface.fitted(model.config, jax.device_get(params))
    ids = tokenizer.vocabulary
    huggingface.save_folder(args.to, config, params, family, eos_token_id=ids.eot, pad_token_id=ids.pad, bos_token_id=None)
    tokenizer.save(args.to)
    print(f"{args.to}: a {family} model of {config.layers} layers, and {', '.join(tokenizer.files)}")
    return 0


@dataclass(frozen=True)
class Fetch:
    """Copy run directories from a bucket, checkpoints aside, to draw figures from: `scripts/plot_*.py TO/experiments/NAME.json`."""

    address: Positional[str]
    """gs://BUCKET/PREFIX of all, or gs://BUCKET/PREFIX/KIND/NAME of one."""
    to: Positional[Path]
    """A folder here; what it has of equal names is written over."""


def fetch(argv: Sequence[str]) -> int:
    from hhjax.fields import ConfigError
    from hhjax.io import bucket
    from hhjax.io.files import is_remote

    args = tyro.cli(Fetch, args=argv, prog="hhjax fetch")
    if not is_remote(args.address):
        raise ConfigError(f"{args.address!r} is no address; such as gs://BUCKET/runs")
    print(f"{bucket.fetch(args.address, args.to)} files of {args.address} in {args.to}")
    return 0


@dataclass(frozen=True)
class CheckData:
    """Report the malformed rows of a comparison file, or of all files in a folder."""

    path: Positional[Path]
    strict: bool = False
    """End with 2 when a row is malformed."""


def check_data(argv: Sequence[str]) -> int:
    from hhjax.data.comparisons import check_data as check

    args = tyro.cli(CheckData, args=argv, prog="hhjax check-data")
    report = check(args.path)
    print(report.text(len(report.skipped)))
    return 2 if (args.strict and report.skipped) or not report.kept else 0


@dataclass(frozen=True)
class TrainTokenizer:
    """Train a SentencePiece tokenizer on text sources or files, and write tokenizer.model into OUT."""

    out: Path
    sources: tuple[str, ...] = ("dialogue-sgd", "text-gutenberg", "text-us-speeches", "text-wikitext2")
    vocab: int = 4096
    limit: int | None = None
    """Characters of text to learn from."""
    data_dir: Path | None = None


def tokenizer(argv: Sequence[str]) -> int:
    if not argv or argv[0] != "train":
        print("usage: hhjax tokenizer train --out DIR [flags]", file=sys.stderr)
        return 0 if argv and argv[0] in ("-h", "--help") else 2
    args = tyro.cli(TrainTokenizer, args=argv[1:], prog="hhjax tokenizer train")
    from hhjax.data.sources import TextData, load_documents
    from hhjax.data.tokenizer import train_tokenizer

    documents = load_documents(TextData(args.sources, args.limit), args.data_dir)
    made = train_tokenizer((d.text for d in documents), args.vocab, args.out)
    print(f"{args.out}: {made.vocab_size} tokens from {len(documents)} documents")
    return 0


def bench(argv: Sequence[str]) -> int:
    import jax

    from hhjax import bench, scaling

    timed = {
        "scale": (scaling.scale, scaling.ScaleBench),
        "compile": (scaling.compile_times, scaling.CompileBench),
        "lm": (bench.lm, bench.Bench),
        "pm": (bench.pm, bench.PMBench),
        "generate": (bench.sampling, bench.GenerateBench),
        "score": (bench.score, bench.Bench),
        "ppo": (bench.ppo, bench.PPOBench),
    }
    if not argv or argv[0] not in ("ceiling", *timed):
        print(f"usage: hhjax bench {'|'.join(('ceiling', *timed))} [--help]", file=sys.stderr)
        return 0 if argv and argv[0] in ("-h", "--help") else 2
    prog = f"hhjax bench {argv[0]}"
    if argv[0] == "ceiling":
        print(bench.report(tyro.cli(bench.ceiling, args=argv[1:], prog=prog)))
        return 0
    measure, config = timed[argv[0]]
    args = tyro.cli(config, args=argv[1:], prog=prog)
    if argv[0] == "scale":
        jax.config.update("jax_num_cpu_devices", args.devices)
    found, rows = measure(args), []
    for row in [found] if isinstance(found, dict) else found:
        rows.append(row)
        print(json.dumps({"bench": argv[0]} | row), flush=True)
    print(bench.table(rows, {*vars(args), *bench.about(args)} - {"layers"}))
    if args.profile:
        print(f"the trace lies under {args.profile}/plugins/profile: .trace.json.gz for ui.perfetto.dev, .xplane.pb for XProf in TensorBoard")
    return 0


COMMANDS = {
    "run": run,
    "sweep": sweep,
    "plan": plan,
    "ls": ls,
    "show": show,
    "chat": chat,
    "export": export,
    "fetch": fetch,
    "check-data": check_data,
    "tokenizer": tokenizer,
    "bench": bench,
}


def log_once() -> None:
    """What the package logs (which data it reads, what it downloads) goes to stderr, each line once."""
    logger, seen = logging.getLogger("hhjax"), set()
    handler = logging.StreamHandler()
    handler.addFilter(lambda record: not (record.getMessage() in seen or seen.add(record.getMessage())))
    logger.setLevel(logging.INFO)
    logger.handlers, logger.propagate = [handler], False


# Text -----------------------------------------------------------------------------------------------------------------


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text in aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows)


def metrics_table(rows: list[dict], last: int = 8) -> str:
    """The last training rows and the last held-out ones, one line a metric: a PPO run has some sixty."""
    parts = []
    for kept in ([r for r in rows if not is_eval(r)][-last:], [r for r in rows if is_eval(r)][-last:]):
        names = dict.fromkeys(name for row in kept for name in row)
        parts += [table([[n, *(shown(row.get(n)) for row in kept)] for n in names])] if kept else []
    return "\n\n".join(parts)


def is_eval(row: dict) -> bool:
    return any(name.startswith("eval/") for name in row)


def shown(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def flat_config(value, prefix: str = "") -> dict:
    from hhjax.io.rundir import flat

    return flat(value, prefix)


def event_text(event: dict) -> str:
    """An event and its details; what takes several lines comes below, indented."""
    details = {k: shown(v) for k, v in event.items() if k not in ("time", "event", "traceback")}
    head = ", ".join(f"{k} {v}" for k, v in details.items() if "\n" not in v)
    below = [line for v in details.values() if "\n" in v for line in v.splitlines()]
    return "\n    ".join([f"{event['event']}: {head}".rstrip(": "), *below])


def samples_text(folder: Path) -> str:
    """Every samples file as text; of those named by iterations, the last with the first one's replies beside its own."""
    files = sorted(folder.glob("*.jsonl"))
    numbered = [path for path in files if path.stem.isdigit()]
    parts = []
    for path in [path for path in files if path not in numbered] + numbered[-1:]:
        rows = read_rows(path)
        if numbered[:-1] and path == numbered[-1]:
            rows = [row | {"reply": first["reply"], f"reply at {int(path.stem)}": row["reply"]}
                    for first, row in zip(read_rows(numbered[0]), rows)]  # fmt: skip
        parts += [f"\n== {path.name}", "\n\n".join(sample_text(row) for row in rows)]
    return "\n".join(parts)


def sample_text(row: dict) -> str:
    """A sample row: its numbers on one line, then its texts."""
    texts = {k: v for k, v in row.items() if isinstance(v, str) and k not in ("part",)}
    head = ", ".join(f"{k} {v}" for k, v in row.items() if k not in texts)
    return "\n".join([f"-- {head}", *(f"[{name}] {text}" for name, text in texts.items())])


if __name__ == "__main__":
    main()
