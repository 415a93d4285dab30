"""`looktwice train estimate`: memory and time of training an assistant, computed before it is run.

The real model's code is run on tensors without memory (torch's fake tensors): what it keeps for the
backward pass and its floating-point operations are counted, not guessed. One and two layers are
traced; the rest follows, as all layers are alike.
"""

import copy
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import click
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration
from transformers.initialization import no_init_weights
from transformers.models.llava_onevision.modeling_llava_onevision import (
    get_anyres_image_grid_shape,
)

from looktwice_adapters.train.assistant import Assistant, Stage2, convert
from looktwice_adapters.train.frozen_sight import Sight

GIB = 2**30
MASTER, MOMENTS, GRADIENT = 4, 8, 4  # bytes of a trained parameter in float32, of AdamW's two means
PHRASE_TOKENS = 6
SELECTED = 4  # suspicious tokens of a crop
# Attention as it runs on a CPU, of which torch's counter knows nothing; counted in full, also the
# half that a causal kernel may leave out.
ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value)
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda gradient, query, key, value, *_, **__: sdpa_backward_flop_count(
            gradient, query, key, value
        )
    ),
}
HUB_SIDES = [384 * count for count in range(1, 7)]
# Of the hub's: hidden, intermediate, layers, heads, key-value heads, vocabulary, tied head.
HUB_LANGUAGE_MODELS = {
    "0.5b": (896, 4864, 24, 14, 2, 152000, True),
    "7b": (3584, 18944, 28, 28, 4, 152128, False),
}


@dataclass(frozen=True)
class Load:
    """What one process holds in memory at once."""

    picture: tuple[int, int] = (768, 1024)  # height, width
    text: int = 60  # tokens of question and facts
    answer: int = 60  # supervised tokens


@dataclass(frozen=True)
class Estimate:
    """Memory in bytes and work in floating-point operations of one process."""

    parameters: int  # of the whole checkpoint without the expert
    trained: int
    tokens: int  # of one conversation, its picture included
    weights: int
    gradients: int
    optimizer: int
    activations: int
    operations: int  # of one batch

    @property
    def memory(self) -> int:
        """Their sum; the framework's own (CUDA context, workspaces, fragments) comes on top."""
        return self.weights + self.gradients + self.optimizer + self.activations


def hub_config(size: str) -> LlavaOnevisionConfig:
    """The sizes of llava-hf/llava-onevision-qwen2-{0.5b,7b}-ov-hf."""
    hidden, inner, layers, heads, kv_heads, vocabulary, tied = HUB_LANGUAGE_MODELS[size]
    return LlavaOnevisionConfig(
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 26,
            "num_attention_heads": 16,
            "image_size": 384,
            "patch_size": 14,
            "vision_use_head": False,
        },
        text_config={
            "model_type": "qwen2",
            "hidden_size": hidden,
            "intermediate_size": inner,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "vocab_size": vocabulary,
            "max_position_embeddings": 32768,
            "tie_word_embeddings": tied,
        },
        image_token_index=151646,
        video_token_index=151647,
        image_grid_pinpoints=[[height, width] for height in HUB_SIDES for width in HUB_SIDES],
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=tied,
        dtype="bfloat16",
    )


