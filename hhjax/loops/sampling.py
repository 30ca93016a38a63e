"""Sampling from trained policies: the parts that PPO shares, and the loops of BestOfN and Comparisons."""

import functools
import gzip
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from hhjax.data.comparisons import ComparisonData
from hhjax.data.packing import ReplyPacker
from hhjax.data.stream import Host, PromptSource
from hhjax.data.tokenizer import Tokenizer
from hhjax.data.transcripts import has_marker
from hhjax.evals.replies import best_of_n_kl, best_of_n_mean
from hhjax.fields import ConfigError
from hhjax.io.files import write_atomically
from hhjax.io.metrics import write_event
from hhjax.loops import inputs
from hhjax.loops.supervised import compute_dtype, load_model
from hhjax.model.generate import Sampling, generate, slots_of
from hhjax.model.transformer import RunConfig, unstacked
from hhjax.objectives.preference import end_scores
from hhjax.sharding import batch_host, batch_sharding, batch_ways, check_batch, make_mesh, put_batch, replicated
from hhjax.stages import BestOfN, Comparisons, StageContext
from hhjax.train.state import decayed
from hhjax.types import Model, Params, Tokens, Vocabulary

COMPARED = 2**32 - 3  # the stream of numpy's random numbers that fresh comparisons are drawn with
EVALUATION = 2**32 - 1  # the child of a sampling key that held-out prompts are answered with


class Loaded(NamedTuple):
    """A model, its parameters on the mesh and its tokenizer."""

    model: Model
    params: Params
    tokenizer: Tokenizer


def load_all(refs: Mapping[str, str], ctx: StageContext, mesh, run: RunConfig) -> dict[str, Loaded]:
    """name -> the model that `refs` names, in f32. Raises ConfigError unless all have one tokenizer."""
    found = {name: Loaded(*load_model(*ctx.parent(ref), mesh, run)) for name, ref in refs.items()}
    (first, one), *others = found.items()
    for name, other in others:
        if other.tokenizer.files != one.tokenizer.files:
            raise ConfigError(f"{first}={refs[first]!r} and {name}={refs[name]!r} have different tokenizers: a reply's ids "
                              f"must mean the same to both; train them from one tokenizer stage")  # fmt: skip
    return found


def frozen(params: Params, dtype: str) -> Params:
    """Parameters for forward passes only: matrices in the compute dtype, which is how they are used anyway."""
    cast = lambda w, matrix: w.astype(dtype) if matrix else w  # noqa: E731
    return jax.tree.map(cast, params, decayed(params))


def load_prompts(data: ComparisonData, split: str, ctx: StageContext, tok: Tokenizer, width: int, batch_size: int) -> PromptSource:
    """The distinct prompts of one side of the comparisons."""
    rows, _ = inputs.comparisons(data, split, ctx.data_dir, ctx.parents)
    return PromptSource((row.prompt for row in rows), tok, width, batch_size)


def make_sample(model: Model, vocab: Vocabulary, cfg: Sampling, mesh):
    """sample(params, prompts, row_ids, key) -> (Samples, decode steps), compiled for a mesh; prompts, row_ids and samples split over
    the batch. See `generate`."""
    rows = batch_sharding(mesh)

    def sample(params, prompts, row_ids, key):
        return generate(model, params, prompts, row_ids, key, vocab, cfg, batch_ways(mesh))

    return jax.jit(sample, in_shardings=(None, rows, rows, None), out_shardings=(rows, replicated(mesh)))


def make_judge(model: Model, mesh):
    """judge(params, PackedReplies) -> the PM's score of every reply, [B] on every device."""
    score = lambda params, rows: end_scores(model, params, rows, ways=batch_ways(mesh))  # noqa: E731
    return jax.jit(score, out_shardings=replicated(mesh))


def check_sampling(stage, mesh) -> None:
    """Raises ValueError unless the stage's batch and slots divide over the mesh."""
    check_batch(stage.batch_size, mesh)
    slots_of(stage.sampling, stage.batch_size, batch_ways(mesh))


def even_rows(size: int, most: int) -> np.ndarray:
    """At most `most` row numbers, spread evenly over `size`."""
    return np.linspace(0, size - 1, min(most, size)).astype(int)


def row_batches(count: int, batch_size: int):
    """(places, real): every place from 0 to count - 1 in batches of batch_size, the last filled up with its last place."""
    for start in range(0, count, batch_size):
        places = np.minimum(np.arange(start, start + batch_size), count - 1)
        yield places, min(batch_size, count - start)


def put_prompts(source: PromptSource, rows: np.ndarray, row_ids: np.ndarray, mesh, copies: int = 1):
    """The prompts of these rows and the ids of their samples, on the mesh. copies: how many rows in a run share a prompt, which is
    put there once."""
    index, count = batch_host(mesh)
    prompts, ids = (np.split(x, count)[index] for x in (rows[::copies], row_ids))
    return put_batch((source.take(prompts, width_of=rows), ids.astype(np.int32)), mesh)


