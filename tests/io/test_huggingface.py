"""Logits agree with transformers', from golden files always and live where torch and transformers are installed."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from hhjax.io.huggingface import config_to_huggingface, extend_vocab, fitted, load_folder, save_folder
from hhjax.model.sizes import model_config
from hhjax.model.transformer import make_model

GOLDEN = Path(__file__).parent / "golden"
FAMILIES = ("gpt_neox", "llama", "qwen2", "qwen3")


def our_logits(folder, tokens):
    cfg, params = load_folder(folder)
    model = make_model(cfg)
    hidden, _ = model.apply(jax.tree.map(jnp.asarray, params), jnp.asarray(tokens))
    return np.asarray(model.logits(params, hidden))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_the_golden_ones(family):
    golden = load_file(GOLDEN / family / "expected.st")
    np.testing.assert_allclose(our_logits(GOLDEN / family, golden["tokens"]), golden["logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_saving_gives_back_the_same_tensors(family, tmp_path):
    cfg, params = load_folder(GOLDEN / family)
    save_folder(tmp_path, cfg, params, family)
    before, after = (load_file(f / "model.safetensors") for f in (GOLDEN / family, tmp_path))
    assert before.keys() == after.keys()
    modes = [(tmp_path / name).stat().st_mode for name in ("config.json", "model.safetensors")]
    assert modes[0] == modes[1]  # whoever may read one may read the other
    for name in before:
        np.testing.assert_array_equal(before[name], after[name], err_msg=name)
    again, params_again = load_folder(tmp_path)
    assert again == cfg
    jax.tree.map(np.testing.assert_array_equal, params, params_again)


def test_a_layout_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="does not fit the llama layout"):
        config_to_huggingface(model_config("1M", 100), "llama")


def random_model(size: str, vocab: int = 96):
    """A rung of the ladder with random weights, norms and their biases included: (config, parameters, tokens, logits)."""
    cfg = model_config(size, vocab)
    model = make_model(cfg)
    leaves, tree = jax.tree.flatten(model.init(jax.random.key(0)))
    params = jax.tree.unflatten(tree, [x + 0.05 * jax.random.normal(jax.random.key(i), x.shape) for i, x in enumerate(leaves)])
    tokens = np.arange(40).reshape(2, 20) * 7 % vocab
    return cfg, params, tokens, np.asarray(model.logits(params, model.apply(params, jnp.asarray(tokens))[0]))


def test_the_ladder_is_gpt_neox_with_biases_of_zero(tmp_path):
    cfg, params, tokens, expected = random_model("0.1M")
    family, wider, filled = fitted(cfg, jax.device_get(params))
    assert family == "gpt_neox" and not np.any(filled["blocks"]["up_bias"])
    save_folder(tmp_path, wider, filled, family, eos_token_id=1)
    np.testing.assert_allclose(our_logits(tmp_path, tokens), expected, atol=1e-5)
    assert fitted(*load_folder(GOLDEN / "qwen3"))[0] == "qwen3"


@pytest.mark.oracle
def test_an_exported_model_speaks_alike_in_transformers(tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    cfg, params, tokens, expected = random_model("0.1M")
    family, wider, filled = fitted(cfg, jax.device_get(params))
    save_folder(tmp_path, wider, filled, family, eos_token_id=1, pad_token_id=0, bos_token_id=None)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        np.testing.assert_allclose(theirs(torch.tensor(tokens)).logits.numpy(), expected, atol=1e-4)


def test_added_rows_are_the_mean_embedding_and_leave_the_others_alone():
    cfg, params = load_folder(GOLDEN / "gpt_neox")
    wider, extended = extend_vocab(cfg, params, cfg.vocab + 2)
    assert wider.vocab == 128 and extended["embed"].shape == (128, cfg.width)
    np.testing.assert_array_equal(extended["embed"][: cfg.vocab], params["embed"])
    np.testing.assert_allclose(extended["embed"][-1], params["embed"].mean(0), rtol=1e-6)
    assert extended["unembed"].shape == (cfg.width, 128)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "bert"}, "model_type 'bert'"),
        ({"hidden_act": "relu"}, "hidden_act 'relu'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope scaling"),
        ({"use_sliding_window": True}, "use_sliding_window"),
    ],
)
def test_what_cannot_be_represented_is_refused(change, message):
    import json

    from hhjax.io.huggingface import config_from_huggingface

    fields = json.loads((GOLDEN / "qwen2" / "config.json").read_text())
    with pytest.raises(ValueError, match=message):
        config_from_huggingface(fields | change)


@pytest.mark.oracle
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers_live(family, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(
        family, vocab_size=160, hidden_size=64, num_hidden_layers=3, num_attention_heads=8, intermediate_size=96
    )
    if family != "gpt_neox":
        config.num_key_value_heads = 4
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    tokens = torch.randint(0, 160, (2, 65))
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(tokens).logits.numpy()
    np.testing.assert_allclose(our_logits(tmp_path, tokens.numpy()), expected, atol=1e-4, rtol=0)


@pytest.mark.oracle
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_reads_what_we_save(family, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    cfg, params = load_folder(GOLDEN / family)
    save_folder(tmp_path, cfg, params, family)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    golden = load_file(GOLDEN / family / "expected.st")
    with torch.no_grad():
        logits = model(torch.from_numpy(golden["tokens"].astype(np.int64))).logits.numpy()
    np.testing.assert_allclose(logits, golden["logits"], atol=1e-4, rtol=0)
