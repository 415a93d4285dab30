"""Training the assistant (Anomaly-OV's stage 2): conversations -> projector and language model.

An existing LLaVA-OneVision checkpoint learns to talk about its inspections: cross-entropy on the
answers alone, in the very prompts that the server builds; image tower and expert stay frozen. All
weights, or low-rank adapters (LoRA) that are merged at the end: the server loads what comes out.
"""

import json
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any
from zlib import crc32

import click
import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    AutoProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionProcessor,
)

from looktwice_adapters.anomaly_prompt import append_prompt
from looktwice_adapters.checkpoint import file_hash, load_expert
from looktwice_adapters.train.conversations import Conversation, read_conversations
from looktwice_adapters.train.frozen_sight import FrozenSight, Sight, brings_expert, read_section
from looktwice_adapters.train.hub_format import hub_state_dict, write_json, write_weights
from looktwice_adapters.train.options import seed_option
from looktwice_adapters.train.run import LOG, Run, Schedule, all_processes, refuse_overwriting
from looktwice_adapters.train.sequences import IGNORED, padded
from looktwice_adapters.train.served_prompt import served_prompt
from looktwice_adapters.train.tokenizer import phrase_token_ids

MODEL_FILES = ("model*.safetensors", "pytorch_model*.bin")  # that transformers reads
WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.index.json")
RECORD = "training.json"
OWN_FILES = ("README.md", "SHA256SUMS", LOG, RECORD, "*.draft")  # of a checkpoint, or of its run


@dataclass(frozen=True)
class Stage2:
    """What is trained, and on what it is trained."""

    batch: int = 1  # conversations of a process
    lora_rank: int = 0  # 0: all weights of projector and language model
    facts_share: float = 0.8  # of the conversations with the facts sentence (`"grounding": true`)
    context: int | None = None  # tokens after which a conversation is cut; the checkpoint's own
    checkpointing: bool = False  # activations are computed twice instead of kept
    seed: int = 0


@dataclass(frozen=True)
class Example:
    """A conversation: T token ids with one <image> token a picture, labels, and what is seen."""

    ids: list[int]
    labels: list[int]
    sights: list[Sight]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Example":
        """The same, its pictures on a device."""
        return Example(self.ids, self.labels, [s.to(device, non_blocking) for s in self.sights])


def convert(parameters: Iterable[nn.Parameter], dtype: torch.dtype) -> None:
    """Change parameters' type in place: tied ones stay tied, fake ones are fine too."""
    for parameter in parameters:
        parameter.data = parameter.data.to(dtype)


class Assistant(nn.Module):
    """The trainable part of a checkpoint: projector, newline, language model, its head."""

    def __init__(
        self,
        model: LlavaOnevisionForConditionalGeneration,
        phrases: list[list[int]],
        stage: Stage2,
    ) -> None:
        """Take the parts of a LLaVA-OneVision model; its tower stays outside.

        Args:
            model: the whole checkpoint.
            phrases: token ids of the anomaly prompt's phrase for each adverb.
            stage: full or LoRA, the context, how activations are kept.
        """
        super().__init__()
        model.requires_grad_(False)
        self.config, self.pack = model.config, model.model.pack_image_features
        self.phrases = phrases
        self.context = stage.context or model.config.text_config.max_position_embeddings
        self.projector = model.model.multi_modal_projector
        self.image_newline = model.model.image_newline
        self.language_model = model.model.language_model
        self.head = model.lm_head
        if stage.lora_rank:
            config = LoraConfig(
                r=stage.lora_rank, lora_alpha=2 * stage.lora_rank, target_modules="all-linear"
            )
            self.language_model = get_peft_model(self.language_model, config)
            convert([*self.projector.parameters(), self.image_newline], torch.float32)
        else:
            convert(self.parameters(), torch.float32)
            self.language_model.requires_grad_(True)
            self.head.requires_grad_(True)
        self.projector.requires_grad_(True)
        self.image_newline.requires_grad_(True)
        if stage.checkpointing:
            self.language_model.gradient_checkpointing_enable({"use_reentrant": False})

    def features(self, sight: Sight) -> Tensor:
        """A picture's embeddings in the served order: AnyRes features, then the anomaly prompt."""
        dtype = self.projector.linear_1.weight.dtype
        tokens = self.projector(sight.tokens.to(dtype))
        (image,), _ = self.pack([tokens], [sight.size], self.image_newline)
        phrase = torch.tensor(self.phrases[sight.adverb], device=image.device)
        return append_prompt(
            image,
            self.language_model.get_input_embeddings()(phrase),
            self.projector(sight.global_token.to(dtype))[0],
            self.projector(sight.selected.to(dtype)),
            self.image_newline,
            sight.grid,
        )

    def embed(self, example: Example) -> tuple[Tensor, list[int]]:
        """Embeddings (T', D) with the pictures in their places, and labels of that length."""
        device, embedding = self.image_newline.device, self.language_model.get_input_embeddings()
        parts, labels, start = list[Tensor](), list[int](), 0
        places = [i for i, token in enumerate(example.ids) if token == self.config.image_token_id]
        for place, sight in zip(places, example.sights, strict=True):
            features = self.features(sight)
            text = torch.tensor(example.ids[start:place], dtype=torch.long, device=device)
            parts += [embedding(text), features]
            labels += example.labels[start:place] + [IGNORED] * len(features)
            start = place + 1
        text = torch.tensor(example.ids[start:], dtype=torch.long, device=device)
        parts.append(embedding(text))
        labels += example.labels[start:]
        return torch.cat(parts)[: self.context], labels[: self.context]

    def forward(self, examples: list[Example]) -> Tensor:
        """Mean cross-entropy () of the answers' tokens, in bfloat16 where that is precise enough.

        Padding stands on the right and attention is causal, so that no mask is needed.
        """
        with torch.autocast(self.image_newline.device.type, torch.bfloat16):
            embedded, labels = zip(*map(self.embed, examples), strict=True)
            inputs = nn.utils.rnn.pad_sequence(list(embedded), batch_first=True)  # (B, T, D)
            hidden = self.language_model(inputs_embeds=inputs, use_cache=False).last_hidden_state
            wanted = padded(list(labels), IGNORED).to(hidden.device)[:, 1:]
            answered = wanted != IGNORED
            logits = self.head(hidden[:, :-1][answered])
        total = cross_entropy(logits.float(), wanted[answered], reduction="sum")
        return total / answered.sum().clamp_min(1)

    def merged(self) -> None:
        """Put what the adapters learnt into the weights themselves."""
        if isinstance(self.language_model, PeftModel):
            self.language_model = self.language_model.merge_and_unload()


