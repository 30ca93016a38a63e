"""What a training loop tells the world: rows, rates against the machine's ceiling, and the console line."""

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax
import numpy as np

from hhjax.io.metrics import Console, MetricsWriter, NullConsole, NullWriter, write_event
from hhjax.stages import Diverged, Preempted, StageContext

# Where a run stands: the last step done, the real (not padding) tokens trained on so far, and whether that step's evaluation was
# given up, for a stop, and is still to be made.
START = MappingProxyType({"step": 0, "tokens": 0, "owes_evaluation": False})


class Progress:
    """The reports of one training stage, from process 0.

    position: where it goes on from, as START. ceiling_flops_per_s: what the machine's own matrix products reach. Rates are over
    the steps since the last row; time spent in `excluded` (compilation, evaluation, saving) is not in them.
    """

    def __init__(self, ctx: StageContext, name: str, position: Mapping, total: int, ceiling_flops_per_s: float):
        self.ctx, self.name, self.ceiling, self.tokens = ctx, name, ceiling_flops_per_s, position["tokens"]
        first = jax.process_index() == 0
        self.metrics = MetricsWriter(ctx.dir, position["step"], not position["owes_evaluation"]) if first else NullWriter()
        self.console = Console(name, total) if first else NullConsole()
        self.held = None
        self.interval_began, self.interval_excluded = time.perf_counter(), 0.0
        self.work = np.zeros(3)  # tokens, positions, FLOPs since the last row

    def count(self, tokens: int, positions: int, flops: float, timed: bool = True) -> None:
        """Adds an update's work: real tokens, the positions computed for them, and FLOPs; with timed=False it counts as seen but not in
        the rates."""
        self.tokens += tokens
        if timed:
            self.work += tokens, positions, flops

    def hold(self, step: int, metrics: dict) -> None:
        """Keeps a step's metrics, still on the device, and the work since the last row, until `flush`."""
        self.held = (step, metrics, self.tokens, *self.work.tolist())
        self.work[:] = 0

    def flush(self) -> None:
        """Writes the row that is held, which waits for its step. Raises Diverged on a loss that is not finite."""
        if self.held is None:
            return
        (step, metrics, tokens, *work), self.held = self.held, None
        row = {name: float(x) for name, x in jax.device_get(metrics).items()} | {"tokens": tokens} | self.rates(*work)
        self.interval_began, self.interval_excluded = time.perf_counter(), 0.0
        self.console.show(self.metrics.write(step, row))
        self.require_finite(step, row)

    def evaluated(self, step: int, evaluate: Callable[[], dict]) -> bool:
        """`evaluation` of evaluate(), outside the rates; False, and nothing is written, where that was told to stop."""
        with self.excluded():
            try:
                results = evaluate()
            except Preempted:
                return False
            self.evaluation(step, results)
        return True

    def evaluation(self, step: int, results: dict) -> None:
        """Writes a row of held-out metrics, named eval/...; the step's own row has been flushed."""
        self.metrics.write(step, results, prefix="eval")
        shown = ", ".join(f"{name} {value:.4g}" for name, value in results.items())
        self.console.say(f"{self.name} {step}: held out: {shown}")

    def require_finite(self, step: int, metrics: dict) -> None:
        """Raises Diverged unless loss and gradient norm are finite, so that no such state is ever saved."""
        bad = [name for name in ("loss", "grad_norm") if not math.isfinite(float(metrics[name]))]
        if bad:
            self.event("nan", step=step, metric=bad[0])
            raise Diverged(f"{self.name}: {bad[0]} is not finite at step {step}; lower optim.lr, or look at the data")

    def saved(self, step: int) -> None:
        self.console.saved = step
        self.event("save", step=step)

    def event(self, event: str, **details) -> None:
        if jax.process_index() == 0:
            write_event(self.ctx.dir, event, **details)

    def rates(self, tokens: float, positions: float, flops: float) -> dict:
        """Work over the time since the last row, the share of the ceiling, and the share of the computed positions that hold a real
        token; {} where nothing was timed."""
        seconds = time.perf_counter() - self.interval_began - self.interval_excluded
        if not tokens or seconds <= 0:
            return {}
        rate = {"seconds": seconds, "tokens_per_s": tokens / seconds, "flops_per_s": flops / seconds}
        return rate | {"share_of_ceiling": flops / seconds / self.ceiling, "useful_share": tokens / positions}

    @contextlib.contextmanager
    def excluded(self):
        """What happens inside is no part of the rates."""
        began = time.perf_counter()
        yield
        self.exclude(time.perf_counter() - began)

    def exclude(self, seconds: float) -> None:
        """So much of the time since the last row is no part of the rates."""
        self.interval_excluded += seconds

    def close(self) -> None:
        self.metrics.close()
        self.console.close()
