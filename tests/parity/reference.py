"""The served model once more, in plain torch and transformers, without a line of ours.

It is written from the papers and the released code's order of computations, crop by crop, for one
picture at a time; the server's own code batches and packs.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cosine_similarity, gelu, interpolate
from transformers import AutoProcessor, LlavaOnevisionForConditionalGeneration
from transformers.models.llava_onevision.modeling_llava_onevision import (
    get_anyres_image_grid_shape,
)

SLIGHTLY, MODERATELY, HIGHLY = range(3)


@dataclass(frozen=True)
class Seen:
    """One picture, seen by the reference."""

    score: float  # calibrated, where the checkpoint says how
    logit: float  # of the head's raw score
    adverb: int
    grid: tuple[int, int]  # rows and columns of its crops
    significance: Tensor  # (B, h, w)
    embeddings: Tensor  # (T, D)


def halves(side: int) -> list[slice]:
    """Two cells of an odd side share its middle."""
    return [slice(0, (side + 1) // 2), slice(side // 2, side)]


def square(values: Tensor) -> Tensor:
    """(N, ...) -> (n, n, ...)."""
    side = round(len(values) ** 0.5)
    return values.unflatten(0, (side, side))


class Expert:
    """The anomaly expert's formulas, on the tensors of its file."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = {name: value.float() for name, value in state.items()}

        others = {name.split(".")[1] for name in state if name.startswith("others.")}
        self.matchings = ["", *(f"others.{number}." for number in others)]

    def linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def mlp(self, x: Tensor, name: str) -> Tensor:
        return self.linear(gelu(self.linear(x, f"{name}.0")), f"{name}.2")

    def significance(self, levels: list[Tensor], final: Tensor) -> Tensor:
        """(B, N): how abnormal each token is, in the mean of all matchings."""
        maps = [self.matched(levels, final, matching) for matching in self.matchings]
        return torch.stack(maps).mean(0)

    def matched(self, levels: list[Tensor], final: Tensor, of: str) -> Tensor:
        """(B, N): how abnormal each token is, by the base view's class description."""
        pooled = self.linear(final[0].T, f"{of}pooling_layer.0").T[0]
        described = self.mlp(pooled, f"{of}class_predictor")
        probabilities = []
        for i, level in enumerate(levels):
            tokens = self.linear(level, f"{of}siglip_adaptors.{i}")
            similar = [
                cosine_similarity(
                    tokens,
                    self.linear(
                        torch.cat((self.state[f"{of}{side}_embedding"][0], described)),
                        f"{of}prompt_adaptors.{i}",
                    ),
                    dim=-1,
                )
                for side in ("positive", "negative")
            ]
            probabilities.append(torch.softmax(100 * torch.stack(similar), dim=0)[1])
        return torch.stack(probabilities).mean(0)

    def select(self, q_former: str, tokens: Tensor, significance: Tensor) -> Tensor:
        """The four tokens (4, C) of one crop: tokens (N, C), significance (N,)."""
        grid, weights = square(tokens), square(significance)[..., None]
        chosen = []
        for rows in halves(len(grid)):
            for columns in halves(len(grid)):
                weight = weights[rows, columns]
                query = (grid[rows, columns] * weight).mean((0, 1)) / weight.mean()
                keys = self.linear(tokens, f"{q_former}.key_proj")
                match = keys @ self.linear(query, f"{q_former}.query_proj")
                chosen.append(torch.softmax(match / keys.shape[-1] ** 0.5, 0) @ tokens)
        return torch.stack(chosen)

    def cells(self, significance: Tensor) -> Tensor:
        """Mean significance of one crop's four cells."""
        grid = square(significance)
        sides = halves(len(grid))
        return torch.stack([grid[rows, columns].mean() for rows in sides for columns in sides])

    def global_token(self, selected: Tensor, significance: Tensor) -> Tensor:
        """The mean of an image's selected tokens (B, 4, C), by cell and crop significance."""
        weights = torch.stack([self.cells(crop) * crop.mean() for crop in significance])
        return (selected * weights[..., None]).sum((0, 1)) / weights.sum()


