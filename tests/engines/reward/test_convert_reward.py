"""`vpo convert-reward`: what is published becomes what the rewards read, and a card says what it is."""

import hashlib
import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_videoreward import TEMPLATE, save_tiny, tiny_backbone, tiny_config, tiny_tokenizer
from torch import nn
from transformers import CLIPConfig, CLIPModel, Qwen2VLForConditionalGeneration

from vpo_ray import recipe
from vpo_ray.cli import main
from vpo_ray.cli.convert_reward import KIND_NAMES
from vpo_ray.engines.reward import Scored, build
from vpo_ray.engines.reward.conversion import ConvertError
from vpo_ray.engines.reward.convert import convert_reward, reward_kinds
from vpo_ray.files.pickles import PickleError


def test_the_command_has_the_kinds_that_there_are(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert tuple(reward_kinds()) == KIND_NAMES
    source, target = tmp_path / "linear.safetensors", tmp_path / "out"
    save_file({"weight": torch.full((1, 4), 2.0), "bias": torch.ones(1)}, source)
    assert main(["convert-reward", "laion_aesthetic", str(source), str(target)]) == 0
    said = capsys.readouterr().out
    assert "2 tensors in head.safetensors" in said
    assert "norm 4.12311" in said
    assert main(["convert-reward", "laion_aesthetic", str(source), str(target)]) == 2
    assert "is there already" in capsys.readouterr().err


def test_laion_v1_is_kept_as_it_is(tmp_path: Path) -> None:
    source, target = tmp_path / "linear.pth", tmp_path / "out"
    given = {"weight": torch.randn(1, 768), "bias": torch.randn(1)}
    torch.save(given, source)
    card = convert_reward("laion_aesthetic", source, target)
    found = load_file(target / "head.safetensors")
    assert all(torch.equal(found[name], given[name]) for name in given)
    assert card == json.loads((target / "card.json").read_text("utf-8"))
    assert card["variant"] == "v1"
    assert card["linear_map"]["norm"] == pytest.approx(float(given["weight"].norm()))
    assert card["linear_map"]["bias"] == pytest.approx(float(given["bias"]))
    assert card["tensors"] == {"bias": ["float32", [1]], "weight": ["float32", [1, 768]]}
    raw = source.read_bytes()
    assert card["sources"] == {"linear.pth": {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}}
    assert sorted(tmp_path.iterdir()) == [source, target]
    # Others may read it as they may any new folder: a store of models is shared.
    (tmp_path / "usual").mkdir()
    assert target.stat().st_mode == (tmp_path / "usual").stat().st_mode
    assert (target / "head.safetensors").stat().st_mode == (target / "card.json").stat().st_mode
    save_file(given, tmp_path / "linear.safetensors")
    again = convert_reward("laion_aesthetic", tmp_path / "linear.safetensors", tmp_path / "again")
    assert again["check"] == card["check"]
    save_file({**given, "bias": given["bias"] + 1}, tmp_path / "linear.safetensors")
    other = convert_reward("laion_aesthetic", tmp_path / "linear.safetensors", tmp_path / "other")
    assert other["check"]["sha256"] != card["check"]["sha256"]


def test_laion_v2_keeps_its_layers_and_is_one_linear_map(tmp_path: Path) -> None:
    torch.manual_seed(1)
    layers = nn.Sequential(
        nn.Linear(768, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2),
        nn.Linear(128, 64), nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1),
    ).eval()  # fmt: skip
    source, target = tmp_path / "v2.safetensors", tmp_path / "out"
    given = {f"layers.{name}": tensor for name, tensor in layers.state_dict().items()}
    save_file(given, source)
    card = convert_reward("laion_aesthetic", source, target)
    found = load_file(target / "head.safetensors")
    assert found.keys() == given.keys()
    assert all(torch.equal(found[name], given[name]) for name in given)
    assert card["variant"] == "v2"
    with torch.inference_mode():
        bias = layers(torch.zeros(768))
        weight = layers(torch.eye(768)) - bias
    assert card["linear_map"] == pytest.approx({"norm": float(weight.norm()), "bias": float(bias)}, rel=1e-4)
    save_file({**given, "layers.2.weight": torch.ones(128, 7)}, source)
    with pytest.raises(ConvertError, match="its layers do not fit each other"):
        convert_reward("laion_aesthetic", source, tmp_path / "other")


