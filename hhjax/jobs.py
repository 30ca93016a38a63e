"""A stage of a sweep as a job: a process here, a SLURM batch job, or a JobSet on GKE."""

import glob
import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from hhjax.fields import ConfigError
from hhjax.io.files import write_atomically
from hhjax.jobset import Pod, jobset, slice_of, slices, to_yaml
from hhjax.process import environment_elsewhere


class Job(NamedTuple):
    """One stage to train. needs: folders that must be done first; run, stage: how a process is told."""

    folder: Path
    run: str
    stage: str
    needs: frozenset[Path]

    @property
    def name(self) -> str:
        """As clusters take names, and the same for the same stage: hhjax-pm-1f2e3d4c5b."""
        return f"hhjax-{self.folder.parent.name.replace('_', '-')}-{self.folder.name.rsplit('-', 1)[-1]}"

    def command(self, flags: Sequence[str]) -> list[str]:
        """The `hhjax run` of this stage alone; flags: FILE and what the sweep passes on."""
        return ["hhjax", "run", *flags, "--only", glob.escape(self.run), "--stage", self.stage]


class Local:
    """Stages as processes of this machine, each with its output in console.log of its folder."""

    def __init__(self, flags: Sequence[str]):
        self.flags = flags

    def devices(self, job: Job) -> tuple[int, str] | None:
        """How many devices a job gets, and of what; None where that is not known before it starts."""
        return None

    def shown(self, job: Job, after: Sequence[str]) -> str:
        """What would be started; after: names of the jobs it would wait for."""
        return " ".join(["#", job.name, *(["after", *after] if after else [])]) + f"\n{shlex.join(job.command(self.flags))}"

    def whereabouts(self, job: Job) -> str:
        """What a cluster says of a job that it still has; "" here, where the LOCK tells all."""
        return ""

    def start(self, job: Job) -> subprocess.Popen:
        job.folder.mkdir(parents=True, exist_ok=True)
        _, *argv = job.command(self.flags)
        with (job.folder / "console.log").open("ab") as log:
            to_log = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
            return subprocess.Popen([sys.executable, "-m", "hhjax.cli", *argv], **to_log)


class Slurm:
    """Stages as batch jobs that wait for one another by `afterok`; nothing here needs to stay up.

    options: for sbatch, such as "--partition=gpu --nodes=2". script: what sbatch runs, with the command as its arguments.
    The id of a stage's job is kept in JOB in its folder, so that a second sweep does not submit it again.
    """

    def __init__(self, flags: Sequence[str], options: str, script: Path):
        self.flags, self.options, self.script = flags, shlex.split(options), script
        if not script.is_file():
            raise ConfigError(f"--script {script} is no file; give a copy of scripts/slurm_sweep.sbatch")

    def devices(self, job: Job) -> tuple[int, str] | None:
        """The GPUs of all nodes, by the options and the script's own; None where they name no number of GPUs a node."""
        found = batch_options([*re.findall(r"^#SBATCH +(\S.*)$", self.script.read_text(), re.MULTILINE), *self.options])
        nodes, gpus = found.get("nodes", "1"), found.get("gpus-per-node", found.get("gres", "")).rpartition(":")[2]
        return (int(nodes) * int(gpus), f"{nodes} nodes of {gpus} GPUs") if nodes.isdigit() and gpus.isdigit() else None

    def argv(self, job: Job, after: Sequence[str]) -> list[str]:
        # A dependency that failed would leave the job waiting for ever.
        wait = [f"--dependency=afterok:{':'.join(after)}", "--kill-on-invalid-dep=yes"] if after else []
        log = [f"--output={job.folder}/slurm-%j.log", "--open-mode=append"]
        return ["sbatch", "--parsable", f"--job-name={job.name}", *log, *wait, *self.options, str(self.script), *job.command(self.flags)]

    def shown(self, job: Job, after: Sequence[str]) -> str:
        return shlex.join(self.argv(job, [f"<{name}>" for name in after]))

    def whereabouts(self, job: Job) -> str:
        """Such as `slurm job 17 PENDING`. Raises ConfigError when squeue does not answer."""
        number = self.job_id(job)
        asked = ["squeue", "--noheader", "--format=%T", f"--jobs={number}"]
        # Of a job that it has forgotten; to take any other failure for that would submit it twice.
        state = said(asked, or_none="Invalid job id").strip() if number else ""
        return f"slurm job {number} {state}" if state else ""

    def job_id(self, job: Job) -> str:
        path = job.folder / "JOB"
        return json.loads(path.read_text())["slurm"] if path.is_file() else ""

    def submit(self, jobs: Sequence[Job]) -> int:
        """Submits every job that SLURM does not have, parents first. Returns 0. Raises ConfigError when sbatch refuses."""
        ids = {}
        for job in jobs:
            if where := self.whereabouts(job):
                ids[job.folder] = self.job_id(job)
                print(f"{job.stage} of {job.run}: {where}", flush=True)
                continue
            job.folder.mkdir(parents=True, exist_ok=True)
            number = said(self.argv(job, sorted(ids[f] for f in job.needs if f in ids))).strip().split(";")[0]
            write_atomically(job.folder / "JOB", json.dumps({"slurm": number}))
            ids[job.folder] = number
            print(f"{job.stage} of {job.run}: submitted as slurm job {number} ({job.folder})", flush=True)
        return 0


