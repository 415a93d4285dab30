"""`looktwice serve [MODEL] [--expert FILE] [--adapter NAME] [vLLM's flags]` -> vLLM's server."""

import os
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import click

from looktwice_adapters.shipped import shipped_folder
from looktwice_server.errors import SettingsError
from looktwice_server.settings import Settings
from looktwice_server.supervisor import end_with_parent, is_child, supervise

PLUGINS = ("looktwice", "looktwice_routes")
COMPILING = ("--no-enforce-eager", "--compilation-config", "-O")  # flags that ask for it
SIZING = ("--gpu-memory-utilization", "--kv-cache-memory-bytes")
OWN = {  # flags of vLLM's whose value is LookTwice's to choose
    "--limit-mm-per-prompt": "LOOKTWICE_MAX_IMAGES says how many pictures a request may have",
    "--mm-processor-cache-gb": "every picture of a request is inspected, which that cache skips",
    "--worker-extension-cls": "LookTwice's own inspects the pictures",
}
CPU_CACHE_BYTES = 2 * 2**30  # of the language model's keys and values


@click.command(
    "serve",
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    epilog="All other flags go to vLLM: looktwice serve --max-model-len 2048 --api-key KEY.",
)
@click.argument("model", default="nano")
@click.option(
    "--expert",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The anomaly expert's weights, for checkpoints that do not bring one: the authors' "
    "released .pth or a converted .safetensors.",
)
@click.option(
    "--adapter",
    type=click.Choice(["anomaly-ov", "anomalygpt"]),
    default="anomaly-ov",
    show_default=True,
    help="Which paper's parts judge pictures and write the language model's prompt.",
)
@click.option(
    "--decoder",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="With anomalygpt: what `looktwice train decoder` wrote; else decoder.safetensors in "
    "MODEL.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=8000, show_default=True, help="Port to listen on.")
@click.pass_context
def serve(
    context: click.Context,
    model: str,
    expert: Path | None,
    adapter: str,
    decoder: Path | None,
    host: str,
    port: int,
) -> None:
    """Serve MODEL behind the OpenAI API.

    MODEL is `nano` (a checkout's models/nano, or a folder of that name under $LOOKTWICE_MODELS), a
    local folder, or a hub name such as llava-hf/llava-onevision-qwen2-7b-ov-hf with --expert FILE.

    With --adapter anomalygpt AnomalyGPT's decoder judges in the place of Anomaly-OV's expert, and
    its prompt learner's embeddings stand behind each picture. Train them for MODEL first:

    \b
    looktwice train decoder --out DECODER
    looktwice serve nano --adapter anomalygpt --decoder DECODER/decoder.safetensors
    """
    if decoder is not None and adapter != "anomalygpt":
        raise click.UsageError("--decoder FILE needs --adapter anomalygpt beside it")
    flags = list(context.args)
    if model.startswith("-"):  # `looktwice serve --dtype float32`: no MODEL before vLLM's flags
        model, flags = "nano", [model, *flags]
    if not is_child():
        context.exit(watch(flags))
    end_with_parent()
    from looktwice_adapters.anomalygpt import DecoderFileError
    from looktwice_adapters.checkpoint import ExpertFileError

    try:
        settings = Settings.from_environment()
        path = find_model(model)
        prepare_environment(settings)
        args = vllm_arguments(path, ["--host", host, "--port", str(port), *flags])
        configure(args, expert, settings)
        if adapter == "anomalygpt":
            args.hf_overrides["anomalygpt"] = decoder_section(args, decoder)
    except (SettingsError, ExpertFileError, DecoderFileError) as error:
        raise click.ClickException(str(error)) from error
    from vllm.entrypoints.cli.serve import ServeSubcommand

    # vLLM only logs a plugin that fails to load and serves on, with its own unchecked routes.
    import looktwice_server.routes  # noqa: F401

    ServeSubcommand.cmd(args)


def watch(flags: list[str]) -> int:
    """Run the server as a child of this process; its exit code.

    Raises:
        ClickException: it ended by itself, or a limit cannot be read.
    """
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    names = ("--shutdown-timeout", "--shutdown_timeout")  # vLLM's, for open requests
    parser.add_argument(*names, type=int, default=0)
    drain = parser.parse_known_args(flags)[0].shutdown_timeout
    try:
        code = supervise(drain + Settings.from_environment().stop_seconds)
    except SettingsError as error:
        raise click.ClickException(str(error)) from error
    if code is None:
        raise click.ClickException(
            "a process of the server died and the server has ended; the log above says why "
            "(often the machine's memory was full). Start the server again"
        )
    return code


def find_model(name: str) -> str:
    """A shipped model's folder by its name, or what was given.

    Raises:
        SettingsError: a path was given, and no checkpoint is there.
    """
    folder = None if "/" in name else shipped_folder(name)
    if folder is not None:
        return str(folder)
    is_path = name.startswith(("/", ".", "~")) or Path(name).is_dir()
    if is_path and not Path(name, "config.json").is_file():
        raise SettingsError(f"no checkpoint at {name}: there is no config.json in it")
    return name


def prepare_environment(settings: Settings) -> None:
    """Set what vLLM reads from the environment, in this process and all that it starts."""
    named = os.environ.get("VLLM_PLUGINS", "").split(",")
    os.environ["VLLM_PLUGINS"] = ",".join(dict.fromkeys([*filter(None, named), *PLUGINS]))
    os.environ["VLLM_MEDIA_CONNECTOR"] = "looktwice"
    os.environ["LOOKTWICE_REFERENCES"] = str(settings.references)
    os.environ["VLLM_MAX_IMAGE_PIXELS"] = str(settings.max_pixels)
    os.environ["VLLM_MEDIA_URL_ALLOW_REDIRECTS"] = "0"
    # Each of a request's `n` answers is sent to the engine with all its pictures.
    os.environ.setdefault("VLLM_MAX_N_SEQUENCES", "16")
    os.environ["VLLM_USE_RUST_FRONTEND"] = "0"  # its routes are not ours
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # plants' machines call nobody
    # glibc gives large tensors back to the system at once: on a CPU, fetching the pages again takes
    # a third of the expert's time. Read by each process when it starts.
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(2**30))
    os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(2**30))


