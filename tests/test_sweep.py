"""Sweeps: states, jobs on SLURM and GKE with stand-ins for their commands, and going on after a crash."""

import json
import os
import shlex
import signal
import sys
import time
from pathlib import Path

import pytest
import yaml
from etils import epath

from hhjax import jobs, sweep
from hhjax.fields import ConfigError
from hhjax.io.files import POINTER
from hhjax.io.metrics import read_events, read_rows, write_event

SWEPT = '''"""A tokenizer and a language model for two seeds, each with a child."""
from hhjax.data.comparisons import ComparisonData
from hhjax.data.sources import TextData
from hhjax.experiment import Experiment, grid
from hhjax.stages import LM, PM, Tokenizer

TEXT = TextData(sources=("text.jsonl",))
BASE = Experiment("swept", (
    Tokenizer("tok", data=TEXT, vocab=320),
    LM("lm", tokenizer="tok", model="0.1M", data=TEXT, seq_len=32, batch_size=16, steps=60, log_every=1, save_every=5, eval_rows=8),
    PM("pm", init="lm", data=ComparisonData(("pairs.jsonl",)), seq_len=96, batch_size=16, steps=2, eval_rows=8),
))
RUNS = grid(BASE, {"seed": (0, 1)})
'''
GKE = ("--backend", "gke", "--topology", "v5p:2x2x2", "--image", "repo/hhjax:1", "--bucket", "my-runs")
SBATCH = """#!/bin/sh
echo "$@" >> {log}
wc -l < {log} | tr -d ' '
"""
SQUEUE = """#!/bin/sh
for id in $(cat {log}.queued 2>/dev/null); do case "$*" in *--jobs=$id) echo PENDING; exit 0;; esac; done
echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1
"""
KUBECTL = """#!{python}
# JobSets in a folder; one is Completed the second time it is looked at, except where a file FAIL names it. Where there is a file
# TIMEOUT, the first look at one fails.
import json, sys, yaml
from pathlib import Path
here, (namespace, verb, *rest) = Path("{log}.jobsets"), sys.argv[1:]
here.mkdir(exist_ok=True)
with open("{log}", "a") as f: f.write(" ".join([verb, *rest]) + chr(10))
if verb == "apply":
    manifest = yaml.safe_load(sys.stdin)
    (here / manifest["metadata"]["name"]).write_text(json.dumps(manifest))
elif verb == "delete":
    (here / rest[1]).unlink()
elif (here / "TIMEOUT").exists() and (here / rest[1]).exists():
    (here / "TIMEOUT").unlink()
    sys.exit("Unable to connect to the server: net/http: TLS handshake timeout")
elif (here / rest[1]).exists():
    manifest = json.loads((here / rest[1]).read_text())
    if "status" not in manifest:
        failed = (here / "FAIL").exists() and rest[1] in (here / "FAIL").read_text()
        after = manifest | {{"status": {{"conditions": [{{"type": "Failed" if failed else "Completed", "status": "True"}}]}}}}
        (here / rest[1]).write_text(json.dumps(after))
    print(json.dumps(manifest))
"""


@pytest.fixture
def swept(tmp_path, tiny_data, monkeypatch):
    """tmp_path as the working folder, with swept.py and stand-ins for sbatch, squeue and kubectl that write to tmp_path/log."""
    (tmp_path / "swept.py").write_text(SWEPT)
    (tmp_path / "bin").mkdir()
    for name, text in (("sbatch", SBATCH), ("squeue", SQUEUE), ("kubectl", KUBECTL)):
        (tmp_path / "bin" / name).write_text(text.format(log=tmp_path / "log", python=sys.executable))
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HHJAX_DATA", str(tiny_data))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sweep, "POLL_S", 0)
    monkeypatch.setattr(jobs.Gke, "poll_s", 0)
    return tmp_path


def logged(folder) -> list[list[str]]:
    path = folder / "log"
    return [shlex.split(line) for line in path.read_text().splitlines()] if path.exists() else []


def option(argv, name) -> list[str]:
    return [a.partition("=")[2] for a in argv if a.startswith(name + "=")]


def make_done(folder):
    (folder / "config.json").write_text("{}")
    (folder / "DONE").touch()


def folders() -> list[Path]:
    """The folders of the sweep that was written down, parents first."""
    index = json.loads(Path("runs/experiments/swept.json").read_text())["runs"]
    return list(dict.fromkeys(Path("runs") / index[run][stage] for run in index for stage in index[run]))