def test_what_is_no_such_checkpoint_leaves_nothing(tmp_path: Path) -> None:
    source, target = tmp_path / "given.safetensors", tmp_path / "out"
    save_file({"weight": torch.randn(1, 8), "extra": torch.ones(1)}, source)
    with pytest.raises(ConvertError, match="1 missing: bias; 1 unknown: extra"):
        convert_reward("laion_aesthetic", source, target)
    save_file({"weight": torch.randn(2, 8), "bias": torch.ones(1)}, source)
    with pytest.raises(ConvertError, match=r"not \(1, features\) and \(1,\)"):
        convert_reward("laion_aesthetic", source, target)
    with pytest.raises(ConvertError, match="no such file or folder"):
        convert_reward("laion_aesthetic", tmp_path / "none.pth", target)
    with pytest.raises(ConvertError, match="has no template"):
        convert_reward("laion_aesthetic", source, target, template=source)

    class Evil:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path / 'touched'}",)

    source.unlink()
    torch.save(Evil(), tmp_path / "given.pth")
    with pytest.raises(PickleError, match=r"wants to run code when it is opened \(posix\.system\)"):
        convert_reward("mps", tmp_path / "given.pth", target)
    assert list(tmp_path.iterdir()) == [tmp_path / "given.pth"]


# Upstream's module, which is there only while a model of it is pickled.
MPS = """
import sys, torch
from torch import nn
from transformers import CLIPConfig, CLIPModel as HFCLIPModel
class Norm(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(dim))
        self.register_buffer("bias", torch.zeros(dim))
class Rotary(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("inv_freq", torch.rand(4))
def linear(a, b): return nn.Linear(a, b, bias=False)
class First(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.to_q, self.to_kv, self.to_out = Norm(8), linear(8, 8), linear(8, 4), linear(8, 8)
        self.ff = nn.Sequential(linear(8, 32), nn.SiLU(), linear(16, 8))
class Second(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.rotary_emb, self.fused_attn_ff_proj = Norm(8), Rotary(), linear(8, 44)
        self.attn_out, self.ff_out = linear(8, 8), nn.Sequential(nn.SiLU(), linear(16, 8))
class Residual(nn.Module):
    def __init__(self, fn):
        super().__init__()
        self.fn = fn
class Cross(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList([Residual(First()), Residual(Second())]) for _ in range(2))
class XCLIPModel(HFCLIPModel):
    pass
class CLIPModel(nn.Module):
    def __init__(self):
        super().__init__()
        shape = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
        self.model = XCLIPModel(CLIPConfig(
            text_config=dict(shape, vocab_size=20, max_position_embeddings=9), projection_dim=8,
            vision_config=dict(shape, image_size=16, patch_size=8)))
        self.model.text_model.embeddings.register_buffer("position_ids", torch.arange(9)[None], True)
        self.cross_model = Cross()
"""


def test_mps_is_read_from_its_pickled_module_without_its_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, plain = tmp_path / "MPS_overall_checkpoint.pth", tmp_path / "diffsynth.safetensors"
    upstream = ModuleType("trainer.models.clip_model")
    with monkeypatch.context() as meanwhile:
        for name in ("trainer", "trainer.models"):
            meanwhile.setitem(sys.modules, name, ModuleType(name))
        meanwhile.setitem(sys.modules, upstream.__name__, upstream)
        exec(MPS, upstream.__dict__)
        model = upstream.CLIPModel()
        torch.save(model, source)
    wanted = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(wanted, plain)
    del wanted["model.text_model.embeddings.position_ids"]

    (tmp_path / "clip").mkdir()
    (tmp_path / "clip/config.json").write_text("{}", "utf-8")
    (tmp_path / "clip/pytorch_model.bin").write_text("no text", "utf-8")
    card = convert_reward("mps", source, tmp_path / "out", tmp_path / "clip")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"card.json", "config.json", "mps.safetensors"}
    found = load_file(tmp_path / "out/mps.safetensors")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert "trainer.models.clip_model.CLIPModel" in card["stand_ins"]
    # The same from the published safetensors, and of a training's state dict.
    assert convert_reward("mps", plain, tmp_path / "again")["check"] == card["check"]
    save_file({f"state_dict.module.{name}": t for name, t in wanted.items()}, plain)
    assert convert_reward("mps", plain, tmp_path / "third")["check"] == card["check"]
    # What CLIP's tensors are called is what transformers calls them.
    config = CLIPConfig(text_config={"num_hidden_layers": 2}, vision_config={"num_hidden_layers": 2})
    with torch.device("meta"):
        clip = CLIPModel(config).state_dict()
    assert {name for name in wanted if name.startswith("model.")} == {f"model.{name}" for name in clip}

    del wanted["cross_model.layers.1.1.fn.attn_out.weight"], wanted["model.logit_scale"]
    save_file(wanted, plain)
    with pytest.raises(
        ConvertError, match=r"2 missing: cross_model\.layers\.1\.1\.fn\.attn_out\.weight, model\.logit_scale"
    ):
        convert_reward("mps", plain, tmp_path / "fourth")


