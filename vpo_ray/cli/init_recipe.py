"""The text of the recipe that `vpo init` writes, section by section, from a few choices.

Numbers are those of VPO (arXiv 2503.20491; the shipped recipes have a source beside each), with LoRA ours;
pools are shared out over the GPUs that there are.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

REWARDS = ("visionreward", "openai", "vbench")
POLICY = "Qwen/Qwen2.5-7B-Instruct"
JUDGE = "Qwen/Qwen2.5-32B-Instruct"
VIDEO = "cogvideox-5b"
SERVICE = "http"  # of --video: a service of video jobs

_DIMENSIONS = """\
    dimensions:
      alignment: 1-4
      composition: 5-6
      stability: 7-10, 36-37, 44-49
      quality: 11-20, 40-43
      preservation: 21-27
      dynamic: 28-35
      fidelity: 38-39, 50-56
      physics: 57-60
      safety: 61-64
"""


class ChoiceError(ValueError):
    """Choices that do not go together; the message says what to choose instead."""


@dataclass(frozen=True)
class Choices:
    """What the recipe is for.

    Attributes:
        video: a preset's name, or `http`.
        judge: a hub id or folder that vLLM loads, or the name of an endpoint's model.
        reward: one of REWARDS.
        models: folder of what has no hub id.
        examples: file of a few queries with good prompts, which drafts follow.
    """

    name: str
    out: str
    queries: str
    video: str = VIDEO
    policy: str = POLICY
    judge: str = JUDGE
    reward: str = "visionreward"
    gpus: int = 8
    models: str = "./models"
    examples: str = "sft_examples.jsonl"

    @property
    def judge_is_endpoint(self) -> bool:
        return "/" not in self.judge

    @property
    def on_gpus(self) -> list[str]:
        """The stages that need a GPU of their own."""
        needs = {
            "sample": True,
            "judge": not self.judge_is_endpoint,
            "render": self.video != SERVICE,
            "reward": self.reward == "visionreward",
        }
        return [name for name, needed in needs.items() if needed]


def recipe_text(choices: Choices) -> str:
    """The recipe. Raises ChoiceError where the GPUs are too few."""
    sizes = _pools(choices)
    workers = max(n for n in (1, 2, 4, 8) if n <= choices.gpus)
    parts = [_head(choices), _sample(sizes), _judge(choices, sizes), _render(choices, sizes)]
    parts += [_reward(choices, sizes), _pair(choices), _train(workers), _evaluate(), _serve()]
    return "\n".join(parts)


def _pools(choices: Choices) -> dict[str, int]:
    """Replicas by stage: one each, and what is left of the GPUs renders, which takes longest."""
    stages = choices.on_gpus
    if choices.gpus < len(stages):
        raise ChoiceError(
            f"--gpus {choices.gpus}: {', '.join(stages)} take a GPU each. Ask endpoints (--judge gpt-4o, "
            "--video http, --reward openai), or try it on a CPU: --example laptop"
        )
    sizes = {name: int(name in stages) for name in ("sample", "judge", "render", "reward")}
    sizes["render" if "render" in stages else "sample"] += choices.gpus - len(stages)
    return sizes


def _pool(gpu_replicas: int) -> str:
    if gpu_replicas:
        return f"{{size: {gpu_replicas}, num_gpus: 1}}"
    return "{size: 1, num_cpus: 1}"


def _quoted(text: str) -> str:
    """As YAML takes it: a JSON string."""
    return json.dumps(text, ensure_ascii=False)


def _head(choices: Choices) -> str:
    return f"""\
# yaml-language-server: $schema=recipe.schema.json
# (`vpo schema > recipe.schema.json` gives editors that file; docs/reference.md has every key)
#
#   vpo plan FILE      what it will take      vpo fetch FILE     what it names, downloaded
#   vpo run FILE       the loop; again to go on      vpo submit FILE    the same on a cluster
#
# Paths are those of this machine; on a cluster name storage that every node has (/mnt/..., s3://...).
name: {_quoted(choices.name)}
seed: 42
out: {_quoted(choices.out)}

queries:
  # Your users' queries: one a line, or JSON, JSONL, CSV, Parquet with a column `query`.
  path: {_quoted(choices.queries)}
  near_duplicates: {{}}  # drop those that say the same
  splits: {{sft: 0.45, dpo: 0.45, eval: 0.1}}  # for drafts, for preference pairs, and held out

policy:
  model: {_quoted(choices.policy)}  # the LLM that becomes the prompt optimiser

draft:
  # The judge's LLM writes SFT data, shown a few examples: replace them by prompts that your video model
  # likes. Data of your own goes to sft.data instead of this section.
  examples: {_quoted(choices.examples)}
  shots: 3
