"""The stages of an experiment and finished evaluations, found through OUT/experiments/<experiment>.json. Never imports jax."""

import json
import re
from collections import defaultdict
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


def find_stages(index: Path, kind: str, only: str = "*", stage: str = "*") -> list[tuple[str, str, Path]]:
    """(run, stage, folder) of every stage of that kind, of the runs and stages whose names match the globs; a folder that several
    runs share is given once. index: OUT/experiments/<experiment>.json. Raises ValueError where there is no such file."""
    index = Path(index)
    if not index.is_file():
        raise ValueError(f"{index} is no experiment's index; give OUT/experiments/<experiment>.json")
    out, found = index.parent.parent, {}
    for run, stages in json.loads(index.read_text())["runs"].items():
        for name, folder in stages.items():
            if folder.startswith(f"{kind}/") and fnmatch(run, only) and matches(name, stage):
                found.setdefault(folder, (run, name, out / folder))
    return list(found.values())


def matches(stage: str, globs: str) -> bool:
    """Whether a stage's name matches one of the globs, which commas part."""
    return any(fnmatch(stage, each) for each in globs.split(","))


def finished_stages(index: Path, kind: str, only: str = "*", stage: str = "*") -> list[tuple[str, str, Path]]:
    """Those of `find_stages` that are done. Raises ValueError where none is."""
    found = [each for each in find_stages(index, kind, only, stage) if (each[2] / "DONE").is_file()]
    if not found:
        raise ValueError(f"no {kind} stage of {index} that matches {only!r}, {stage!r} is finished; run the experiment first{choices(index, kind)}")
    return found


def choices(index: Path, kind: str) -> str:
    """The end of an error: which stages of that kind there are to be chosen from."""
    names = dict.fromkeys(name for _, name, _ in find_stages(index, kind))
    return f"; its stages of that kind: {', '.join(names)}" if names else ""


def without_seed(run: str) -> str:
    """What tells a run's name from others but for the seed: `policy=both,seed=1` gives `both`, two axes `a=1,b=2`."""
    axes = [part for part in re.split(r",(?=[\w.]+=)", run) if "=" in part and not part.startswith("seed=")]
    return axes[0].partition("=")[2] if len(axes) == 1 else ",".join(axes)


def load_results(index: Path, only: str = "*", stage: str = "*") -> list[Result]:
    """Results of every finished evaluation of the runs and stages whose names match the globs `only` and `stage`.

    index: OUT/experiments/<experiment>.json. Raises ValueError where there is none at all.
    """
    results = [load_result(folder, run, name) for run, name, folder in find_stages(index, "evaluate", only, stage)
               if (folder / "evals" / "summary.json").is_file()]  # fmt: skip
    if not results:
        raise ValueError(f"nothing of {index} that matches {only!r}, {stage!r} is evaluated yet; run the experiment first{choices(index, 'evaluate')}")
    return results


def trained_on(result: Result) -> str:
    """The sources of the model's training pairs, in words."""
    return " and ".join(sorted(result.about["shares"]))


def alike(results: list[Result], ratio: float = 1.2) -> dict[str, list[Result]]:
    """Results by what their models are, in words: the sources and shares of their training pairs, size, and number of pairs. Folds and
    seeds are alike; so are models whose numbers of pairs differ by less than `ratio` from one to the next."""
    kinds = defaultdict(list)
    for r in sorted(results, key=lambda r: r.about["comparisons"]):
        shares = r.about["shares"]
        mixed = ", ".join(f"{5 * round(20 * shares[source])} % {source}" for source in sorted(shares)) if len(shares) > 1 else ""
        groups = kinds[f"{r.about['size']} on {mixed or trained_on(r)}"]
        if not groups or r.about["comparisons"] > ratio * groups[-1][-1].about["comparisons"]:
            groups.append([])
        groups[-1].append(r)
    several = lambda groups, group: f", about {group[0].about['comparisons']:,} pairs" if len(groups) > 1 else ""  # noqa: E731
    found = {f"{kind}{several(groups, group)}": group for kind, groups in kinds.items() for group in groups}
    order = [r.run for r in results]
    return {kind: sorted(group, key=lambda r: order.index(r.run)) for kind, group in found.items()}


def require_alike(results: list[Result]) -> None:
    """Raises ValueError where the models were trained on different sources: pooled, they would be no model's result."""
    if len(kinds := {trained_on(r): r.stage for r in results}) > 1:
        raise ValueError(f"these models were trained on {' / '.join(kinds)}; choose one kind with --only, or with "
                         f"--stage, which may be {' or '.join(kinds.values())}")  # fmt: skip
