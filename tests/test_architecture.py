"""Who may import whom, read from the sources; and what the base install may load."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {
    "looktwice_server": ROOT / "server" / "looktwice_server",
    "looktwice_adapters": ROOT / "adapters" / "looktwice_adapters",
    "looktwice_clients": ROOT / "clients" / "looktwice_clients",
}
FORBIDDEN = {
    "looktwice_server": {"looktwice_clients"},
    "looktwice_adapters": {"looktwice_server", "looktwice_clients", "vllm"},
    "looktwice_clients": {
        *("looktwice_server", "looktwice_adapters", "vllm"),
        *("torch", "torchvision", "transformers", "timm", "numpy", "scipy", "safetensors"),
    },
}

BEYOND_PYTHON = {
    *("node", "npm", "chromium", "docker", "docker-compose", "promtool"),
    *("postgres", "initdb", "pg_ctl", "psql", "playwright"),
}


def imported_packages(source: str) -> set[str]:
    """Top-level names of everything that a module imports, wherever in it, also by name."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = getattr(node.func, "id", getattr(node.func, "attr", ""))
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                names.add(node.args[0].value)
    return {name.partition(".")[0] for name in names}


def test_the_reader_finds_imports_at_the_top_inside_functions_and_by_name() -> None:
    source = (
        "import a.b\ndef f():\n    from c.d import e\n    import_module('g.h')\nfrom . import i"
    )
    assert imported_packages(source) == {"a", "c", "g"}


@pytest.mark.parametrize("package", PACKAGES)
def test_no_module_imports_what_its_package_may_not(package: str) -> None:
    modules = sorted(PACKAGES[package].rglob("*.py"))
    assert modules, f"{package} is not where it should be"
    wrong = {
        f"{module.relative_to(ROOT)} imports {name}"
        for module in modules
        for name in imported_packages(module.read_text()) & FORBIDDEN[package]
    }
    assert not wrong


def test_what_is_served_knows_of_no_training_and_training_of_no_evaluation() -> None:
    adapters = PACKAGES["looktwice_adapters"]
    parts = {name: sorted((adapters / name).rglob("*.py")) for name in ("train", "evaluate")}
    served = [*adapters.glob("*.py"), *PACKAGES["looktwice_server"].rglob("*.py")]
    rules = (("train", served), ("evaluate", served + parts["train"]), ("train", parts["evaluate"]))
    wrong = {
        f"{module.relative_to(ROOT)} imports {part}"
        for part, modules in rules
        for module in modules
        if f"looktwice_adapters.{part}" in module.read_text()
    }
    assert all(parts.values())
    assert not wrong


def programs_beyond_python(source: str) -> set[str]:
    """Those that a command's list or a call names first; and the import that starts a browser."""
    first = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            first += node.args[:1]
        elif isinstance(node, ast.List):
            first += node.elts[:1]
    words = [one.value for one in first if isinstance(one, ast.Constant)]
    named = {word.split()[0] for word in words if isinstance(word, str) and word.strip()}
    names = {name.rpartition("/")[2] for name in named} | imported_packages(source)
    return names & BEYOND_PYTHON


def test_no_test_outside_of_system_starts_more_than_python() -> None:
    tests = ROOT / "tests"
    found = {
        str(file.relative_to(tests)): programs_beyond_python(file.read_text("utf-8"))
        for file in tests.rglob("*.py")
    }
    system = {name: found.pop(name) for name in list(found) if name.startswith("system/")}
    started = {"node", "npm", "chromium", "docker-compose", "promtool", "initdb", "playwright"}
    assert started <= set().union(*system.values())
    assert not {name: programs for name, programs in found.items() if programs}


def loaded_after(code: str) -> set[str]:
    """Top-level modules in a fresh interpreter after `code`."""
    script = (
        f"import sys\n{code}\nprint(' '.join(sorted({{m.split('.')[0] for m in sys.modules}})))"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(run.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    "code",
    [
        "import looktwice_clients",
        "from looktwice_clients import *",
        "from looktwice_clients import cli_inspect, cli_chat, doctor",
        "import looktwice_clients.demo",
    ],
)
def test_the_clients_load_nothing_heavy(code: str) -> None:
    assert not loaded_after(code) & FORBIDDEN["looktwice_clients"]


def test_importing_the_clients_takes_less_than_a_second() -> None:
    code = "import time; t = time.perf_counter(); import looktwice_clients; "
    script = code + "print(time.perf_counter() - t)"
    runs = [subprocess.check_output([sys.executable, "-c", script]) for _ in range(3)]
    assert min(map(float, runs)) < 1.0


def test_the_help_of_the_command_imports_no_command() -> None:
    code = "from looktwice_clients.cli import run; run(['--help'])"
    loaded = loaded_after(code)
    assert not loaded & {"openai", "torch", "vllm", "looktwice_server", "looktwice_adapters"}
