"""nano's assistant: made-up dialogues -> projector and small language model, from nothing.

Two stages. First on text: pictures are a few random embeddings, so that steps are cheap and the
facts sentence is all there is to read. Then on real pictures: their tokens, the anomaly prompt and
the facts, in the layout that the server serves; one conversation in five has no facts sentence.
"""

import json
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LlavaOnevisionForConditionalGeneration, LlavaOnevisionImageProcessor

from looktwice_adapters.answers import Facts
from looktwice_adapters.checkpoint import file_hash, read_expert
from looktwice_adapters.dialogue import Turn, make_dialogue, make_series
from looktwice_adapters.expert import weighted_mean
from looktwice_adapters.precision import mixed_precision
from looktwice_adapters.qformer import QFormer
from looktwice_adapters.selector import select_tokens
from looktwice_adapters.train.agreement import measure
from looktwice_adapters.train.draft import draft_of
from looktwice_adapters.train.hub_format import (
    PINPOINTS,
    image_processor_config,
    nano_config,
    read_checkpoint,
    write_json,
)
from looktwice_adapters.train.looks import Layout, Look, crop_maps, layout, take_looks
from looktwice_adapters.train.options import changed, seed_option
from looktwice_adapters.train.run import (
    Run,
    Schedule,
    TrainingError,
    all_processes,
    refuse_overwriting,
)
from looktwice_adapters.train.sequences import (
    IGNORED,
    PictureSlots,
    Sequence,
    SequenceWriter,
    padded,
)
from looktwice_adapters.train.tokenizer import kept_tokenizer, save_tokenizer
from looktwice_adapters.train.tower import read_pictures

LOOKS = "looks.pt"
KEY_SIZE = 512  # of the selector's attention, as published
SERIES = 0.7  # share of long series of short pictures in the first stage
FIRST_WORD = 4.0  # weight of a reply's first token, in which the question is understood
FURTHER = 1 / 3  # of the learning rate, for what has learnt already
SELECTOR = "llm_q_former."
POOL = 8  # batches that are drawn together and sorted by length, to waste less on padding


@dataclass(frozen=True)
class AssistantTraining:
    """How much the assistant sees of what."""

    batch: int = 16
    seed: int = 0
    choices: float = 0.0  # share of the conversations on text that are multiple choice alone


class NanoAssistant(nn.Module):
    """The trainable part of the checkpoint: selector, projector, newline, language model."""

    def __init__(self, model: LlavaOnevisionForConditionalGeneration) -> None:
        """Take the parts of a LLaVA-OneVision model; its tower stays outside."""
        super().__init__()
        self.language_model = model.model.language_model
        self.projector = model.model.multi_modal_projector
        self.image_newline = model.model.image_newline
        self.image_id = model.config.image_token_index
        self.llm_q_former = QFormer(model.config.vision_config.hidden_size, KEY_SIZE)

    def embed(self, sequences: list[Sequence]) -> Tensor:
        """Input embeddings (B, T, D): tokens, and the pictures' features in their slots."""
        ids = padded([sequence.ids for sequence in sequences], 0).to(self.image_newline.device)
        embedded = self.language_model.embed_tokens(ids)
        features = [self.features(picture) for s in sequences for picture in s.pictures]
        if features:
            slots = (ids == self.image_id).unsqueeze(-1)
            embedded = embedded.masked_scatter(slots, torch.cat(features).to(embedded.dtype))
        return embedded

    def features(self, picture: PictureSlots) -> Tensor:
        """A picture's embeddings in the order of its slots: (before + behind, D)."""
        device = self.image_newline.device
        if isinstance(picture, RandomPicture):
            newlines = picture.newlines.unsqueeze(-1).to(device)
            return torch.where(newlines, self.image_newline, picture.rows.to(device))
        assert isinstance(picture, SeenPicture)
        tokens = picture.look.tokens.to(device).float()
        maps = picture.significance.to(device)
        selected = select_tokens(self.llm_q_former, tokens, maps)  # (B, 4, C)
        global_token = weighted_mean(selected, maps, [len(tokens)])  # (1, C)
        rows = torch.cat((tokens.flatten(0, 1), selected.flatten(0, 1), global_token))
        rows = torch.cat((self.projector(rows), self.image_newline.unsqueeze(0)))
        return rows[picture.order]

    def forward(self, sequences: list[Sequence]) -> Tensor:
        """The loss, in mixed precision."""
        with mixed_precision(self.image_newline.device.type):
            return self.loss(sequences)

    def loss(self, sequences: list[Sequence]) -> Tensor:
        """Weighted mean cross-entropy of the supervised tokens.

        Padding stands on the right and attention is causal, so that no mask is needed.
        """
        hidden = self.language_model(
            inputs_embeds=self.embed(sequences), use_cache=False
        ).last_hidden_state
        marks = padded([sequence.labels for sequence in sequences], IGNORED).to(hidden.device)
        labels = marks[:, 1:]
        wanted = labels != IGNORED
        logits = hidden[:, :-1][wanted] @ self.language_model.embed_tokens.weight.T
        first = wanted & (marks[:, :-1] == IGNORED)
        weight = torch.where(first, FIRST_WORD, 1.0)[wanted]
        losses = cross_entropy(logits.float(), labels[wanted], reduction="none")
        return (losses * weight).sum() / weight.sum()

    @torch.no_grad()
    def reply(self, sequences: list[Sequence], end: int, limit: int = 80) -> list[list[int]]:
        """Greedy answers to questions (sequences that end where the assistant begins)."""
        answers = []
        for sequence in sequences:
            embedded, cache, answer = self.embed([sequence]), None, list[int]()
            while len(answer) < limit:
                out = self.language_model(
                    inputs_embeds=embedded, past_key_values=cache, use_cache=True
                )
                cache = out.past_key_values
                logits = out.last_hidden_state[:, -1] @ self.language_model.embed_tokens.weight.T
                answer.append(int(logits.argmax()))
                if answer[-1] == end:
                    break
                embedded = self.language_model.embed_tokens(torch.tensor([answer[-1:]]))
            answers.append(answer)
        return answers


