"""A changed loss is another stage: whatever of its folder it uses counts, in whichever way it is reached."""

import dataclasses
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hhjax.fields import ConfigError
from hhjax.identity import canonical, digest

ROOT = Path(__file__).resolve().parent.parent
HELPERS = "def scale(x):\n    return x * 2\n"
LOSS = """
import functools
import numpy as np
import helpers
from helpers import scale

SETTINGS = {"margin": 1.0}
STEPS = [1, 2]
TABLE = np.array([1.0, 2.0])


@functools.wraps(scale)
def wrapped(x):
    return scale(x) + 1


class Tool:
    factor = 3


SCALES = (np.exp,)
power = np.square
scaled = functools.partial(scale, 1)


def registered(x):
    return len(REGISTRY)


REGISTRY = {"registered": registered}


def objective(model, cfg, base=1.0):
    def loss(params, batch, key):
        return helpers.scale(batch) * SETTINGS["margin"] + TABLE.sum() + len(STEPS) + wrapped(batch) + Tool.factor + power(SCALES[0](base)) + scaled()
    return loss, registered
"""


@pytest.fixture
def identity_of(tmp_path, monkeypatch):
    """identity_of(loss, helpers) -> the digest of `objective` in a module of these sources."""
    count = iter(range(100))

    def make(loss=LOSS, helpers=HELPERS):
        folder = tmp_path / str(next(count))
        folder.mkdir()
        (folder / "losses.py").write_text(loss)
        (folder / "helpers.py").write_text(helpers)
        monkeypatch.syspath_prepend(folder)
        for name in ("losses", "helpers"):
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        return digest(canonical(importlib.import_module("losses").objective))

    yield make
    for name in ("losses", "helpers"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    "old, new",
    [
        ('"margin": 1.0', '"margin": 2.0'),
        ("STEPS = [1, 2]", "STEPS = [1, 2, 3]"),
        ("np.array([1.0, 2.0])", "np.array([1.0, 3.0])"),
        ("factor = 3", "factor = 4"),
        (") * SETTINGS", ") + SETTINGS"),
        ("SCALES = (np.exp,)", "SCALES = (np.log,)"),
        ("power = np.square", "power = np.sqrt"),
        ("base=1.0", "base=2.0"),
        ("partial(scale, 1)", "partial(scale, 2)"),
    ],
)
def test_what_the_loss_s_own_file_changes_is_a_new_identity(identity_of, old, new):
    assert old in LOSS and identity_of() != identity_of(LOSS.replace(old, new))


def test_a_helper_in_the_same_folder_counts_through_module_name_and_decorator(identity_of):
    assert identity_of() != identity_of(helpers=HELPERS.replace("* 2", "* 3"))
    by_module = LOSS.replace("from helpers import scale", "scale = float")
    assert identity_of(by_module) != identity_of(by_module, HELPERS.replace("* 2", "* 3"))


def test_comments_docstrings_and_place_do_not_count(identity_of):
    assert identity_of() == identity_of("# a comment\n" + LOSS.replace("class Tool:", 'class Tool:\n    """A tool."""'))


def test_closures_tell_one_function_of_a_library_from_another():
    from hhjax.objectives.kl import kl_k2, kl_k3

    def make(penalty):
        def loss(logp, ref_logp):
            return penalty(logp, ref_logp)

        return loss

    assert digest(canonical(make(kl_k2))) == digest(canonical(make(kl_k2))) != digest(canonical(make(kl_k3)))


def test_a_closure_of_a_library_counts_with_what_it_holds():
    import optax

    def make(rate):
        schedule = optax.cosine_decay_schedule(rate, 100)

        def loss(step):
            return schedule(step)

        return loss

    assert digest(canonical(make(1e-3))) == digest(canonical(make(1e-3))) != digest(canonical(make(9e-3)))


@dataclasses.dataclass(frozen=True)
class Scaled:
    factor: float

    def loss(self, x):
        return self.factor * x


def test_a_method_counts_with_its_object_and_a_mere_object_is_refused():
    assert digest(canonical(Scaled(1.0).loss)) == digest(canonical(Scaled(1.0).loss)) != digest(canonical(Scaled(2.0).loss))

    class Callable:
        def __call__(self):
            return 1

    with pytest.raises(ConfigError, match="cannot be part of a stage's identity"):
        canonical(Callable())
    with pytest.raises(ConfigError, match="cannot be part of a stage's identity"):
        canonical({canonical: 1})


def test_an_identity_is_the_same_in_every_process(tmp_path):
    """Helpers of one name, and whatever order Python's sets have in a process."""
    (tmp_path / "twins.py").write_text("""
def scaled(k):
    def f(x):
        return k * x
    return f

double, triple = scaled(2), scaled(3)
half = lambda x: x / 2
tenth = lambda x: x / 10

def objective(x):
    return double(x) + triple(x) + half(x) + tenth(x)
""")
    code = "import twins; from hhjax.identity import canonical, digest; print(digest(canonical(twins.objective)))"
    run = lambda seed, code: subprocess.run(  # noqa: E731
        [sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": str(seed), "PYTHONPATH": f"{ROOT}:{tmp_path}"},
        capture_output=True, text=True, check=True).stdout  # fmt: skip
    assert len({run(seed, code) for seed in range(5)}) == 1
    swapped = code.replace("import twins;", "import twins; twins.double, twins.triple = twins.triple, twins.double;")
    assert run(0, swapped) != run(0, code)


def test_of_two_lambdas_on_a_line_neither_is_taken():
    losses = (lambda x: x, lambda x: x + 1)
    with pytest.raises(ConfigError, match="cannot be read; define it with `def`"):
        canonical(losses[1])


def test_a_value_without_a_stable_text_is_refused(identity_of):
    with pytest.raises(ConfigError, match="cannot be part of a stage's identity"):
        identity_of(LOSS.replace("STEPS = [1, 2]", "STEPS = iter([1, 2])").replace("len(STEPS)", "next(STEPS)"))
