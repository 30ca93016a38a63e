"""The loops of Questions, Exam and Detect: what a model knows, and whether its activations tell harmful prompts apart."""

import gzip
import json
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace

import jax
import numpy as np

from hhjax.data.comparisons import ComparisonData, opening
from hhjax.data.exams import load_exams
from hhjax.data.records import DataError, read_records
from hhjax.data.stream import PromptSource
from hhjax.data.transcripts import HUMAN, OPEN_REPLY, Turn, render
from hhjax.evals.multiple_choice import ask
from hhjax.evals.ood import auroc, exposed_scores, fit_gaussian, mahalanobis, relative_mahalanobis
from hhjax.fields import ConfigError
from hhjax.io.files import write_atomically
from hhjax.io.metrics import write_event
from hhjax.loops import inputs
from hhjax.loops.sampling import row_batches
from hhjax.loops.supervised import load_model
from hhjax.loops.waiting import on_first
from hhjax.model.transformer import first_layers, make_model
from hhjax.sharding import batch_host, check_batch, make_mesh, put_batch, replicated
from hhjax.stages import Detect, Exam, Questions, StageContext

DRAWS = 5  # draws of the few outside examples that a probe is shown, as in the paper


def run_questions(stage: Questions, ctx: StageContext) -> None:
    """Writes exam.jsonl.gz on process 0."""
    questions = on_first(ctx, lambda: load_exams(stage.data, ctx.data_dir))
    if jax.process_index() == 0:
        rows = "".join(json.dumps(question._asdict()) + "\n" for question in questions)
        (ctx.dir / "exam.jsonl.gz").write_bytes(gzip.compress(rows.encode(), mtime=0))
        counts = Counter(question.subject for question in questions)
        write_event(ctx.dir, "data", **counts)
        print(f"{stage.name}: " + ", ".join(f"{count} questions of {name}" for name, count in counts.items()))


def run_exam(stage: Exam, ctx: StageContext) -> None:
    """Writes evals/exam.json (accuracy and nats by subject and shots, and every answer's) and evals/table.txt.

    A few-shot question stands behind solved ones of its subject, the next in the file.
    """
    mesh = make_mesh(stage.mesh)
    check_batch(stage.batch_size, mesh)
    model, params, tok = load_model(*ctx.parent(stage.of), mesh, stage.run)
    path = ctx.parent(stage.data)[0] / "exam.jsonl.gz"
    if not path.is_file():
        raise DataError(f"{path} does not exist: give a folder that holds exam.jsonl.gz in {stage.name}.data")
    questions = [row for _, row in read_records(path)]
    rows = []
    for shots in sorted(stage.shots):
        contexts = [context(questions, i, shots) for i in range(len(questions))]
        said = ask(model, params, tok, contexts, [[ending(q, at) for at in range(len(q["options"]))] for q in questions],
                   [q["answer"] for q in questions], stage.batch_size, mesh, ctx.stop_if_told)  # fmt: skip
        by_subject = defaultdict(list)
        for question, answered in zip(questions, said):
            by_subject[question["subject"]].append(answered)
        for subject, group in by_subject.items():
            rows.append({"subject": subject, "shots": shots, "questions": len(group), "accuracy": float(np.mean([a.right for a in group])),
                         "nats": float(np.mean([a.nats for a in group])), "right": [int(a.right) for a in group],
                         "each_nats": [round(a.nats, 4) for a in group]})  # fmt: skip
    lines = [f"{'subject':<12}{'shots':>6}{'questions':>11}{'accuracy':>10}{'nats':>8}"]
    lines += [f"{r['subject']:<12}{r['shots']:>6}{r['questions']:>11}{r['accuracy']:>10.3f}{r['nats']:>8.3f}" for r in rows]
    finish(ctx, "exam", {"rows": rows}, lines)


def context(questions: list[dict], at: int, shots: int) -> str:
    """The question without its answer, behind `shots` solved ones of the same subject."""
    same = [i for i, q in enumerate(questions) if q["subject"] == questions[at]["subject"] and i != at]
    if shots > len(same):
        raise DataError(f"{shots} shots, but {questions[at]['subject']!r} has {len(same)} other questions; use fewer shots")
    start = next((n for n, i in enumerate(same) if i > at), 0)
    solved = [questions[same[(start + n) % len(same)]] for n in range(shots)]
    return "\n".join([*(beginning(q) + ending(q, q["answer"]) for q in solved), beginning(questions[at])])


def beginning(question: dict) -> str:
    """What stands before an option."""
    return question["question"] if question.get("continues") else f"Question: {question['question']} Answer:"


def ending(question: dict, at: int) -> str:
    """An option as it is read; one that goes on from the text is not closed, since more may have followed."""
    return f" {question['options'][at]}" + "." * (not question.get("continues"))