def test_slurm_gets_one_job_a_stage_that_waits_for_its_parents(swept, capsys):
    args = ["swept.py", "--lm.steps", "70", "--backend", "slurm", "--sbatch=--partition=gpu --nodes=2"]
    assert sweep.run([*args, "--dry-run"]) == 0
    shown = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert not logged(swept) and not (swept / "runs").exists()
    assert sweep.run(args) == 0
    given = logged(swept)
    assert len(given) == len(shown) == 5  # the tokenizer once for both seeds
    tok, lm, pm, lm1, pm1 = given
    assert [option(each, "--dependency") for each in given] == [[], ["afterok:1"], ["afterok:2"], ["afterok:1"], ["afterok:4"]]
    names = {option(argv, "--job-name")[0]: str(n) for n, argv in enumerate(given, 1)}
    for planned, argv in zip(shown, given):  # what was shown is what was submitted, ids apart
        ids = [f"--dependency=afterok:{names[a[22:-1]]}" if a.startswith("--dependency=afterok:<") else a for a in planned]
        assert ids[0] == "sbatch" and ids[1:] == argv
    script = str(sweep.SCRIPT)
    assert pm[pm.index(script) :] == [
        script, "hhjax", "run", "swept.py", "--lm.steps", "70", "--only", "swept:seed=0,lm.steps=70", "--stage", "pm",
    ]  # fmt: skip
    assert "--partition=gpu" in lm and "--nodes=2" in lm and option(lm, "--output")[0].endswith("/slurm-%j.log")


def test_slurm_is_not_given_what_it_has_or_what_is_done(swept, capsys):
    args = ["swept.py", "--backend", "slurm"]
    assert sweep.run(args) == 0
    tok, lm, *_ = folders()
    make_done(tok)
    (swept / "log.queued").write_text("2\n")  # of the five jobs, the first seed's language model is still there
    assert sweep.run([*args, "--status"]) == 0
    said = capsys.readouterr().out
    assert "slurm job 2 PENDING" in said and "1 done, 1 queued, 3 new" in said
    assert sweep.run(args) == 0
    again = logged(swept)[5:]
    assert [argv[-1] for argv in again] == ["pm", "lm", "pm"]
    assert [option(argv, "--dependency") for argv in again] == [["afterok:2"], [], ["afterok:7"]]


