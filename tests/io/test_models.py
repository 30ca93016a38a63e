"""Models on disk: what a folder must hold to be one."""

import json

import pytest

from hhjax.fields import ConfigError
from hhjax.io.models import open_model
from hhjax.model.sizes import model_config
from hhjax.model.transformer import config_to_json


def test_a_hugging_face_folder_gets_the_rows_its_tokenizer_needs(hugging_face_folder):
    assert [open_model(hugging_face_folder, vocab_size=n).config.vocab for n in (0, 96, 97, 129)] == [96, 96, 128, 256]
    with pytest.raises(ConfigError, match="has no steps; leave @5 out"):
        open_model(hugging_face_folder, 5)


def test_a_run_directory_keeps_its_own(tmp_path):
    config = model_config("0.1M", 300)
    (tmp_path / "model.json").write_text(json.dumps(config_to_json(config)))
    (tmp_path / "config.json").write_text(json.dumps({"id": "x", "kind": "lm"}))
    assert open_model(tmp_path, vocab_size=1000).config == config


def test_any_other_folder_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds no model; name the folder of an LM or PM stage"):
        open_model(tmp_path)