def test_videoscore_is_checked_and_passed_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("vpo_ray").propagate = True
    source = tmp_path / "videoscore"
    source.mkdir()
    first = {f"model.{part}.weight": torch.randn(2, 2) for part in (
        "vision_model.x", "connector.modality_projection.y", "connector.perceiver_resampler.z",
    )}  # fmt: skip
    second = {"model.text_model.w.weight": torch.randn(2), "score.weight": torch.randn(5, 8),
              "score.bias": torch.randn(5)}  # fmt: skip
    save_file(first, source / "model-00001-of-00002.safetensors")
    save_file(second, source / "model-00002-of-00002.safetensors")
    (source / "config.json").write_text("{}", "utf-8")
    (source / "modeling.py").write_text("raise SystemError", "utf-8")
    script = tmp_path / "run_videoscore.py"
    script.write_text(
        'import nothing\nREGRESSION_QUERY_PROMPT = """\nRate {text_prompt}\n"""\nOTHER = "x"\n', "utf-8"
    )
    card = convert_reward("videoscore", source, tmp_path / "out", template=script)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    shards = {f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}
    assert names == {*shards, "config.json", "card.json", "template.txt"}
    assert (tmp_path / "out/template.txt").read_text("utf-8") == "\nRate {text_prompt}\n"
    assert card["template"]["sha256"] == hashlib.sha256(b"\nRate {text_prompt}\n").hexdigest()
    assert card["template"]["trained_with"] == "49b386d9ea300376"
    assert "the weights were trained with one of 49b386d9ea300376" in caplog.text
    assert card["sources"].keys() == shards
    assert card["tensors"].keys() == first.keys() | second.keys()

    save_file({**second, "lm_head.weight": torch.ones(1)}, source / "model-00002-of-00002.safetensors")
    with pytest.raises(ConvertError, match=r"1 unknown: lm_head\.weight"):
        convert_reward("videoscore", source, tmp_path / "other")
    del second["model.text_model.w.weight"]
    save_file(second, source / "model-00002-of-00002.safetensors")
    with pytest.raises(ConvertError, match=r"1 missing: model\.text_model\."):
        convert_reward("videoscore", source, tmp_path / "other")
    script.write_text("PROMPT = 'x'", "utf-8")
    with pytest.raises(ConvertError, match="has no text REGRESSION_QUERY_PROMPT"):
        convert_reward("videoscore", source, tmp_path / "other", template=script)


def published(folder: Path, rows: int) -> dict[str, torch.Tensor]:
    """VideoReward as it is on the hub: a pickled state dict of PEFT with the names of transformers 4.45.
    Gives what it is when PEFT itself merges it, with today's names."""
    torch.manual_seed(5)
    config = tiny_config(tiny_tokenizer())
    model = Qwen2VLForConditionalGeneration(config)
    model.model.load_state_dict(tiny_backbone().state_dict())
    model.rm_head = nn.Linear(32, rows, bias=False)
    names = [
        name for name, part in model.named_modules()
        if isinstance(part, nn.Linear) and "language_model" in name
    ]  # fmt: skip
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=names, r=4, lora_alpha=8))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn_like(parameter)
    legacy = {
        name.replace(".model.visual.", ".visual.").replace(
            ".model.language_model.", ".model."
        ): tensor.clone()
        for name, tensor in adapted.state_dict().items()
    }
    assert "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight" in legacy
    assert "base_model.model.visual.patch_embed.proj.weight" in legacy
    checkpoint = folder / "checkpoint-11352"
    checkpoint.mkdir(parents=True)
    torch.save(legacy, checkpoint / "model.pth")
    tiny_tokenizer().save_pretrained(checkpoint / "tokenizer")
    settings = {"peft_lora_config": {"lora_r": 4, "lora_alpha": 8}, "inference_config": {"VQ_mean": 3.6757}}
    (folder / "model_config.json").write_text(json.dumps(settings), "utf-8")
    merged = adapted.merge_and_unload().state_dict()
    return {name: tensor for name, tensor in merged.items() if name != "lm_head.weight"}