class Examples:
    """Batches of conversations by number: every epoch in another order, from the seed alone."""

    def __init__(
        self,
        conversations: list[Conversation],
        sight: FrozenSight,
        processor: LlavaOnevisionProcessor,
        stage: Stage2,
    ) -> None:
        """Batches of these conversations; pictures are looked at when they are asked for."""
        self.conversations, self.sight, self.stage = conversations, sight, stage
        self.tokenizer = processor.tokenizer
        self.template = processor.chat_template or processor.tokenizer.chat_template

    def __call__(self, index: int) -> tuple[list[Example]]:
        """The batch of this number."""
        first = index * self.stage.batch
        return ([self.example(self._at(first + i), first + i) for i in range(self.stage.batch)],)

    def example(self, conversation: Conversation, draw: int = 0) -> Example:
        """One conversation with its pictures; `draw` chooses whether the facts are told.

        Facts are those that the answers agree with, where the conversation brings them.
        """
        told = Random(f"{self.stage.seed} facts {draw}").random() < self.stage.facts_share
        sights = [self.sight.read(path) for path in conversation.pictures]
        facts = [""] * len(sights)
        if told:
            facts = list(conversation.facts or (sight.facts for sight in sights))
        ids, labels = served_prompt(self.tokenizer, self.template, conversation, facts)
        return Example(ids, labels, sights)

    def _at(self, draw: int) -> Conversation:
        epoch, place = divmod(draw, len(self.conversations))
        order = np.random.default_rng([self.stage.seed, epoch]).permutation(len(self.conversations))
        return self.conversations[order[place]]


def load_assistant(
    folder: Path, stage: Stage2
) -> tuple[LlavaOnevisionForConditionalGeneration, Assistant, LlavaOnevisionProcessor]:
    """A checkpoint's folder as a model, its trainable part and its processor."""
    torch.manual_seed(stage.seed)
    model = LlavaOnevisionForConditionalGeneration.from_pretrained(folder, dtype="auto")
    processor = AutoProcessor.from_pretrained(folder)
    return model, Assistant(model, phrase_token_ids(processor.tokenizer), stage), processor


def settings_of(
    folder: Path, expert: Path, conversations: list[Conversation], stage: Stage2
) -> dict[str, Any]:
    """What a run's steps depend on, beside its schedule."""
    settings = asdict(stage)
    del settings["checkpointing"]  # more time, the same weights
    said = [[*(message.text for message in one.messages), one.facts] for one in conversations]
    seen = [[str(path.resolve()) for path in one.pictures] for one in conversations]
    return settings | {
        "model": [file_hash(path) for files in MODEL_FILES for path in sorted(folder.glob(files))],
        "expert": file_hash(expert),
        "conversations": crc32(repr(said).encode()),
        "images": crc32(repr(seen).encode()),
    }


def train_assistant(
    folder: Path,
    expert: Path | None,
    conversations: list[Conversation],
    stage: Stage2,
    schedule: Schedule,
    out: Path,
    resume: bool = False,
) -> LlavaOnevisionForConditionalGeneration:
    """Train on conversations and give the whole model, adapters merged."""
    model, assistant, processor = load_assistant(folder, stage)
    file, sizes = read_section(folder, expert)
    judge = load_expert(file, sizes)
    run = Run(assistant, schedule, out, settings_of(folder, file, conversations, stage))
    sight = FrozenSight(model, processor.image_processor, judge, run.accelerator.device)
    if resume:
        run.resume()
    run.train(Examples(conversations, sight, processor, stage), "assistant")
    assistant.merged()
    return model.cpu().eval()