def fetch(tree, mesh):
    """Arrays split over the mesh as numpy, whole, on every process."""
    return jax.device_get(make_whole(mesh)(tree))


@functools.lru_cache
def make_whole(mesh):
    """The identity that leaves its result on every device."""
    return jax.jit(lambda x: x, out_shardings=replicated(mesh))


def reply_texts(rows: Tokens, tok: Tokenizer) -> list[str]:
    """The replies of fetched rows as text, without special tokens."""
    return [tok.decode(ids[p:n].tolist()) for ids, p, n in zip(rows.tokens, rows.prompt_len, rows.length)]


# Rejection sampling ---------------------------------------------------------------------------------------------------


def run_best_of_n(stage: BestOfN, ctx: StageContext) -> None:
    """Writes evals/best_of_n.json: for every n the KL and the mean score, above that of one reply, by the PM that chose and
    by the test PMs, with standard errors over prompts; evals/table.txt; and samples/best_of_n.jsonl."""
    mesh = make_mesh(stage.mesh)
    check_sampling(stage, mesh)
    judges = {"reward": stage.reward} | {f"tests.{ref}": ref for ref in stage.tests}
    found = load_all({"policy": stage.policy} | judges, ctx, mesh, stage.run)
    tok = found["policy"].tokenizer
    source = load_prompts(stage.data, "test", ctx, tok, stage.prompt_len, stage.batch_size)
    chosen, most = even_rows(source.size, stage.prompts), max(stage.ns)
    key = jax.random.fold_in(jax.random.key(ctx.seed), EVALUATION)
    scores, texts = draw_and_judge(stage, ctx, key, found, "policy", list(judges), source, chosen, most, mesh)
    if jax.process_index():
        return
    # Above the mean of one reply to the same prompt: errors are of the gain, and not of how prompts differ.
    prompts = [source.prompts[row] for row in np.repeat(chosen, most)]
    seen = {f"watch/{name}": np.asarray(x, float) for name, x in stage.watch(prompts, texts).items()} if stage.watch else {}
    scores |= {name: x for name, x in seen.items() if np.isfinite(x).all()}  # a gain needs every reply's
    by_prompt = {name.removeprefix("tests."): s.reshape(len(chosen), most) for name, s in scores.items()}
    by_pm = {name: s - s.mean(1, keepdims=True) for name, s in by_prompt.items()}
    table = []
    for n in sorted(stage.ns):
        means = {name: best_of_n_mean(by_pm["reward"], s, n) for name, s in by_pm.items()}
        ends = {name: {"mean": float(m.mean()), "se": float(m.std(ddof=1) / len(m) ** 0.5) if len(m) > 1 else None}
                for name, m in means.items()}  # fmt: skip
        table.append({"n": n, "kl": best_of_n_kl(n), "scores": ends})
    (ctx.dir / "evals").mkdir(exist_ok=True)
    write_atomically(ctx.dir / "evals" / "best_of_n.json", json.dumps({"prompts": len(chosen), "rows": table}, indent=1))
    lines = [f"{'n':>4}{'KL':>8}" + "".join(f"{name:>21}" for name in by_pm)]
    for row in table:
        cells = (f"{s['mean']:+.3f} ± {s['se'] or 0:.3f}" for s in row["scores"].values())
        lines.append(f"{row['n']:>4}{row['kl']:>8.3f}" + "".join(f"{cell:>21}" for cell in cells))
    text = "\n".join([f"best of n by {stage.reward}, {len(chosen)} held-out prompts, PM score above one reply's, ± standard error", *lines])
    write_atomically(ctx.dir / "evals" / "table.txt", text + "\n")
    print(text)
    best = by_pm["reward"].argmax(1)
    write_samples(ctx.dir, "best_of_n", [
        {"row": i, "score": float(by_pm["reward"][i, at]), "prompt": source.prompts[row], "reply": texts[i * most + at],
         "first": texts[i * most]} for i, (row, at) in enumerate(zip(chosen, best))])  # fmt: skip