@pytest.fixture(scope="module")
def converted(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, dict[str, torch.Tensor], dict[str, Any]]:
    """The folder that a conversion made, what is wanted in it, and its card."""
    folder = tmp_path_factory.mktemp("videoreward")
    wanted = published(folder / "hub", 3)
    base = tiny_config(tiny_tokenizer())
    base.text_config.vocab_size += 100  # rows that the checkpoint has not
    base.save_pretrained(folder / "base")
    (folder / "prompt_template.py").write_text(
        f"DETAILED_PROMPT_WITH_SPECIAL_TOKEN = {TEMPLATE!r}\n", "utf-8"
    )
    card = convert_reward(
        "videoreward", folder / "hub", folder / "out", folder / "base", folder / "prompt_template.py"
    )
    return folder, wanted, card


def test_videoreward_is_merged_and_renamed(
    converted: tuple[Path, dict[str, torch.Tensor], dict[str, Any]],
) -> None:
    folder, wanted, card = converted
    found = load_file(folder / "out/model.safetensors")
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.allclose(found[name], tensor, atol=1e-5), name
    untouched = tiny_backbone().state_dict()
    changed = found["model.language_model.layers.0.self_attn.q_proj.weight"]
    assert (changed - untouched["language_model.layers.0.self_attn.q_proj.weight"]).abs().max() > 0.1
    assert card["head_rows"] == 3
    assert card["positions"] == "sequential on all three axes of the rotary embedding"
    assert card["normalisation"] == {"VQ_mean": 3.6757}
    assert (folder / "out/template.txt").read_text("utf-8") == TEMPLATE


def test_what_was_converted_is_read_by_its_reward(
    converted: tuple[Path, dict[str, torch.Tensor], dict[str, Any]],
    clip: Callable[..., bytes],
    tmp_path: Path,
) -> None:
    folder, wanted, _ = converted

    def score(place: Path) -> Scored:
        settings = {
            "kind": "videoreward", "model": str(place), "device": "cpu", "dtype": "float32",
            "options": {"template": str(place / "template.txt")},
        }  # fmt: skip
        (result,) = build(recipe.Reward.model_validate(settings)).score([clip(1)], ["a boat"])
        assert isinstance(result, Scored), result
        return result

    save_tiny(tmp_path, 3)
    save_file(
        {name: t.contiguous() for name, t in wanted.items()}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    assert score(folder / "out").dimensions == pytest.approx(score(tmp_path).dimensions, abs=1e-3)


def test_a_videoreward_that_does_not_fit_is_refused(
    converted: tuple[Path, dict[str, torch.Tensor], dict[str, Any]], tmp_path: Path
) -> None:
    folder, _, _ = converted
    hub, base = folder / "hub", folder / "base"
    with pytest.raises(ConvertError, match="--base: give the folder of Qwen2-VL"):
        convert_reward("videoreward", hub, tmp_path / "out")
    with pytest.raises(ConvertError, match=r"model_config.json and checkpoint-\*/model.pth"):
        convert_reward("videoreward", base, tmp_path / "out", base)
    weights = torch.load(hub / "checkpoint-11352/model.pth", weights_only=True)
    deeper = tiny_config(tiny_tokenizer())
    deeper.text_config.num_hidden_layers, deeper.text_config.layer_types = 3, ["full_attention"] * 3
    deeper.save_pretrained(tmp_path / "deeper")
    other = tmp_path / "hub"
    (other / "checkpoint-2").mkdir(parents=True)
    (other / "model_config.json").write_text((hub / "model_config.json").read_text("utf-8"), "utf-8")
    weights = {name: tensor.clone() for name, tensor in weights.items()}
    save_file(weights, other / "checkpoint-2/model.safetensors")
    with pytest.raises(ConvertError, match=r"12 missing: model\.language_model\.layers\.2\."):
        convert_reward("videoreward", other, tmp_path / "out", tmp_path / "deeper")
    del weights["base_model.model.model.layers.1.mlp.up_proj.lora_B.default.weight"]
    save_file(weights, other / "checkpoint-2/model.safetensors")
    with pytest.raises(ConvertError, match=r"without their other half: .*layers\.1\.mlp\.up_proj"):
        convert_reward("videoreward", other, tmp_path / "out", base)
    assert not (tmp_path / "out").exists()