@dataclass(frozen=True)
class RandomPicture:
    """A made-up picture of a few random embeddings, a newline at the end of each part."""

    rows: Tensor  # (before + behind, D)
    before: int
    behind: int

    @property
    def newlines(self) -> Tensor:
        """Which rows are newlines: (before + behind,) bool."""
        marks = torch.zeros(len(self.rows), dtype=torch.bool)
        marks[[self.before - 1, -1]] = True
        return marks


@dataclass(frozen=True)
class SeenPicture:
    """A real picture's tokens with a map drawn to fit its facts."""

    look: Look
    significance: Tensor  # (B, side, side)
    layout: Layout

    @property
    def before(self) -> int:
        """Embeddings before the phrase."""
        return len(self.layout.image)

    @property
    def behind(self) -> int:
        """Embeddings behind the phrase."""
        return len(self.layout.suspicious)

    @property
    def order(self) -> Tensor:
        """Indices of the slots' embeddings into [tokens | selected | global | newline]."""
        return torch.cat((self.layout.image, self.layout.suspicious))


MakeSequence = Callable[[random.Random], Sequence]


def text_sequences(writer: SequenceWriter, width: int, choices: float = 0.0) -> MakeSequence:
    """The first stage's data: made-up facts, pictures of a few random embeddings.

    Args:
        writer: makes token ids of conversations.
        width: of the language model.
        choices: share of the conversations that are multiple choice alone.
    """

    def picture(rng: random.Random) -> RandomPicture:
        generator = torch.Generator().manual_seed(rng.getrandbits(40))
        before, behind = rng.choice(((1, 1), (2, 2), (9, 5)))
        scale = 0.02 * 4 ** rng.random()
        rows = torch.randn(before + behind, width, generator=generator) * scale
        return RandomPicture(rows, before, behind)

    def make(rng: random.Random) -> Sequence:
        if choices and rng.random() < choices:
            dialogue = make_series(rng, choices=True)
        else:
            dialogue = make_series(rng) if rng.random() < SERIES else make_dialogue(rng)
        return writer.write(dialogue, [picture(rng) for _ in dialogue.pictures])

    return make


def see(look: Look, facts: Facts, rng: random.Random, pinpoints: str) -> SeenPicture:
    """A look whose significance is drawn to fit the facts."""
    side = round(look.tokens.shape[1] ** 0.5)
    maps = crop_maps(look, facts, side, rng)
    return SeenPicture(look, maps, layout(look.size, look.grid, side, pinpoints))


