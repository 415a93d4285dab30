"""docker-compose.yml and what watches the server, against the house's rules and what is served.

tests/system/test_deployment.py asks Docker's and Prometheus's own programs about the same files.
"""

import json
import re
from pathlib import Path

import pytest
import yaml
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

from looktwice_clients import Inspector
from tests.clients.conftest import encoded, red
from tests.serving import Server

ROOT = Path(__file__).parents[1]
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text("utf-8"))
SERVICES = COMPOSE["services"]
MONITORING = ROOT / "docker" / "monitoring"
DASHBOARD = json.loads((MONITORING / "dashboards" / "looktwice.json").read_text("utf-8"))
ALERTS = yaml.safe_load((MONITORING / "alerts.yml").read_text("utf-8"))
EXPRESSIONS = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]] + [
    rule["expr"] for group in ALERTS["groups"] for rule in group["rules"]
]
PROMETHEUS_OWN = {"job", "instance"}


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


def test_a_server_has_the_time_to_load_and_keeps_what_it_downloaded():
    start = {name: SERVICES[name]["healthcheck"]["start_period"] for name in ("gpu", "cpu")}
    assert start == {"gpu": "30m", "cpu": "5m"}
    assert "huggingface:/root/.cache/huggingface" in SERVICES["gpu"]["volumes"]
    [device] = SERVICES["gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])


def test_prometheus_grafana_and_open_webui_find_each_other_and_the_server():
    aliases = {name: set(networks_of(SERVICES[name])) | {name} for name in SERVICES}
    [job] = yaml.safe_load((MONITORING / "prometheus.yml").read_text())["scrape_configs"]
    [target] = job["static_configs"][0]["targets"]
    for address in (target, SERVICES["webui"]["environment"]["OPENAI_API_BASE_URL"]):
        host, port = re.search(r"([a-z]+):(\d+)", address.removeprefix("http://")).groups()
        for server in ("gpu", "cpu"):
            assert host in aliases[server]
            assert any(str(p).endswith(f":{port}") for p in SERVICES[server]["ports"])
    [source] = yaml.safe_load((MONITORING / "datasources.yml").read_text())["datasources"]
    assert source["url"].startswith("http://prometheus:")
    assert {panel["datasource"]["uid"] for panel in DASHBOARD["panels"]} == {source["uid"]}
    [provider] = yaml.safe_load((MONITORING / "dashboards.yml").read_text())["providers"]
    mounts = [volume.split(":")[:2] for volume in SERVICES["grafana"]["volumes"]]
    assert ["./docker/monitoring/dashboards", provider["options"]["path"]] in mounts


def networks_of(service: dict) -> list[str]:
    """The names by which other services reach it, beside its own."""
    return service.get("networks", {}).get("default", {}).get("aliases", [])


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


def test_what_dashboard_and_alerts_ask_for_is_what_the_server_exports(
    server: Server, openai_client: OpenAI
):
    with Inspector(server.url) as inspector:
        inspector.inspect(encoded(red(200, (64, 64))))
        inspector.ask(encoded(red(200, (64, 64))), "Is it good?", max_tokens=4)
    with pytest.raises(Exception, match="404"):
        openai_client.get("/nowhere", cast_to=object)
    text = openai_client._client.get(f"{server.root}/metrics").text
    labels: dict[str, set[str]] = {"up": set()}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels.setdefault(sample.name, set()).update(sample.labels)
    for expression in EXPRESSIONS:
        names = re.findall(r"\b(?:up|(?:looktwice|vllm|http)[a-z0-9_:]+)\b", expression)
        assert names, expression
        assert set(names) <= labels.keys(), expression
        asked = {
            label for by in re.findall(r"by \(([^)]*)\)", expression) for label in by.split(", ")
        }
        asked |= set(re.findall(r"(\w+)=~?\"", expression))
        for name in names:
            assert asked - PROMETHEUS_OWN <= labels[name], expression


def test_the_dashboard_shows_what_was_promised():
    titles = " ".join(panel["title"] for panel in DASHBOARD["panels"])
    for words in (
        "Verdicts",
        "score per product",
        "Requests",
        "Queue",
        "Errors",
        "Expert",
        "Answers",
    ):
        assert words in titles
