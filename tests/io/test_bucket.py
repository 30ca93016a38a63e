"""Checkpoints in a bucket, gs://: Orbax, epath and tensorstore's own Cloud Storage driver against a bucket in memory, over loopback; and
whole run directories there by gcsfs, where it is installed."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, quote, unquote, urlparse

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from hhjax.io import checkpoint
from hhjax.io.files import POINTER, checkpoints_dir, write_atomically
from hhjax.io.rundir import why_not_done
from hhjax.sharding import MeshConfig, make_mesh


class Bucket(MemoryFileSystem):
    """What epath finds behind gs://; its objects are those that the server below serves."""

    protocol = ("gcs", "gs")
    store: dict = {}
    pseudo_dirs = [""]

    def __init__(self, *args, **kwargs):
        super().__init__()

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(path.replace("gs://", "/"))


class Storage(BaseHTTPRequestHandler):
    """The calls of Cloud Storage's JSON API that tensorstore and gcsfs make: read, write, list, delete."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, code: int, body: bytes = b"", **headers) -> None:
        self.send_response(code)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        url, body = urlparse(self.path), self.rfile.read(int(self.headers.get("Content-Length", 0)))
        bucket, query = url.path.split("/")[-2], dict(parse_qsl(url.query))
        if query["uploadType"] == "resumable":  # gcsfs for a file that is open to write: the bytes come next
            return self.answer(200, Location=f"http://{self.headers['Host']}{url.path}?uploadType=media&name={quote(json.loads(body)['name'], safe='')}")
        if query["uploadType"] == "multipart":  # gcsfs: what it is called, then what it holds
            about, body = (part.split(b"\n\n", 1)[1] for part in body.removesuffix(b"\n--==0==--").split(b"\n--==0==\n", 1))
            query |= {"name": json.loads(about)["name"]}
        if query.get("ifGenerationMatch") == "0" and f"/{bucket}/{query['name']}" in Bucket.store:
            return self.answer(412)
        Bucket().pipe(f"/{bucket}/{query['name']}", body)
        self.answer(200, json.dumps(self.about(bucket, query["name"])).encode())

    def about(self, bucket: str, name: str) -> dict:
        file = Bucket.store[f"/{bucket}/{name}"]
        when = file.modified.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        return {"bucket": bucket, "name": name, "size": str(file.size), "generation": "1", "updated": when, "timeCreated": when}

    def do_GET(self):
        url = urlparse(self.path)
        bucket, _, name = url.path.partition("/b/")[2].partition("/o")
        query = dict(parse_qsl(url.query))
        if not name:
            start, folders = query.get("prefix", ""), query.get("delimiter")
            found = sorted(p[len(bucket) + 2 :] for p in Bucket.store if p.startswith(f"/{bucket}/{start}"))
            below = {start + n[len(start) :].partition("/")[0] + "/" for n in found if folders and "/" in n[len(start) :]}
            items = [self.about(bucket, n) for n in found if not folders or "/" not in n[len(start) :]]
            return self.answer(200, json.dumps({"items": items, "prefixes": sorted(below)}).encode())
        if (key := f"/{bucket}/{unquote(name[1:])}") not in Bucket.store:
            return self.answer(404)
        if "/download/" not in url.path and query.get("alt") != "media":
            return self.answer(200, json.dumps(self.about(bucket, unquote(name[1:]))).encode())
        data = Bucket.store[key].getvalue()
        if wanted := self.headers.get("Range"):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start = int(first) if first else len(data) - int(last)
            part = data[start : int(last) + 1 if first and last else len(data)]
            return self.answer(206, part, x_goog_generation="1", Content_Range=f"bytes {start}-{start + len(part) - 1}/{len(data)}")
        self.answer(200, data, x_goog_generation="1")

    def do_DELETE(self):
        *_, bucket, _, name = urlparse(self.path).path.split("/")
        Bucket.store.pop(f"/{bucket}/{unquote(name)}", None)
        self.answer(204)


@pytest.fixture(scope="module")
def storage():
    """The bucket's server, found by tensorstore through its variable for emulators, which it reads once in a process."""
    fsspec.register_implementation("gcs", Bucket, clobber=True)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Storage)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("TENSORSTORE_GCS_HTTP_URL", "STORAGE_EMULATOR_HOST"):
            patch.setenv(name, f"http://127.0.0.1:{server.server_port}")
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")
        yield
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def run_dir(storage, tmp_path):
    """A run directory whose checkpoints are in the empty bucket."""
    Bucket.store.clear()
    Bucket.pseudo_dirs[:] = [""]
    (tmp_path / POINTER).write_text("gs://bucket/runs/pm/0.1M-s0-x")
    return tmp_path


TRAINED = '''"""A tokenizer and a language model."""
from hhjax.data.sources import TextData
from hhjax.experiment import Experiment
from hhjax.stages import LM, Tokenizer

TEXT = TextData(sources=("text.jsonl",))
RUNS = Experiment("trained", (
    Tokenizer("tok", data=TEXT, vocab=320),
    LM("lm", tokenizer="tok", model="0.1M", data=TEXT, seq_len=32, batch_size=8, steps=60, log_every=1, save_every=10, eval_rows=8),
))
'''


