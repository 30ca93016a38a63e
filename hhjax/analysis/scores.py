"""Scored comparisons on disk, and what they say: accuracies against baselines. numpy only.

scores.csv has one row a test pair: source, opening (hash of the first Human turn), turns (Human turns of the prompt),
chosen and rejected score, and each baseline's margin under `baseline:NAME`. No text is stored.
"""

import csv
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hhjax.analysis.stats import Estimate, calibration_error, correct, mean_estimate, paired_difference

BASELINE = "baseline:"


class Scores(NamedTuple):
    """Columns of scores.csv, each [N]; baselines: name -> margin."""

    source: np.ndarray
    opening: np.ndarray
    turns: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray
    baselines: dict[str, np.ndarray]

    @property
    def margin(self) -> np.ndarray:
        return self.chosen - self.rejected

    def only(self, keep) -> "Scores":
        """The rows where `keep` [N] is true."""
        arrays = (x[keep] for x in self[:-1])
        return Scores(*arrays, {name: x[keep] for name, x in self.baselines.items()})


class Row(NamedTuple):
    """Accuracy of one scorer on one source. lead, p: the PM's lead over a baseline, paired, and its one-sided p."""

    scorer: str
    source: str
    accuracy: Estimate
    lead: Estimate | None = None
    p: float | None = None


def write_scores(path: Path, scores: Scores) -> None:
    columns = dict(zip(Scores._fields, scores[:-1])) | {BASELINE + n: x for n, x in scores.baselines.items()}
    with open(path, "w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(columns)
        writer.writerows(zip(*(np.asarray(c).tolist() for c in columns.values())))


def read_scores(path: Path) -> Scores:
    """The file that `write_scores` made. Raises ValueError where it has no rows."""
    with open(path, newline="") as f:
        header, *rows = csv.reader(f)
    if not rows:
        raise ValueError(f"{path} has no scored comparisons")
    columns = dict(zip(header, map(np.array, zip(*rows))))
    floats = {n: columns[n].astype(float) for n in ("chosen", "rejected")}
    baselines = {n.removeprefix(BASELINE): c.astype(float) for n, c in columns.items() if n.startswith(BASELINE)}
    return Scores(columns["source"], columns["opening"].astype(np.int64), columns["turns"].astype(int), **floats, baselines=baselines)


def pooled(parts: list[Scores]) -> Scores:
    """Several test sets one after the other: folds, or seeds (whose pairs of one opening stay one group)."""
    names = set.intersection(*(set(p.baselines) for p in parts))
    baselines = {n: np.concatenate([p.baselines[n] for p in parts]) for n in parts[0].baselines if n in names}
    return Scores(*(np.concatenate([p[i] for p in parts]) for i in range(5)), baselines)


def accuracy_rows(scores: Scores) -> list[Row]:
    """The PM and every baseline on each source and on all, with 95 % intervals over opening prompts."""
    rows = []
    sources = list(dict.fromkeys(scores.source.tolist()))
    for source in sources + (["all"] if len(sources) > 1 else []):
        part = scores if source == "all" else scores.only(scores.source == source)
        ours = correct(part.margin)
        rows.append(Row("pm", source, mean_estimate(ours, part.opening)))
        for name, margin in part.baselines.items():
            lead, p = paired_difference(ours, correct(margin), part.opening)
            rows.append(Row(name, source, mean_estimate(correct(margin), part.opening), lead, p))
    return rows


def accuracy_table(rows: list[Row]) -> str:
    """The rows as aligned text."""
    lines = [("test", "scorer", "accuracy [95 %]", "pm leads by", "p", "pairs")]
    for r in rows:
        lead = f"{r.lead.value:+.3f} [{r.lead.low:+.3f}, {r.lead.high:+.3f}]" if r.lead else ""
        p = f"{r.p:.4f}" if r.p is not None else ""
        lines.append((r.source.rstrip("/").split("/")[-1], r.scorer, str(r.accuracy), lead, p, str(r.accuracy.n)))
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in lines)


def summary(scores: Scores) -> dict:
    """What summary.json holds: every row of the table, and the calibration error by source."""
    rows = [r._asdict() for r in accuracy_rows(scores)]
    for r in rows:
        r["accuracy"] = r["accuracy"]._asdict()
        r["lead"] = r["lead"]._asdict() if r["lead"] else None
    errors = {s: calibration_error(scores.margin[scores.source == s]) for s in dict.fromkeys(scores.source.tolist())}
    return {"accuracy": rows, "calibration_error": errors}


def write_summary(folder: Path, scores: Scores, about: dict) -> str:
    """scores.csv, summary.json (with `about` the model) and table.txt in `folder`; returns the table."""
    folder.mkdir(parents=True, exist_ok=True)
    table = accuracy_table(accuracy_rows(scores))
    write_scores(folder / "scores.csv", scores)
    (folder / "summary.json").write_text(json.dumps({"about": about} | summary(scores), indent=1) + "\n")
    (folder / "table.txt").write_text(table + "\n")
    return table
