"""The assistant's training: sequences in the server's layout, resumable steps, honest checks."""

import json
import random
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from transformers import LlavaOnevisionForConditionalGeneration

from looktwice_adapters.answers import Facts, place_named, said_yes
from looktwice_adapters.dialogue import Dialogue, Turn, make_dialogue
from looktwice_adapters.train.agreement import Agreement, check, measure
from looktwice_adapters.train.hub_format import PINPOINTS, nano_config
from looktwice_adapters.train.looks import Look, crop_maps, layout
from looktwice_adapters.train.nano_assistant import (
    AssistantTraining,
    Batches,
    NanoAssistant,
    RandomPicture,
    SeenPicture,
    picture_sequences,
    text_sequences,
    train_assistant,
)
from looktwice_adapters.train.run import Run, Schedule, TrainingError
from looktwice_adapters.train.sequences import IGNORED, SequenceWriter
from looktwice_adapters.train.tokenizer import kept_tokenizer
from tests.golden import GOLDEN

NANO = Path(__file__).parents[2] / "models" / "nano"
CASES = json.loads((GOLDEN / "layout.json").read_text())
GOLDEN_PINPOINTS = json.dumps(
    [[84 * rows, 84 * columns] for rows in (1, 2, 3) for columns in (1, 2, 3)]
)
SCRATCHED = Facts("anomalous", ("bottom left",), "slightly")


@pytest.fixture(scope="module")
def tokenizer():
    return kept_tokenizer(NANO)


@pytest.fixture
def assistant(tokenizer):
    config = nano_config(tokenizer)
    config.text_config.num_hidden_layers = 2
    config.text_config.layer_types = ["full_attention"] * 2
    config.vision_config.num_hidden_layers = 1
    torch.manual_seed(0)
    return NanoAssistant(LlavaOnevisionForConditionalGeneration(config))


def a_look(grid=(2, 2), size=(300, 300)):
    generator = torch.Generator().manual_seed(0)
    return Look(torch.randn(1 + grid[0] * grid[1], 64, 192, generator=generator), size, grid)


def golden_codes(indices, crops, crops_before, number):
    """Our indices of one picture in the codes of the golden file (see its README)."""
    tokens, selected = crops * 36, crops * 4
    table = [36 * crops_before + i for i in range(tokens)]
    table += [100000 + 4 * crops_before + i for i in range(selected)]
    table += [200000 + number, -1]  # the global token, the newline
    return [table[index] for index in indices.tolist()]


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case["image_sizes_wh"]))
def test_layout_is_the_published_order(case):
    found, crops_before = [], 0
    grids = [tuple(grid) for grid in case["grids_hw"]]
    for number, (size, grid) in enumerate(zip(case["image_sizes_wh"], grids, strict=True)):
        crops = 1 + grid[0] * grid[1]
        parts = layout(tuple(size), grid, 6, GOLDEN_PINPOINTS)
        for indices in (parts.image, parts.suspicious):
            found += golden_codes(indices, crops, crops_before, number)
        crops_before += crops
    assert found == [code for code in case["sequence"] if code >= -1]  # text is below -1000


def test_replies_are_supervised_and_nothing_else(tokenizer):
    writer = SequenceWriter(tokenizer)
    for seed in range(20):
        dialogue = make_dialogue(random.Random(seed))
        pictures = [RandomPicture(torch.zeros(3, 256), 2, 1)] * len(dialogue.pictures)
        sequence = writer.write(dialogue, pictures)
        supervised = [i for i in sequence.labels if i != IGNORED]
        said = tokenizer.decode(supervised).split("<|im_end|>")[:-1]
        assert said == [turn.reply for turn in dialogue.turns]
        assert len(sequence.labels) == len(sequence.ids)


def test_a_sequence_reads_as_the_chat_template_writes_it(tokenizer):
    writer, look = SequenceWriter(tokenizer), a_look()
    turn = Turn("Is it OK?", "No.", (SCRATCHED,))
    picture = SeenPicture(look, crop_maps(look, SCRATCHED, 8, random.Random(0)), look_layout(look))
    ids = writer.write(Dialogue((turn,)), [picture]).ids
    template = tokenizer.apply_chat_template(
        [
            {"role": "user", "content": [{"type": "text", "text": "Q"}, {"type": "image"}]},
            {"role": "assistant", "content": "No."},
        ],
        tokenize=False,
    )
    slots = "<image>" * picture.before + " with slightly suspicious features: "
    slots += "<image>" * picture.behind + "Inspection: anomalous, 1 region: bottom left.\n"
    expected = template.replace("<image>Q", slots + "Is it OK?")
    assert tokenizer.decode(ids) == expected