def picture_sequences(writer: SequenceWriter, looks: list[Look], pinpoints: str) -> MakeSequence:
    """The second stage's data: made-up facts about real pictures, all their tokens in place."""

    def make(rng: random.Random) -> Sequence:
        dialogue = make_dialogue(rng)
        pictures = [see(rng.choice(looks), facts, rng, pinpoints) for facts in dialogue.pictures]
        return writer.write(dialogue, pictures)

    return make


class Batches:
    """Batches by step: drawn POOL at a time, sorted by length, their order shuffled."""

    def __init__(self, make: MakeSequence, training: AssistantTraining) -> None:
        """Batches of `make`'s sequences; the same for the same seed and step."""
        self.make, self.training = make, training
        self.pool: list[list[Sequence]] = []
        self.index = -1

    def __call__(self, step: int) -> list[Sequence]:
        """The batch of a step."""
        if step // POOL != self.index:
            self.index = step // POOL
            rng = random.Random(f"{self.training.seed} {self.index}")
            drawn = [self.make(rng) for _ in range(POOL * self.training.batch)]
            drawn.sort(key=lambda sequence: len(sequence.ids))
            size = self.training.batch
            self.pool = [drawn[i : i + size] for i in range(0, len(drawn), size)]
            rng.shuffle(self.pool)
        return self.pool[step % POOL]


def train_assistant(
    assistant: NanoAssistant,
    batches: Batches,
    schedule: Schedule,
    folder: Path,
    resume: bool,
    sources: dict[str, str | None] | None = None,
) -> None:
    """Run one stage in its own folder, or go on with it.

    Args:
        assistant: what learns.
        batches: its sequences.
        schedule: how long and how fast.
        folder: of this stage alone.
        resume: whether to go on.
        sources: options that name what the assistant was begun with -> hashes.
    """
    run = Run(assistant, schedule, folder, asdict(batches.training) | (sources or {}))
    if resume:
        run.resume()

    run.train(lambda step: (batches(step),), f"assistant, {folder.name}")
    assistant.cpu()


@click.command("nano-assistant")
@click.option(
    "--tower",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder that `looktwice train tower` filled; --start-from brings its own.",
)
@click.option(
    "--pictures",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    required=True,
    help="Folder of any pictures, such as `looktwice train pictures` fills.",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="Folder for tokenizer, both stages' runs and the finished assistant.",
)
@click.option(
    "--start-from",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="CHECKPOINT",
    help="Teach this checkpoint's language model more (models/nano), at a third of the rate.",
)
@click.option("--text-steps", default=4000, show_default=True, help="Steps on text alone.")
@click.option("--picture-steps", default=1000, show_default=True, help="Steps on real pictures.")
@click.option(
    "--looks",
    type=click.IntRange(1),
    default=600,
    show_default=True,
    help="Pictures of the second stage.",
)
@click.option(
    "--choices",
    type=click.FloatRange(0, 1),
    default=0.0,
    show_default=True,
    help="Share of the conversations on text that are multiple choice alone.",
)
@seed_option("Of fresh weights, words and looks.")
@click.option("--resume", is_flag=True, help="Go on from the checkpoints in --out.")
def nano_assistant(
    tower: Path | None,
    pictures: Path,
    out: Path,
    start_from: Path | None,
    text_steps: int,
    picture_steps: int,
    looks: int,
    choices: float,
    seed: int,
    resume: bool,
) -> None:
    """Train nano's language model from nothing, on made-up conversations about inspections.

    For a checkpoint that can talk already: `looktwice train assistant`.
    """
    refuse_overwriting(out / "text", resume)
    if start_from is None and tower is None:
        raise click.UsageError("from nothing it needs --tower FOLDER; else --start-from CHECKPOINT")
    sources = {
        "tower": file_hash(tower / "tower.safetensors") if tower else None,
        "start-from": file_hash(start_from / "model.safetensors") if start_from else None,
    }
    looks_of = {"pictures": str(pictures.resolve()), "looks": looks, "seed": seed, **sources}
    if (out / LOOKS).exists():
        read_looks(out / LOOKS, looks_of)  # refuse before anything is trained
    processes = all_processes()
    if start_from is not None:
        model, tokenizer = read_checkpoint(start_from)
        if processes.is_main_process:
            save_tokenizer(tokenizer, out / "tokenizer")
        student, rate = NanoAssistant(model), FURTHER
        selector = read_expert(start_from / "expert.safetensors")
        student.load_state_dict(
            {name: value for name, value in selector.items() if name.startswith(SELECTOR)},
            strict=False,
        )
    else:
        assert tower is not None  # refused above
        with processes.main_process_first():
            tokenizer = kept_tokenizer(out / "tokenizer")
        torch.manual_seed(seed)
        model = LlavaOnevisionForConditionalGeneration(nano_config(tokenizer))
        model.model.vision_tower.load_state_dict(load_file(tower / "tower.safetensors"))
        student, rate = NanoAssistant(model), 1.0
    writer = SequenceWriter(tokenizer)
    student.llm_q_former.requires_grad_(False)  # text has nothing to select from
    text = text_sequences(writer, len(student.image_newline), choices)
    batches = Batches(text, AssistantTraining(seed=seed, choices=choices))
    schedule = Schedule(text_steps, rate * 2e-3)
    train_assistant(student, batches, schedule, out / "text", resume, sources)

    # It lies in the expert's file, by whose hash stored references are known: no new one for it.
    student.llm_q_former.requires_grad_(start_from is None)
    with processes.main_process_first():
        seen = kept_looks(model, pictures, looks_of, out / LOOKS)
    make = picture_sequences(writer, seen, json.dumps(PINPOINTS))
    batches = Batches(make, AssistantTraining(batch=6, seed=seed))  # long sequences
    schedule = Schedule(picture_steps, rate * 7e-4, warmup=30)
    train_assistant(student, batches, schedule, out / "pictures", resume, sources)
    if not processes.is_main_process:
        return
    weights = {name: value.contiguous() for name, value in student.state_dict().items()}
    save_file(weights, out / "assistant.safetensors")
    figures = {
        name: measure(replier(student, writer, seen), 200, stated=stated).shares()
        for name, stated in (("grounded", True), ("ungrounded", False))
    }
    write_json(out / "agreement.json", figures)
    click.echo(json.dumps(figures))


