"""Kubernetes files for KubeRay: a RayCluster, and a RayJob whose retry is a resume."""

import re
from dataclasses import dataclass
from typing import Any, Literal

from cluster.shapes import (
    STOP_GRACE_S,
    ClusterShape,
    Head,
    WorkerGroup,
    node_env,
    node_labels,
    refuse,
    resume_command,
    shm_gb,
)

_USER_ID = 1000
"""Of the image's user."""
_DNS_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")
_PORTS = {"gcs-server": 6379, "dashboard": 8265, "client": 10001}

Platform = Literal["", "gke", "eks", "aks", "karpenter"]
_SPOT_LABELS = {
    "gke": ("cloud.google.com/gke-spot", "true"),
    "eks": ("eks.amazonaws.com/capacityType", "SPOT"),
    "aks": ("kubernetes.azure.com/scalesetpriority", "spot"),
    "karpenter": ("karpenter.sh/capacity-type", "spot"),
}
"""How nodes that may be taken away are labelled, and tainted where they are."""
_GPU_LABELS = {"gke": "cloud.google.com/gke-accelerator", "karpenter": "karpenter.k8s.aws/instance-gpu-name"}
_ANY_GPU_LABEL = "nvidia.com/gpu.product"
"""Set by NVIDIA's feature discovery."""


@dataclass(frozen=True)
class Kubernetes:
    """What Kubernetes has to know beside the shape.  Secrets are named, never held."""

    namespace: str = "default"
    platform: Platform = ""
    """Whose labels tell spot nodes and kinds of GPUs."""
    token_secret: str = ""
    """A Secret with the key ``auth_token``; without one KubeRay makes a token for each cluster."""
    env_secret: str = ""
    """A Secret whose keys become environment variables: credentials of the store, WANDB_API_KEY."""
    store_claim: str = ""
    """A PersistentVolumeClaim (ReadWriteMany) that holds a store which is a path."""
    service_account: str = ""
    """Of the pods, where it gives access to the store without a key."""
    retries: int = 3
    """New clusters for a RayJob that failed; retries of stages come first, and are counted in the store."""
    keep_s: int = 600
    """How long the cluster of a finished RayJob stays."""

    def __post_init__(self) -> None:
        """Refuse what Kubernetes would refuse later."""
        for name in ("namespace", "token_secret", "env_secret", "store_claim", "service_account"):
            value = getattr(self, name)
            if (value or name == "namespace") and not _DNS_NAME.fullmatch(value):
                raise refuse(
                    f"kubernetes.{name}", value, "the name of an object is needed: lower case, digits, '-', '.'"
                )
        if self.platform and self.platform not in _SPOT_LABELS:
            raise refuse("kubernetes.platform", self.platform, f"{', '.join(_SPOT_LABELS)} are known; or leave it out")
        for name in ("retries", "keep_s"):
            if type(value := getattr(self, name)) is not int or value < 0:
                raise refuse(f"kubernetes.{name}", value, "a whole number from 0 is needed")


def ray_cluster(shape: ClusterShape, kubernetes: Kubernetes) -> dict[str, Any]:
    """A cluster that stays, for ``dlm submit``."""
    return _object("RayCluster", shape, kubernetes, _cluster_spec(shape, kubernetes))


def ray_job(shape: ClusterShape, kubernetes: Kubernetes, run: str) -> dict[str, Any]:
    """A cluster for one run: each retry is a new cluster in which the run is resumed.

    KubeRay retries whatever failed, whatever its exit code was.  A job that was stopped is complete to it, so that is
    how a run ends that another cluster would do no good.
    """
    spec = {
        "entrypoint": f"{resume_command(run, shape.store)} --stop-own-job",
        "submissionMode": "K8sJobMode",
        "backoffLimit": kubernetes.retries,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": kubernetes.keep_s,
        "rayClusterSpec": _cluster_spec(shape, kubernetes),
    }
    return _object("RayJob", shape, kubernetes, spec)


def _object(kind: str, shape: ClusterShape, kubernetes: Kubernetes, spec: dict[str, Any]) -> dict[str, Any]:
    metadata = {
        "name": shape.name,
        "namespace": kubernetes.namespace,
        "labels": {"app.kubernetes.io/name": "dlm", "app.kubernetes.io/instance": shape.name},
    }
    return {"apiVersion": "ray.io/v1", "kind": kind, "metadata": metadata, "spec": spec}


