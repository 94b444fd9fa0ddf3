"""The tokens of a model are those of its tokenizer.json, whatever its tokenizer is called."""

import json
import shutil
from pathlib import Path

import pytest

from vpo_ray.engines.chat.tokenizer import load_chat_tokenizer
from vpo_ray.prompts.policy_prompt import PromptError

TEXT = "A quiet  harbour, at 7.30 in the morning"


@pytest.fixture
def policy(tiny_models: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_models / "policy", tmp_path / "policy"))


def call(folder: Path, name: str) -> None:
    path = folder / "tokenizer_config.json"
    tree = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps(tree | {"tokenizer_class": name}), "utf-8")


@pytest.mark.parametrize(
    "name", ["PreTrainedTokenizerFast", "Qwen2Tokenizer", "GPT2TokenizerFast", "NotYetKnownTokenizer"]
)
def test_a_class_that_makes_the_files_tokens_is_taken(policy: Path, name: str) -> None:
    from tokenizers import Tokenizer

    expected = Tokenizer.from_file(str(policy / "tokenizer.json")).encode(TEXT, add_special_tokens=False).ids
    call(policy, name)
    assert load_chat_tokenizer(str(policy)).encode(TEXT, add_special_tokens=False) == expected


def test_what_a_file_pads_and_cuts_says_nothing_of_its_tokens(policy: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(policy / "tokenizer.json"))
    tokenizer.enable_padding(length=128)
    tokenizer.enable_truncation(4)
    tokenizer.save(str(policy / "tokenizer.json"))
    call(policy, "Qwen2Tokenizer")
    assert len(load_chat_tokenizer(str(policy)).encode(TEXT)) > 4


@pytest.mark.parametrize("name", ["LlamaTokenizer", "LlamaTokenizerFast"])
def test_a_class_that_makes_others_is_refused(policy: Path, name: str) -> None:
    call(policy, name)
    with pytest.raises(PromptError, match=r'other tokens.*"tokenizer_class": "PreTrainedTokenizerFast"'):
        load_chat_tokenizer(str(policy))


@pytest.mark.parametrize("spaced", [True, False])
def test_what_a_llama_2_puts_before_the_first_word_may_differ(
    policy: Path, tmp_path: Path, spaced: bool
) -> None:
    from tokenizers import Tokenizer, models, normalizers, trainers

    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizer
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(
        [TEXT] * 9, trainers.BpeTrainer(special_tokens=special, show_progress=False)
    )
    tokenizer.save(str(policy / "tokenizer.json"))
    own = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_prefix_space": spaced}
    (policy / "tokenizer_config.json").write_text(
        json.dumps(own | {"tokenizer_class": "LlamaTokenizer"}), "utf-8"
    )
    assert load_chat_tokenizer(str(policy)).convert_tokens_to_ids("<s>") == 1