def replier(
    student: NanoAssistant, writer: SequenceWriter, looks: list[Look]
) -> Callable[[Turn], tuple[str, bool]]:
    """Answers turns about pictures, greedily: the words, and whether they came to an end."""
    student.eval()
    rng, pinpoints = random.Random(0), json.dumps(PINPOINTS)

    def reply(turn: Turn) -> tuple[str, bool]:
        pictures = tuple(see(rng.choice(looks), f, rng, pinpoints) for f in turn.pictures)
        sequence = Sequence(writer.question(turn, pictures), [], pictures)
        (answer,) = student.reply([sequence], writer.end)
        ended = answer[-1] == writer.end
        return str(writer.tokenizer.decode(answer[: len(answer) - ended])), ended

    return reply


def kept_looks(
    model: LlavaOnevisionForConditionalGeneration,
    pictures: Path,
    made_of: dict[str, Any],
    path: Path,
) -> list[Look]:
    """The looks of a file; taken from the pictures and saved there if they are not yet.

    Args:
        model: whose tower looks.
        pictures: the folder to look at.
        made_of: number of `looks`, `seed`, and what else is written down beside them.
        path: the file.

    Raises:
        TrainingError: as `read_looks`.
    """
    if not path.exists():
        processor = LlavaOnevisionImageProcessor(**image_processor_config())
        count = made_of["looks"]
        library = read_pictures(pictures, limit=count, side=448, smallest=128)
        taken = take_looks(library, count, model, processor, made_of["seed"])
        state = {"of": made_of, "looks": [(look.tokens, look.size, look.grid) for look in taken]}
        with draft_of(path) as draft:
            torch.save(state, draft)
    return read_looks(path, made_of)


def read_looks(path: Path, made_of: dict[str, Any]) -> list[Look]:
    """The looks of a file.

    Raises:
        TrainingError: they were made of something else.
    """
    state = torch.load(path, weights_only=True)
    if others := changed(state["of"], made_of):
        names = ", ".join(f"--{name}" for name in others)
        raise TrainingError(f"{path} was made with other {names}: choose another --out")
    return [Look(*parts) for parts in state["looks"]]
