"""Stage 2 on an existing checkpoint: the served prompt, answers alone, frozen sight, resumable."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor

from looktwice_adapters.train.assistant import (
    Examples,
    Stage2,
    load_assistant,
    train_assistant,
    write_like,
)
from looktwice_adapters.train.conversations import (
    Conversation,
    ConversationError,
    Message,
    read_conversations,
)
from looktwice_adapters.train.frozen_sight import FrozenSight, read_section
from looktwice_adapters.train.run import Run, Schedule, TrainingError
from looktwice_adapters.train.sequences import IGNORED
from looktwice_adapters.train.served_prompt import served_prompt
from looktwice_clients.cli import run as looktwice
from tests.parity.reference import Reference

NANO = Path(__file__).parents[2] / "models" / "nano"
# As llava-hf's checkpoints write theirs: a blank before a history's answer, none before a new one.
HUB_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ '\n' + part['text'] }}"
    "{% endfor %}{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
FACTS = "Inspection: anomalous, 1 region: right.\n"
SCHEDULE = Schedule(3, 1e-3, warmup=1, weight_decay=0.0, save_every=1, log_every=1)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoProcessor.from_pretrained(NANO).tokenizer


@pytest.fixture
def file(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.png"):
        Image.fromarray(rng.integers(0, 256, (60, 90, 3), np.uint8)).save(tmp_path / name)
    records = [
        {
            "id": "one",
            "image": "a.png",
            "conversations": [
                {"from": "human", "value": "<image>\nIs it a bolt?"},
                {"from": "gpt", "value": "Yes, a rusty bolt."},
                {"from": "human", "value": "How rusty?"},
                {"from": "gpt", "value": "Very."},
            ],
        },
        {
            "id": "two",
            "image": ["a.png", "b.png"],
            "conversations": [
                {"from": "system", "value": "Be brief."},
                {"from": "human", "value": "Compare."},
                {"from": "gpt", "value": "Alike."},
            ],
        },
    ]
    path = tmp_path / "conversations.json"
    path.write_text(json.dumps(records))
    return path


def test_llavas_json_is_read_with_its_pictures_and_without_its_marks(file):
    one, two = read_conversations(file)
    assert one.messages[0] == Message("user", "Is it a bolt?", (file.parent / "a.png",))
    assert [message.text for message in one.messages[1:]] == [
        "Yes, a rusty bolt.",
        "How rusty?",
        "Very.",
    ]
    assert two.messages[1].pictures == (file.parent / "a.png", file.parent / "b.png")
    lines = file.with_suffix(".jsonl")
    lines.write_text("\n".join(json.dumps(record) for record in json.loads(file.read_text())))
    assert read_conversations(lines)[0].messages == one.messages


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"facts": []}, "1 pictures, but 0 `facts`"),
        ({"facts": [{"verdict": "normal"}]}, "`facts` without verdict and positions"),
        ({"facts": [{"verdict": "anomalous", "positions": "top left"}]}, "no list of: .*top left"),
        ({"facts": [{"verdict": "anomalous", "positions": ["upstairs"]}]}, "no list of: .*top"),
        ({"image": 5}, "record 0 .*neither a path nor a list"),
        ({"image": "c.png"}, "record 0 .*no picture at .*c.png"),
        ({"image": ["a.png", "b.png"]}, "2 pictures, but 1 times <image>"),
        ({"conversations": "none"}, "no list `conversations`"),
        ({"conversations": [{"from": "human", "value": "<image>Hi"}]}, "gpt last"),
        ({"conversations": [{"from": "bot", "value": "Hi"}]}, "a message from 'bot'"),
        ({"conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": ""}]},
         "1 empty answers"),
    ],
)  # fmt: skip
def test_a_record_that_cannot_be_trained_on_is_named(file, change, complaint):
    records = json.loads(file.read_text())
    file.write_text(json.dumps([records[0] | change]))
    with pytest.raises(ConversationError, match=complaint):
        read_conversations(file)


@pytest.mark.parametrize("template", ["nano", "hub"])
def test_the_prompt_of_the_last_answer_is_the_one_that_is_served(file, tokenizer, template):
    chat = tokenizer.chat_template if template == "nano" else HUB_TEMPLATE
    conversation = read_conversations(file)[0]
    ids, labels = served_prompt(tokenizer, chat, conversation, [FACTS])
    parts = [{"type": "image"}, {"type": "text", "text": "Is it a bolt?"}]
    history = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": [{"type": "text", "text": "Yes, a rusty bolt."}]},
        {"role": "user", "content": [{"type": "text", "text": "How rusty?"}]},
    ]
    text = tokenizer.apply_chat_template(
        history, chat_template=chat, tokenize=False, add_generation_prompt=True
    )
    served = tokenizer.encode(text, add_special_tokens=False)
    place = served.index(tokenizer.convert_tokens_to_ids("<image>")) + 1
    served[place:place] = tokenizer.encode(FACTS, add_special_tokens=False)
    assert ids[: len(served)] == served
    assert tokenizer.decode(ids[len(served) :]).startswith("Very.<|im_end|>")
    said = tokenizer.decode([label for label in labels if label != IGNORED])
    assert said == "Yes, a rusty bolt.<|im_end|>Very.<|im_end|>"
    assert len(labels) == len(ids)


@pytest.mark.parametrize("said", ["n", "d", "im", "end", "assistant"])
@pytest.mark.parametrize("template", ["nano", "hub"])
def test_an_answer_whose_letters_are_in_the_templates_marks_is_learnt_whole(
    tokenizer, template, said
):
    chat = tokenizer.chat_template if template == "nano" else HUB_TEMPLATE
    turns = (Message("user", "Is it good? y/n"), Message("assistant", said))
    ids, labels = served_prompt(tokenizer, chat, Conversation("", (*turns, *turns)), [])
    learnt = tokenizer.decode([label for label in labels if label != IGNORED])
    assert learnt == f"{said}<|im_end|>" * 2
    whole = tokenizer.decode(ids).replace("assistant \n", "assistant\n")  # the hub's history
    assert whole.count(f"assistant\n{said}<|im_end|>") == 2


def test_a_template_that_changes_an_answer_is_refused(tokenizer):
    turns = (Message("user", "Is it good?"), Message("assistant", "No."))
    loud = "{% for message in messages %}{{ message['content'][0]['text'] | upper }}{% endfor %}"
    with pytest.raises(ConversationError, match="rewrites part 7's answers"):
        served_prompt(tokenizer, loud, Conversation("part 7", turns), [])


def test_a_line_of_jsonl_may_hold_any_letter(file):
    record = json.loads(file.read_text())[1]
    record["conversations"][-1]["value"] = "One.\u2028Two.\x85Three."
    lines = file.with_suffix(".jsonl")
    lines.write_text(json.dumps(record, ensure_ascii=False) + "\n")
    assert read_conversations(lines)[0].messages[-1].text.count("Two.") == 1


def trained_parts(stage):
    model, assistant, processor = load_assistant(NANO, stage)
    from looktwice_adapters.checkpoint import load_expert

    expert = load_expert(*read_section(NANO, None))
    sight = FrozenSight(model, processor.image_processor, expert, torch.device("cpu"))
    return assistant, sight, processor


def test_a_pictures_embeddings_equal_the_published_codes(file):
    picture = Image.open(file.parent / "a.png").resize((300, 200))
    assistant, sight, _ = trained_parts(Stage2())
    sight.tower.float()
    seen = sight.look(np.asarray(picture))
    reference = Reference.of_folder(NANO).see(picture)
    assert seen.adverb == reference.adverb
    assert seen.grid == tuple(reference.grid)
    with torch.no_grad():
        features = assistant.features(seen)
    torch.testing.assert_close(features, reference.embeddings, atol=2e-3, rtol=1e-3)


def test_only_projector_and_language_model_learn(file):
    for rank in (0, 4):
        assistant, _, _ = trained_parts(Stage2(lora_rank=rank))
        learns = {name.split(".")[0] for name, p in assistant.named_parameters() if p.requires_grad}
        assert learns - {"head"} == {"projector", "image_newline", "language_model"}
        lora = [n for n, p in assistant.named_parameters() if p.requires_grad and "lora" in n]
        assert bool(lora) == bool(rank)


def test_the_loss_is_the_cross_entropy_of_the_answers(file):
    stage = Stage2(facts_share=1.0)
    assistant, sight, processor = trained_parts(stage)
    examples = Examples(read_conversations(file), sight, processor, stage)
    batch = [examples.example(conversation) for conversation in examples.conversations]
    assert tokenizer_text(processor, batch[0]).count("Inspection: ") == 1
    with torch.no_grad():
        loss = assistant(batch)
        total, count = 0.0, 0
        for example in batch:
            embedded, labels = assistant.embed(example)
            logits = assistant.head(assistant.language_model(inputs_embeds=embedded[None])[0][0])
            chances = logits.log_softmax(-1)
            for place, label in enumerate(labels):
                if label != IGNORED:
                    total -= chances[place - 1, label].item()
                    count += 1
    assert loss.item() == pytest.approx(total / count, rel=0.02)  # bfloat16


def tokenizer_text(processor, example):
    return processor.tokenizer.decode(example.ids)


def test_the_facts_are_told_in_the_asked_share_of_conversations(file):
    stage = Stage2(facts_share=0.5)
    _, sight, processor = trained_parts(stage)
    examples = Examples(read_conversations(file), sight, processor, stage)
    told = [
        "Inspection: " in tokenizer_text(processor, examples.example(examples.conversations[0], i))
        for i in range(12)
    ]
    assert 2 <= sum(told) <= 10


def test_the_facts_told_are_those_that_the_answers_agree_with(file):
    records = json.loads(file.read_text())
    records[0]["facts"] = [{"verdict": "anomalous", "positions": ["top left", "right"]}]
    records[1]["facts"] = [{"verdict": "normal", "positions": []}, None]
    file.write_text(json.dumps(records))
    stage = Stage2(facts_share=1.0)
    _, sight, processor = trained_parts(stage)
    one, two = read_conversations(file)
    examples = Examples([one, two], sight, processor, stage)
    first, second = (tokenizer_text(processor, examples.example(each)) for each in (one, two))
    assert first.count("Inspection: ") == second.count("Inspection: ") == 1
    assert "Inspection: anomalous, 2 regions: top left, right.\n" in first
    assert "Inspection: normal, no regions.\n" in second


@pytest.mark.parametrize("rank", [0, 4])
def test_a_resumed_run_equals_an_uninterrupted_one(file, tmp_path, monkeypatch, rank):
    conversations, stage = read_conversations(file), Stage2(lora_rank=rank, checkpointing=True)
    whole = train_assistant(NANO, None, conversations, stage, SCHEDULE, tmp_path / "whole")
    update = Run.update

    def interrupted(self, inputs_at):
        if self.step == 2:
            raise KeyboardInterrupt
        return update(self, inputs_at)

    monkeypatch.setattr(Run, "update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_assistant(NANO, None, conversations, stage, SCHEDULE, tmp_path / "parts")
    monkeypatch.setattr(Run, "update", update)
    again = train_assistant(NANO, None, conversations, stage, SCHEDULE, tmp_path / "parts", True)
    state = again.state_dict()
    for name, value in whole.state_dict().items():
        assert torch.equal(value, state[name]), name
    losses = [json.loads(line)["loss"] for line in (tmp_path / "parts" / "log.jsonl").open()]
    assert len(losses) == 3


def test_a_run_with_another_expert_or_other_images_is_not_resumed(file, tmp_path):
    conversations, stage, out = read_conversations(file), Stage2(lora_rank=4), tmp_path / "out"
    train_assistant(NANO, None, conversations, stage, replace(SCHEDULE, steps=0), out)
    other = tmp_path / "other.safetensors"
    state = load_file(NANO / "expert.safetensors")
    save_file({name: value + 0.01 for name, value in state.items()}, other)
    shutil.copy(NANO / "expert.json", other.with_suffix(".json"))
    with pytest.raises(TrainingError, match=r"other options \(expert\)"):
        train_assistant(NANO, other, conversations, stage, SCHEDULE, out, True)
    (tmp_path / "images").mkdir()
    for picture in file.parent.glob("*.png"):
        shutil.copy(picture, tmp_path / "images")
    moved = read_conversations(file, tmp_path / "images")
    with pytest.raises(TrainingError, match=r"other options \(images\)"):
        train_assistant(NANO, None, moved, stage, SCHEDULE, out, True)


def test_a_run_with_other_weights_in_a_folder_of_that_name_is_not_resumed(file, tmp_path):
    conversations, stage, out = read_conversations(file), Stage2(lora_rank=4), tmp_path / "out"
    train_assistant(NANO, None, conversations, stage, replace(SCHEDULE, steps=0), out)
    other = tmp_path / "nano"
    shutil.copytree(NANO, other)
    state = load_file(NANO / "model.safetensors")
    name = next(name for name in state if name.startswith("language_model"))
    state[name] = state[name] + 0.01
    save_file(state, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(TrainingError, match=r"other options \(model\)"):
        train_assistant(other, None, conversations, stage, SCHEDULE, out, True)


def test_a_parents_log_and_record_are_not_the_childs(tmp_path):
    shutil.copytree(NANO, tmp_path / "parent")
    (tmp_path / "out").mkdir()
    for name in ("log.jsonl", "training.json", "checkpoint.pt.draft"):
        (tmp_path / "parent" / name).write_text("the parent's")
        (tmp_path / "out" / name).write_text("its own")
    model, _, _ = load_assistant(NANO, Stage2())
    write_like(tmp_path / "parent", model, tmp_path / "out")
    for name in ("log.jsonl", "training.json", "checkpoint.pt.draft"):
        assert (tmp_path / "out" / name).read_text() == "its own"
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_the_command_writes_a_checkpoint_like_the_one_it_began_with(file, tmp_path):
    out = tmp_path / "out"
    options = ["--conversations", str(file), "--out", str(out), "--lora", "4", "--steps", "2"]
    assert looktwice(["train", "assistant", "--model", str(NANO), *options]) == 0
    before, after = load_file(NANO / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith(("language_model", "multi_modal", "image_new")) for name in changed)
    for name in ("config.json", "expert.safetensors", "tokenizer.json", "chat_template.jinja"):
        assert digest(out / name) == digest(NANO / name)
    assert json.loads((out / "training.json").read_text())["stage"]["lora_rank"] == 4


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_an_untied_head_is_written_under_the_hubs_name(tmp_path):
    model, _, _ = load_assistant(NANO, Stage2())
    model.config.tie_word_embeddings = False
    (tmp_path / "out").mkdir()
    write_like(NANO, model, tmp_path / "out")
    assert "language_model.lm_head.weight" in load_file(tmp_path / "out" / "model.safetensors")
    assert (NANO / "SHA256SUMS").exists()  # of weights that are not written
    assert not (tmp_path / "out" / "SHA256SUMS").exists()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--model", "{tmp}"], "config.json"),
        (["--conversations", "{tmp}/empty.json"], "holds no list of conversations"),
        (["--lora", "-1"], "--lora"),
        (["--expert", f"{NANO}/expert.safetensors"], "brings an expert of its own"),
    ],
)
def test_wrong_options_are_one_line(file, tmp_path, capsys, options, complaint):
    (tmp_path / "empty.json").write_text("[]")
    given = {"--model": str(NANO), "--conversations": str(file), "--out": str(tmp_path / "out")}
    given |= {options[0]: options[1].format(tmp=tmp_path)}
    assert looktwice(["train", "assistant", *(word for pair in given.items() for word in pair)])
    said = capsys.readouterr().err
    assert complaint in said
    assert said.count("\n") == 1


def test_a_long_conversation_is_cut_at_the_context(file):
    assistant, sight, processor = trained_parts(Stage2(context=40))
    example = Examples(read_conversations(file), sight, processor, Stage2()).example(
        read_conversations(file)[0]
    )
    embedded, labels = assistant.embed(example)
    assert len(embedded) == len(labels) == 40
    assert torch.isfinite(assistant([example]))
