"""Training of the policy: one loop, two losses (`sft`, `dpo`), on Ray Train and DeepSpeed ZeRO.

The loop calls `train` for a phase (`phase`). It tokenises the rows (`examples`) and starts the workers
(`job`). Each packs its share of a batch (`packing`), computes response log-probabilities without wasted
tokens (`policy`), and steps the optimizer (`worker`). The result is an ordinary Hugging Face folder
(`save_pretrained`).
"""

from vpo_ray.train.examples import TrainError
from vpo_ray.train.job import TrainResult, train
from vpo_ray.train.phase import PhaseSpec

__all__ = ["PhaseSpec", "TrainError", "TrainResult", "train"]