def test_gke_gets_each_jobset_once_its_parents_have_succeeded(swept, capsys):
    assert sweep.run(["swept.py", *GKE, "--dry-run"]) == 0
    planned = list(yaml.safe_load_all(capsys.readouterr().out))[:-1]
    assert not logged(swept) and len(planned) == 5
    assert sweep.run(["swept.py", *GKE, "--data", "/runs/data", "--dry-run"]) == 0
    pod = next(yaml.safe_load_all(capsys.readouterr().out))["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert {"name": "HHJAX_DATA", "value": "/runs/data"} in pod["containers"][0]["env"] and "--data" not in pod["containers"][0]["command"]
    assert sweep.run(["swept.py", *GKE]) == 0
    kept = {p.name: json.loads(p.read_text()) for p in (swept / "log.jobsets").iterdir()}
    for manifest in planned:  # what was shown is what was applied
        assert {k: v for k, v in kept[manifest["metadata"]["name"]].items() if k != "status"} == manifest
    names = [manifest["metadata"]["name"] for manifest in planned]
    said = capsys.readouterr().out.splitlines()
    order = [line.split()[:2] for line in said]
    assert order[0] == ["started", "tok"] and order[1] == ["done:", "tok"] and order[2:4] == [["started", "lm"]] * 2
    applied = [i for i, argv in enumerate(logged(swept)) if argv[0] == "apply"]
    assert len(applied) == 5
    # The same sweep again takes the JobSets as they are; one that has failed is deleted and applied anew.
    (swept / "log.jobsets" / "FAIL").write_text(names[2])
    (swept / "log.jobsets" / names[2]).unlink()
    assert sweep.run(["swept.py", *GKE]) == 1
    assert "FAILED (1): pm of swept:seed=0" in capsys.readouterr().out
    (swept / "log.jobsets" / "FAIL").unlink()
    before = len(logged(swept))
    assert sweep.run(["swept.py", *GKE]) == 0
    assert [argv for argv in logged(swept)[before:] if argv[0] != "get"] == [
        ["delete", "jobset", names[2], "--wait=true"], ["apply", "--filename=-"],
    ]  # fmt: skip


def test_a_slice_for_a_stage_or_a_kind_of_stage(swept, capsys):
    flags = [*GKE[:3], "v5p:2x2x2,tok=v5p:2x2x1,pm=v5p:2x2x4", *GKE[4:]]
    assert sweep.run(["swept.py", *flags, "--only", "seed=0", "--dry-run"]) == 0
    pods = [made["spec"]["replicatedJobs"][0]["template"]["spec"] for made in list(yaml.safe_load_all(capsys.readouterr().out))[:-1]]
    shapes = [pod["template"]["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-topology"] for pod in pods]
    assert shapes == ["2x2x1", "2x2x2", "2x2x4"] and [pod["parallelism"] for pod in pods] == [1, 2, 4]
    with pytest.raises(ConfigError, match="unknown name 'tokk'; did you mean 'tok'|unknown name 'tokk' in"):
        sweep.run(["swept.py", *GKE[:3], "v5p:2x2x2,tokk=v5p:2x2x1", *GKE[4:], "--dry-run"])
    with pytest.raises(ConfigError, match="give the slice of most jobs first"):
        sweep.run(["swept.py", *GKE[:3], "tok=v5p:2x2x1", *GKE[4:], "--dry-run"])


@pytest.mark.parametrize("backend", [(*GKE[:3], "v5p:2x4x4", *GKE[4:]), ("--backend", "slurm", "--sbatch=-N4 --partition=gpu")])
@pytest.mark.parametrize("dry", [("--dry-run",), ()])
def test_what_does_not_fit_its_devices_is_not_submitted(swept, backend, dry):
    args = ["swept.py", *backend, *dry]
    with pytest.raises(ConfigError, match=r"stage lm on .* \(32 devices\): a batch of 16 does not divide over the mesh data 32 x fsdp 1 x "
                                          r"tensor 1 = 32; give --lm.batch-size 32, a larger --lm.mesh.tensor, or a smaller slice"):  # fmt: skip
        sweep.run(args)
    with pytest.raises(ConfigError, match=r"stage pm on .* \(32 devices\): mesh .*'data': 3.* does not fill 32 devices.*--pm.mesh.data"):
        sweep.run([*args, "--lm.mesh.tensor", "2", "--pm.mesh.data", "3"])
    with pytest.raises(ConfigError, match="a batch of 32 in 2 parts does not divide .* give --pm.batch-size 64"):
        sweep.run([*args, "--lm.batch-size", "32", "--pm.batch-size", "32", "--pm.micro-batches", "2"])
    assert not logged(swept) and not (swept / "runs").exists()
    assert sweep.run(["swept.py", *backend, "--dry-run", "--lm.mesh.tensor", "2", "--pm.mesh.fsdp", "8", "--pm.mesh.tensor", "4"]) == 0


def test_how_many_gpus_a_batch_job_gets(swept):
    def devices(options, text="#SBATCH --gpus-per-node=4  # of eight"):
        (swept / "script").write_text(f"#!/bin/sh\n{text}\n")
        return jobs.Slurm([], options, swept / "script").devices(None)

    assert devices("") == (4, "1 nodes of 4 GPUs") and devices("-N 2")[0] == 8 == devices("--nodes 2")[0]
    assert devices("--nodes=2 --gpus-per-node=h100:8")[0] == 16 and devices("--gres=gpu:8 -N3", "")[0] == 24
    assert devices("--nodes=2-4") is None and devices("", "") is None


def test_a_cluster_that_does_not_answer_once_ends_no_sweep(swept, capsys):
    (swept / "log.jobsets").mkdir()
    (swept / "log.jobsets" / "TIMEOUT").touch()
    assert sweep.run(["swept.py", *GKE, "--only", "seed=0"]) == 0
    said = capsys.readouterr().out
    assert "TLS handshake timeout" in said and said.count("done:") == 3


def test_slurm_that_does_not_answer_is_no_job_forgotten(swept):
    assert sweep.run(["swept.py", "--backend", "slurm"]) == 0
    (swept / "bin" / "squeue").write_text("#!/bin/sh\necho Unable to contact slurm controller >&2; exit 1\n")
    with pytest.raises(ConfigError, match="failed with 1: Unable to contact slurm controller"):
        sweep.run(["swept.py", "--backend", "slurm"])
    assert len(logged(swept)) == 5  # nothing twice


def test_a_missing_command_or_option_is_said(swept, monkeypatch):
    with pytest.raises(ConfigError, match="--backend 'cloud'; choose one of local, slurm, gke"):
        sweep.run(["swept.py", "--backend", "cloud"])
    with pytest.raises(ConfigError, match="--image is needed"):
        sweep.run(["swept.py", "--backend", "gke", "--topology", "v5p:2x2x2", "--dry-run"])
    (swept / "bin" / "sbatch").write_text("#!/bin/sh\necho no such partition >&2; exit 3\n")
    with pytest.raises(ConfigError, match="failed with 3: no such partition"):
        sweep.run(["swept.py", "--backend", "slurm"])
    monkeypatch.setenv("PATH", str(swept / "none"))
    with pytest.raises(ConfigError, match="sbatch is not installed"):
        sweep.run(["swept.py", "--backend", "slurm"])


def test_states_say_why(swept, capsys):
    """One folder in every state, as the files of each say."""
    assert sweep.run(["swept.py", "--backend", "slurm"]) == 0
    tok, lm, pm, lm1, pm1 = folders()
    capsys.readouterr()
    make_done(tok)
    for folder in (lm, pm, lm1, pm1):
        (folder / "config.json").write_text("{}")
        write_event(folder, "start", host="h", pid=1)
    (lm / "checkpoints").mkdir()
    (lm / "checkpoints" / "40.json").write_text("{}")
    write_event(pm, "error", message="ValueError: a mesh of 3", traceback="")
    write_event(lm1, "nan", step=7, metric="loss")
    (pm1 / "LOCK").write_text(json.dumps({"host": "elsewhere", "pid": 12}))
    assert sweep.run(["swept.py", "--status"]) == 0
    *lines, total = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["done", "tok"], ["resumable", "lm"], ["failed", "pm"], ["failed", "lm"], ["running", "pm"],
    ]  # fmt: skip
    assert lines[0].endswith("swept:seed=0 and 1 more")
    assert lines[1].endswith("ended without a word, saved at step 40") and lines[2].endswith(": ValueError: a mesh of 3")
    assert lines[3].endswith("loss is not finite at step 7") and lines[4].endswith("process 12 on elsewhere")
    assert total == "1 done, 1 resumable, 2 failed, 1 running"


