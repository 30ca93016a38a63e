"""Finished evaluations, found through OUT/experiments/<experiment>.json. Never imports jax."""

import json
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from hhjax.analysis.scores import Scores, read_scores


class Result(NamedTuple):
    """One scored preference model. about: what summary.json says of it (size, parameters, comparisons, ...)."""

    run: str
    stage: str
    dir: Path
    about: dict
    scores: Scores


def load_result(folder: Path, run: str = "", stage: str = "") -> Result:
    """The Evaluate folder's result. Raises ValueError where it is not finished."""
    folder = Path(folder)
    if not (folder / "evals" / "summary.json").is_file():
        raise ValueError(f"{folder} has no evals/summary.json; finish that stage with `hhjax run` first")
    about = json.loads((folder / "evals" / "summary.json").read_text())["about"]
    return Result(run or folder.name, stage, folder, about, read_scores(folder / "evals" / "scores.csv"))


def load_results(index: Path, only: str = "*", stage: str = "*") -> list[Result]:
    """Results of every finished evaluation of the runs and stages whose names match the globs `only` and `stage`.

    index: OUT/experiments/<experiment>.json. Raises ValueError where there is none at all.
    """
    index = Path(index)
    if not index.is_file():
        raise ValueError(f"there is no {index}; give OUT/experiments/<experiment>.json")
    out, results = index.parent.parent, []
    for run, stages in json.loads(index.read_text())["runs"].items():
        for name, folder in stages.items():
            finished = folder.startswith("evaluate/") and (out / folder / "evals" / "summary.json").is_file()
            if finished and fnmatch(run, only) and fnmatch(name, stage):
                results.append(load_result(out / folder, run, name))
    if not results:
        raise ValueError(f"nothing of {index} that matches {only!r}, {stage!r} is evaluated yet; run the experiment first")
    return results


def trained_on(result: Result) -> str:
    """The sources of the model's training pairs, in words."""
    return " and ".join(sorted(result.about["shares"]))


def require_alike(results: list[Result]) -> None:
    """Raises ValueError where the models were trained on different sources: pooled, they would be no model's result."""
    if len(kinds := {trained_on(r): r.stage for r in results}) > 1:
        raise ValueError(f"these models were trained on {' / '.join(kinds)}; choose one kind with --stage, "
                         f"which may be {' or '.join(kinds.values())}")  # fmt: skip
