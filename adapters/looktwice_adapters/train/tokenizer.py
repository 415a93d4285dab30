"""The small checkpoint's tokenizer: dialogues + general English -> byte-level BPE, Qwen2 style.

Qwen2's splitting rule and special tokens, a vocabulary of its own: the words of inspections are
one token each, anything else falls apart into pieces and at worst into bytes.
"""

import json
import random
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from looktwice_adapters.anomaly_prompt import ADVERBS, phrase
from looktwice_adapters.dialogue import make_dialogue, messages

VOCABULARY = 4096
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>")
# Qwen2's rule: contractions, words with their space, single digits, marks, line ends, blanks.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Pictures first, in order, then the texts, as LLaVA-OneVision's template on the hub does; the
# server writes an image's facts, one line, right behind it.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- elif message['content'] -%}
{%- for part in message['content'] if part['type'] in ('image', 'image_url') -%}
{{- '<image>' -}}
{%- endfor -%}
{%- for part in message['content'] if part['type'] == 'video' -%}
{{- '<video>' -}}
{%- endfor -%}
{%- for part in message['content'] if part['type'] == 'text' -%}
{{- ('' if loop.first else '\\n') + part['text'] -}}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def general_english() -> Iterator[str]:
    """Prose that every Python carries: the language reference behind `help()`."""
    topics: dict[str, str] = import_module("pydoc_data.topics").topics
    yield from topics.values()


def corpus(dialogues: int) -> Iterator[str]:
    """Text that the vocabulary is learnt from."""
    rng = random.Random(0)
    for _ in range(dialogues):
        yield from (message["content"] for message in messages(make_dialogue(rng)))
        yield from (phrase(adverb) for adverb in ADVERBS)
    yield from general_english()


def train_tokenizer(dialogues: int = 20000) -> PreTrainedTokenizerFast:
    """Learn the vocabulary; the same on every machine with the same Python."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(corpus(dialogues), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<image>", "<video>"],
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    path = folder / "tokenizer_config.json"
    written = json.loads(path.read_text())
    written["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(written, indent=2) + "\n")


def kept_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder; trained and saved there if it is not yet."""
    if not (folder / "tokenizer.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        save_tokenizer(train_tokenizer(), folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def phrase_token_ids(tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    """Token ids of the phrase for each of ADVERBS; their counts must agree."""
    ids = [tokenizer(phrase(adverb), add_special_tokens=False)["input_ids"] for adverb in ADVERBS]
    if len({len(row) for row in ids}) != 1:
        raise ValueError(f"the phrases have different token counts: {[len(row) for row in ids]}")
    return ids
