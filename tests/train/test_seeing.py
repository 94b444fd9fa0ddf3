"""A policy that sees images in training: its numbers are those of the whole model by transformers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from seeing_data import plain_log_probabilities, put, shown_pairs
from train_data import FACTS, TASK_PROMPT, settings

from vpo_ray.engines.chat.tokenizer import load_tokenizer
from vpo_ray.evaluation.live import collect
from vpo_ray.files.folder import StorageError
from vpo_ray.files.image_files import image_hash
from vpo_ray.loop.pairing import make_pairs
from vpo_ray.recipe import TrainLora, load
from vpo_ray.storage.feedback_tables import FeedbackTables
from vpo_ray.storage.images import ImageStore, images_of
from vpo_ray.storage.run_dir import RunDir
from vpo_ray.train import policy
from vpo_ray.train.examples import TrainError, tokenise
from vpo_ray.train.images import ImagePrompts
from vpo_ray.train.packing import pack
from vpo_ray.train.save_pretrained import export_policy
from vpo_ray.train.zero import full_weights
from vpo_ray.world import tiny

pytestmark = pytest.mark.engine
TINY = Path(__file__).parents[2] / "jobs/recipes/tiny.yaml"

Make = Callable[..., Any]


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vlm")
    tiny.make_vlm(folder)
    return folder


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    return ImageStore(tmp_path / "images")


@pytest.mark.parametrize("phase", ["dpo", "rl"])
def test_packs_give_the_whole_models_log_probabilities(
    make_worker: Make, vlm: Path, store: ImageStore, phase: str
) -> None:
    """Prompts that differ by their image alone, another size of image, and a row without, in one pack."""
    rows = shown_pairs(store)
    if phase == "rl":
        group = {"advantages": [1.0, -0.5, -0.5]}
        rows = [
            {**row, **group, "group_id": row["pair_id"], "prompts": [row["chosen"], row["rejected"], "So."]}
            for row in rows
        ]
    worker = make_worker(phase, rows, settings(), model=vlm, images=store.folder.uri)
    module, examples = worker.engine.module, worker.job.examples
    with torch.no_grad():
        packed = module(pack(examples))
    expected = plain_log_probabilities(vlm, rows, examples, store)[1].detach()
    torch.testing.assert_close(packed, expected, rtol=0, atol=1e-5)
    if phase == "dpo":
        sums = [part.sum() for part in expected.split([len(r) for e in examples for r in e.responses])]
        torch.testing.assert_close(torch.from_numpy(worker.reference.reshape(-1)), torch.stack(sums))
    for example in examples:
        policy.check_packing(module, example, torch.device("cpu"), 1e-5)


def test_what_users_said_of_answers_with_an_image_is_learnt(
    make_worker: Make, vlm: Path, tmp_path: Path
) -> None:
    """From the store of an endpoint's feedback to a step of DPO, with the images that users sent."""
    tables, sent = FeedbackTables(str(tmp_path / "store")), ImageStore(tmp_path / "sent")
    answers, opinions = [], []
    for number, colour in enumerate(("red", "blue")):
        image = put(sent, colour)
        said = {"answer_id": f"{number}", "key": "studio", "time": 1.0}
        asked = {"query": "it drifts", "query_hash": image, "image": image_hash(image), "image_name": image}
        answers.append({**said, **asked, "prompt": f"A {colour} kite.", "alternatives": [], "safety": "pass"})
        opinions.append({**said, "opinion_id": f"{number}", "edited": f"A {colour} kite drifts off."})
    images = {row["image_name"]: sent.read(row["image_name"]) for row in answers}
    tables.append(tables.answers, answers, images)
    tables.append(tables.opinions, opinions)
    collect(tables.uri, str(tmp_path / "live"))
    also, out = f"pair.also={tmp_path / 'live/pairs'}", f"out={tmp_path / 'run'}"
    recipe = load(TINY, [out, also, "queries.image_column=image"])
    run = RunDir(recipe.out)
    assert make_pairs(recipe, run) == 2
    rows, store = sorted(run.table("pairs").rows(), key=lambda row: str(row["pair_id"])), images_of(run)
    assert {row["image"] for row in rows} == images.keys()
    worker = make_worker("dpo", rows, settings(), model=vlm, images=store.folder.uri)
    with torch.no_grad():
        packed = worker.engine.module(pack(worker.job.examples))
    expected = plain_log_probabilities(vlm, rows, worker.job.examples, store)[1].detach()
    torch.testing.assert_close(packed, expected, rtol=0, atol=1e-5)
    worker.step(0)


