"""What a GKE cluster is told: a JobSet that runs one command on every host of a TPU slice, and the Kueue queue it waits in.

    python -m hhjax.jobset run --topology v5p:4x4x4 --image IMAGE --bucket BUCKET -- hhjax run experiments/pm_sizes.py --out /runs
    python -m hhjax.jobset queue --topology v5p:4x4x4 --slices 4

Prints YAML for `kubectl apply -f -`, as tpu/gke.sh does. Fields: jobset.sigs.k8s.io/docs/reference/jobset.v1alpha2,
kueue.sigs.k8s.io/docs/reference/kueue.v1beta1, docs.cloud.google.com/kubernetes-engine/docs/how-to/tpus.
"""

import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import tyro
import yaml

from hhjax.chips import Topology, parse_topology
from hhjax.fields import ConfigError

ACCELERATORS = {  # the node label cloud.google.com/gke-tpu-accelerator
    "v4": "tpu-v4-podslice",
    "v5e": "tpu-v5-lite-podslice",
    "v5p": "tpu-v5p-slice",
    "v6e": "tpu-v6e-slice",
    "tpu7x": "tpu7x",
}
CONTAINER, MOUNT = "hhjax", "/runs"
NEVER_AGAIN = [2, 65]  # exit codes that a restart would only repeat: configuration or data, a loss that is not finite


@dataclass(frozen=True)
class Pod:
    """Where jobs run on a GKE cluster."""

    topology: str = ""
    """The slice of each job, such as v5p:4x4x4; sweep: and of stages, or kinds of them, that get another: v5p:4x4x4,tok=v5p:2x2x1."""
    image: str = ""
    """The container image that tpu/Dockerfile made."""
    bucket: str = ""
    """The Cloud Storage bucket that is mounted at /runs; not needed where --out is gs://BUCKET/PREFIX."""
    data: str = ""
    """The data folder in the pods, such as /runs/data on the bucket, with the files that this machine sees."""
    queue: str = "hhjax"
    """The Kueue LocalQueue that jobs wait in."""
    namespace: str = "default"
    """The Kubernetes namespace."""
    service_account: str = "hhjax"
    """The Kubernetes service account that may write to the bucket."""
    restarts: int = 20
    """How often a job is started again after preemptions and crashes."""


def chips_per_host(topology: Topology) -> int:
    """How many chips a machine of this slice has: up to 8 in one machine on v5e and v6e, else 4."""
    if topology.chip.axes == 2 and topology.chips <= 8:
        return topology.chips
    return 4


def slices(text: str) -> tuple[str, dict[str, str]]:
    """`v5p:4x4x4,tok=v5p:2x2x1` -> ("v5p:4x4x4", {"tok": "v5p:2x2x1"}). Raises ConfigError where the first has a name, or another none."""
    first, *others = text.split(",")
    if "=" in first or not all("=" in each for each in others):
        raise ConfigError(f"--topology {text!r}; give the slice of most jobs first, then STAGE=SLICE of others: v5p:4x4x4,tok=v5p:2x2x1")
    return first, dict(each.strip().split("=", 1) for each in others)


def slice_of(pod: Pod) -> Topology:
    """The pod's topology. Raises ConfigError where GKE has no such slices."""
    topology = parse_topology(pod.topology)
    if topology.kind not in ACCELERATORS or topology.chips % chips_per_host(topology):
        raise ConfigError(f"--topology {pod.topology!r} is no TPU slice of whole machines; such as v5p:2x2x1, v6e:4x4")
    return topology


