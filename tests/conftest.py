"""Eight simulated devices, a compilation cache, and what several tests share. Imported before any test imports jax."""

import functools
import gc
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from hhjax.process import compile_quickly

ROOT = Path(__file__).resolve().parent.parent
CACHE = Path(tempfile.gettempdir()) / f"hhjax-test-cache-{os.getuid()}"

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
compile_quickly()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

WORDS = "the cat sat on a mat and then it ran far away from dogs who bark loudly at night while birds sing".split()


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """A data folder: text.jsonl (400 documents) and pairs.jsonl (200 comparisons whose chosen reply says "good")."""
    folder, rng = tmp_path_factory.mktemp("data"), random.Random(0)

    def sentence(n):
        return " ".join(rng.choice(WORDS) for _ in range(n))

    write_rows(folder / "text.jsonl", [{"text": sentence(60)} for _ in range(400)])
    prompts = [f"\n\nHuman: {i} {sentence(8)}\n\nAssistant:" for i in range(200)]
    write_rows(
        folder / "pairs.jsonl",
        [{"chosen": f"{p} good {sentence(6)}", "rejected": f"{p} bad {sentence(6)}"} for p in prompts],
    )
    return folder


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_data, tmp_path_factory) -> Path:
    """The folder of a tokenizer of 320 tokens, trained on tiny_data."""
    from hhjax.data.sources import TextData, load_documents
    from hhjax.data.tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([d.text for d in load_documents(TextData(("text.jsonl",)), tiny_data)], 320, folder)
    return folder


@pytest.fixture(scope="session")
def hugging_face_folder(tiny_data, tmp_path_factory) -> Path:
    """A Llama of 96 tokens with a tokenizer.json of 96, whose <pad> and <eoc> the model has no rows for."""
    import tokenizers

    folder = tmp_path_factory.mktemp("hugging_face") / "llama-tiny"
    shutil.copytree(ROOT / "tests" / "io" / "golden" / "llama", folder)
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.decoder = tokenizers.decoders.Fuse()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=96, special_tokens=["</s>"], show_progress=False)
    texts = [value for line in (tiny_data / "pairs.jsonl").read_text().splitlines() for value in json.loads(line).values()]
    made.train_from_iterator(texts, trainer)
    assert made.get_vocab_size() == 96
    made.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def orphaned_reads():
    """For tests that damage a checkpoint (with filterwarnings): Orbax reads leaves side by side, and those still under
    way when one fails find its event loop closed. Waits for them, so that they warn in no other test."""
    yield
    time.sleep(0.3)
    gc.collect()


@pytest.fixture(scope="session")
def start_hhjax(tiny_data):
    """start_hhjax(folder, *args, devices=1, env={}) -> the running `hhjax ARGS` in that folder, on tiny_data."""
    started = []

    def start(folder, *args, devices=1, env={}):
        env = os.environ | env | {
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "HHJAX_DATA": str(tiny_data),
            "PYTHONPATH": str(ROOT),
        }
        argv = [sys.executable, "-m", "hhjax.cli", *map(str, args)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(argv, cwd=folder, env=env, text=True, **pipes)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture(scope="session")
def start_two(start_hhjax):
    """start_two(folder, *args, devices=1) -> `hhjax ARGS` as a cluster of two processes, each with so many devices."""
    from hhjax.cluster import free_port

    def start(folder, *args, devices=1):
        cluster = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": "2"}
        return [start_hhjax(folder, *args, devices=devices, env=cluster | {"JAX_PROCESS_ID": str(i)}) for i in range(2)]

    return start


@pytest.fixture
def hhjax(start_hhjax, tmp_path):
    """`start_hhjax` in tmp_path."""
    return functools.partial(start_hhjax, tmp_path)


def write_rows(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