class Reference:
    """A checkpoint in the hub's format and its expert, in float32."""

    def __init__(self, folder: Path, expert: Path, tower: dict | None, phrases: list[list[int]]):
        """Load everything; `tower` is the expert's own where it is not the LLM's."""
        self.model = LlavaOnevisionForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32
        ).eval()
        self.processor = AutoProcessor.from_pretrained(folder)
        state = load_file(expert) if expert.suffix == ".safetensors" else torch.load(expert)
        self.expert = Expert(state)
        self.tower, self.phrases = tower, phrases
        self.calibration: dict[str, float] | None = None

    @classmethod
    def of_folder(cls, folder: Path) -> "Reference":
        """A checkpoint that brings its expert."""
        section = json.loads((folder / "config.json").read_text())["anomaly_expert"]
        expert = folder / section["weights"]
        reference = cls(folder, expert, section["tower"], section["phrase_token_ids"])
        reference.calibration = section.get("calibration")
        return reference

    @cached_property
    def network(self) -> torch.nn.Module:
        """The expert's own convolutional network."""
        network = timm.create_model(
            self.tower["name"],
            pretrained=False,
            features_only=True,
            out_indices=[stage - 1 for stage in self.tower["levels"]],
        )
        prefix = "tower.network."
        state = self.expert.state.items()
        network.load_state_dict(
            {name.removeprefix(prefix): value for name, value in state if name.startswith(prefix)}
        )
        return network.eval()

    def own_tokens(self, pixels: Tensor) -> tuple[list[Tensor], Tensor]:
        """Levels (B, N, C_l) and final tokens (B, N, C) of the expert's own network."""
        side = (self.tower["grid"],) * 2
        stages = [
            interpolate(stage, side, mode="bilinear", antialias=True).flatten(2).transpose(1, 2)
            for stage in self.network(pixels)
        ]
        for i in range(len(stages)):
            stages[i] = (stages[i] - self.own(f"mean_{i}")) / self.own(f"std_{i}")
            if self.tower.get("components"):
                stages[i] = stages[i] @ self.own(f"components_{i}")
        crops = [self._compared(list(crop)) for crop in zip(*stages, strict=True)]
        *levels, evidence = (torch.stack(level) for level in zip(*crops, strict=True))
        return levels, evidence if self.tower.get("evidence") else levels[-1]

    def own(self, name: str) -> Tensor:
        return self.expert.state[f"tower.{name}"]

    def _compared(self, stages: list[Tensor]) -> list[Tensor]:
        """The levels (N, C_l) of one crop, and the evidence (N, C) of all of them."""
        deviations, statistics = [], []
        for tokens in stages:
            unit = tokens / tokens.norm(dim=-1, keepdim=True)
            likeness = (unit @ unit.T).fill_diagonal_(-2)
            ordered, order = likeness.sort(descending=True)
            count = self.tower["neighbours"]
            best, beyond = ordered[:, :count], ordered[:, count, None]
            weight = torch.minimum((best - beyond) / 1e-3, torch.tensor(1.0)) + 1e-3
            alike = (tokens[order[:, :count]] * weight[..., None]).sum(1) / weight.sum(1)[:, None]
            deviations.append(tokens - alike)
            length = (((tokens - alike) ** 2).mean(1) + 0.01**2).sqrt()
            first, mean = 1 - best[:, 0], 1 - best.mean(1)
            z_length = (length - length.mean()) / (length.std() + 0.05)
            z_mean = (mean - mean.mean()) / (mean.std() + 0.02)
            statistics += [length, length.log(), z_length, 3 * first, 3 * mean, z_mean]
        rarity = 4 * torch.stack(statistics, dim=-1)
        levels = [
            torch.cat((tokens, tokens - tokens.mean(0), away, away.abs(), rarity), dim=-1)
            for tokens, away in zip(stages, deviations, strict=True)
        ]
        return [*levels, torch.cat((*(away.abs() for away in deviations), rarity), dim=-1)]

    def see(self, picture: Image.Image) -> Seen:
        """Score, map and embeddings of one picture."""
        with torch.inference_mode():
            return self._see(picture)

    def _see(self, picture: Image.Image) -> Seen:
        config = self.model.config
        inputs = self.processor.image_processor(picture, return_tensors="pt")
        pixels, size = inputs.pixel_values[0], (picture.height, picture.width)
        grid = get_anyres_image_grid_shape(
            size, config.image_grid_pinpoints, config.vision_config.image_size
        )
        hidden = self.model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
        tokens = hidden[config.vision_feature_layer]
        if self.tower is None:
            levels, final = [hidden[layer] for layer in (7, 13, 19, 25)], hidden[26]
        else:
            levels, final = self.own_tokens(pixels)
        expert = self.expert
        significance = expert.significance(levels, final)
        own = torch.stack(
            [expert.select("q_former", *c) for c in zip(final, significance, strict=True)]
        )
        own_global = expert.global_token(own, significance)
        logit = expert.mlp(own_global, "final_predictor").squeeze()
        score = self._score(logit, significance)
        selected, global_token = (
            (own, own_global) if self.tower is None else self._of_llm(tokens, significance)
        )
        adverb = (float(score) >= 0.3) + (float(score) >= 0.7)
        embeddings = self._embeddings(tokens, size, grid, adverb, global_token, selected)
        maps = torch.stack([square(crop) for crop in significance])
        return Seen(float(score), float(logit), adverb, grid, maps, embeddings)

    def _score(self, logit: Tensor, significance: Tensor) -> Tensor:
        """From the head's logit and the mean logit of the crops' 2 % most significant tokens."""
        if self.calibration is None:
            return torch.sigmoid(logit)
        crops = significance[1:]  # without the base view
        logits = torch.logit(crops.flatten().double(), 1e-6).sort().values
        peak = logits[-max(1, round(0.02 * len(logits))) :].mean()
        of = self.calibration
        return torch.sigmoid(of["score_scale"] * logit + of["score_bias"] + of["peak_scale"] * peak)

    def _of_llm(self, tokens: Tensor, significance: Tensor) -> tuple[Tensor, Tensor]:
        """Selected and global tokens of the LLM's tower by the map of the expert's own."""
        side = round(tokens.shape[1] ** 0.5)
        maps = torch.stack([square(crop) for crop in significance])[:, None]
        resampled = interpolate(maps, (side, side), mode="bilinear", antialias=True).flatten(1)
        selected = torch.stack(
            [
                self.expert.select("llm_q_former", *crop)
                for crop in zip(tokens, resampled, strict=True)
            ]
        )
        return selected, self.expert.global_token(selected, significance)

    def _embeddings(
        self,
        tokens: Tensor,
        size: tuple[int, int],
        grid: tuple[int, int],
        adverb: int,
        global_token: Tensor,
        selected: Tensor,
    ) -> Tensor:
        """[image][phrase][global][base view's four][the grid's, row by row with newlines]."""
        model = self.model.model
        newline = model.image_newline[None]
        [image], _ = model.pack_image_features(
            [model.multi_modal_projector(tokens)], torch.tensor([size]), model.image_newline
        )
        selected = model.multi_modal_projector(selected)
        parts = [image, self.embed(self.phrases[adverb])]
        parts += [model.multi_modal_projector(global_token)[None], selected[0]]
        for row in range(grid[0]):
            for half in (slice(0, 2), slice(2, 4)):
                for column in range(grid[1]):
                    parts.append(selected[1 + row * grid[1] + column, half])
                parts.append(newline)
        return torch.cat(parts)

    def embed(self, ids: list[int]) -> Tensor:
        return self.model.get_input_embeddings()(torch.tensor(ids, dtype=torch.long))

    def prompt(self, text: str, images: list[Tensor], behind: list[str] | None = None) -> Tensor:
        """The embedded prompt (T, D): each `<image>` replaced, with a text `behind` it."""
        token = self.model.config.image_token_index
        tokenizer = self.processor.tokenizer
        parts, start, images = [], 0, list(images)
        behind = list(behind or [""] * len(images))
        ids = tokenizer.encode(text, add_special_tokens=False)
        for place in [i for i, each in enumerate(ids) if each == token]:
            after = tokenizer.encode(behind.pop(0), add_special_tokens=False)
            parts += [self.embed(ids[start:place]), images.pop(0), self.embed(after)]
            start = place + 1
        assert not images
        return torch.cat([*parts, self.embed(ids[start:])])

    @torch.inference_mode()
    def logits(self, embedded: Tensor) -> Tensor:
        """The language model's logits (T, V) at every place of a prompt."""
        return self.model(inputs_embeds=embedded[None]).logits[0]

    @torch.inference_mode()
    def answer(self, embedded: Tensor, tokens: int) -> list[int]:
        """Greedy token ids, by transformers' own generate."""
        mask = torch.ones(1, len(embedded), dtype=torch.long)
        return self.model.generate(
            inputs_embeds=embedded[None],
            attention_mask=mask,
            do_sample=False,
            temperature=None,
            max_new_tokens=tokens,
        )[0].tolist()
