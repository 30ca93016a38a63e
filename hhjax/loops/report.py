"""The loop of Report: tables and figures from the evaluations that it names."""

import jax

from hhjax.analysis.figures import calibration_figure, turn_figure
from hhjax.analysis.runs import load_result
from hhjax.analysis.scores import accuracy_rows, accuracy_table
from hhjax.loops.waiting import on_first
from hhjax.stages import Report, StageContext


def run(stage: Report, ctx: StageContext) -> None:
    """Writes what the stage's `draw` writes; else report.txt (accuracy beside the baselines, and what each figure shows) and
    figures/*.{png,csv}."""
    said = on_first(ctx, lambda: draw(stage, ctx))
    if jax.process_index() == 0:
        print(said)


def draw(stage: Report, ctx: StageContext) -> str:
    """Writes the files; returns what is to be printed."""
    if stage.draw:
        return stage.draw({ref: ctx.parent(ref)[0] for ref in stage.of}, ctx.dir)
    figures, parts = ctx.dir / "figures", []
    for ref in stage.of:
        name = ref.split("/")[-1]
        result = load_result(ctx.parent(ref)[0], name)
        about = result.about
        parts += [
            f"{name}: {about['size']} model trained on {about['comparisons']} pairs of {' and '.join(about['shares'])}",
            accuracy_table(accuracy_rows(result.scores)),
            f"Calibration (paper Figure 9): {calibration_figure([result], figures / f'calibration_{name}')}",
            f"By turn (paper Figure 8): {turn_figure([result], figures / f'turns_{name}')}",
            "",
        ]
    report = "\n".join([*parts, f"Figures: {figures}"])
    (ctx.dir / "report.txt").write_text(report + "\n")
    return report
