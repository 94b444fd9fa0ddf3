"""Greedy tokens from vLLM in a process of its own: `python vllm_tokens.py REQUESTS`.

REQUESTS is JSON: a list of {model, adapter (or null), prompt (token ids)}, with the path of an `image` where
one is shown; the answer is on the last line of stdout, a list of token ids for each. With an image it begins
with those of the prompt.
"""

import json
import sys

if __name__ == "__main__":
    from PIL import Image
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    engines = {}
    answers = []
    for number, request in enumerate(json.loads(sys.argv[1]), start=1):
        name = request["model"]
        if name not in engines:
            engines[name] = LLM(
                name,
                dtype="float32",
                enforce_eager=True,
                max_model_len=1024,
                enable_lora=request["adapter"] is not None,
                max_lora_rank=8,
                enable_prefix_caching=False,
                enable_chunked_prefill=False,
                max_num_batched_tokens=1024,
            )
        adapter = request["adapter"]
        image = request.get("image")
        shown = {"multi_modal_data": {"image": Image.open(image).convert("RGB")}} if image else {}
        [answer] = engines[name].generate(
            {"prompt_token_ids": request["prompt"], **shown},
            SamplingParams(temperature=0, max_tokens=6),
            lora_request=LoRARequest("adapter", number, adapter) if adapter else None,
            use_tqdm=False,
        )
        read = answer.prompt_token_ids if image else []
        answers.append([*read, *answer.outputs[0].token_ids])
    sys.stdout.write(json.dumps(answers) + "\n")
