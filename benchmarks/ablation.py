"""What does the language model read? Its yes and no without tokens, adverb, or both.

    python benchmarks/ablation.py DATASET_DIR... [--model models/nano] [--limit 40]

The same pictures and the same question, in process, float32: what stands behind the picture is
left out piece by piece. "Adverb" is the phrase with its adverb, "tokens" the global and the
suspicious ones. Pictures are drawn evenly from the test pictures of each product, by seed.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor
from tqdm import tqdm

from looktwice_adapters.anomaly_prompt import ADVERBS, prompt_length
from looktwice_adapters.checkpoint import load_expert
from looktwice_adapters.datasets import read_sample
from looktwice_adapters.evaluate.run import read_products
from looktwice_adapters.train.assistant import Stage2, load_assistant
from looktwice_adapters.train.conversations import Conversation, Message
from looktwice_adapters.train.frozen_sight import FrozenSight, Sight, read_section
from looktwice_adapters.train.sequences import IGNORED
from looktwice_adapters.train.served_prompt import served_prompt

QUESTION = "Is there a defect in this picture?"
ANSWERS = ("Yes", "No")
KEPT = {
    "tokens and adverb": ("adverb", "tokens"),
    "tokens": ("tokens",),
    "adverb": ("adverb",),
    "none": (),
}


class Asked:
    """A checkpoint that is asked the question about a picture that it has looked at."""

    def __init__(self, folder: Path) -> None:
        """Load the checkpoint's parts, frozen, in float32."""
        model, assistant, self.processor = load_assistant(folder, Stage2())
        self.assistant = assistant.eval()
        judge = load_expert(*read_section(folder, None))
        self.sight = FrozenSight(model, self.processor.image_processor, judge, torch.device("cpu"))
        self.yes, self.no = (
            self.processor.tokenizer.encode(word, add_special_tokens=False)[0] for word in ANSWERS
        )

    def prompt(self, path: Path, facts: str) -> tuple[list[int], list[int]]:
        """Token ids before and behind the picture, up to the answer."""
        said = (Message("user", QUESTION, (path,)), Message("assistant", ANSWERS[0]))
        tokenizer = self.processor.tokenizer
        template = self.processor.chat_template or tokenizer.chat_template
        ids, labels = served_prompt(tokenizer, template, Conversation("", said), [facts])
        end = next(i for i, label in enumerate(labels) if label != IGNORED)
        place = ids.index(self.assistant.config.image_token_id)
        return ids[:place], ids[place + 1 : end]

    @torch.inference_mode()
    def pieces(self, sight: Sight) -> dict[str, Tensor]:
        """A picture's embeddings: its AnyRes features, and the two parts of what stands behind."""
        features, phrase = self.assistant.features(sight), self.assistant.phrases[sight.adverb]
        behind = prompt_length(sight.grid, len(phrase))
        start = len(features) - behind
        image, adverb, tokens = features.tensor_split([start, start + len(phrase)])
        return {"image": image, "adverb": adverb, "tokens": tokens}

    @torch.inference_mode()
    def answer(self, path: Path, embeddings: Tensor, facts: str) -> Tensor:
        """Logits (V,) of the answer's first token, given a picture's embeddings (T, D)."""
        model = self.assistant.language_model
        before, after = map(
            model.get_input_embeddings(), map(torch.tensor, self.prompt(path, facts))
        )
        prompt = torch.cat((before, embeddings, after))
        return self.assistant.head(model(inputs_embeds=prompt[None]).last_hidden_state[0, -1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--model", type=Path, default=Path(__file__).parents[1] / "models/nano")
    parser.add_argument("--limit", type=int, default=40, help="pictures of a product")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    products = read_products(arguments.folders, 0, arguments.limit, arguments.seed)
    samples = [s for members in products.values() for _, test in members.values() for s in test]
    asked = Asked(arguments.model)
    said = {(name, told): [] for told in (False, True) for name in KEPT}
    sights = []
    for sample in tqdm(samples, unit="picture"):
        sight = asked.sight.look(read_sample(sample))
        sights.append(sight)
        pieces = asked.pieces(sight)
        for (name, told), answers in said.items():
            embeddings = torch.cat([pieces["image"], *(pieces[part] for part in KEPT[name])])
            logits = asked.answer(sample.path, embeddings, sight.facts if told else "")
            answers.append((int(logits.argmax()), float(logits[asked.yes] - logits[asked.no])))

    anomalous = np.array([sample.anomalous for sample in samples])
    verdicts = np.array(["anomalous" in sight.facts for sight in sights])
    adverbs = np.array([sight.adverb for sight in sights])
    counted = ", ".join(f"{(adverbs == i).sum()} {word}" for i, word in enumerate(ADVERBS))
    print(f"{len(samples)} pictures, {anomalous.sum()} anomalous; {counted}")
    print(f"verdict right: {(verdicts == anomalous).mean():.1%}\n")
    print("| facts | left behind the picture | yes or no | as the label | as the verdict | AUROC |")
    print("|---|---|---|---|---|---|")
    for (name, told), answers in said.items():
        tokens, odds = map(np.array, zip(*answers, strict=True))
        either = np.isin(tokens, (asked.yes, asked.no))
        yes = tokens == asked.yes
        print(
            f"| {'told' if told else 'not told'} | {name} | {either.mean():.1%} "
            f"| {(either & (yes == anomalous)).mean():.1%} "
            f"| {(either & (yes == verdicts)).mean():.1%} | {roc_auc_score(anomalous, odds):.1%} |"
        )


if __name__ == "__main__":
    main()
