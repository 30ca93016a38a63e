"""The loop of Evaluate: a preference model and its baselines on held-out comparisons."""

from collections import Counter
from pathlib import Path

import jax
import numpy as np

from hhjax.analysis.scores import Scores, write_summary
from hhjax.clinic.gold import bayes_accuracy
from hhjax.data.comparisons import ComparisonData, opening, opening_hash
from hhjax.data.records import DataError
from hhjax.data.transcripts import HUMAN, parse_transcript
from hhjax.evals.baselines import baseline_margins
from hhjax.evals.preference import score_comparisons
from hhjax.fields import ConfigError
from hhjax.io.metrics import read_events
from hhjax.loops import inputs
from hhjax.loops.supervised import load_model
from hhjax.loops.waiting import on_first
from hhjax.model.sizes import matmul_params
from hhjax.model.transformer import RunConfig
from hhjax.sharding import batch_ways, make_mesh
from hhjax.stages import Evaluate, StageContext


def run(stage: Evaluate, ctx: StageContext) -> None:
    """Scores the test side of the stage's data; writes evals/scores.csv, summary.json and table.txt.

    The baselines learn from the very pairs that the preference model was trained on. Test pairs whose opening prompt it has seen are
    left out, and counted, where the data says overlap="drop"; DataError otherwise.
    """
    mesh = make_mesh(stage.mesh)
    folder, step = ctx.parent(stage.of)
    parent = ctx.parent_stages[stage.of]
    if parent.get("kind") != "pm":
        raise ConfigError(f"{stage.name}.of={stage.of!r} is no preference model; name a PM stage, or its folder")
    model, params, tokenizer = load_model(folder, step, mesh, RunConfig(dtype=parent["config"]["run"]["dtype"]))
    test, _ = inputs.comparisons(stage.data, "test", ctx.data_dir, ctx.parents)
    folders = {ref: Path(folder) for ref, folder in parent["parents"].items()}
    train, _ = inputs.comparisons(training_data(parent), "train", ctx.data_dir, folders)
    fresh = unseen(train, test, stage.data.overlap)
    left_out, test = len(test) - len(fresh), fresh
    batch_size = -(-stage.batch_size // batch_ways(mesh)) * batch_ways(mesh)
    found = score_comparisons(model, params, tokenizer, test, parent["config"]["seq_len"], batch_size, mesh, ctx.stop_if_told)
    text = on_first(ctx, lambda: summarise(stage, ctx, found, train, test, matmul_params(model.config), left_out))
    if jax.process_index() == 0:
        print(text)


def summarise(stage: Evaluate, ctx: StageContext, found: np.ndarray, train, test, parameters: int, left_out: int) -> str:
    """Writes the files of the scores `found` of the test side, baselines beside them, and of how many pairs are left out because their
    openings were trained on; returns the table."""
    folder, parent = ctx.parent(stage.of)[0], ctx.parent_stages[stage.of]
    scores = Scores(
        source=np.array([row.source for row in test]),
        opening=np.array([opening_hash(row.prompt) for row in test]),
        turns=np.array([sum(t.role == HUMAN for t in parse_transcript(row.prompt)) for row in test]),
        chosen=found[:, 0],
        rejected=found[:, 1],
        baselines=baseline_margins(train, test) if stage.baselines else {},
    )
    bayes = {}
    if stage.raters:
        bayes["bayes"] = bayes_accuracy([row.prompt for row in test], [(row.chosen, row.rejected) for row in test], stage.raters)
    # Another experiment, which shares the model and made it, may call the stages that its pairs come from otherwise.
    here = {Path(folder).absolute(): ref for ref, folder in ctx.parents.items()}
    names = {ref: here.get(Path(folder).absolute(), ref) for ref, folder in parent["parents"].items()}
    saw = Counter(names.get(row.source, row.source) for row in train)
    trained = next((e["rows"] for e in reversed(read_events(folder)) if e["event"] == "data"), len(train))  # the others did not fit
    about = {
        "pm": str(folder),
        "size": parent["size"],
        "seed": parent["seed"],
        "parameters": parameters,
        "comparisons": trained,
        "shares": {source: round(count / len(train), 4) for source, count in saw.items()},
        "left_out": left_out,
    } | bayes
    seen = f"\n{left_out} of {left_out + len(test)} test pairs left out: the model was trained on their opening prompts" if left_out else ""
    return write_summary(ctx.dir / "evals", scores, about) + seen


def training_data(parent: dict) -> ComparisonData:
    """The comparisons that a preference model was trained on, from its config.json."""
    saved = parent["config"]["data"]
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()}
    return ComparisonData(**fields)


def unseen(train, test, overlap: str) -> list:
    """The test pairs whose opening prompts were not trained on: with overlap "drop" the others are left out, and counted.

    Raises DataError where there are others and overlap is "error", or where none remains: another fold of one data set, say.
    """
    seen = {opening(row.prompt) for row in train}
    fresh = [row for row in test if opening(row.prompt) not in seen]
    leaked = len(test) - len(fresh)
    if leaked and (overlap == "error" or not fresh):
        raise DataError(f"the model was trained on the opening prompts of {leaked} of {len(test)} test pairs: give this stage the data, "
                        f"and the fold, of the model, or set data.overlap to 'drop' to leave out a part")  # fmt: skip
    return fresh