class State(NamedTuple):
    step: Any
    params: Any


SPECS = State(P(), {"w": P("fsdp", "tensor"), "half": P("fsdp")})


def make_state(seed: int) -> State:
    w = jax.random.normal(jax.random.key(seed), (16, 8))
    return State(jnp.int32(seed), {"w": w, "half": w[:, 0].astype(jnp.bfloat16)})


def on_mesh(cfg: MeshConfig) -> State:
    mesh = make_mesh(cfg)
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), SPECS, is_leaf=lambda x: isinstance(x, P))


def save(run_dir, steps) -> None:
    writer = checkpoint.CheckpointWriter(run_dir, keep=2)
    for step in steps:
        writer.save(step, jax.device_put(make_state(step), on_mesh(MeshConfig(1, 8, 1))), {"step": step})
    writer.close()


def restored(run_dir, **more):
    return checkpoint.restore(run_dir, jax.eval_shape(lambda: make_state(0)), on_mesh(MeshConfig(2, 2, 2)), **more)


def test_a_checkpoint_in_a_bucket_comes_back_on_another_mesh(run_dir):
    assert restored(run_dir) is None
    save(run_dir, (1, 2, 3))
    state, position = restored(run_dir)
    jax.tree.map(np.testing.assert_array_equal, state, make_state(3))
    assert position == {"step": 3} and state.params["w"].sharding.spec == P("fsdp", "tensor")
    folder = checkpoints_dir(run_dir)
    assert checkpoint.good_steps(folder) == [2, 3] and not any("/1/" in path for path in Bucket.store)  # the oldest is gone whole
    assert sorted(p.name for p in run_dir.iterdir()) == [POINTER]  # nothing here
    params = checkpoint.load_params(run_dir, 2, state.params, on_mesh(MeshConfig(8, 1, 1)).params)
    np.testing.assert_array_equal(params["w"], make_state(2).params["w"])
    (run_dir / "config.json").write_text("{}")
    assert why_not_done(run_dir) == ("resumable", "ended without a word, saved at step 3")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("orphaned_reads")
def test_a_save_that_was_cut_off_is_passed_over(run_dir):
    """In a bucket nothing is renamed: what counts is the manifest, which comes last, and the checksums in it."""
    save(run_dir, (1, 2))
    del Bucket.store["/bucket/runs/pm/0.1M-s0-x/2.json"]
    told = []
    state, _ = restored(run_dir, on_damaged=lambda step, why: told.append((step, why)))
    assert int(state.step) == 1 and told[0][0] == 2 and "no manifest" in told[0][1]
    save(run_dir, (2,))  # over what was left
    assert int(restored(run_dir)[0].step) == 2


def test_an_object_is_written_whole(run_dir):
    path = epath.Path("gs://bucket/a/b.json")
    write_atomically(path, "one")
    write_atomically(path, "two")
    assert path.read_text() == "two" and list(Bucket.store) == ["/bucket/a/b.json"]


def test_a_run_in_cloud_storage_goes_on_on_another_machine(run_dir, start_hhjax, tmp_path):
    """By gcsfs and tensorstore, as it would be: kill -9, an empty disk, and the same command again."""
    pytest.importorskip("gcsfs", reason="needs the extra gs")
    (tmp_path / "trained.py").write_text(TRAINED)
    disks = [tmp_path / name for name in ("first", "second")]
    for disk in disks:
        disk.mkdir()
    quiet = {"GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}  # gcsfs would ask, at every call, for what kind of bucket it is
    first, second = (lambda disk=disk: start_hhjax(tmp_path, "run", "trained.py", "--out", "gs://bucket/runs", env=quiet | {"TMPDIR": str(disk)}) for disk in disks)
    process = first()
    while not any("/checkpoints/" in path and path.endswith("0.json") for path in list(Bucket.store)):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert any(path.endswith("/LOCK") for path in Bucket.store)
    output, _ = (process := second()).communicate(timeout=300)
    assert process.returncode == 0, output
    assert not any(path.endswith("/LOCK") for path in Bucket.store) and not list(tmp_path.glob("runs")) and not list(disks[1].glob("hhjax-*"))
    [lm] = [path.removesuffix("/DONE") for path in Bucket.store if path.startswith("/bucket/runs/lm/") and path.endswith("/DONE")]
    rows, events = ([json.loads(line) for line in Bucket.store[f"{lm}/{name}.jsonl"].getvalue().splitlines()] for name in ("metrics", "events"))
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 61))
    assert [e["event"] for e in events].count("restore") == 1 and f"{lm}/checkpoints/60.json" in Bucket.store
    listed = start_hhjax(tmp_path, "ls", "gs://bucket/runs", env=quiet)
    output, _ = listed.communicate(timeout=120)
    assert listed.returncode == 0 and output.count(" done ") == 2, output
