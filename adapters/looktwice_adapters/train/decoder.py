"""Training AnomalyGPT's decoder and prompt learner: lessons -> decoder.safetensors.

AnomalyGPT (AAAI 2024), "Loss Functions": cross-entropy of the answers, focal and dice loss of each
level's map, weighted alike; both towers and the language model are frozen. The answers are asked
for without the facts sentence, so that the prompt embeddings are all that tells them.
"""

import random
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import click
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import LlavaOnevisionForConditionalGeneration

from looktwice_adapters.anomaly_prompt import ADVERBS, adverb_index
from looktwice_adapters.anomalygpt import FILE_NAME, AnomalyGPT, AnomalyGPTConfig, DecoderOutput
from looktwice_adapters.answers import Facts, answer
from looktwice_adapters.checkpoint import file_hash
from looktwice_adapters.decoder import ImageDecoder
from looktwice_adapters.detector import Detector, expert_file, shipped_checkpoint
from looktwice_adapters.dialogue import Dialogue, Turn
from looktwice_adapters.expert import AnomalyExpert
from looktwice_adapters.facts import Verdict
from looktwice_adapters.losses import dice_loss, focal_loss
from looktwice_adapters.prompt_ensemble import TextTowerError, open_clip_encoder, text_features
from looktwice_adapters.prompt_learner import CHANNELS, PROMPTS
from looktwice_adapters.questions import ask
from looktwice_adapters.scenes import PictureLibrary
from looktwice_adapters.train.calibrating import check_calibrating, fit_calibration
from looktwice_adapters.train.expert import COVERED
from looktwice_adapters.train.features import keep_plan
from looktwice_adapters.train.lessons import Lesson, Towers, make_lessons
from looktwice_adapters.train.nano_assistant import NanoAssistant
from looktwice_adapters.train.options import calibrate_on_option, seed_option, weights
from looktwice_adapters.train.pictures import index_hash, open_library
from looktwice_adapters.train.run import Run, Schedule, all_processes, refuse_overwriting
from looktwice_adapters.train.sequences import PictureSlots, Sequence, SequenceWriter
from looktwice_adapters.train.tokenizer import kept_tokenizer

LEARNING_RATE = 1e-3  # as published
START = 0.01  # of the adapters' part along the line from class to class
TOPICS = ("defect", "fine", "where")  # of the questions


@dataclass(frozen=True)
class DecoderTraining:
    """What a step sees."""

    pairs: int = 4  # of normal and defective pictures a step
    channels: tuple[int, ...] = CHANNELS
    seed: int = 0


@dataclass(frozen=True)
class PromptedPicture:
    """A picture's embeddings: image tokens (T, D), and prompts (18, D) that are being learnt."""

    image: Tensor
    prompts: Tensor

    @property
    def before(self) -> int:
        """Embeddings before the phrase."""
        return len(self.image)

    @property
    def behind(self) -> int:
        """Embeddings behind the phrase."""
        return PROMPTS


class Listener(NanoAssistant):
    """The frozen language model, whose pictures carry AnomalyGPT's prompts."""

    def __init__(self, model: LlavaOnevisionForConditionalGeneration) -> None:
        """Take the parts of a LLaVA-OneVision model and freeze them."""
        super().__init__(model)
        self.requires_grad_(False).eval()

    def features(self, picture: PictureSlots) -> Tensor:
        """A picture's embeddings in the order of its slots: (before + behind, D)."""
        assert isinstance(picture, PromptedPicture)
        return torch.cat((picture.image.float(), picture.prompts))


@torch.no_grad()
def undecided(decoder: ImageDecoder) -> None:
    """Start beside the line from class to class: fresh adapters, times 100, would be saturated."""
    line = normalize(decoder.text_features[1] - decoder.text_features[0], dim=0)  # (E,)
    beside = torch.eye(len(line)) - (1 - START) * torch.outer(line, line)
    for parameter in decoder.adapters.parameters():
        parameter.copy_(beside @ parameter)


