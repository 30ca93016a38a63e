"""Does asking for a margin make a preference model better, or only louder?

Question   With log(1 + exp(margin - difference)) in place of the paper's loss, do accuracy and calibration change?
Figures    Accuracy table and calibration (paper Figure 9), at margins 0, 0.5 and 1.
Expected   About the same accuracy; scores pushed apart, so over-confident by about as much as the margin asks.
Cost       About 12 minutes on 2 cores for three margins; the language model is shared with pm_hh.
Command    hhjax sweep experiments/pm_margin.py --jobs 1
           python scripts/plot_calibration.py runs/experiments/pm_margin.json --only 'pm.loss.margin=1.0*'

It also shows how to change a loss: a config, a function of a few lines, and the stage that uses it.
"""

from dataclasses import dataclass, replace

from pm_hh import BASE

from hhjax.experiment import Experiment, grid
from hhjax.objectives.masked import weighted_mean
from hhjax.objectives.preference import pair_scores, preference_loss, preference_metrics


@dataclass(frozen=True)
class MarginLoss:
    margin: float = 0.0


def margin_objective(model, cfg):
    def loss(params, batch, key):
        chosen, rejected = pair_scores(model, params, batch)
        total = weighted_mean(preference_loss(chosen - cfg.margin, rejected), batch.weight)
        return total, preference_metrics(chosen, rejected, batch.weight)

    return loss


PM = replace(BASE.stage("pm"), objective=margin_objective, loss=MarginLoss())
STAGES = tuple(PM if stage.name == "pm" else stage for stage in BASE.stages)
RUNS = grid(Experiment("pm_margin", STAGES), {"pm.loss.margin": (0.0, 0.5, 1.0)})
