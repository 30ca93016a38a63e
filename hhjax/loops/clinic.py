"""The loop of Clinic: a part of the simulated clinic's data."""

import jax

from hhjax.io.metrics import write_event
from hhjax.loops.waiting import on_first
from hhjax.stages import Clinic, StageContext


def run(stage: Clinic, ctx: StageContext) -> None:
    """Writes the part's files on process 0."""
    counts = on_first(ctx, lambda: stage.writer(ctx.dir, stage.part, stage.size, stage.raters, ctx.seed))
    if jax.process_index() == 0:
        write_event(ctx.dir, "data", **counts)
        print(f"{stage.name}: " + ", ".join(f"{count} rows of {name}" for name, count in counts.items()))