def test_checkpoints_that_cannot_be_read_do_not_end_the_list_of_states(swept, monkeypatch, capsys):
    def no_gcsfs(*args):
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(type(epath.Path("gs://bucket/pm")), "glob", no_gcsfs)
    assert sweep.run(["swept.py", "--backend", "slurm"]) == 0
    pm = folders()[2]
    (pm / "config.json").write_text("{}")
    (pm / POINTER).write_text("gs://bucket/pm")
    capsys.readouterr()
    assert sweep.run(["swept.py", "--status"]) == 0
    said = capsys.readouterr().out
    assert "checkpoints at gs://bucket/pm, which cannot be read here: Please install gcsfs" in said and "4 new, 1 resumable" in said


def test_a_local_dry_run_shows_the_commands(swept, capsys):
    assert sweep.run(["swept.py", "--only", "seed=1", "--jobs", "2", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["#", "hhjax"] * 3
    assert lines[3] == "hhjax run swept.py --only swept:seed=1 --stage lm" and lines[2].split()[2:] == ["after", lines[0].split()[1]]
    assert not (swept / "runs").exists()


def test_one_stage_brings_what_it_needs_and_no_more(swept, capsys):
    assert sweep.run(["swept.py", "--dry-run", "--stage", "lm", "--only", "*seed=1"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("--stage lm") == 1 == shown.count("--stage tok") and "--stage pm" not in shown
    with pytest.raises(ConfigError, match="'nope' is no stage of these runs; they have tok, lm, pm"):
        sweep.run(["swept.py", "--stage", "nope"])
    with pytest.raises(ConfigError, match="--jobs 0; give at least 1"):
        sweep.run(["swept.py", "--jobs", "0"])


@pytest.mark.slow
def test_a_sweep_that_was_killed_goes_on(swept, start_hhjax):
    """kill -9 of the sweep and of the stage that it was at."""
    args = ("sweep", "swept.py", "--only", "seed=0")
    process = start_hhjax(swept, *args)
    rows = lambda: sum(len(read_rows(p)) for p in swept.glob("runs/lm/*/metrics.jsonl"))  # noqa: E731
    while rows() < 12:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)
    process.kill()
    lm = folders()[1]
    os.kill(json.loads((lm / "LOCK").read_text())["pid"], signal.SIGKILL)
    output, _ = (again := start_hhjax(swept, *args)).communicate(timeout=300)
    assert again.returncode == 0 and "started tok" not in output, output
    events = [e["event"] for e in read_events(lm)]
    assert events.count("start") == 2 and "restore" in events and all((f / "DONE").exists() for f in folders()[:3])