def _cluster_spec(shape: ClusterShape, kubernetes: Kubernetes) -> dict[str, Any]:
    if not shape.image:
        raise refuse("image", "", "Kubernetes needs one: build it from cluster/manifests/Dockerfile, and name it here")
    if shape.store.startswith("/") != bool(kubernetes.store_claim):
        claim = kubernetes.store_claim
        allowed = f"store is {shape.store}: a path needs the claim that holds it, and a bucket needs none"
        raise refuse("kubernetes.store_claim", claim, allowed)
    auth = {"mode": "token"} | ({"secretName": kubernetes.token_secret} if kubernetes.token_secret else {})
    spec: dict[str, Any] = {
        "rayVersion": shape.ray_version,
        "authOptions": auth,
        "enableInTreeAutoscaling": shape.is_elastic,
        "headGroupSpec": {
            "labels": node_labels(shape),
            "rayStartParams": {},
            "template": _pod(shape, kubernetes, None),
        },
        "workerGroupSpecs": [_worker_group(shape, kubernetes, group) for group in shape.workers],
    }
    if shape.is_elastic:
        spec["autoscalerOptions"] = {"version": "v2", "idleTimeoutSeconds": 600}
    return spec


def _worker_group(shape: ClusterShape, kubernetes: Kubernetes, group: WorkerGroup) -> dict[str, Any]:
    low, high = group.bounds
    return {
        "groupName": group.name,
        "replicas": group.count,
        "minReplicas": low,
        "maxReplicas": high,
        "labels": node_labels(shape, group),
        "rayStartParams": {},
        "template": _pod(shape, kubernetes, group),
    }


def _pod(shape: ClusterShape, kubernetes: Kubernetes, group: WorkerGroup | None) -> dict[str, Any]:
    """The pods of a group, or of the head; Ray reads its sizes from the limits of the container."""
    node = group or shape.head
    volumes, mounts = _volumes(shape, kubernetes, node)
    sizes = {"cpu": str(node.cpus), "memory": _quantity(node.memory_gb)}
    if group and group.gpus:
        sizes["nvidia.com/gpu"] = str(group.gpus)
    container: dict[str, Any] = {
        "name": "ray-worker" if group else "ray-head",
        "image": shape.image,
        "env": [{"name": name, "value": value} for name, value in node_env(shape).items()],
        "resources": {"limits": sizes, "requests": dict(sizes)},
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        "volumeMounts": mounts,
    }
    if kubernetes.env_secret:
        container["envFrom"] = [{"secretRef": {"name": kubernetes.env_secret}}]
    if group is None:
        container["ports"] = [{"name": name, "containerPort": port} for name, port in _PORTS.items()]
    spec: dict[str, Any] = {
        "containers": [container],
        "volumes": volumes,
        "securityContext": {"runAsNonRoot": True, "runAsUser": _USER_ID, "fsGroup": _USER_ID},
        "terminationGracePeriodSeconds": STOP_GRACE_S,
        **_placement(kubernetes, group),
    }
    if kubernetes.service_account:
        spec["serviceAccountName"] = kubernetes.service_account
    return {"spec": spec}


def _volumes(
    shape: ClusterShape, kubernetes: Kubernetes, node: Head | WorkerGroup
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    memory = {"medium": "Memory", "sizeLimit": _quantity(shm_gb(shape, node))}
    volumes: list[dict[str, Any]] = [{"name": "shm", "emptyDir": memory}]
    mounts = [{"name": "shm", "mountPath": "/dev/shm"}]
    if kubernetes.store_claim:
        volumes.append({"name": "store", "persistentVolumeClaim": {"claimName": kubernetes.store_claim}})
        mounts.append({"name": "store", "mountPath": shape.store})
    return volumes, mounts


def _placement(kubernetes: Kubernetes, group: WorkerGroup | None) -> dict[str, Any]:
    """On which nodes: spot groups on spot nodes and nothing else there, GPUs of a kind where they are."""
    selector: dict[str, str] = {}
    tolerations: list[dict[str, str]] = []
    placement: dict[str, Any] = {}
    if group and group.is_spot:
        if not kubernetes.platform:
            allowed = f"{group.name} is a spot group, and platforms name such nodes differently"
            raise refuse("kubernetes.platform", "", f"{allowed}: {', '.join(_SPOT_LABELS)} are known")
        key, value = _SPOT_LABELS[kubernetes.platform]
        selector[key] = value
        tolerations.append({"key": key, "operator": "Equal", "value": value, "effect": "NoSchedule"})
    elif kubernetes.platform:
        key, value = _SPOT_LABELS[kubernetes.platform]
        term = {"matchExpressions": [{"key": key, "operator": "NotIn", "values": [value]}]}
        required = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [term]}}
        placement["affinity"] = {"nodeAffinity": required}
    if group and group.gpus:
        tolerations.append({"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"})
    if group and group.gpu_kind:
        selector[_GPU_LABELS.get(kubernetes.platform, _ANY_GPU_LABEL)] = group.gpu_kind
    if selector:
        placement["nodeSelector"] = selector
    if tolerations:
        placement["tolerations"] = tolerations
    return placement


def _quantity(gigabytes: float) -> str:
    return f"{round(gigabytes * 1000)}M"