def vllm_arguments(model: str, flags: list[str]) -> Namespace:
    """Parse vLLM's own flags.

    Raises:
        SettingsError: one of them would let unchecked data reach the worker, or is not the user's.
    """
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.platforms import current_platform
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from looktwice_adapters.precision import has_bfloat16

    parser = make_arg_parser(FlexibleArgumentParser(prog="looktwice serve"))
    args = parser.parse_args([model, *flags])
    if current_platform.is_cpu():
        named = [flag.replace("_", "-") for flag in flags]  # vLLM takes both
        if not any(flag.startswith(COMPILING) for flag in named):
            args.enforce_eager = True  # compiling there needs a C++ compiler, and minutes
        if not any(flag.startswith(SIZING) for flag in named):
            args.kv_cache_memory_bytes = CPU_CACHE_BYTES  # vLLM's default is 92 % of the machine
        if args.dtype == "auto" and not has_bfloat16("cpu"):
            args.dtype = "float32"
    # "auto" checks each request with the backend that suits it, but the engine keeps the first
    # request's for all. A report needs guidance, which alone can be forbidden white space.
    if args.structured_outputs_config.backend == "auto":
        args.structured_outputs_config.backend = "guidance"
    ServeSubcommand().validate(args)
    refused = {
        "--trust-request-mm-kwargs": args.trust_request_mm_kwargs,
        "--enable-mm-embeds": args.enable_mm_embeds,
        "--enable-prompt-embeds": args.enable_prompt_embeds,
        "--pipeline-parallel-size above 1": args.pipeline_parallel_size > 1,
        "--headless": args.headless,
        "--grpc": getattr(args, "grpc", False),
        "--runner pooling": args.runner == "pooling",
        "--language-model-only": args.language_model_only,
        "--mm-encoder-only": args.mm_encoder_only,
    }
    for flag, given in refused.items():
        if given:
            raise SettingsError(f"{flag} does not work with inspections; leave it out")
    for flag, why in OWN.items():
        name = flag.removeprefix("--").replace("-", "_")
        if getattr(args, name) != parser.get_default(name):
            raise SettingsError(f"{flag} cannot be set: {why}; leave it out")
    return args


