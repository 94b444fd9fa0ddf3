"""MPS against its definition: stock CLIP for the towers, numpy for the cross-attention."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_laion_aesthetic import four, pixels
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from vpo_ray import recipe
from vpo_ray.engines.reward import Scored, build
from vpo_ray.engines.reward.frames import read_video
from vpo_ray.engines.reward.mps import CONDITION
from vpo_ray.recipe.plugins import PluginError, find
from vpo_ray.world.tiny_scorers import make_tiny_mps

HEAD_DIM, INNER, LAYERS = 8, 64, 2
WORDS = (
    "light color clarity tone style ambiance artistry shape face hair hands limbs structure instance texture "
    "quantity attributes position number location word things"
)
QUERY = "a red fox in the snow"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("mps")
    make_tiny_mps(place)
    return place


def settings(folder: Path, **more: object) -> recipe.Reward:
    return recipe.Reward.model_validate(
        {"kind": "mps", "model": str(folder), "device": "cpu", "dtype": "float32", **more}
    )


def softmax(x: np.ndarray) -> np.ndarray:
    found = np.exp(x - x.max(-1, keepdims=True))
    return found / found.sum(-1, keepdims=True)


def normed(x: np.ndarray, w: dict[str, np.ndarray]) -> np.ndarray:
    scaled = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return scaled * w["norm.weight"] + w["norm.bias"]


def swiglu(x: np.ndarray, gate_first: bool) -> np.ndarray:
    first, second = x[:, :INNER], x[:, INNER:]
    value, gate = (second, first) if gate_first else (first, second)
    return value * gate / (1 + np.exp(-gate))


def turned(x: np.ndarray, frequencies: np.ndarray) -> np.ndarray:
    """Each pair of a component of the first half and one of the second, turned by place times frequency."""
    half = x.shape[-1] // 2
    found = x.copy()
    for place in range(len(x)):
        for i, frequency in enumerate(frequencies):
            cos, sin = np.cos(place * frequency), np.sin(place * frequency)
            a, b = x[place, i], x[place, half + i]
            found[place, i], found[place, half + i] = a * cos - b * sin, b * cos + a * sin
    return found


def attention(query: np.ndarray, key: np.ndarray, value: np.ndarray, mask: np.ndarray | float) -> np.ndarray:
    heads = [query[:, i : i + HEAD_DIM] for i in range(0, query.shape[1], HEAD_DIM)]
    return np.concatenate(
        [softmax(head / np.sqrt(HEAD_DIM) @ key.T + mask) @ value for head in heads], axis=1
    )


def crossed(
    tensors: dict[str, np.ndarray], x: np.ndarray, context: np.ndarray, mask: np.ndarray, trap: str
) -> np.ndarray:
    def weights(layer: int, block: int) -> dict[str, np.ndarray]:
        prefix = f"cross_model.layers.{layer}.{block}.fn."
        return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

    for layer in range(LAYERS):
        w = weights(layer, 0)
        n = normed(x, w)
        pairs = (normed(context, w) if trap == "context normalised" else context) @ w["to_kv.weight"].T
        attended = attention(n @ w["to_q.weight"].T, pairs[:, :HEAD_DIM], pairs[:, HEAD_DIM:], mask)
        fed = swiglu(n @ w["ff.0.weight"].T, trap == "gate first") @ w["ff.2.weight"].T
        x = x + attended @ w["to_out.weight"].T + fed
        w = weights(layer, 1)
        fused = normed(x, w) @ w["fused_attn_ff_proj.weight"].T
        wide = fused.shape[1] - 2 * HEAD_DIM - 2 * INNER
        query, key, value, ff = np.split(fused, [wide, wide + HEAD_DIM, wide + 2 * HEAD_DIM], axis=1)
        if trap != "no rotation":
            frequencies = w["rotary_emb.inv_freq"]
            parts = [query[:, i : i + HEAD_DIM] for i in range(0, wide, HEAD_DIM)]
            query = np.concatenate([turned(part, frequencies) for part in parts], axis=1)
            key = turned(key, frequencies)
        own = attention(query, key, value, 0.0) @ w["attn_out.weight"].T
        x = x + own + swiglu(ff, trap == "gate first") @ w["ff_out.1.weight"].T
    return x


@torch.inference_mode()
def expected(folder: Path, frames: np.ndarray, query: str = QUERY, trap: str = "") -> float:
    tensors = load_file(folder / "model.safetensors")
    config = CLIPConfig.from_pretrained(folder)
    if trap == "quick_gelu":
        config.vision_config.hidden_act = config.text_config.hidden_act = "quick_gelu"
    clip = CLIPModel(config).eval()
    clip.load_state_dict(
        {n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")}, strict=False
    )
    tokenizer = CLIPTokenizer.from_pretrained(folder, pad_token="<|endoftext|>")

    def text(words: str) -> tuple[np.ndarray, np.ndarray, int]:
        given = tokenizer([words], padding="max_length", max_length=240, truncation=True, return_tensors="pt")
        mask = given.attention_mask if trap == "attention mask" else None
        output = clip.text_model(given.input_ids, attention_mask=mask)
        pooled = output.last_hidden_state[:, -1] if trap == "pooled at the last" else output.pooler_output
        states, end = clip.text_projection(output.last_hidden_state[0]), clip.text_projection(pooled)[0]
        return states.numpy(), end.numpy(), int(given.attention_mask.sum())

    condition, _, words = text(", ".join(WORDS.split()) + ".")
    context, pooled, length = text(query)
    if trap == "real tokens only":
        condition, context = condition[:words], context[:length]
    dots = context @ condition.T
    if trap == "cosines":
        norms = [np.linalg.norm(states, axis=1) for states in (context, condition)]
        dots = dots / norms[0][:, None] / norms[1]
    alike = dots.max(1) / dots.max()
    mask = np.where(alike > (0.01 if trap == "threshold of training" else 0.3), 0.0, -np.inf)
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    scores = []
    for i in four(len(frames)):
        image = clip.vision_model(pixels(frames[i])[None]).last_hidden_state
        if trap == "layer norm":
            image = clip.vision_model.post_layernorm(image)
        z = crossed(arrays, clip.visual_projection(image)[0].numpy(), context, mask, trap)[0]
        cosine = z @ pooled / np.linalg.norm(z) / np.linalg.norm(pooled)
        scores.append(float(clip.logit_scale.exp()) * cosine)
    return float(np.mean(scores))


@pytest.mark.parametrize("shape", [(9, 64, 96), (50, 104, 56)])
@pytest.mark.parametrize("query", [QUERY, "", "many words " * 40])
def test_mps_is_what_its_definition_gives(
    folder: Path, clip: Callable[..., bytes], shape: tuple[int, int, int], query: str
) -> None:
    count, height, width = shape
    video = clip(4, count, height, width)
    (found,) = build(settings(folder)).score([video], [query])
    assert isinstance(found, Scored), found
    assert list(found.dimensions) == ["mps"]
    assert found.score == pytest.approx(expected(folder, read_video(video)[0], query), abs=2e-4)


TRAPS = [
    "layer norm", "threshold of training", "context normalised", "gate first", "no rotation", "quick_gelu",
    "pooled at the last", "real tokens only", "cosines",
]  # fmt: skip


@pytest.mark.parametrize("trap", TRAPS)
def test_each_trap_of_mps_gives_another_mark(folder: Path, clip: Callable[..., bytes], trap: str) -> None:
    frames = read_video(clip(4, 1))[0]
    queries = (QUERY, "!", "yellow", "Q x", "two boats")
    off = [abs(expected(folder, frames, one, trap) - expected(folder, frames, one)) for one in queries]
    assert max(off) > 2e-3


def test_the_condition_is_the_published_one() -> None:
    assert ", ".join(WORDS.split()) + "." == CONDITION


def test_queries_of_one_call_do_not_change_each_other(folder: Path, clip: Callable[..., bytes]) -> None:
    model = build(settings(folder))
    queries = [QUERY, "yellow", "!", "light, color, clarity."]
    together = model.score([clip(i) for i in range(4)], queries)
    assert together == [model.score([clip(i)], [query])[0] for i, query in enumerate(queries)]


def test_a_query_is_data(folder: Path, clip: Callable[..., bytes]) -> None:
    model = build(settings(folder))
    plain, ends = model.score([clip(1), clip(1)], ["a cat", "a cat <|endoftext|> and more"])
    assert isinstance(plain, Scored)
    assert isinstance(ends, Scored)
    # Its end is not where a user wrote the token.
    assert abs(ends.score - expected(folder, read_video(clip(1))[0], "a cat < |endoftext|> and more")) < 2e-4


def test_bfloat16_is_near(folder: Path, clip: Callable[..., bytes]) -> None:
    (found,) = build(settings(folder, dtype="bfloat16")).score([clip(4)], [QUERY])
    assert isinstance(found, Scored)
    right = expected(folder, read_video(clip(4))[0])
    assert found.score == pytest.approx(right, abs=0.6)
    assert found.score != pytest.approx(right, abs=1e-5), "it is computed in bfloat16"


def test_folders_of_others_are_refused(folder: Path, tmp_path: Path) -> None:
    make_tiny_mps(tmp_path / "quick", "quick_gelu")
    with pytest.raises(
        PluginError, match=r"config.json says quick_gelu, and MPS's CLIP was trained with gelu"
    ):
        build(settings(tmp_path / "quick"))
    tensors = load_file(folder / "model.safetensors")
    for name, less, says in (
        ("clip", "cross_model.", r"not MPS's `model.\*` and `cross_model.\*`; .*vpo convert-reward"),
        ("some", "model.text_projection", "no model.text_projection.weight: 1 are missing"),
        ("layer", "cross_model.layers.1.1.fn.attn_out", "layers.1.1.fn.attn_out.weight"),
    ):
        (tmp_path / name).mkdir()
        for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            (tmp_path / name / file).write_bytes((folder / file).read_bytes())
        save_file(
            {n: t for n, t in tensors.items() if not n.startswith(less)},
            tmp_path / name / "model.safetensors",
        )
        with pytest.raises(PluginError, match=says):
            build(settings(tmp_path / name))


def test_the_identity_of_mps_names_what_changes_a_mark(folder: Path) -> None:
    sections = [
        settings(folder),
        settings(folder, dtype="bfloat16"),
        settings(folder, options={"condition": "light, color"}),
        settings(folder, options={"threshold": 0.01}),
    ]
    assert len({find(section).identity(section) for section in sections}) == 4
