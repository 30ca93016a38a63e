"""The loop of Elo: policies answer the same prompts, raters compare the replies."""

import itertools
import json

import jax
import numpy as np

from hhjax.analysis.stats import Estimate, mean_estimate
from hhjax.evals.elo import ELO, Rating, rate
from hhjax.io.files import write_atomically
from hhjax.loops.sampling import COMPARED, EVALUATION, check_sampling, draw_and_judge, even_rows, load_all, load_prompts, write_samples
from hhjax.sharding import make_mesh
from hhjax.stages import Elo, StageContext, split_step


def run(stage: Elo, ctx: StageContext) -> None:
    """Writes evals/elo.json, of every policy its rating and the guesses of PMs and of the raters' own gold; evals/table.txt; and
    samples/elo.jsonl."""
    mesh = make_mesh(stage.mesh)
    check_sampling(stage, mesh)
    names = {f"policies.{i}": ref for i, ref in enumerate(stage.policies)}
    judges = {f"guesses.{ref}": ref for ref in stage.guesses}
    found = load_all(names | judges, ctx, mesh, stage.run)
    source = load_prompts(stage.data, "test", ctx, found["policies.0"].tokenizer, stage.prompt_len, stage.batch_size)
    rows = even_rows(source.size, stage.prompts)
    key = jax.random.fold_in(jax.random.key(ctx.seed), EVALUATION)
    drawn = [draw_and_judge(stage, ctx, jax.random.fold_in(key, i), found, name, list(judges), source, rows, 1, mesh) for i, name in enumerate(names)]
    if jax.process_index():
        return
    prompts, texts = [source.prompts[row] for row in rows], [[text.strip() for text in texts] for _, texts in drawn]
    winners, losers, groups = compare(stage, prompts, texts, np.random.Generator(np.random.Philox(key=[ctx.seed, COMPARED])))
    ratings = rate(winners, losers, groups, len(names), seed=ctx.seed)
    guesses = [{name.removeprefix("guesses."): guess(scores[name], drawn[0][0][name]) for name in judges} for scores, _ in drawn]
    truth = [np.array([stage.raters.gold(prompt, text) for prompt, text in zip(prompts, said)]) / (stage.raters.noise or 1) for said in texts]
    for guessed, utility in zip(guesses, truth):
        guessed["gold"] = guess(utility, truth[0])
    table = [{"policy": ref} | origin(ref, ctx) | rating._asdict() | {"guesses": {pm: e._asdict() for pm, e in guessed.items()}}
             for ref, rating, guessed in zip(stage.policies, ratings, guesses)]  # fmt: skip
    (ctx.dir / "evals").mkdir(exist_ok=True)
    write_atomically(ctx.dir / "evals" / "elo.json", json.dumps({"prompts": len(rows), "rows": table}, indent=1))
    text = "\n".join(table_lines(stage, ratings, guesses, len(rows)))
    write_atomically(ctx.dir / "evals" / "table.txt", text + "\n")
    write_samples(ctx.dir, "elo", [{"row": i, "prompt": prompt, "replies": [said[i] for said in texts]} for i, prompt in enumerate(prompts)])
    print(text)


def origin(ref: str, ctx: StageContext) -> dict:
    """What a policy was trained on: PPO samples by the step that the reference asks for, and the PM; 0 and None for a language model."""
    about = ctx.parent_stages.get(ref) or {}
    if about.get("kind") != "ppo":
        return {"samples": 0, "reward": None}
    config, step = about["config"], split_step(ref)[1]
    return {"samples": config["batch_size"] * (step or config["steps"]), "reward": config["reward"]}


def compare(stage: Elo, prompts: list[str], texts: list[list[str]], rng: np.random.Generator) -> tuple[list[int], list[int], list[int]]:
    """(winner, loser, prompt) of every comparison of two policies' replies to one prompt; equal replies are not compared."""
    found = []
    for i, prompt in enumerate(prompts):
        for one, other in itertools.combinations(range(len(texts)), 2):
            if texts[one][i] != texts[other][i]:
                won = stage.raters.first_wins(prompt, texts[one][i], texts[other][i], rng)
                found.append((one, other, i) if won else (other, one, i))
    return tuple(map(list, zip(*found))) if found else ([], [], [])


def guess(scores: np.ndarray, anchor: np.ndarray) -> Estimate:
    """The naive estimate of Elo: 174 times the mean score above the anchor's, prompt by prompt.

    Even gold's is further from 0 than the rating where differences vary from prompt to prompt: a rating is the log-odds of a mean
    chance to win, and not a mean of log-odds. Only what goes beyond gold's guess is a PM's own mistake.
    """
    return mean_estimate(ELO * (scores - anchor), np.arange(len(scores)))


def table_lines(stage: Elo, ratings: list[Rating], guesses, prompts: int):
    yield f"Elo above {stage.policies[0]}, {prompts} held-out prompts, 95 % intervals over prompts; guesses are 174 x mean score differences"
    yield f"{'policy':<20}{'Elo':>24}{'won':>8}{'of':>8}" + "".join(f"{'by ' + name:>24}" for name in guesses[0])
    for ref, rating, guessed in zip(stage.policies, ratings, guesses):
        cells = (f"{f'{e.value:+.0f} [{e.low:+.0f}, {e.high:+.0f}]':>24}" for e in guessed.values())
        yield f"{ref:<20}{f'{rating.elo:+.0f} [{rating.low:+.0f}, {rating.high:+.0f}]':>24}{rating.won:>8}{rating.played:>8}" + "".join(cells)
