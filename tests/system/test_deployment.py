"""docker-compose.yml, alerts and dashboard, checked by Compose and by Prometheus's promtool."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
MONITORING = ROOT / "docker" / "monitoring"
KEYS = {
    name: "a key of the test"
    for name in (
        "LOOKTWICE_API_KEY",
        "LOOKTWICE_CHATBOT_KEY",
        "POSTGRES_PASSWORD",
        "GRAFANA_PASSWORD",
        "WEBUI_SECRET_KEY",
    )
}
PROFILES = ["gpu", "cpu", "chatbot", "postgres", "monitoring", "webui"]


def compose(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    assert shutil.which("docker-compose"), "no Compose: run .ci/system-packages first"
    return subprocess.run(
        ["docker-compose", "--file", str(ROOT / "docker-compose.yml"), *arguments],
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )


def promtool(*arguments: str) -> None:
    assert shutil.which("promtool"), "no promtool: run .ci/system-packages first"
    run = subprocess.run(["promtool", *arguments], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("profile", PROFILES)
def test_compose_takes_every_profile(profile):
    run = compose("--profile", profile, "config", "--quiet", **KEYS)
    assert run.returncode == 0, run.stderr


def test_the_command_of_the_page_is_one_that_compose_takes():
    page = (ROOT / "docs" / "deployment.md").read_text()
    [options] = re.findall(r"^\$ docker compose (.+) up --build$", page, re.MULTILINE)
    run = compose(*options.split(), "config", "--quiet", **KEYS)
    assert run.returncode == 0, run.stderr
    assert set(re.findall(r"--profile (\S+)", options)) < set(PROFILES)


def test_compose_refuses_to_start_without_keys():
    run = compose("--profile", "cpu", "config", **dict.fromkeys(KEYS, ""))
    assert run.returncode != 0
    assert "the key that clients of the API send" in run.stderr


def test_model_and_flags_reach_the_server_as_arguments():
    flags = {"LOOKTWICE_MODEL": "hub/name", "LOOKTWICE_FLAGS": "--expert /models/expert.pth"}
    run = compose("--profile", "gpu", "config", **KEYS, **flags)
    assert "serve hub/name --host 0.0.0.0 --expert /models/expert.pth" in " ".join(
        run.stdout.split()
    )


def test_prometheus_takes_its_configuration_and_the_alerts_fire_when_they_should():
    promtool("check", "config", str(MONITORING / "prometheus.yml"))
    promtool("test", "rules", str(MONITORING / "alerts_test.yml"))


def test_prometheus_reads_every_expression_of_the_dashboard(tmp_path):
    dashboard = json.loads((MONITORING / "dashboards" / "looktwice.json").read_text("utf-8"))
    targets = [target for panel in dashboard["panels"] for target in panel["targets"]]
    rules = [
        {"record": f"panel:{n}", "expr": target["expr"].replace("$__rate_interval", "1m")}
        for n, target in enumerate(targets)
    ]
    file = tmp_path / "rules.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    promtool("check", "rules", str(file))