def configure(args: Namespace, expert: Path | None, settings: Settings) -> None:
    """Put the expert beside the checkpoint and our worker into vLLM's arguments.

    Raises:
        SettingsError: the model is no LLaVA-OneVision checkpoint, or has no expert.
        ExpertFileError: the expert's file does not fit.
    """
    from looktwice_server.plugin import ARCHITECTURE

    model = args.model_tag
    args.hf_overrides = {
        **(args.hf_overrides if isinstance(args.hf_overrides, dict) else {}),
        "architectures": [ARCHITECTURE],
        "anomaly_expert": expert_section(model, expert, args.revision),
    }
    args.middleware = [*args.middleware, "looktwice_server.errors.KeyRefused"]
    args.worker_extension_cls = "looktwice_server.worker.InspectionWorker"
    args.limit_mm_per_prompt = {"image": settings.max_images}
    # vLLM's processor cache takes a rendered picture for one that reached the engine. Ours are
    # inspected in between, and a request that ends there would leave the two caches apart.
    args.mm_processor_cache_gb = 0
    if args.served_model_name is None and Path(model).is_dir():
        args.served_model_name = [f"looktwice-{Path(model).resolve().name}"]


def expert_section(model: str, expert: Path | None, revision: str | None) -> dict[str, Any]:
    """The `anomaly_expert` section of the served config: sizes, weights and the phrase's tokens."""
    from transformers import AutoConfig, AutoTokenizer

    from looktwice_adapters.anomaly_prompt import ADVERBS, phrase
    from looktwice_adapters.checkpoint import section_beside
    from looktwice_server.weights import ExpertSection

    try:
        config = AutoConfig.from_pretrained(model, revision=revision)
        tokenizer = AutoTokenizer.from_pretrained(model, revision=revision)
    except (OSError, ValueError) as error:
        raise SettingsError(f"cannot load {model}: {str(error).splitlines()[0]}") from error
    if config.model_type != "llava_onevision":
        raise SettingsError(f"{model} is a {config.model_type}, not a LLaVA-OneVision checkpoint")
    if expert is not None:
        section = section_beside(expert) | {"weights": str(expert.resolve())}
    elif (own := getattr(config, "anomaly_expert", None)) is not None:
        section = dict(own) | {"weights": str(Path(model, own["weights"]).resolve())}
    else:
        raise SettingsError(f"{model} brings no anomaly expert; name its file with --expert FILE")
    section["phrase_token_ids"] = [
        tokenizer.encode(phrase(adverb), add_special_tokens=False) for adverb in ADVERBS
    ]
    if len({len(ids) for ids in section["phrase_token_ids"]}) > 1:
        raise SettingsError(f"the tokenizer of {model} gives the three phrases unequal lengths")
    config.anomaly_expert = section
    ExpertSection.from_config(config).check(config.vision_config)
    return section


def decoder_section(args: Namespace, decoder: Path | None) -> dict[str, Any]:
    """The `anomalygpt` section of a configured server: the file of its trained parts.

    Raises:
        SettingsError: there is none.
        DecoderFileError: it cannot be read, or was trained for another checkpoint.
    """
    from transformers import AutoConfig

    from looktwice_adapters.anomalygpt import FILE_NAME, AnomalyGPT

    path = decoder or Path(args.model_tag, FILE_NAME)
    if not path.is_file():
        raise SettingsError(
            f"{args.model_tag} brings no trained decoder ({FILE_NAME}) for anomalygpt; make one "
            "with `looktwice train decoder` and name it with --decoder FILE"
        )
    config = AutoConfig.from_pretrained(args.model_tag, revision=args.revision)
    expert = Path(args.hf_overrides["anomaly_expert"]["weights"])
    AnomalyGPT.load(path).config.check(expert, config.text_config.hidden_size)
    return {"weights": str(path.resolve())}


if __name__ == "__main__":
    sys.exit(serve())