def run_detect(stage: Detect, ctx: StageContext) -> None:
    """Writes evals/detect.json: AUROC by method, and the scores of both test sides; and evals/table.txt."""
    mesh = make_mesh(stage.mesh)
    check_batch(stage.batch_size, mesh)
    model, params, tok = load_model(*ctx.parent(stage.of), mesh, stage.run)
    if stage.layer > model.config.layers:
        raise ConfigError(f"{stage.name}.layer={stage.layer}, but the model has {model.config.layers} layers")
    rng = np.random.Generator(np.random.Philox(key=[ctx.seed, 0]))
    prompts = {(side, split): distinct(getattr(stage, side), split, stage.openings, ctx)
               for side in ("inside", "outside") for split in ("train", "test")}  # fmt: skip
    words = [word for several in prompts.values() for prompt in several for word in prompt.split(" ") if "\n" not in word]
    noisy = {key: [noised(prompt, words, stage.noise, rng) for prompt in several] for key, several in prompts.items()}
    reader = make_model(replace(model.config, layers=stage.layer), mesh, stage.run)
    lower = first_layers(params, stage.layer)
    acts = {key: activations(reader, lower, tok, several, stage, mesh, ctx.stop_if_told) for key, several in noisy.items()}
    seen = acts["inside", "train"][: stage.fit]
    fitted, inside, outside = fit_gaussian(seen), acts["inside", "test"], acts["outside", "test"]
    methods = {"relative_mahalanobis": relative_mahalanobis, "mahalanobis": mahalanobis}
    scores = {name: {"inside": f(fitted, inside).tolist(), "outside": f(fitted, outside).tolist()} for name, f in methods.items()}
    found = {name: [auroc(s["inside"], s["outside"])] for name, s in scores.items()}
    shown = acts["outside", "train"]
    for number in stage.exposure:
        drawn = [rng.choice(len(shown), min(number, len(shown)), replace=False) for _ in range(DRAWS)]
        found[f"probe_{number}"] = [auroc(*(exposed_scores(seen, shown[few], x) for x in (inside, outside))) for few in drawn]
    lines = [f"{len(inside)} prompts inside, {len(outside)} outside, layer {stage.layer} of {model.config.layers}, "
             f"{100 * stage.noise:.0f} % of words replaced", f"{'method':<24}{'AUROC':>8}"]  # fmt: skip
    lines += [f"{name:<24}{np.mean(a):>8.3f}" + (f" ± {np.std(a, ddof=1):.3f}" if len(a) > 1 else "") for name, a in found.items()]
    finish(ctx, "detect", {"auroc": found, "scores": scores}, lines)


def distinct(data: ComparisonData, split: str, openings: bool, ctx: StageContext) -> list[str]:
    """The different prompts of one side, in the order that comparisons are loaded in. openings: the first Human turn of each alone."""
    prompts = [row.prompt for row in inputs.comparisons(data, split, ctx.data_dir, ctx.parents)[0]]
    return list(dict.fromkeys(render((Turn(HUMAN, opening(prompt)),)) + OPEN_REPLY if openings else prompt for prompt in prompts))


def noised(prompt: str, words: list[str], share: float, rng: np.random.Generator) -> str:
    """The prompt with that share of its words replaced by words drawn from `words`; one with a turn marker stays."""
    swapped = rng.random(len(parts := prompt.split(" "))) < share
    return " ".join(words[rng.integers(len(words))] if swap and "\n" not in word else word for word, swap in zip(parts, swapped))


def activations(model, params, tok, prompts: list[str], stage: Detect, mesh, poll: Callable[[], None]) -> np.ndarray:
    """The hidden state at each prompt's last token, [N, D]. poll() is called before every batch."""
    source = PromptSource(prompts, tok, stage.prompt_len, stage.batch_size)
    index, count = batch_host(mesh)

    def read(params, batch):
        return model.apply(params, batch.tokens, read=batch.length[:, None] - 1)[0][:, 0]

    read = jax.jit(read, out_shardings=replicated(mesh))
    parts = []
    for places, real in row_batches(source.size, stage.batch_size):
        poll()
        mine = np.split(places, count)[index]
        parts.append(jax.device_get(read(params, put_batch(source.take(mine, width_of=places), mesh)))[:real])
    return np.concatenate(parts)


def finish(ctx: StageContext, name: str, found: dict, lines: list[str]) -> None:
    """evals/NAME.json and evals/table.txt, by process 0."""
    if jax.process_index() == 0:
        (ctx.dir / "evals").mkdir(exist_ok=True)
        write_atomically(ctx.dir / "evals" / f"{name}.json", json.dumps(found))
        write_atomically(ctx.dir / "evals" / "table.txt", "\n".join(lines) + "\n")
        print("\n".join(lines))
