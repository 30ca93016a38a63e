"""Data of a stage, where some of its sources are other stages of the experiment."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from hhjax.data.comparisons import Comparison, ComparisonData, load_comparisons
from hhjax.data.records import DataReport
from hhjax.data.sources import Document, TextData, load_documents


def comparisons(data: ComparisonData, split: str, data_dir: Path | None,
                folders: Mapping[str, Path]) -> tuple[list[Comparison], DataReport]:
    """`load_comparisons`, with sources that are stages read from their folders and called by the stages' names."""
    names = {str(folders[s]) if s in folders else s: s for s in data.sources}
    rows, report = load_comparisons(replace(data, sources=tuple(names)), split, data_dir)
    return [row._replace(source=names[row.source]) for row in rows], report


def documents(data: TextData, split: str, data_dir: Path | None, folders: Mapping[str, Path]) -> list[Document]:
    """`load_documents`, with sources that are stages read from the text that those wrote."""
    sources = (str(Path(folders[s]) / "text.jsonl.gz") if s in folders else s for s in data.sources)
    return load_documents(replace(data, sources=tuple(sources)), data_dir, split)