def write_like(folder: Path, model: LlavaOnevisionForConditionalGeneration, out: Path) -> Path:
    """Write the model's weights and, unchanged, every other file of the folder it came from.

    Its model card and its hashes are of other weights, its log and record of another run.
    """
    for path in folder.iterdir():
        left_out = any(path.match(pattern) for pattern in (*WEIGHT_FILES, *OWN_FILES))
        if path.is_file() and not left_out:
            shutil.copyfile(path, out / path.name)
    section = json.loads((folder / "config.json").read_text()).get("anomaly_expert")
    if section is not None:
        shutil.copyfile(folder / section["weights"], out / section["weights"])
    dtype = LlavaOnevisionConfig.from_pretrained(folder).dtype or torch.float32
    write_weights(hub_state_dict(model, dtype), out)
    return out / "model.safetensors"


@click.command("assistant")
@click.option(
    "--model",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    required=True,
    help="Folder of a LLaVA-OneVision checkpoint in Hugging Face format; models/nano is one.",
)
@click.option(
    "--expert",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The anomaly expert's weights, for a checkpoint that does not bring one.",
)
@click.option(
    "--conversations",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    required=True,
    help="LLaVA's JSON: Anomaly-Instruct-125k, what `looktwice train dialogue` wrote, your own.",
)
@click.option(
    "--images",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder that the records' picture paths start from.  [default: the JSON's own]",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="Folder for run and finished checkpoint; `looktwice serve` takes it.",
)
@click.option(
    "--lora",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Rank of low-rank adapters in the language model; 0 trains all its weights.",
)
@click.option(
    "--epochs",
    type=click.FloatRange(min=0),
    default=1.0,
    show_default=True,
    help="How often each conversation is seen.",
)
@click.option("--steps", type=click.IntRange(min=1), help="Steps, instead of --epochs.")
@click.option(
    "--batch",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Conversations at a time, of each process.",
)
@click.option(
    "--accumulate",
    type=click.IntRange(min=1),
    default=4,
    show_default=True,
    help="Batches of a process that make one step.",
)
@click.option(
    "--learning-rate",
    type=click.FloatRange(min=0, min_open=True),
    help="Peak; warm-up over 3 % of the steps, then a cosine.  [default: 1e-5; 1e-4 with --lora]",
)
@click.option(
    "--facts-share",
    type=click.FloatRange(0, 1),
    default=0.8,
    show_default=True,
    help="Share of conversations with the facts behind the picture; 0 is the paper's prompt.",
)
@click.option(
    "--context",
    type=click.IntRange(min=16),
    help="Cut conversations after so many tokens, pictures included.  [default: the checkpoint's]",
)
@click.option(
    "--checkpointing",
    is_flag=True,
    help="Compute activations twice instead of keeping them: less memory, a third more time.",
)
@click.option(
    "--save-every",
    type=click.IntRange(min=1),
    default=100,
    show_default=True,
    help="Steps between checkpoints.",
)
@seed_option("Of order, adapters and which facts are told.")
@click.option("--resume", is_flag=True, help="Go on from the checkpoint in --out.")
def assistant(
    model: Path,
    expert: Path | None,
    conversations: Path,
    images: Path | None,
    out: Path,
    lora: int,
    epochs: float,
    steps: int | None,
    batch: int,
    accumulate: int,
    learning_rate: float | None,
    facts_share: float,
    context: int | None,
    checkpointing: bool,
    save_every: int,
    seed: int,
    resume: bool,
) -> None:
    """Train a checkpoint to talk about inspections (Anomaly-OV's stage 2).

    Projector and language model learn from conversations, the answers alone being judged; image
    tower and expert stay as they are. OUT becomes a checkpoint like MODEL.

    Several GPUs: accelerate launch -m looktwice_clients train assistant ...

    Memory and time beforehand: looktwice train estimate --help
    """
    refuse_overwriting(out, resume)
    if model.resolve() == out.resolve():
        raise click.UsageError("--out must be another folder than --model")
    if expert is not None and brings_expert(model):
        raise click.UsageError(f"{model} brings an expert of its own, which OUT keeps: no --expert")
    read_section(model, expert)  # refuse before anything large is read
    read = read_conversations(conversations, images)
    stage = Stage2(batch, lora, facts_share, context, checkpointing, seed)
    processes = all_processes()
    together = batch * accumulate * processes.num_processes
    count = steps or max(1, round(epochs * len(read) / together))
    rate = learning_rate or (1e-4 if lora else 1e-5)
    schedule = Schedule(
        count,
        rate,
        warmup=max(1, round(0.03 * count)),
        weight_decay=0.0,
        save_every=save_every,
        log_every=1 if count < 200 else 10,
        accumulate=accumulate,
    )
    trained = train_assistant(model, expert, read, stage, schedule, out, resume)
    if processes.is_main_process:
        weights = write_like(model, trained, out)
        record = {
            "model": str(model),
            "conversations": file_hash(conversations),
            "count": len(read),
        }
        write_json(out / RECORD, record | {"stage": asdict(stage), "schedule": asdict(schedule)})
        click.echo(f"{weights}: {file_hash(weights)}, {count} steps of {together} conversations")