@contextmanager
def kept_for_backward(outside: set[int]) -> Iterator[dict[int, int]]:
    """Bytes by storage of what autograd keeps, without the storages named by `outside`."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in outside:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield kept


def fake(*roots: nn.Module) -> None:
    """Put fake tensors in place of parameters and buffers that have no memory; ties stay."""
    made: dict[int, Tensor] = {}
    for module in (module for root in roots for module in root.modules()):
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None or isinstance(tensor, FakeTensor):
                    continue
                if id(tensor) not in made:
                    empty = torch.empty(tensor.shape, dtype=tensor.dtype)
                    learns = tensor.requires_grad
                    parameter = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(empty, learns) if parameter else empty
                tensors[name] = made[id(tensor)]  # type: ignore[assignment]


def counted(config: LlavaOnevisionConfig, stage: Stage2, load: Load) -> tuple[Estimate, int, int]:
    """A checkpoint of these sizes traced as it is, operations before the backward pass, and the
    bytes of a layer's input.
    """
    vision = config.vision_config
    side = vision.image_size // vision.patch_size
    rows, columns = get_anyres_image_grid_shape(
        load.picture, config.image_grid_pinpoints, vision.image_size
    )
    crops, channels = 1 + int(rows) * int(columns), vision.hidden_size
    with torch.device("meta"):
        with no_init_weights():
            model = LlavaOnevisionForConditionalGeneration(config)
        model.tie_weights()
        convert(model.parameters(), torch.bfloat16)
        parameters = sum(p.numel() for p in model.parameters())
        phrases = [[0] * PHRASE_TOKENS] * 3
        assistant = Assistant(model, phrases, replace(stage, checkpointing=False))
    with FakeTensorMode(), torch.device("cpu"):
        fake(model, assistant)
        trained = sum(p.numel() for p in assistant.parameters() if p.requires_grad)
        weights = {p.untyped_storage()._cdata: p.nbytes for p in model.parameters()}
        weights |= {p.untyped_storage()._cdata: p.nbytes for p in assistant.parameters()}
        sight = Sight(
            torch.empty(crops, side**2, channels, dtype=torch.bfloat16),
            torch.empty(crops, SELECTED, channels),
            torch.empty(1, channels),
            0,
            load.picture,
            (int(rows), int(columns)),
            "",
        )
        pixels = torch.empty(stage.batch * crops, 3, vision.image_size, vision.image_size)
        with FlopCounterMode(display=False, custom_mapping=ATTENTION) as flops:
            with torch.no_grad():
                model.model.vision_tower(pixels.bfloat16())
            with (
                kept_for_backward(set(weights)) as kept,
                torch.autocast("cpu", torch.bfloat16),
            ):
                images = [assistant.features(sight) for _ in range(stage.batch)]
                words = torch.zeros(load.text + load.answer, dtype=torch.long)
                text = assistant.language_model.get_input_embeddings()(words)
                embedded = torch.stack([torch.cat((image, text)) for image in images])
                embedded = embedded[:, : assistant.context]
                hidden = assistant.language_model(
                    inputs_embeds=embedded, use_cache=False
                ).last_hidden_state
                logits = assistant.head(hidden[:, -load.answer :]).float().flatten(0, 1)
                labels = torch.zeros(len(logits), dtype=torch.long)
                loss = cross_entropy(logits, labels)
            forward = flops.get_total_flops()
            loss.backward()
        estimate = Estimate(
            parameters,
            trained,
            embedded.shape[1],
            sum(weights.values()),
            GRADIENT * trained,
            MOMENTS * trained,
            sum(kept.values()),
            flops.get_total_flops(),
        )
        return estimate, forward, embedded.nbytes


def estimate_training(config: LlavaOnevisionConfig, stage: Stage2, load: Load) -> Estimate:
    """Memory and work of one process that trains a checkpoint of these sizes.

    Args:
        config: the checkpoint's.
        stage: batch, rank of adapters (0: all weights), whether activations are kept.
        load: what one conversation is like.
    """
    layers = config.text_config.num_hidden_layers
    (one, forward, entry), (two, forward_of_two, _) = (
        counted(_with_layers(config, count), stage, load) for count in (1, 2)
    )
    values = {
        name: value + (layers - 1) * (asdict(two)[name] - value)
        for name, value in asdict(one).items()
    }
    if stage.checkpointing:
        # Each layer's input is kept, and while one is computed again all of its activations.
        values["activations"] = one.activations + (layers - 1) * entry
        values["operations"] += layers * (forward_of_two - forward)
    return Estimate(**values)


def _with_layers(config: LlavaOnevisionConfig, count: int) -> LlavaOnevisionConfig:
    config = copy.deepcopy(config)
    config.text_config.num_hidden_layers = count
    config.text_config.layer_types = ["full_attention"] * count
    return config


def measured_rate(side: int = 1024, seconds: float = 0.5) -> float:
    """Floating-point operations a second of bfloat16 matrix products on this machine's device."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    a = torch.ones(side, side, dtype=torch.bfloat16, device=device)
    float((a @ a)[0, 0])
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        float((a @ a)[0, 0])
        count += 1
    return count * 2 * side**3 / (time.perf_counter() - began)