def test_gradients_are_the_whole_models_and_the_tower_gets_none(
    make_worker: Make, vlm: Path, store: ImageStore
) -> None:
    rows = shown_pairs(store)
    worker = make_worker("dpo", rows, settings(), model=vlm, images=store.folder.uri)
    module, examples = worker.engine.module, worker.job.examples
    module(pack(examples)).sum().backward()
    model, found = plain_log_probabilities(vlm, rows, examples, store)
    found.sum().backward()
    plain = dict(model.named_parameters())
    for name, part in module.model.named_parameters():
        scale = plain[name].grad.abs().max()
        assert (part.grad - plain[name].grad).abs().max() <= 1e-4 * scale, name
    worker.engine.zero_grad()
    before = full_weights(worker.engine, 0)
    worker.step(0)
    after = full_weights(worker.engine, 0)
    same = {name for name, part in before.items() if torch.equal(part, after[name])}
    assert same == {name for name in before if name.startswith(("model.vision_model.", "model.connector."))}
    assert len(same) > 30


@pytest.mark.parametrize("lora", [None, TrainLora(r=4, alpha=8), TrainLora(r=4, alpha=8, merge=False)])
def test_an_export_is_the_whole_model_with_its_processor(
    make_worker: Make, vlm: Path, store: ImageStore, lora: TrainLora | None
) -> None:
    from transformers import AutoModelForImageTextToText

    rows = shown_pairs(store)
    worker = make_worker("dpo", rows, settings(lora=lora, lr=3e-2), model=vlm, images=store.folder.uri)
    worker.step(0)
    with torch.no_grad():
        packed = worker.engine.module(pack(worker.job.examples))
    weights = full_weights(worker.engine, 0, trained_only=lora is not None)
    export_policy(worker.engine.module.model, weights, worker.job, FACTS)
    out = Path(worker.job.out)
    if lora is not None and not lora.merge:
        names = json.loads((out / "adapter_config.json").read_text("utf-8"))["target_modules"]
        assert names
        assert not any("vision" in name or "connector" in name for name in names)
        return
    model, found = plain_log_probabilities(out, rows, worker.job.examples, store)
    torch.testing.assert_close(found, packed, rtol=0, atol=1e-4)
    base = AutoModelForImageTextToText.from_pretrained(vlm)
    assert base.state_dict().keys() == model.state_dict().keys()
    assert not torch.equal(base.model.text_model.layers[0].mlp.up_proj.weight,
                           model.model.text_model.layers[0].mlp.up_proj.weight)  # fmt: skip


def test_an_images_tokens_count_and_are_never_cut(vlm: Path, store: ImageStore) -> None:
    tokenizer = load_tokenizer(str(vlm), TASK_PROMPT)
    rows = shown_pairs(store)
    prompts = ImagePrompts(str(vlm), tokenizer, store.folder.uri, [r["image"] for r in rows if r["image"]])
    examples, _ = tokenise("dpo", rows, tokenizer, TASK_PROMPT, 1024, prompts.prompt)
    without, _ = tokenise("dpo", rows, tokenizer, TASK_PROMPT, 1024)
    longer = [len(a.prompt) - len(b.prompt) for a, b in zip(examples, without, strict=True)]
    assert longer[0] == longer[1] > longer[3] > 10
    assert longer[2] == 0
    most = max(len(e.prompt) + max(map(len, e.responses)) for e in without)
    _, dropped = tokenise("dpo", rows, tokenizer, TASK_PROMPT, most, prompts.prompt)
    assert dropped[f"longer than {most} tokens"] >= 1
    smaller = {"size": {"longest_edge": 56}}  # as in vLLM's mm_processor_kwargs
    fewer = ImagePrompts(str(vlm), tokenizer, store.folder.uri, [str(rows[0]["image"])], arguments=smaller)
    assert fewer.images.starts.tolist() == [0, 4]
    assert prompts.images.starts[-1] == 20 + 20 + 12


def test_an_image_that_is_not_there_or_no_image_is_told(vlm: Path, store: ImageStore) -> None:
    tokenizer = load_tokenizer(str(vlm), TASK_PROMPT)
    name = put(store, "red")
    with pytest.raises(StorageError, match="cannot read the image"):
        ImagePrompts(str(vlm), tokenizer, store.folder.uri, [name, f"{'0' * 64}.png"])
    store.folder.write(name, b"other")
    with pytest.raises(StorageError, match="other bytes than its name says"):
        ImagePrompts(str(vlm), tokenizer, store.folder.uri, [name])


def test_a_model_that_is_not_trained_with_images_is_refused(tiny_models: Path, store: ImageStore) -> None:
    model = str(tiny_models / "policy")
    tokenizer = load_tokenizer(model, TASK_PROMPT)
    with pytest.raises(TrainError, match="is of the type llama, which is sampled with images and not"):
        ImagePrompts(model, tokenizer, store.folder.uri, [])
