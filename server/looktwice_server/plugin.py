"""vLLM's general plugin: what every process of the server registers first."""

ARCHITECTURE = "LookTwiceForConditionalGeneration"
MEDIA_CONNECTOR = "looktwice"


def register() -> None:
    """Register the model (by name, loaded when used) and the reader of pictures."""
    from vllm import ModelRegistry

    from looktwice_server import pictures  # registers its connector  # noqa: F401

    ModelRegistry.register_model(
        ARCHITECTURE, "looktwice_server.model:LookTwiceForConditionalGeneration"
    )