def draw_and_judge(stage, ctx: StageContext, key, found: Mapping[str, Loaded], policy: str, judges, source: PromptSource,
                   prompts: np.ndarray, copies: int, mesh):
    """`copies` replies to each prompt, in runs, with their places as ids: their scores by name [len(prompts) * copies], and texts.

    Raises Preempted when told to stop; nothing of it is kept.
    """
    rows = np.repeat(prompts, copies)
    shared = math.gcd(copies, slots_of(stage.sampling, stage.batch_size, batch_ways(mesh)) // batch_ways(mesh))  # rows that read one prompt
    tok = found[policy].tokenizer
    sample = make_sample(found[policy].model, tok.vocabulary, stage.sampling, mesh)
    judge = {name: make_judge(found[name].model, mesh) for name in judges}
    packer = ReplyPacker(stage.prompt_len, stage.sampling.max_new_tokens, tok.vocabulary, batch_ways(mesh), shared, Host(*batch_host(mesh)))
    dtype = compute_dtype(stage.run, mesh)
    params = {name: frozen(found[name].params, dtype) for name in judges}
    params[policy] = jax.jit(lambda p: unstacked(frozen(p, dtype)))(found[policy].params)
    scores, texts = {name: [] for name in judges}, []
    for places, real in row_batches(len(rows), stage.batch_size):
        ctx.stop_if_told()
        samples, _ = sample(params[policy], *put_prompts(source, rows[places], places, mesh, shared), key)
        whole, stopped = fetch((samples.rows, samples.stopped), mesh)
        packed = put_batch(packer.pack(whole, stopped), mesh) if judges else None
        for name in judges:
            scores[name].append(jax.device_get(judge[name](params[name], packed))[:real])
        texts += reply_texts(whole, tok)[:real]
    return {name: np.concatenate(s) for name, s in scores.items()}, texts


def write_samples(folder: Path, name: str, rows: list[dict]) -> None:
    """samples/<name>.jsonl."""
    (folder / "samples").mkdir(exist_ok=True)
    write_atomically(folder / "samples" / f"{name}.jsonl", "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))


# Fresh comparisons ----------------------------------------------------------------------------------------------------


def run_comparisons(stage: Comparisons, ctx: StageContext) -> None:
    """Writes comparisons.jsonl.gz: {"prompt", "chosen", "rejected"}, who wrote them and what a PM that labels thought; and the counts."""
    mesh = make_mesh(stage.mesh)
    check_sampling(stage, mesh)
    names = {f"policies.{i}": ref for i, ref in enumerate(stage.policies)}
    judges = {name: ref for name, ref in (("labeler", stage.labeler), ("ranker", stage.ranker)) if ref}
    found = load_all(names | judges, ctx, mesh, stage.run)
    tok = next(iter(found.values())).tokenizer
    source = load_prompts(stage.data, "train", ctx, tok, stage.prompt_len, stage.batch_size)
    # Not [seed, 0], the order in which PPO takes its prompts: the first ones would be those that it was trained on longest.
    order = np.random.Generator(np.random.Philox(key=[ctx.seed, COMPARED])).permutation(source.size)
    chosen = order[stage.skip : stage.skip + stage.prompts]
    if not len(chosen):
        raise ConfigError(f"{stage.name}.skip={stage.skip} leaves none of the {source.size} prompts; use less")
    if len(chosen) < stage.prompts:
        print(f"{stage.name}: {len(chosen)} of the {stage.prompts} prompts asked for: there are {source.size}, and {stage.skip} were passed over")
    rng = np.random.default_rng([ctx.seed, COMPARED, stage.skip])
    writer = rng.integers(len(names), size=(len(chosen), 2))  # which policy writes each reply of a pair
    replies, scores = np.empty((len(chosen), 2), object), np.zeros((len(chosen), 2))
    for number, policy in enumerate(names):
        pair, side = np.nonzero(writer == number)
        if not len(pair):
            continue
        # Neither two policies nor two tranches share their noise.
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(ctx.seed), number), stage.skip)
        drawn, texts = draw_and_judge(stage, ctx, key, found, policy, list(judges), source, chosen[pair], stage.best_of, mesh)
        best = np.arange(len(pair)) * stage.best_of
        if stage.ranker:
            best += drawn["ranker"].reshape(-1, stage.best_of).argmax(1)
        replies[pair, side] = np.array(texts, object)[best]
        if stage.labeler:
            scores[pair, side] = drawn["labeler"][best]
    if jax.process_index():
        return
    pairs, dropped = [], {"equal": 0, "empty": 0, "turn marker": 0}
    for i, row in enumerate(chosen):
        both = [str(reply).strip() for reply in replies[i]]
        reason = ("equal" if both[0] == both[1] else "empty" if not all(both)
                  else "turn marker" if any(map(has_marker, both)) else None)  # fmt: skip
        if reason:
            dropped[reason] += 1
            continue
        if stage.raters:
            first = stage.raters.first_wins(source.prompts[row], *both, rng)
        else:
            difference = scores[i, 0] - scores[i, 1]
            first = rng.random() < 1 / (1 + np.exp(-difference / stage.noise)) if stage.noise else difference > 0
        win, lose = (0, 1) if first else (1, 0)
        said = {"scores": [float(scores[i, win]), float(scores[i, lose])]} if stage.labeler else {}
        pairs.append({"prompt": source.prompts[row], "chosen": both[win], "rejected": both[lose], **said,
                      "policies": [stage.policies[writer[i, win]], stage.policies[writer[i, lose]]]})  # fmt: skip
    data = "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs).encode()
    (ctx.dir / "comparisons.jsonl.gz").write_bytes(gzip.compress(data, mtime=0))
    write_event(ctx.dir, "data", comparisons=len(pairs), **{f"dropped_{k.replace(' ', '_')}": n for k, n in dropped.items()})
    print(f"{stage.name}: {len(pairs)} comparisons of {len(chosen)} prompts; dropped: {dropped}")

