"""Checkpoints in a bucket, gs://: Orbax, epath and tensorstore's own Cloud Storage driver against a bucket in memory, over loopback."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, unquote, urlparse

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem
from jax.sharding import NamedSharding, PartitionSpec as P

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
    """The calls of Cloud Storage's JSON API that tensorstore makes: read, write, list, delete."""

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
        bucket, name = url.path.split("/")[-2], dict(parse_qsl(url.query))["name"]
        Bucket().pipe(f"/{bucket}/{name}", body)
        self.answer(200, json.dumps({"name": name, "generation": "1", "size": str(len(body))}).encode())

    def do_GET(self):
        url = urlparse(self.path)
        _, _, _, bucket, _, *name = url.path.strip("/").split("/")
        if not name:
            start = f"/{bucket}/{dict(parse_qsl(url.query)).get('prefix', '')}"
            found = [{"name": p[len(bucket) + 2 :], "size": str(f.size)} for p, f in sorted(Bucket.store.items()) if p.startswith(start)]
            return self.answer(200, json.dumps({"items": found}).encode())
        if (key := f"/{bucket}/{unquote(name[0])}") not in Bucket.store:
            return self.answer(404)
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
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://127.0.0.1:{server.server_port}")
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
