"""A tiny trained pipeline that several loops start from."""

import functools
import json
from pathlib import Path

import pytest

from hhjax.data.comparisons import ComparisonData
from hhjax.data.sources import TextData
from hhjax.loops import supervised
from hhjax.stages import LM, PM, StageContext, references


@pytest.fixture(scope="session")
def pipeline(tiny_data, tiny_tokenizer, tmp_path_factory) -> dict[str, Path]:
    """Folders of a 0.1M LM, and of PMs of the two halves of tiny_data, which like "good"."""
    root = tmp_path_factory.mktemp("pipeline")
    common = {"seq_len": 64, "batch_size": 16, "log_every": 10, "save_every": 0}
    lm = LM("lm", tokenizer=str(tiny_tokenizer), model="0.1M", data=TextData(("text.jsonl",)), steps=40, **common)
    folders = {"lm": trained(lm, root / "lm", tiny_data)}
    for name, half in (("pm", "A"), ("pm_test", "B")):
        data = ComparisonData(sources=("pairs.jsonl",), half=half)
        # Two rows a pair: how far scores can rise, and lie apart, differs from PM to PM, and the tests' bounds are of these.
        folders[name] = trained(PM(name, init=str(folders["lm"]), data=data, packed=False, steps=20, **common), root / name, tiny_data)
    return folders


def trained(stage, folder: Path, data: Path) -> Path:
    supervised.run(stage, make_context(stage, folder, data))
    (folder / "config.json").write_text(json.dumps({"kind": stage.kind, "id": stage.name, "size": "0.1M"}))
    (folder / "DONE").touch()
    return folder


@pytest.fixture(scope="session")
def context(tiny_data):
    """context(stage, folder, stop_after=None, seed=0) on tiny_data."""
    return functools.partial(make_context, data=tiny_data)


def make_context(stage, folder: Path, data: Path, stop_after=None, seed=0) -> StageContext:
    """A context whose references are folders, and whose should_stop says True from the given poll on."""
    folder.mkdir(exist_ok=True)
    polls = iter(range(1, 10**9))
    refs = {ref for _, ref, _ in references(stage, {})}
    return StageContext(
        dir=folder, seed=seed, parents={r: Path(r) for r in refs}, parent_stages={}, data_dir=data,
        should_stop=lambda: stop_after is not None and next(polls) >= stop_after,
    )  # fmt: skip