class Gke:
    """Stages as JobSets, each applied once what it needs has succeeded, by a process that watches. It may stop: the JobSets go on,
    and the same sweep finds them by their names."""

    poll_s = 10.0

    def __init__(self, flags: Sequence[str], pod: Pod):
        self.flags, self.pod = flags, pod

    def pod_of(self, job: Job) -> Pod:
        """With the slice of the job's stage, or kind of stage, where --topology names one for it."""
        default, others = slices(self.pod.topology)
        return replace(self.pod, topology=others.get(job.stage, others.get(job.folder.parent.name, default)))

    def devices(self, job: Job) -> tuple[int, str] | None:
        topology = slice_of(self.pod_of(job))
        return topology.devices, topology.name

    def manifest(self, job: Job) -> str:
        return to_yaml(jobset(job.name, job.command(self.flags), self.pod_of(job)))

    def shown(self, job: Job, after: Sequence[str]) -> str:
        waits = f" once {' and '.join(after)} succeeded" if after else ""
        return f"# kubectl apply -f -{waits}\n{self.manifest(job)}---"

    def whereabouts(self, job: Job) -> str:
        """Such as `JobSet hhjax-pm-1f2e3d4c5b running`."""
        state = self.state(job)
        return f"JobSet {job.name} {state}" if state == "running" else ""

    def state(self, job: Job) -> str:
        """running (or queued), Completed, Failed, or "" where there is none."""
        found = self.kubectl("get", "jobset", job.name, "--ignore-not-found", "--output=json")
        if not found.strip():
            return ""
        ends = [c["type"] for c in json.loads(found).get("status", {}).get("conditions", ()) if c["status"] == "True"]
        return next((end for end in ends if end in ("Completed", "Failed")), "running")

    def start(self, job: Job) -> "Watched":
        """Applies the JobSet, in the place of one that failed; one that runs or has succeeded is taken as it is."""
        manifest, state = self.manifest(job), self.state(job)
        if state == "Failed":
            self.kubectl("delete", "jobset", job.name, "--wait=true")
        if state in ("", "Failed"):
            self.kubectl("apply", "--filename=-", stdin=manifest)
        return Watched(self, job)

    def kubectl(self, *args: str, stdin: str = "") -> str:
        return said(["kubectl", f"--namespace={self.pod.namespace}", *args], stdin)


class Watched:
    """A JobSet in the place of a process."""

    def __init__(self, gke: Gke, job: Job):
        self.gke, self.job, self.returncode, self.asked = gke, job, None, time.monotonic()

    def poll(self) -> int | None:
        """0 once it has completed, 1 once it has failed or is gone, None before, and where the cluster does not answer."""
        if time.monotonic() - self.asked >= self.gke.poll_s:
            self.asked = time.monotonic()
            try:
                self.returncode = {"Completed": 0, "running": None}.get(self.gke.state(self.job), 1)
            except ConfigError as error:  # a timeout, say: it is asked again
                print(f"asked again: {error}", flush=True)
        return self.returncode

    def terminate(self) -> None:
        print(f"JobSet {self.job.name} goes on; the same sweep will watch it again", flush=True)

    def wait(self) -> None:
        pass


def batch_options(words: Sequence[str]) -> dict[str, str]:
    """Options of sbatch by their long names, the last of each: --nodes=2, --nodes 2, -N 2 and -N2 are the same."""
    found, words = {}, [word for line in words for word in shlex.split(line, comments=True)]
    for word, after in zip(words, [*words[1:], ""]):
        name, equals, value = word.partition("=")
        if name.startswith("--"):
            found[name[2:]] = value if equals else after
        elif word.startswith("-N"):
            found["nodes"] = word[2:] or after
    return found


def said(argv: Sequence[str], stdin: str = "", or_none: str = "") -> str:
    """What a command prints; "" where it fails with the words or_none. Raises ConfigError where it is missing or fails otherwise."""
    try:
        done = subprocess.run(argv, input=stdin, capture_output=True, text=True, env=environment_elsewhere())
    except FileNotFoundError:
        raise ConfigError(f"{argv[0]} is not installed; run this where it is, or use --dry-run") from None
    if not done.returncode:
        return done.stdout
    if or_none and or_none in done.stderr:
        return ""
    raise ConfigError(f"{shlex.join(argv)} failed with {done.returncode}: {done.stderr.strip()}")