@click.command("estimate")
@click.option(
    "--model",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of a checkpoint; only its config.json is read.",
)
@click.option("--size", type=click.Choice(list(HUB_LANGUAGE_MODELS)), help="Or the hub's sizes.")
@click.option(
    "--lora", type=click.IntRange(min=0), default=0, show_default=True, help="Rank; 0: all weights."
)
@click.option(
    "--batch",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Conversations at a time, of each process.",
)
@click.option("--checkpointing", is_flag=True, help="Compute activations twice.")
@click.option(
    "--picture",
    type=(click.IntRange(min=28), click.IntRange(min=28)),
    default=(1024, 768),
    show_default=True,
    metavar="WIDTH HEIGHT",
    help="Pixels of a conversation's picture.",
)
@click.option(
    "--text",
    type=click.IntRange(min=1),
    default=60,
    show_default=True,
    help="Tokens of question and facts.",
)
@click.option(
    "--answer", type=click.IntRange(min=1), default=60, show_default=True, help="Tokens of answers."
)
@click.option(
    "--conversations", type=click.IntRange(min=1), default=1000, show_default=True, help="To train."
)
@click.option(
    "--processes",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="That train together.",
)
@click.option(
    "--tflops",
    type=click.FloatRange(min=0, min_open=True),
    help="The device's 10^12 bfloat16 operations a second.  [default: measured here, now]",
)
@click.option(
    "--utilisation",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.4,
    show_default=True,
    help="Share of them that training reaches.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def estimate(
    model: Path | None,
    size: str | None,
    lora: int,
    batch: int,
    checkpointing: bool,
    picture: tuple[int, int],
    text: int,
    answer: int,
    conversations: int,
    processes: int,
    tflops: float | None,
    utilisation: float,
    as_json: bool,
) -> None:
    """Memory and time of `looktwice train assistant`, before it is run.

    Counted on the real model's code without its memory. Memory is each process's, and what the
    framework needs for itself comes on top; time is that of the arithmetic.

    \b
    looktwice train estimate --size 7b --lora 16 --checkpointing --tflops 312
    """
    if (model is None) == (size is None):
        raise click.UsageError("give either --model or --size")
    config = hub_config(size) if size else LlavaOnevisionConfig.from_pretrained(model)
    stage = Stage2(batch=batch, lora_rank=lora, checkpointing=checkpointing)
    found = estimate_training(config, stage, Load((picture[1], picture[0]), text, answer))
    rate = (tflops * 1e12 if tflops else measured_rate()) * utilisation
    hours = found.operations / batch * conversations / processes / rate / 3600
    if as_json:
        click.echo(json.dumps({**asdict(found), "memory": found.memory, "hours": hours}))
        return
    click.echo(
        f"parameters   {found.parameters / 1e6:10,.1f} M, trained {found.trained / 1e6:,.1f} M"
    )
    click.echo(f"tokens       {found.tokens:10,} of a conversation")
    for name in ("weights", "gradients", "optimizer", "activations", "memory"):
        click.echo(f"{name:12} {getattr(found, name) / GIB:10.2f} GiB")
    click.echo(f"operations   {found.operations / 1e12:10.2f} x 10^12 a batch of {batch}")
    given = "given" if tflops else "measured"
    click.echo(
        f"time         {hours:10.2f} h for {conversations:,} conversations at {rate / 1e12:.2f} "
        f"x 10^12 a second ({given}, x {utilisation:g})"
    )