def jobset(name: str, command: Sequence[str], pod: Pod) -> dict:
    """The JobSet of this name whose pods, one a host of the slice, all run `command` in the image.

    A pod that fails ends its job, and all start again, since hosts go on from a checkpoint together; except after NEVER_AGAIN.
    Raises ConfigError on an incomplete `pod`.
    """
    if not pod.image:
        raise ConfigError("--image is needed to run on GKE")
    if not pod.bucket and not re.search(r" --out[= ]\w+://", " ".join(command)):
        raise ConfigError("--bucket is needed to run on GKE, unless --out is an address such as gs://BUCKET/runs")
    topology = slice_of(pod)
    hosts = topology.chips // chips_per_host(topology)
    container = {
        "name": CONTAINER,
        "image": pod.image,
        "command": ["tpu/env.sh", topology.kind, *command],
        "env": [{"name": name, "value": value} for name, value in
                (("HHJAX_CACHE", f"{MOUNT}/cache" if pod.bucket else ""), ("HHJAX_DATA", pod.data)) if value],
        "ports": [{"containerPort": 8471}, {"containerPort": 8080}],
        "resources": {"limits": {"google.com/tpu": chips_per_host(topology)}},
    }
    bucket = {  # without a cache: hosts must see each other's files
        "driver": "gcsfuse.csi.storage.gke.io",
        "volumeAttributes": {"bucketName": pod.bucket, "mountOptions": "implicit-dirs,metadata-cache:ttl-secs:0"},
    }
    pod_spec = {
        "restartPolicy": "Never",  # which podFailurePolicy asks for
        "terminationGracePeriodSeconds": 120,
        "serviceAccountName": pod.service_account,
        "nodeSelector": {
            "cloud.google.com/gke-tpu-accelerator": ACCELERATORS[topology.kind],
            "cloud.google.com/gke-tpu-topology": "x".join(map(str, topology.shape)),
        },
        "containers": [container],
    }
    if pod.bucket:
        container["volumeMounts"] = [{"name": "runs", "mountPath": MOUNT}]
        pod_spec["volumes"] = [{"name": "runs", "csi": bucket}]
    job_spec = {
        "parallelism": hosts,
        "completions": hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {
            "rules": [{"action": "FailJob", "onExitCodes": {"containerName": CONTAINER, "operator": "In", "values": NEVER_AGAIN}}]
        },
        "template": {"metadata": {"annotations": {"gke-gcsfuse/volumes": str(bool(pod.bucket)).lower()}}, "spec": pod_spec},
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": name,
            "namespace": pod.namespace,
            "labels": {"kueue.x-k8s.io/queue-name": pod.queue, "app": "hhjax"},
            # One slice is one node pool, and no two jobs share one.
            "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
        },
        "spec": {
            "failurePolicy": {
                "maxRestarts": pod.restarts,
                "rules": [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
            },
            "replicatedJobs": [{"name": "slice", "replicas": 1, "template": {"spec": job_spec}}],
        },
    }


def kueue(pod: Pod, slices: int) -> list[dict]:
    """The queue that JobSets wait in while so many slices are busy: a flavor of nodes, a cluster's quota, a namespace's queue."""
    topology, api = slice_of(pod), "kueue.x-k8s.io/v1beta1"
    flavor = f"{pod.queue}-{topology.kind}"
    labels = {"cloud.google.com/gke-tpu-accelerator": ACCELERATORS[topology.kind]}
    quota = {"name": "google.com/tpu", "nominalQuota": slices * topology.chips}
    group = {"coveredResources": ["google.com/tpu"], "flavors": [{"name": flavor, "resources": [quota]}]}
    return [
        {"apiVersion": api, "kind": "ResourceFlavor", "metadata": {"name": flavor}, "spec": {"nodeLabels": labels}},
        {"apiVersion": api, "kind": "ClusterQueue", "metadata": {"name": pod.queue},
         "spec": {"namespaceSelector": {}, "resourceGroups": [group]}},
        {"apiVersion": api, "kind": "LocalQueue", "metadata": {"name": pod.queue, "namespace": pod.namespace},
         "spec": {"clusterQueue": pod.queue}},
    ]  # fmt: skip


def to_yaml(*documents: dict) -> str:
    return yaml.safe_dump_all(documents, sort_keys=False, width=math.inf)


def main(argv: Sequence[str]) -> int:
    """`run [flags] -- COMMAND` or `queue [flags] --slices N`: prints YAML. Returns the exit code."""
    kind, *flags = argv or [""]
    split = flags.index("--") if "--" in flags else len(flags)
    flags, command = flags[:split], flags[split + 1 :]
    try:
        if kind == "queue":
            pod = tyro.cli(Queue, args=flags, prog="hhjax.jobset queue")
            print(to_yaml(*kueue(pod, pod.slices)), end="")
        elif kind == "run" and command:
            named = tyro.cli(Named, args=flags, prog="hhjax.jobset run")
            print(to_yaml(jobset(named.name, command, named)), end="")
        else:
            print(__doc__, file=sys.stderr)
            return 2
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


@dataclass(frozen=True)
class Queue(Pod):
    slices: int = 1
    """How many slices may be busy at once."""


@dataclass(frozen=True)
class Named(Pod):
    name: str = "hhjax"
    """The JobSet's name."""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