def look_layout(look):
    return layout(look.size, look.grid, 8, json.dumps(PINPOINTS))


def test_a_pictures_embeddings_stand_in_its_slots(tokenizer, assistant):
    look, rng = a_look(grid=(1, 2), size=(400, 200)), random.Random(0)
    sequence = picture_sequences(SequenceWriter(tokenizer), [look], json.dumps(PINPOINTS))(rng)
    embedded = assistant.embed([sequence])[0]
    slots = torch.tensor(sequence.ids) == assistant.image_id
    features = torch.cat([assistant.features(picture) for picture in sequence.pictures])
    torch.testing.assert_close(embedded[slots], features)
    first = assistant.projector(look.tokens[0, :1].float())[0]
    torch.testing.assert_close(features[0], first)
    torch.testing.assert_close(features[-1], assistant.image_newline)


def test_the_significance_is_highest_where_the_facts_say():
    look = a_look()
    maps = crop_maps(look, SCRATCHED, 8, random.Random(0))
    row, column = divmod(int(maps[0].argmax()), 8)
    assert row >= 5
    assert column <= 2
    assert maps[1:].mean((1, 2)).argmax() == 2  # the grid's crop at the bottom left


def test_a_run_learns_and_an_interrupted_one_ends_the_same(tokenizer, assistant, tmp_path):
    batches = Batches(text_sequences(SequenceWriter(tokenizer), 256), AssistantTraining())
    start = {name: value.clone() for name, value in assistant.state_dict().items()}
    schedule = Schedule(6, 2e-3, warmup=2, save_every=3, log_every=1)
    assistant.llm_q_former.requires_grad_(False)
    train_assistant(assistant, batches, schedule, tmp_path / "whole", False)
    whole = {name: value.clone() for name, value in assistant.state_dict().items()}
    losses = [json.loads(line)["loss"] for line in (tmp_path / "whole" / "log.jsonl").open()]
    assert losses[-1] < losses[0]

    def power_cut(step):
        if step == 4:
            raise KeyboardInterrupt
        return (batches(step),)

    assistant.load_state_dict(start)
    with pytest.raises(KeyboardInterrupt):
        Run(assistant, schedule, tmp_path / "cut", asdict(batches.training)).train(power_cut, "cut")
    with pytest.raises(TrainingError, match=r"other options \(tower\)"):
        train_assistant(assistant, batches, schedule, tmp_path / "cut", True, {"tower": "0"})
    train_assistant(assistant, batches, schedule, tmp_path / "cut", True)
    for name, value in assistant.state_dict().items():
        torch.testing.assert_close(value, whole[name], msg=name)


@pytest.mark.parametrize(
    ("text", "yes", "place"),
    [
        ("Yes. The inspection found 1 suspicious region, at the top left.", True, "top left"),
        ("No, the picture looks normal.", False, None),
        ("The suspicious region is on the right.", None, "right"),
        ("Nowhere near it.", None, None),
    ],
)
def test_answers_are_read_by_their_first_word_and_first_place(text, yes, place):
    assert said_yes(text) == yes
    assert place_named(text) == place


def test_agreement_counts_a_wrong_yes_and_a_wrong_place():
    agreement = Agreement()
    check(agreement, "defect", SCRATCHED, "Is there a defect?", "No. It is at the top.")
    check(agreement, "where", SCRATCHED, "Where?", "The suspicious region is here: bottom left.")
    assert agreement.shares() == {"yes_no": 0.0, "place": 0.5, "exact": 0.5}


def test_letters_are_measured_by_what_stands_behind_them():
    def first_option(turn):
        return ("A." if turn.topic == "choice" else "Yes."), True

    def right(turn):
        return turn.reply, True

    asked = [measure(reply, 60).shares()["choice"] for reply in (first_option, right)]
    assert 0.2 < asked[0] < 0.7
    assert asked[1] == 1
