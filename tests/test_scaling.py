"""Benchmarks of meshes and of compilation: the rows say what was run."""

import jax
import pytest

from hhjax import bench, scaling

SMALL = {"width": 32, "heads": 4, "mlp_width": 64, "vocab": 64, "batch": 8, "prompt": 12, "response": 8}
TINY = SMALL | {"repeats": 1, "warmup": 1}


def test_every_mesh_stands_beside_one_device(tmp_path):
    rows = list(scaling.scale(scaling.ScaleBench(**TINY, layers=1, devices=4, profile=str(tmp_path))))
    assert list(tmp_path.rglob("*.xplane.pb"))
    found = {row["mesh"]: row for row in rows}
    assert list(found) == ["one device", "data 4", "fsdp 4", "fsdp 2 x tensor 2"]
    assert found["one device"]["of_one_device"] == 1 and found["one device"]["collectives"] == "none"
    assert "all-reduce" in found["data 4"]["collectives"] and "all-gather" not in found["data 4"]["collectives"]
    assert "all-gather" in found["fsdp 4"]["collectives"]
    assert "of_one_device" in bench.table(rows, set()) and len(bench.table(rows, set()).splitlines()) == 5
    with pytest.raises(ValueError, match="devices 99"):
        list(scaling.scale(scaling.ScaleBench(**TINY, devices=99)))


def test_a_full_cache_saves_the_compilation():
    before = jax.config.jax_compilation_cache_dir
    rows = list(scaling.compile_times(scaling.CompileBench(**SMALL, depths=(2,))))
    assert [(row["program"], row["layers"]) for row in rows] == [("pm update", 2), ("sampling", 2)]
    assert all(row["warm_s"] < row["cold_s"] for row in rows)
    assert jax.config.jax_compilation_cache_dir == before


@pytest.mark.parametrize("name, value", [("layers", 8), ("size", "13M"), ("repeats", 3), ("profile", "traces")])
def test_compilation_does_not_take_what_it_would_not_heed(name, value):
    with pytest.raises(ValueError, match=f"{name} {value} is not asked"):
        next(scaling.compile_times(scaling.CompileBench(**SMALL, **{name: value})))
