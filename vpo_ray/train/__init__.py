"""Training of the policy: one loop, two losses (`sft`, `dpo`), on Ray Train and DeepSpeed ZeRO.

`train` is what the pipeline calls for a phase: it tokenises the rows (`examples`), starts the
workers (`job`), each of which packs its share of a batch (`packing`), computes response
log-probabilities without wasted tokens (`policy`), and steps the optimizer (`loop`). What comes
out is an ordinary Hugging Face folder (`export`).
"""

from vpo_ray.train.examples import TrainError
from vpo_ray.train.job import TrainResult, train

__all__ = ["TrainError", "TrainResult", "train"]
