"""The objects of Kubernetes that manifests in scripts/launch/kubernetes are made of, field by field.

Names, types and which are required are those of the published APIs: JobSet ``jobset.x-k8s.io/v1alpha2``,
LeaderWorkerSet ``leaderworkerset.x-k8s.io/v1``, ``batch/v1`` Job, ``v1`` Service and pod. The API server drops a field
that it does not know without a word, so a manifest is refused here for any: ``msgspec.convert(document, JobSet)``. Of
pods and containers there are the fields that a job of this kind may want.
"""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

Name = Annotated[str, Meta(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=63)]
Count = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Quantity = Annotated[int, Meta(ge=0)] | Annotated[str, Meta(pattern=r"^[0-9.]+(m|[kMGTPE]i?)?$")]


class Known(msgspec.Struct, rename="camel", forbid_unknown_fields=True, kw_only=True, frozen=True):
    """Has these fields and no others."""


class Metadata(Known):
    name: Name | None = None
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}


class FieldRef(Known):
    field_path: str
    api_version: str | None = None


class KeyRef(Known):
    key: str
    name: str
    optional: bool = False


class ValueFrom(Known):
    field_ref: FieldRef | None = None
    secret_key_ref: KeyRef | None = None
    config_map_key_ref: KeyRef | None = None


class Env(Known):
    name: Annotated[str, Meta(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
    value: str | None = None
    value_from: ValueFrom | None = None

    def __post_init__(self) -> None:
        if (self.value is None) == (self.value_from is None):
            raise ValueError(f"variable {self.name} has both value and valueFrom, or neither")


class Resources(Known):
    limits: dict[str, Quantity] = {}
    requests: dict[str, Quantity] = {}


class Mount(Known):
    name: Name
    mount_path: str
    read_only: bool = False
    sub_path: str | None = None


class Container(Known):
    name: Name
    image: str
    command: list[str] = []
    args: list[str] = []
    env: list[Env] = []
    resources: Resources | None = None
    volume_mounts: list[Mount] = []
    working_dir: str | None = None
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] | None = None
    ports: list[dict[str, Any]] = []
    readiness_probe: dict[str, Any] | None = None
    liveness_probe: dict[str, Any] | None = None
    security_context: dict[str, Any] | None = None


class EmptyDir(Known):
    medium: Literal["", "Memory", "HugePages"] = ""
    size_limit: Quantity | None = None


class Volume(Known):
    name: Name
    empty_dir: EmptyDir | None = None
    host_path: dict[str, Any] | None = None
    persistent_volume_claim: dict[str, Any] | None = None
    nfs: dict[str, Any] | None = None


class PodSpec(Known):
    containers: Annotated[list[Container], Meta(min_length=1)]
    volumes: list[Volume] = []
    restart_policy: Literal["Always", "OnFailure", "Never"] = "Always"
    termination_grace_period_seconds: Count = 30
    subdomain: Name | None = None
    host_network: bool = False
    hostname: Name | None = None
    node_selector: dict[str, str] = {}
    tolerations: list[dict[str, Any]] = []
    affinity: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        mounted = {mount.name for container in self.containers for mount in container.volume_mounts}
        if missing := mounted - {volume.name for volume in self.volumes}:
            raise ValueError(f"no volumes of the names {sorted(missing)}")


class PodTemplate(Known):
    spec: PodSpec
    metadata: Metadata = Metadata()


class JobSpec(Known):
    template: PodTemplate
    completion_mode: Literal["Indexed", "NonIndexed"] = "NonIndexed"
    parallelism: Count = 1
    completions: Count | None = None
    backoff_limit: Count = 6
    backoff_limit_per_index: Count | None = None
    max_failed_indexes: Count | None = None
    active_deadline_seconds: Count | None = None
    ttl_seconds_after_finished: Count | None = None
    pod_failure_policy: dict[str, Any] | None = None
    pod_replacement_policy: Literal["Failed", "TerminatingOrFailed"] | None = None
    suspend: bool = False


class Job(Known):
    api_version: Literal["batch/v1"]
    kind: Literal["Job"]
    metadata: Metadata
    spec: JobSpec


class ServiceSpec(Known):
    selector: dict[str, str]
    cluster_ip: str | None = msgspec.field(default=None, name="clusterIP")
    publish_not_ready_addresses: bool = False
    ports: list[dict[str, Any]] = []


class Service(Known):
    api_version: Literal["v1"]
    kind: Literal["Service"]
    metadata: Metadata
    spec: ServiceSpec


class Coordinator(Known):
    replicated_job: Name
    job_index: Count = 0
    pod_index: Count = 0


class FailurePolicy(Known):
    max_restarts: Count = 0
    restart_strategy: Literal["Recreate", "BlockingRecreate", "InPlaceRestart"] = "Recreate"
    rules: list[dict[str, Any]] = []


class Network(Known):
    enable_dns_hostnames: bool = msgspec.field(default=True, name="enableDNSHostnames")
    publish_not_ready_addresses: bool = True
    subdomain: Name | None = None


class JobTemplate(Known):
    spec: JobSpec
    metadata: Metadata = Metadata()


class ReplicatedJob(Known):
    name: Name
    template: JobTemplate
    replicas: Count = 1
    group_name: str = "default"
    depends_on: list[dict[str, str]] = []


class JobSetSpec(Known):
    replicated_jobs: list[ReplicatedJob]
    coordinator: Coordinator | None = None
    failure_policy: FailurePolicy | None = None
    network: Network | None = None
    success_policy: dict[str, Any] | None = None
    startup_policy: dict[str, Any] | None = None
    suspend: bool = False
    ttl_seconds_after_finished: Count | None = None


class JobSet(Known):
    api_version: Literal["jobset.x-k8s.io/v1alpha2"]
    kind: Literal["JobSet"]
    metadata: Metadata
    spec: JobSetSpec


class Group(Known):
    worker_template: PodTemplate
    leader_template: PodTemplate | None = None
    size: Count = 1
    restart_policy: Literal["Default", "RecreateGroupOnPodRestart", "RecreateGroupAfterStart", "None"] | None = None
    sub_group_policy: dict[str, Any] | None = None


class LeaderWorkerSetSpec(Known):
    leader_worker_template: Group
    replicas: Count = 1
    startup_policy: Literal["LeaderCreated", "LeaderReady"] = "LeaderCreated"
    rollout_strategy: dict[str, Any] | None = None
    network_config: dict[str, Any] | None = None


class LeaderWorkerSet(Known):
    api_version: Literal["leaderworkerset.x-k8s.io/v1"]
    kind: Literal["LeaderWorkerSet"]
    metadata: Metadata
    spec: LeaderWorkerSetSpec
