"""Models that see: what turns a picture into ids, positions and embeddings, exactly and for rows laid end to end.

A vision-language model of the Qwen2-VL family (Qwen2.5-VL, Qwen3-VL) reads a picture as a run of placeholder ids whose
embeddings its vision tower replaces, at positions of three dimensions (time, row, column). Here both are computed
outside the model, so that its text part runs over ragged rows like any other (`agentrl.models.attention`). Which ids
are placeholders is decided by where pictures were put (`ImageSpan`), never by the ids: a sampled placeholder is text.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from agentrl.errors import ModelError
from agentrl.images import read_pixels
from agentrl.models.attention import PackedSequences, RaggedPlan, lm_logits, precision
from agentrl.types import ImagePart, ImageSpan

Tensor = torch.Tensor

_CACHE = 512
"""Pictures whose patches are kept: members of a group, sampler and trainer read the same ones."""


class Patches(NamedTuple):
    """One picture as a vision tower reads it."""

    pixels: Tensor
    """(patches, values) float32."""
    grid: Tensor
    """(1, 3) int64: patches in time, down, across."""
    tokens: int
    """Placeholders that it takes in a context."""


class ImageReader:
    """A model's image processor. Stateless but for a cache, and shared by copies of the model.

    Attributes:
        processor: of `transformers`; what `save_pretrained` writes beside the model.
        token_id: the placeholder.
    """

    def __init__(self, processor: Any, token_id: int) -> None:
        self.processor, self.token_id = processor, token_id
        self._read = lru_cache(_CACHE)(self._patches)

    def __deepcopy__(self, memo: dict[int, Any]) -> ImageReader:
        return self

    def read(self, image: ImagePart) -> Patches:
        """Returns the patches of a picture.

        Raises:
            DataError: its file is missing or broken.
        """
        return self._read(image)

    def _patches(self, image: ImagePart) -> Patches:
        made = self.processor(images=[read_pixels(image)], return_tensors="pt")
        grid = made["image_grid_thw"]
        return Patches(made["pixel_values"], grid, int(grid.prod()) // self.processor.merge_size**2)


def reader_of(model: Any) -> ImageReader | None:
    """Returns how `model` reads pictures; None where it reads text only."""
    reader: ImageReader | None = getattr(model, "image_reader", None)
    return reader


def rope_positions(model: Any, ids: Sequence[int], spans: Sequence[ImageSpan]) -> Tensor:
    """Returns the rotary positions of one whole sequence, (3, L) int64; three times the same for text."""
    if not spans:
        return torch.arange(len(ids)).expand(3, -1)
    reader, row = _reader(model), torch.tensor([*ids])
    grids = torch.cat([reader.read(span.image).grid for span in spans])
    kinds = _placeholders(reader, row, spans).int().unsqueeze(0)
    positions: Tensor = model.base_model.get_rope_index(
        row.unsqueeze(0), mm_token_type_ids=kinds, image_grid_thw=grids
    )[0][:, 0]
    return positions


def run_visual(model: Any, ids: Tensor, positions: Tensor, plan: RaggedPlan, spans: Sequence[ImageSpan]) -> Tensor:
    """`agentrl.models.attention.run_ragged` for a row with pictures in it.

    Args:
        model: loaded with an `image_reader` and ragged attention.
        ids: (T,) int64 token ids.
        positions: (3, T) int64 rotary positions (`rope_positions` of each sequence).
        plan: which token attends to which.
        spans: the pictures, in order; `start` counts from the first of `ids`.

    Returns:
        (T, H) last hidden states.
    """
    no_mask = ids.new_zeros((1, 1, 1, 1), dtype=torch.bool)
    with precision(model):
        output = model.base_model.language_model(
            **_embed(model, ids, spans),
            position_ids=positions.to(ids.device).unsqueeze(1),
            attention_mask=no_mask,
            use_cache=False,
            ragged=plan,
        )
    hidden: Tensor = output.last_hidden_state[0]
    return hidden


def _embed(model: Any, ids: Tensor, spans: Sequence[ImageSpan]) -> dict[str, Any]:
    """Embeddings (1, T, H) with the pictures in them, and what else the text part takes (Qwen3-VL's deep features)."""
    embeddings = model.get_input_embeddings()(ids).unsqueeze(0)
    if not spans:
        return {"inputs_embeds": embeddings}
    reader = _reader(model)
    place = {image: number for number, image in enumerate(dict.fromkeys(span.image for span in spans))}
    read = [reader.read(image) for image in place]
    features = model.base_model.get_image_features(
        torch.cat([one.pixels for one in read]).to(ids.device),
        torch.cat([one.grid for one in read]).to(ids.device),
        return_dict=True,
    )

    def in_order(pieces: Sequence[Tensor]) -> Tensor:
        return torch.cat([pieces[place[span.image]] for span in spans]).to(embeddings.dtype)

    mask = _placeholders(reader, ids, spans).unsqueeze(0)
    given = {"inputs_embeds": embeddings.masked_scatter(mask.unsqueeze(-1), in_order(features.pooler_output))}
    if (deep := getattr(features, "deepstack_features", None)) is not None:
        given |= {"visual_pos_masks": mask, "deepstack_visual_embeds": [in_order(layer) for layer in deep]}
    return given


def _placeholders(reader: ImageReader, ids: Tensor, spans: Sequence[ImageSpan]) -> Tensor:
    """(T,) bool: ids that stand for a piece of a picture."""
    inside = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    for span in spans:
        inside[span.start : span.start + span.length] = True
    return inside & (ids == reader.token_id)


def _reader(model: Any) -> ImageReader:
    reader = reader_of(model)
    if reader is None:
        raise ModelError(
            f"the rows hold pictures, but {type(model).__name__} reads text only; take a vision-language model "
            "(Qwen2.5-VL, Qwen3-VL), or an environment that describes what it shows in words"
        )
    return reader


@torch.no_grad()
def check_visual(model: Any) -> None:
    """Compares logits of two packed sequences with a picture each with the model's own; done once when it is loaded.

    Raises:
        ModelError: the architecture reads pictures in another way than the Qwen2-VL family.
    """
    import numpy as np

    from agentrl.images import image_part

    reader = _reader(model)
    body = model.base_model
    missing = [n for n in ("get_rope_index", "get_image_features", "language_model") if not hasattr(body, n)]
    if missing:
        raise ModelError(
            f"{type(model).__name__} has no {missing[0]}: pictures are read by models of the Qwen2-VL family only "
            "(Qwen2-VL, Qwen2.5-VL, Qwen3-VL)"
        )
    random = np.random.default_rng(0)
    rows, spans, positions, plain = [], [], [], []
    flat: list[int] = []
    for height, before in ((60, 2), (90, 3)):
        image = image_part(random.integers(256, size=(height, 120, 3), dtype=np.uint8))
        patches = reader.read(image)
        row = [*range(5, 5 + before), *[reader.token_id] * patches.tokens, 3, 4]
        span = ImageSpan(start=before, length=patches.tokens, image=image)
        spans.append(span.moved(len(flat)))
        positions.append(rope_positions(model, row, [span]))
        rows.append(row)
        flat += row
        plain.append(_own_logits(model, row, patches))
    device = model.get_input_embeddings().weight.device
    plan = PackedSequences(tuple(map(len, rows)))
    hidden = run_visual(model, torch.tensor(flat, device=device), torch.cat(positions, 1), plan, spans)
    ours, theirs = lm_logits(model, hidden), torch.cat(plain).float()
    error, largest = (ours - theirs).abs().max().item(), theirs.abs().max().item()
    exact = plain[0].dtype == torch.float32
    if not error <= (1e-3 if exact else 0.05) * largest:
        raise ModelError(
            f"{type(model).__name__}: logits of packed sequences with pictures differ from the model's own by "
            f"{error:.3g}; this architecture cannot be trained exactly here"
        )


def _own_logits(model: Any, row: list[int], patches: Patches) -> Tensor:
    device = model.get_input_embeddings().weight.device
    ids = torch.tensor([row], device=device)
    token_id = _reader(model).token_id
    with precision(model):
        logits: Tensor = model(
            input_ids=ids,
            mm_token_type_ids=(ids == token_id).int(),
            pixel_values=patches.pixels.to(device),
            image_grid_thw=patches.grid.to(device),
            use_cache=False,
        ).logits[0]
    return logits
