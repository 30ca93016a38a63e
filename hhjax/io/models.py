"""Models on disk: the architecture and the parameters of a run directory or of a Hugging Face folder."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax

from hhjax.fields import ConfigError
from hhjax.io import checkpoint, huggingface
from hhjax.model.transformer import ModelConfig, config_from_json


class SavedModel(NamedTuple):
    """load(shapes, shardings) -> the parameters, laid out by trees of shapes and of NamedShardings."""

    config: ModelConfig
    load: Callable


def open_model(folder: Path, step: int | None = None, vocab_size: int = 0) -> SavedModel:
    """What a folder holds; nothing large is read before `load`.

    step: of a run directory; None is its last. vocab_size: rows that the tokenizer needs; a Hugging Face model
    that has fewer gets them (see `huggingface.extend_vocab`), a run directory's stays as it was trained.
    Raises ConfigError where the folder is neither.
    """
    folder = Path(folder)
    if (folder / "model.json").is_file():
        config = config_from_json(json.loads((folder / "model.json").read_text()))
        return SavedModel(config, lambda shapes, shardings: checkpoint.load_params(folder, step, shapes, shardings))
    if not huggingface.is_model(folder):
        raise ConfigError(f"{folder} holds no model; name the folder of an LM or PM stage (it has a model.json), or of a "
                          f"Hugging Face model (its config.json has a model_type)")  # fmt: skip
    if step is not None:
        raise ConfigError(f"{folder} is a Hugging Face folder, which has no steps; leave @{step} out")

    def load(_, shardings):
        params = huggingface.load_folder(folder, vocab_size)[1]
        return jax.tree.map(lambda x, at: jax.make_array_from_callback(x.shape, at, x.__getitem__), params, shardings)

    return SavedModel(huggingface.load_config(folder, vocab_size), load)
