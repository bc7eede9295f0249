"""The manifests of k8s/, as kustomize renders them, against Kubernetes' own schema and against the program."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from trainer.ppo_config import PPOSettings

ROOT = Path(__file__).resolve().parents[3]
OVERLAYS = ["base", "overlays/local", "overlays/gpu"]
ADMIN_PORTS = {"policy": 50061, "reward": 50062}
SECURED = {"overlay": "overlays/local", "component": "components/security"}

Document = dict[str, Any]


@dataclass(frozen=True)
class Rendered:
    """The documents of one overlay."""

    overlay: str
    documents: list[Document]

    def all(self, *kinds: str) -> list[Document]:
        return [document for document in self.documents if document["kind"] in kinds]

    def one(self, kind: str, name: str) -> Document:
        found = [document for document in self.all(kind) if document["metadata"]["name"] == name]
        assert len(found) == 1, f"{self.overlay} has {len(found)} {kind} named {name}"
        return found[0]

    def environment(self, workload: Document) -> dict[str, str]:
        """What the container sees, fields of its resources resolved as the kubelet does."""
        container = container_of(workload)
        seen: dict[str, str] = {}
        for source in container.get("envFrom", []):
            seen |= self.one("ConfigMap", source["configMapRef"]["name"])["data"]
        for variable in container.get("env", []):
            if "value" in variable:
                seen[variable["name"]] = variable["value"]
            else:
                kind, resource = variable["valueFrom"]["resourceFieldRef"]["resource"].split(".")
                amount = container["resources"][kind][resource]
                assert amount.isdigit(), f"{amount} processors are no whole number of threads"
                seen[variable["name"]] = amount
        return seen


@pytest.fixture(scope="module", params=OVERLAYS)
def rendered(request: pytest.FixtureRequest) -> Rendered:
    return render(request.param)


def render(overlay: str) -> Rendered:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed: the manifests are not rendered")
    version = subprocess.run(
        ["kubectl", "version", "--client", "--output", "json"], capture_output=True, text=True, check=True
    )
    kustomize = json.loads(version.stdout).get("kustomizeVersion", "v2")
    if int(kustomize.removeprefix("v").split(".")[0]) < 4:
        pytest.skip(f"kubectl's kustomize is {kustomize}, components and patches need v4 or newer (kubectl 1.21)")
    command = ["kubectl", "kustomize", str(ROOT / "k8s" / overlay)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stderr == "", "kustomize warns"
    return Rendered(overlay, list(yaml.safe_load_all(result.stdout)))


def pod_of(workload: Document) -> Document:
    return workload["spec"]["template"]["spec"]


def container_of(workload: Document) -> Document:
    (container,) = pod_of(workload)["containers"]
    return container


def workload_of(rendered: Rendered, component: str) -> Document:
    return rendered.one("Job" if component == "trainer" else "Deployment", f"quartet-{component}")


def selected(rendered: Rendered, selector: dict[str, str]) -> list[Document]:
    """The workloads whose pods have the labels."""
    return [
        workload
        for workload in rendered.all("Deployment", "Job")
        if selector.items() <= workload["spec"]["template"]["metadata"]["labels"].items()
    ]


def ports_of(workload: Document) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for port in container_of(workload)["ports"]}


def gibibytes(quantity: str) -> float:
    factor = {"Gi": 1.0, "Mi": 1 / 1024}[quantity[-2:]]
    return float(quantity[:-2]) * factor


def test_every_document_is_valid_and_has_no_unknown_field(rendered):
    assert rendered.documents
    for document in rendered.documents:
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


def test_the_pod_for_files_is_valid():
    (document,) = yaml.safe_load_all((ROOT / "k8s" / "files.yaml").read_text())
    kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


def test_there_are_three_services_and_a_trainer(rendered):
    names = sorted(workload["metadata"]["name"] for workload in rendered.all("Deployment", "Job"))
    assert names == ["quartet-policy", "quartet-reference", "quartet-reward", "quartet-trainer"]


@pytest.mark.parametrize("component", ["policy", "reward", "reference"])
def test_the_environment_is_settings_that_the_service_accepts_and_listens_by(
    rendered, component, services, read_settings
):
    workload = workload_of(rendered, component)
    service = services[component]
    settings = read_settings(service.settings, rendered.environment(workload))
    assert settings.host == "0.0.0.0", "the pod's address is not loopback"
    expected = {"grpc": settings.port, "metrics": settings.metrics_port}
    if component in ("policy", "reward"):
        expected["admin"] = settings.admin_port
    assert ports_of(workload) == expected
    assert pod_of(workload)["terminationGracePeriodSeconds"] > settings.grace_s
    assert settings.threads == int(container_of(workload)["resources"]["limits"]["cpu"])
    assert settings.model.startswith("/models/")


def test_kubernetes_adds_no_variables_that_would_be_read_as_settings(rendered):
    # A Service quartet-policy with a cluster address would set QUARTET_POLICY_PORT=tcp://10.0.0.1:50051 in every pod.
    for workload in rendered.all("Deployment", "Job"):
        assert pod_of(workload)["enableServiceLinks"] is False


@pytest.mark.parametrize("component", ["policy", "reward", "reference"])
def test_probes_ask_for_the_service_by_name_and_liveness_for_the_process(rendered, component, services):
    container = container_of(workload_of(rendered, component))
    name, port = services[component].health, ports_of(workload_of(rendered, component))["grpc"]
    assert container["startupProbe"]["grpc"] == {"port": port, "service": name}
    assert container["readinessProbe"]["grpc"] == {"port": port, "service": name}
    assert container["livenessProbe"]["grpc"] == {"port": port, "service": ""}


def test_pods_are_confined(rendered):
    for workload in rendered.all("Deployment", "Job"):
        pod, container = pod_of(workload), container_of(workload)
        context = pod["securityContext"]
        assert context["runAsNonRoot"] is True
        assert context["runAsUser"] == context["runAsGroup"] == context["fsGroup"] == 10001
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert pod["automountServiceAccountToken"] is False
        account = rendered.one("ServiceAccount", pod["serviceAccountName"])
        assert account["automountServiceAccountToken"] is False
        assert {"hostNetwork", "hostPID", "hostIPC"}.isdisjoint(pod)


def test_the_namespace_of_an_overlay_enforces_the_restricted_standard(rendered):
    if rendered.overlay == "base":
        assert not rendered.all("Namespace")
        return
    (namespace,) = rendered.all("Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    others = [document for document in rendered.documents if document["kind"] != "Namespace"]
    assert {document["metadata"]["namespace"] for document in others} == {namespace["metadata"]["name"]}


def test_with_a_read_only_root_everything_written_has_a_volume(rendered):
    for workload in rendered.all("Deployment", "Job"):
        pod, container = pod_of(workload), container_of(workload)
        mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert {mount["name"] for mount in mounts.values()} == set(volumes)
        assert "emptyDir" in volumes[mounts["/tmp"]["name"]]
        assert not mounts["/tmp"].get("readOnly", False)
        for volume in volumes.values():
            if "persistentVolumeClaim" in volume:
                rendered.one("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"])


def test_weights_are_staged_in_memory_that_the_pod_is_allowed(rendered):
    policy = workload_of(rendered, "policy")
    mount = next(mount for mount in container_of(policy)["volumeMounts"] if mount["mountPath"] == "/dev/shm")
    volume = next(volume for volume in pod_of(policy)["volumes"] if volume["name"] == mount["name"])
    assert volume["emptyDir"]["medium"] == "Memory"
    staged = gibibytes(volume["emptyDir"]["sizeLimit"])
    # Half of what the kubelet would end the pod for remains for the engine.
    assert 1 <= staged <= 0.5 * gibibytes(container_of(policy)["resources"]["limits"]["memory"])


def test_requests_do_not_exceed_limits(rendered):
    for workload in rendered.all("Deployment", "Job"):
        resources = container_of(workload)["resources"]
        assert gibibytes(resources["requests"]["memory"]) <= gibibytes(resources["limits"]["memory"])


def test_deployments_select_their_own_pods_alone(rendered):
    for deployment in rendered.all("Deployment"):
        assert selected(rendered, deployment["spec"]["selector"]["matchLabels"]) == [deployment]


def test_services_are_headless_and_lead_to_ports_of_one_workload(rendered):
    names = {service["metadata"]["name"] for service in rendered.all("Service")}
    assert names == {"quartet-policy", "quartet-policy-admin", "quartet-reward", "quartet-reference"}
    for service in rendered.all("Service"):
        spec = service["spec"]
        assert spec["clusterIP"] == "None", "gRPC clients balance over the pods' addresses themselves"
        (workload,) = selected(rendered, spec["selector"])
        for port in spec["ports"]:
            # A headless Service does not translate ports.
            assert ports_of(workload)[port["targetPort"]] == port["port"]


@pytest.mark.parametrize(("component", "admins"), [("policy", "quartet-trainer"), ("reward", "quartet-reward-admin")])
def test_only_those_who_may_reach_an_admin_port(rendered, component, admins):
    policy = rendered.one("NetworkPolicy", f"quartet-{component}")
    assert selected(rendered, policy["spec"]["podSelector"]["matchLabels"]) == [workload_of(rendered, component)]
    assert policy["spec"]["policyTypes"] == ["Ingress"]

    def reaches(labels: dict[str, str], port: int) -> bool:
        return any(
            port in [entry["port"] for entry in rule["ports"]]
            and all(source["podSelector"]["matchLabels"].items() <= labels.items() for source in rule.get("from", []))
            for rule in policy["spec"]["ingress"]
        )

    ports = ports_of(workload_of(rendered, component))
    assert ports["admin"] == ADMIN_PORTS[component]
    assert reaches({"app.kubernetes.io/name": admins}, ports["admin"])
    pods = [workload["spec"]["template"]["metadata"]["labels"] for workload in rendered.all("Deployment", "Job")]
    for labels in [*pods, {}]:
        assert reaches(labels, ports["admin"]) == (labels.get("app.kubernetes.io/name") == admins)
        assert reaches(labels, ports["grpc"])
        assert reaches(labels, ports["metrics"])


def test_every_admin_port_has_its_network_policy(rendered):
    guarded = sorted(policy["metadata"]["name"] for policy in rendered.all("NetworkPolicy"))
    assert guarded == [f"quartet-{component}" for component in ADMIN_PORTS]


def test_prometheus_finds_the_metrics_port(rendered, services):
    for component, service in services.items():
        annotations = workload_of(rendered, component)["spec"]["template"]["metadata"]["annotations"]
        assert annotations["prometheus.io/scrape"] == "true"
        assert annotations["prometheus.io/port"] == str(service.port("metrics_port"))


def test_disruption_budgets_cover_what_can_have_replicas(rendered):
    budgets = rendered.all("PodDisruptionBudget")
    covered = [selected(rendered, budget["spec"]["selector"]["matchLabels"]) for budget in budgets]
    assert covered == [[workload_of(rendered, "reference")], [workload_of(rendered, "reward")]]
    assert all(budget["spec"]["maxUnavailable"] == 1 for budget in budgets)


def test_the_policy_is_never_two_pods_with_different_weights(rendered):
    spec = workload_of(rendered, "policy")["spec"]
    assert spec["replicas"] == 1
    assert spec["strategy"] == {"type": "Recreate"}


def test_images_are_targets_of_the_dockerfile_at_the_version_of_the_project(rendered):
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    tag = {"base": version, "overlays/local": "local", "overlays/gpu": f"{version}-cuda"}[rendered.overlay]
    for component in ("policy", "reward", "reference", "trainer"):
        assert container_of(workload_of(rendered, component))["image"] == f"quartet-{component}:{tag}"


def test_gpus_are_asked_for_in_the_gpu_overlay_alone(rendered):
    for workload in rendered.all("Deployment", "Job"):
        limits = container_of(workload)["resources"]["limits"]
        if rendered.overlay == "overlays/gpu":
            assert limits["nvidia.com/gpu"] == "1"
            assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in pod_of(workload)[
                "tolerations"
            ]
        else:
            assert "nvidia.com/gpu" not in limits


def test_with_gpus_an_update_needs_no_spare_one_and_vllm_is_required(services, read_settings):
    rendered = render("overlays/gpu")
    for component in ("reward", "reference"):
        strategy = workload_of(rendered, component)["spec"]["strategy"]
        assert strategy["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}
    environment = rendered.environment(workload_of(rendered, "policy"))
    assert read_settings(services["policy"].settings, environment).engine == "vllm"


def test_the_trainer_waits_for_services_and_goes_on_after_each_new_start(rendered, read_settings):
    job = workload_of(rendered, "trainer")
    assert job["spec"]["backoffLimit"] >= 1
    assert pod_of(job)["restartPolicy"] == "OnFailure"
    settings = read_settings(PPOSettings, {}, container_of(job)["args"][1:])
    assert settings.resume is True
    for component in ("policy", "reward", "reference"):
        probe = container_of(workload_of(rendered, component))["startupProbe"]
        # It waits as long as a service that starts beside it may take to load.
        assert settings.ready_timeout_s >= probe["periodSeconds"] * probe["failureThreshold"]


def test_the_trainer_is_given_services_that_exist_and_folders_that_are_mounted(rendered, read_settings):
    job = workload_of(rendered, "trainer")
    arguments = container_of(job)["args"]
    assert arguments[0] == "ppo"
    settings = read_settings(PPOSettings, rendered.environment(job), arguments[1:])
    # As many admin addresses as the policy has replicas.
    (policy_admin,) = settings.policy_admin
    for address, name in (
        (settings.policy, "quartet-policy"),
        (policy_admin, "quartet-policy-admin"),
        (settings.reward, "quartet-reward"),
        (settings.reference, "quartet-reference"),
    ):
        (port,) = rendered.one("Service", name)["spec"]["ports"]
        assert address == f"dns:///{name}:{port['port']}"
    mounts = {mount["mountPath"]: mount for mount in container_of(job)["volumeMounts"]}
    for path in (settings.model, settings.critic, *settings.prompts, *settings.eval_prompts):
        assert str(path).startswith("/models/")
    assert str(settings.output).startswith("/runs/")
    assert not mounts["/runs"].get("readOnly", False)
    policy = rendered.environment(workload_of(rendered, "policy"))
    reference = rendered.environment(workload_of(rendered, "reference"))
    # PPO starts from the weights that the policy service has loaded, and is held near those of the reference.
    assert settings.model == policy["QUARTET_POLICY_MODEL"] == reference["QUARTET_REFERENCE_MODEL"]


@pytest.fixture
def secured(tmp_path: Path) -> Rendered:
    """The local overlay with the component security, in an overlay as a user would write it."""
    paths = {name: os.path.relpath(ROOT / "k8s" / path, tmp_path) for name, path in SECURED.items()}
    (tmp_path / "kustomization.yaml").write_text(
        "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\n"
        f"resources: [{paths['overlay']}]\ncomponents: [{paths['component']}]\n"
    )
    return render(str(tmp_path))


def credentials_of(workload: Document) -> set[str]:
    """Paths of the files that the container finds under /credentials."""
    (mount,) = [mount for mount in container_of(workload)["volumeMounts"] if mount["name"] == "credentials"]
    (volume,) = [volume for volume in pod_of(workload)["volumes"] if volume["name"] == "credentials"]
    assert mount["readOnly"] is True
    assert volume["projected"]["defaultMode"] == 0o440
    sources = [source["secret"] for source in volume["projected"]["sources"]]
    return {f"{mount['mountPath']}/{item['path']}" for secret in sources for item in secret["items"]}


def test_with_security_each_pod_has_the_secrets_that_its_settings_name_and_no_others(secured, services, read_settings):
    for document in secured.documents:
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)
    for component, service in services.items():
        workload = workload_of(secured, component)
        settings = read_settings(service.settings, secured.environment(workload))
        named = {settings.tls_cert, settings.tls_key, settings.token_file}
        if component in ("policy", "reward"):
            named.add(settings.admin_token_file)
        assert {str(path) for path in named} == credentials_of(workload)
    job = workload_of(secured, "trainer")
    settings = read_settings(PPOSettings, secured.environment(job), container_of(job)["args"][1:])
    # The key of the services is none of the trainer's business.
    named = {settings.tls_ca, settings.token_file, settings.admin_token_file}
    assert {str(path) for path in named} == credentials_of(job)
    assert settings.admin_security.encrypted


def test_with_security_probes_have_a_port_without_tls(secured, services, read_settings):
    for component, service in services.items():
        workload = workload_of(secured, component)
        port = read_settings(service.settings, secured.environment(workload)).health_port
        assert ports_of(workload)["health"] == port
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert container_of(workload)[probe]["grpc"]["port"] == port