def lessons_at(step: int, lessons: list[Lesson], training: DecoderTraining) -> list[Lesson]:
    """The pairs of one step, by seed and step alone."""
    rng = np.random.default_rng([training.seed, step])
    pairs = rng.choice(len(lessons) // 2, min(training.pairs, len(lessons) // 2), replace=False)
    return [lessons[2 * pair + which] for pair in pairs for which in (0, 1)]


def levels_of(expert: AnomalyExpert, lessons: list[Lesson]) -> tuple[list[Tensor], Tensor]:
    """Levels L x (B, N, C_l) and final tokens of all crops of some lessons."""
    stages = zip(*(lesson.stages for lesson in lessons), strict=True)
    return expert.tower.tokens([torch.cat(stage).float() for stage in stages])


def map_loss(probabilities: Tensor, cover: Tensor) -> Tensor:
    """Focal and dice loss, summed over the levels.

    Args:
        probabilities: (L, B, 2, h, w), normal then abnormal.
        cover: (B, h, w), share of each token that a defect covers.
    """
    truth = (cover > COVERED).float()
    losses = [focal_loss(maps, truth) + dice_loss(maps[:, 1], truth) for maps in probabilities]
    return torch.stack(losses).sum()


def conversations(
    lessons: list[Lesson], output: DecoderOutput, writer: SequenceWriter, rng: random.Random
) -> list[Sequence]:
    """A question about each picture and its true answer, the prompts beside the image tokens."""
    sequences = []
    adverbs = adverb_index(output.score.detach()).tolist()
    for lesson, prompts, adverb in zip(lessons, output.prompts, adverbs, strict=True):
        verdict: Verdict = "anomalous" if lesson.places else "normal"
        facts = Facts(verdict, lesson.places, ADVERBS[adverb], stated=False)
        topic = rng.choice(TOPICS)
        turn = Turn(ask(topic, rng), answer(topic, facts, rng), (facts,), topic)
        picture = PromptedPicture(lesson.image, prompts)
        sequences.append(writer.write(Dialogue((turn,)), [picture]))
    return sequences


class Pupil(nn.Module):
    """The parts that learn, between the frozen tower and the frozen language model."""

    def __init__(self, parts: AnomalyGPT, towers: Towers, writer: SequenceWriter) -> None:
        """Take fresh parts, which start undecided, and the checkpoint that they are for."""
        super().__init__()
        undecided(parts.decoder)
        self.parts, self.expert, self.writer = parts, towers.detector.expert, writer
        self.listener = Listener(towers.model)

    def forward(self, lessons: list[Lesson], seed: str) -> Tensor:
        """Cross-entropy of the answers and loss of the maps of some lessons."""
        levels, final = levels_of(self.expert, lessons)
        probabilities = self.parts.decoder(levels)
        counts = [len(lesson.cover) for lesson in lessons]
        output = self.parts.look_again(final, probabilities[:, :, 1].mean(0), counts)
        asked = conversations(lessons, output, self.writer, random.Random(seed))
        cover = torch.cat([lesson.cover for lesson in lessons])
        return self.listener.loss(asked) + map_loss(probabilities, cover)


def train_decoder(
    pupil: Pupil,
    lessons: list[Lesson],
    training: DecoderTraining,
    schedule: Schedule,
    folder: Path,
    resume: bool = False,
) -> AnomalyGPT:
    """Train on lessons; what comes back judges and is trained no more."""
    settings = asdict(training) | {
        "lessons": len(lessons),
        "text": pupil.parts.config.text_tower,
        "model": weights(pupil.listener.language_model),
    }
    run = Run(pupil, schedule, folder, settings)
    if resume:
        run.resume()

    def inputs_at(step: int) -> tuple[list[Lesson], str]:
        return lessons_at(step, lessons, training), f"{training.seed} {step}"

    run.train(inputs_at, "decoder")
    return pupil.cpu().eval().parts.requires_grad_(False)


@click.command("decoder")
@click.option(
    "--model",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Checkpoint folder whose expert has a tower of its own.  [default: nano]",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="Folder for lessons, checkpoint, log, TensorBoard and decoder.safetensors.",
)
@click.option(
    "--pictures",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder that `looktwice train pictures` filled; without it all scenes are drawn.",
)
@calibrate_on_option()
@click.option("--text-tower", default="ViT-B-32", show_default=True, help="open_clip's name of it.")
@click.option(
    "--text-weights",
    default="laion2b_s34b_b79k",
    show_default=True,
    help="open_clip's tag (downloaded), a file, or `untrained`: two fixed directions without "
    "a meaning, which the adapters learn to point in all the same.",
)
@click.option(
    "--pairs",
    type=click.IntRange(1),
    default=256,
    show_default=True,
    help="Pairs of made-up pictures.",
)
@click.option("--steps", default=400, show_default=True, help="Steps of 4 pairs.")
@seed_option("Of pictures, defects and batches.")
@click.option("--resume", is_flag=True, help="Go on from the checkpoint in --out.")
def decoder(
    model: Path | None,
    out: Path,
    pictures: Path | None,
    calibrate_on: tuple[Path, ...],
    text_tower: str,
    text_weights: str,
    pairs: int,
    steps: int,
    seed: int,
    resume: bool,
) -> None:
    """Train AnomalyGPT's decoder and prompt learner for a checkpoint, on made-up defects.

    Writes lessons, checkpoint and log under OUT, and OUT/decoder.safetensors. Interrupted, it goes
    on with --resume; lessons that exist are never made again.

    \b
    looktwice train decoder --out DECODER
    looktwice evaluate mine/ --decoder DECODER/decoder.safetensors
    looktwice serve nano --adapter anomalygpt --decoder DECODER/decoder.safetensors
    """
    refuse_overwriting(out, resume)
    check_calibrating(calibrate_on)
    training, processes = DecoderTraining(seed=seed), all_processes()
    try:
        text = text_features(
            open_clip_encoder(text_tower, None if text_weights == "untrained" else text_weights)
        )
        model = model or shipped_checkpoint()
        detector = Detector.from_folder(model)
        if detector.expert.config.tower.name == "llm":
            raise click.ClickException(
                f"the expert of {model} looks through the language model's tower; the decoder can "
                "be trained for one with a tower of its own"
            )
        llava = LlavaOnevisionForConditionalGeneration.from_pretrained(model, dtype=torch.float32)
        expert = file_hash(expert_file(model))
        with processes.main_process_first():
            library = PictureLibrary() if pictures is None else open_library(pictures)
            made_of = {
                "expert": expert,
                "model": weights(llava),
                "pictures": pictures and str(pictures.resolve()),
                "library": pictures and index_hash(pictures),
            }
            keep_plan(out / "lessons", made_of)
    except ModuleNotFoundError as error:
        raise click.UsageError("pip install 'looktwice[clip]' brings the text tower") from error
    except TextTowerError as error:
        raise click.ClickException(
            f"{error}; --text-weights takes one of open_clip's tags, a file, or `untrained`"
        ) from error
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error).partition("\n")[0]) from error
    towers = Towers(detector, llava.eval())
    with processes.main_process_first():
        lessons = make_lessons(towers, library, out / "lessons", pairs, seed)
    torch.manual_seed(seed)
    config = AnomalyGPTConfig(
        detector.expert.config.level_sizes,
        text.shape[1],
        llava.config.text_config.hidden_size,
        f"{text_tower} {text_weights}",
        expert,
        training.channels,
    )
    pupil = Pupil(AnomalyGPT(config, text), towers, SequenceWriter(kept_tokenizer(model)))
    schedule = Schedule(steps, LEARNING_RATE, warmup=steps // 10, save_every=50)
    parts = train_decoder(pupil, lessons, training, schedule, out, resume)
    if not processes.is_main_process:
        return
    if calibrate_on:
        fit_calibration(replace(detector, decoder=parts), calibrate_on, seed)
    parts.save(out / FILE_NAME)
    click.echo(f"{out / FILE_NAME}: decoder {file_hash(out / FILE_NAME)}")
