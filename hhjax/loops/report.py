"""The loop of Report: tables and figures from the evaluations that it names."""

import jax

from hhjax.analysis.figures import calibration_figure, turn_figure
from hhjax.analysis.runs import load_result
from hhjax.analysis.scores import accuracy_rows, accuracy_table, pooled
from hhjax.experiment import Report, StageContext


def run(stage: Report, ctx: StageContext) -> None:
    """Writes report.txt (accuracy beside the baselines, and what each figure shows) and figures/*.{png,csv}."""
    if jax.process_index():
        return
    results = [load_result(ctx.parent(ref)[0], ref) for ref in stage.of]
    figures = ctx.dir / "figures"
    parts = [
        accuracy_table(accuracy_rows(pooled([r.scores for r in results]))),
        f"Calibration (paper Figure 9): {calibration_figure(results, figures / 'calibration')}",
        f"By turn (paper Figure 8): {turn_figure(results, figures / 'turns')}",
        f"Figures: {figures}",
    ]
    report = "\n".join(parts)
    (ctx.dir / "report.txt").write_text(report + "\n")
    print(report)
