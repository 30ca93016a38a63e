"""Options are scored by the tokens that follow the shared start, whatever else shares the batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hhjax.data.tokenizer import load_tokenizer
from hhjax.evals.multiple_choice import ask, option_logps
from hhjax.model.replies import policy_logits
from hhjax.model.sizes import model_config
from hhjax.model.transformer import make_model
from hhjax.sharding import MeshConfig, make_mesh

ROWS = [("the cat sat", "the cat sat on a mat"), ("dogs", "dogs bark loudly at night while"), ("a", "a bird")]


@pytest.fixture(scope="module")
def setup(tiny_tokenizer):
    tok = load_tokenizer(tiny_tokenizer)
    model = make_model(model_config("0.1M", tok.vocab_size))
    return tok, model, model.init(jax.random.key(0))


def test_logps_equal_a_plain_loop(setup):
    tok, model, params = setup
    expected = []
    for start, whole in ROWS:
        a, b = tok.encode(start), tok.encode(whole)
        shared = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
        ids = [tok.eot_id, *b]
        hidden, _ = model.apply(params, jnp.array([ids]))
        logp = jax.nn.log_softmax(policy_logits(model, params, hidden, tok.vocabulary))[0]
        expected.append(sum(float(logp[i, ids[i + 1]]) for i in range(shared, len(b))))
    for batch_size, mesh in ((16, MeshConfig()), (8, MeshConfig(2, 4, 1))):
        found = option_logps(model, params, tok, ROWS, batch_size, make_mesh(mesh))
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_answers_follow_the_probabilities(setup):
    tok, model, params = setup
    mesh = make_mesh(MeshConfig())
    options = [" on", " loudly at night", " mat"]
    logps = option_logps(model, params, tok, [("the cat", "the cat" + o) for o in options], 8, mesh)
    [answered] = ask(model, params, tok, ["the cat"], [options], [2], 8, mesh)
    shares = np.exp(logps) / np.exp(logps).sum()
    assert answered.chosen == logps.argmax() and answered.right == (logps.argmax() == 2)
    assert answered.nats == pytest.approx(-np.log(shares[2]), abs=1e-4)
