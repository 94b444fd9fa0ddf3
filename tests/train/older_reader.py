"""What the transformers that is first on the path reads in the folders that are named, as JSON."""

import json
import sys

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

found = {}
for folder in sys.argv[1:]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "A cat  naps — 一只猫"}], add_generation_prompt=True
    )
    ids = list(ids if isinstance(ids, list) else ids["input_ids"])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
    found[folder] = {
        "ids": ids,
        "plain": tokenizer.encode(" A cat\n naps", add_special_tokens=False),
        "special": sorted(tokenizer.all_special_tokens),
        "template": tokenizer.chat_template,
        "logits": logits[:64].tolist(),
        "generation": GenerationConfig.from_pretrained(folder).to_diff_dict()["eos_token_id"],
        "tied": model.get_input_embeddings().weight is model.get_output_embeddings().weight,
    }
json.dump({"version": transformers.__version__, "found": found}, sys.stdout)
