"""Manifests for Kubernetes: fields as the APIs define them, and who each pod finds that it is."""

import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from spmd_infer.multihost.detection import detect
from spmd_infer.multihost.secret import job_secret
from tests.multihost.kubernetes_types import Container, Job, JobSet, LeaderWorkerSet, Service

MANIFESTS = Path("scripts/launch/kubernetes")
KINDS = {"jobset.yaml": (JobSet,), "leaderworkerset.yaml": (LeaderWorkerSet,), "job.yaml": (Service, Job)}


def documents(name: str) -> list[Any]:
    return list(yaml.safe_load_all((MANIFESTS / name).read_text()))


def read(name: str) -> list[Any]:
    """A manifest's objects; raises where a field is unknown, missing or of another type."""
    return [msgspec.convert(document, kind) for document, kind in zip(documents(name), KINDS[name], strict=True)]


def environment(container: Container, annotations: dict[str, str]) -> dict[str, str]:
    """What a container's variables come to in a pod with these annotations."""
    env = {}
    for entry in container.env:
        if entry.value_from is None:
            env[entry.name] = entry.value or ""
        elif entry.value_from.secret_key_ref is not None:
            assert (entry.value_from.secret_key_ref.name, entry.value_from.secret_key_ref.key) == (
                "spmd-infer-job", "secret",
            )  # fmt: skip
            env[entry.name] = "0123456789abcdef"
        else:
            assert entry.value_from.field_ref is not None
            path = re.fullmatch(r"metadata\.annotations\['(.+)'\]", entry.value_from.field_ref.field_path)
            env[entry.name] = annotations[path[1]]  # type: ignore[index]  # it matches, or the manifest is wrong
    return env


def test_every_manifest_has_the_fields_of_its_api() -> None:
    assert sorted(path.name for path in MANIFESTS.iterdir()) == sorted(KINDS)
    for name in KINDS:
        for found in read(name):
            assert found.metadata.name == "spmd-infer"
        assert len((MANIFESTS / name).read_text().splitlines()) <= 45


def containers(node: Any) -> list[dict[str, Any]]:
    if isinstance(node, dict):
        return node.get("containers", []) + [found for part in node.values() for found in containers(part)]
    return [found for part in node for found in containers(part)] if isinstance(node, list) else []


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"enviroment": []}, "unknown field `enviroment`"),
        ({"command": "python program.py"}, "Expected `array`, got `str`"),
        ({"volumeMounts": [{"name": "data", "mountPath": "/data"}]}, r"no volumes of the names \['data'\]"),
        ({"env": [{"name": "A", "value": 4}]}, "Expected `str | null`, got `int`"),
        ({"resources": {"limits": {"nvidia.com/gpu": "eight"}}}, "matching regex"),
    ],
)
def test_a_field_that_is_wrong_is_refused(name: str, change: dict[str, Any], message: str) -> None:
    *_, document = documents(name)
    (container,) = containers(document)
    container |= change
    with pytest.raises(msgspec.ValidationError, match=message):
        msgspec.convert(document, KINDS[name][-1])


def test_pods_of_a_jobset() -> None:
    """With what the controller adds: the index as a variable, the names and the coordinator as annotations."""
    (found,) = read("jobset.yaml")
    (workers,) = found.spec.replicated_jobs
    job = workers.template.spec
    assert (job.completion_mode, job.backoff_limit, job.template.spec.restart_policy) == ("Indexed", 0, "Never")
    assert found.spec.failure_policy.max_restarts == 5
    (container,) = job.template.spec.containers
    first = f"{found.metadata.name}-{workers.name}-0-0.{found.metadata.name}"
    annotations = {"jobset.sigs.k8s.io/coordinator": first, "jobset.sigs.k8s.io/jobset-name": found.metadata.name}
    for rank in range(job.parallelism):
        env = environment(container, annotations) | {"JOB_COMPLETION_INDEX": str(rank)}
        place = detect(env)
        assert (place.rank, place.size, place.host) == (rank, job.completions, first)
        assert place.source.startswith("Kubernetes JobSet")
        assert job_secret(env) == b"0123456789abcdef"


def test_pods_of_a_group() -> None:
    (found,) = read("leaderworkerset.yaml")
    group = found.spec.leader_worker_template
    (container,) = group.worker_template.spec.containers
    added = {"LWS_LEADER_ADDRESS": "spmd-infer-0.spmd-infer.default", "LWS_GROUP_SIZE": str(group.size)}
    for rank in range(group.size):
        place = detect(environment(container, {}) | added | {"LWS_WORKER_INDEX": str(rank)})
        assert (place.rank, place.size, place.host) == (rank, 2, added["LWS_LEADER_ADDRESS"])


def test_pods_of_a_plain_job() -> None:
    service, found = read("job.yaml")
    pod = found.spec.template.spec
    # A pod has a name of its own where its subdomain is a headless service that selects it, ready or not.
    assert (pod.subdomain, service.spec.cluster_ip) == (service.metadata.name, "None")
    assert service.spec.publish_not_ready_addresses
    assert service.spec.selector == {"batch.kubernetes.io/job-name": found.metadata.name}
    (container,) = pod.containers
    first = f"{found.metadata.name}-0.{service.metadata.name}"
    for rank in range(found.spec.completions):
        place = detect(environment(container, {}) | {"JOB_COMPLETION_INDEX": str(rank)})
        assert (place.rank, place.size, place.host) == (rank, found.spec.parallelism, first)
    assert found.spec.backoff_limit >= found.spec.completions  # each restart is a failure of every pod
