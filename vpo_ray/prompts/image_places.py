"""Where an image stands in a policy's prompt: before the query, inside the task prompt, on a line of its own.

Sampling asks vLLM what stands for an image. Training, which has no vLLM at hand, has the families here.
"""

from __future__ import annotations

# Models by their `model_type` whose language model can be trained beside images, and what stands for an image
# in their prompts. Their positions count tokens one by one, and attention is causal for images too, so that
# packs may share prompts.
TRAINED_PLACES = {
    "idefics3": "<image>",
    "smolvlm": "<image>",
    "llava": "<image>",
    "llava_next": "<image>",
}


def image_lines(place: str, count: int = 1) -> str:
    """What precedes a query with so many images."""
    return f"{place}\n" * count


def why_untrained(model: str, kind: object) -> str | None:
    """Why a model of this `model_type` is not trained with images; None where it is."""
    if kind in TRAINED_PLACES:
        return None
    return (
        f"{model} is of the type {kind}, which is sampled with images and not trained with them: its "
        f"positions or its attention do not fit packing. Name one of {', '.join(TRAINED_PLACES)} (SmolVLM is "
        "of the first two), leave out sft, dpo and rl, or write policy.images: ignore"
    )
