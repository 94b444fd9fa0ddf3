"""Rows with images, and what transformers alone makes of them."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from train_data import TASK_PROMPT, pairs

from vpo_ray.engines.chat.tokenizer import load_tokenizer
from vpo_ray.prompts.image_places import image_lines
from vpo_ray.prompts.policy_prompt import prompt_ids
from vpo_ray.records import Row
from vpo_ray.storage.images import ImageStore
from vpo_ray.train.examples import Example


def put(store: ImageStore, colour: str, size: tuple[int, int] = (120, 90)) -> str:
    file = io.BytesIO()
    picture = Image.new("RGB", size, colour)
    picture.paste("white", (10, 10, 40, 30))
    picture.save(file, "PNG")
    return store.put(file.getvalue())


def shown_pairs(store: ImageStore) -> list[Row]:
    """One query with two pictures of one size, one without, one with a picture of another size."""
    images = [put(store, "red"), put(store, "blue"), None, put(store, "green", (120, 40))]
    rows = [{**row, "image": image} for row, image in zip(pairs(4), images, strict=True)]
    rows[1]["query"] = rows[0]["query"]
    return rows


def plain_log_probabilities(
    folder: Path, rows: Sequence[Row], examples: Sequence[Example], store: ImageStore
) -> tuple[Any, torch.Tensor]:
    """The whole model of a folder, and what it and its processor say of each response by itself."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = load_tokenizer(str(folder), TASK_PROMPT)
    found = []
    for row, example in zip(rows, examples, strict=True):
        shown: dict[str, Any] = {}
        ids = torch.tensor([prompt_ids(tokenizer, row["query"])])
        if row["image"] is not None:
            picture = Image.open(io.BytesIO(store.read(row["image"])))
            text = tokenizer.decode(prompt_ids(tokenizer, row["query"], image_lines("<image>")))
            given = {"return_tensors": "pt", "add_special_tokens": False}
            shown = dict(processor(text=text, images=[picture], **given))
            ids = shown.pop("input_ids")
            shown.pop("attention_mask")
        for response in example.responses:
            whole = torch.cat([ids, torch.from_numpy(response)[None].long()], dim=1)
            logits = model(input_ids=whole, **shown).logits[0, ids.shape[1] - 1 : -1]
            found.append(logits.log_softmax(-1).gather(1, whole[0, ids.shape[1] :, None])[:, 0])
    return model, torch.cat(found)
