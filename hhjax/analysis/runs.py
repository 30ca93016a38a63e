"""Finished evaluations, found through OUT/experiments/<experiment>.json. Never imports jax."""

import json
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from hhjax.analysis.scores import Scores, read_scores


class Result(NamedTuple):
    """One scored preference model. about: what summary.json says of it (size, parameters, comparisons, ...)."""

    run: str
    dir: Path
    about: dict
    scores: Scores


def load_result(folder: Path, run: str = "") -> Result:
    """The Evaluate folder's result. Raises ValueError where it is not finished."""
    folder = Path(folder)
    if not (folder / "evals" / "summary.json").is_file():
        raise ValueError(f"{folder} has no evals/summary.json; finish that stage with `hhjax run` first")
    about = json.loads((folder / "evals" / "summary.json").read_text())["about"]
    return Result(run or folder.name, folder, about, read_scores(folder / "evals" / "scores.csv"))


def load_results(index: Path, only: str = "*") -> list[Result]:
    """Results of every finished evaluation of the runs whose names match the glob `only`.

    index: OUT/experiments/<experiment>.json. Raises ValueError where there is none at all.
    """
    index = Path(index)
    if not index.is_file():
        raise ValueError(f"there is no {index}; give OUT/experiments/<experiment>.json")
    out, results = index.parent.parent, []
    for run, stages in json.loads(index.read_text())["runs"].items():
        folders = [out / d for d in stages.values() if d.startswith("evaluate/")]
        if fnmatch(run, only):
            results += [load_result(d, run) for d in folders if (d / "evals" / "summary.json").is_file()]
    if not results:
        raise ValueError(f"no run of {index} that matches {only!r} is evaluated yet; run the experiment first")
    return results