"""


def _sample(sizes: dict[str, int]) -> str:
    return f"""\
sample:
  k: 4  # candidates of each query
  temperature: 0.9
  top_p: 0.9
  max_tokens: 1024
  engine: &policy {{dtype: bfloat16, max_model_len: 4096}}
  pool: {_pool(sizes["sample"])}
"""


def _judge(choices: Choices, sizes: dict[str, int]) -> str:
    if choices.judge_is_endpoint:
        return f"""\
judge:
  # Any OpenAI-compatible endpoint; the key is read from the environment of every node.
  backend: openai
  model: {_quoted(choices.judge)}
  endpoint:
    base_url: https://api.openai.com/v1
    api_key_env: OPENAI_API_KEY
    concurrency: 64
    prompt_price: 0  # of a million tokens, from your price list: then limits.max_cost stops a run
    completion_price: 0
  temperature: 0.7
  pool: {_pool(0)}
"""
    return f"""\
judge:
  model: {_quoted(choices.judge)}  # critiques every candidate and refines those that lose the query's sense
  temperature: 0.7
  engine:
    dtype: bfloat16
    max_model_len: 8192
    max_num_seqs: 32
    engine_kwargs: {{gpu_memory_utilization: 0.92}}
  pool: {_pool(sizes["judge"])}
"""


def _render(choices: Choices, sizes: dict[str, int]) -> str:
    if choices.video == SERVICE:
        return """\
render:
  # A service of video jobs, as OpenAI and vLLM-Omni have it. What a video is made with goes into `request`.
  kind: openai
  model: your-video-model
  version: "1"  # another one renders all videos anew
  endpoint:
    base_url: http://127.0.0.1:8091/v1
    api_key_env: null  # or the name of a variable
    request: {seconds: 4, size: 720x480}
    video_price: 0  # of a video: then limits.max_cost stops a run
  pool: {size: 1, num_cpus: 1}
"""
    return f"""\
render:
  preset: {choices.video}  # the model with its authors' settings; any key of it can be given here
  strategy: adaptive  # no more videos of a query than its pair takes
  pool: {_pool(sizes["render"])}
"""


def _reward(choices: Choices, sizes: dict[str, int]) -> str:
    if choices.reward == "vbench":
        return """\
reward:
  # Measures that need no weights, to begin with: they know nothing of the query. See docs/rendering.md.
  kind: vbench
  dimensions: [temporal_flickering, dynamic_degree]
  pool: {size: 1, num_cpus: 2}
"""
    asked = f"""\
  model: {_quoted(f"{choices.models}/VisionReward-Video")}
  dtype: bfloat16
  pool: {_pool(sizes["reward"])}
"""
    if choices.reward == "openai":
        asked = f"""\
  # A vision-language model behind an endpoint answers the questions.
  kind: openai
  model: gpt-4o
  endpoint: {{base_url: "https://api.openai.com/v1", api_key_env: OPENAI_API_KEY}}
  pool: {_pool(0)}
"""
    return f"""\
reward:
{asked}\
  checklist:
    # VisionReward's 64 questions; `vpo fetch` downloads them, and makes the weights of the published ones.
    questions: {_quoted(f"{choices.models}/visionreward/VisionReward_video_qa.txt")}
    weights: {_quoted(f"{choices.models}/visionreward/weight_64.json")}
{_DIMENSIONS}"""


def _pair(choices: Choices) -> str:
    if choices.reward == "vbench":
        return """\
pair:
  margin: 0.05  # of the score, which here is 0 to 1
  dominance: none
  choice: best
"""
    return """\
pair:
  margin: 0.5
  dominance: question  # the chosen video may be worse in no question
"""


def _train(workers: int) -> str:
    lora = "  lora: {r: 16}  # all weights need more GPUs than these\n" if workers < 4 else ""
    return f"""\
sft:
  epochs: 5
  lr: {"2.0e-4" if lora else "2.0e-6"}
  schedule: constant
  global_batch: 64
  micro_batch: 2
  activation_checkpointing: true
  workers: {workers}
{lora}
dpo:
  epochs: 1
  lr: {"5.0e-6" if lora else "5.0e-7"}
  beta: 0.1
  global_batch: 16
  micro_batch: 2
  activation_checkpointing: true
  workers: {workers}
{lora}"""


def _evaluate() -> str:
    return """\
evaluate:
  # `vpo evaluate FILE`: does it help, by how much, and how sure is that?
  policies: [query, sft, dpo]
"""


def _serve() -> str:
    return """\
serve:
  engine: *policy
  pool: {size: 1, num_gpus: 1}
"""
