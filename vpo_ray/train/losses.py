"""The losses, as pure functions of log-probabilities.

Both are sums, so that the caller divides by the size of the *global* batch, and every split into
workers and micro steps gives the same gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vpo_ray.recipe import Dpo, Rl

# What a DPO step reports, as means over its pairs.
DPO_METRICS = (
    "accuracy", "margin", "chosen_reward", "rejected_reward", "chosen_logp", "rejected_logp", "end_logp"
)  # fmt: skip

# What an RL step reports, as means with the weights of its loss: the KL divergence from the reference, the
# importance ratio, and the share of tokens whose ratio the clipping holds back.
RL_METRICS = ("kl", "ratio", "clipped")

METRICS: dict[str, tuple[str, ...]] = {"sft": (), "dpo": DPO_METRICS, "rl": RL_METRICS}


def sft_loss(token_logps: Tensor) -> Tensor:
    """Negative log-likelihood, summed over the learnt tokens [N]."""
    return -token_logps.sum()


def response_sums(token_logps: Tensor, lengths: Sequence[int]) -> Tensor:
    """Sum per response: [N] to [S]."""
    return torch.stack([part.sum() for part in token_logps.split(list(lengths))])


def rounding(logps: Tensor, count: Tensor, dtype: str) -> Tensor:
    """How far, in nats [S], the sums `logps` [S] of `count` [S] log-probabilities may differ between two
    passes of the same model in `dtype` with different packs: a few units in the last place of the float32
    sum, and the model's own rounding, which is independent in each token."""
    sums = 4 * torch.finfo(torch.float32).eps * logps.abs()
    return sums + torch.finfo(getattr(torch, dtype)).eps * count.sqrt()


def dpo_loss(
    token_logps: Tensor, reference: Tensor, lengths: Sequence[int], settings: Dpo
) -> tuple[Tensor, Tensor]:
    """DPO (arXiv 2305.18290, equation 7) and its options, summed over pairs.

    Args:
        token_logps: [N] log-probabilities of the responses' tokens: chosen, rejected, chosen, ...
        reference: [2 * pairs], the sum of each response under the reference policy.
        lengths: tokens of each response.
        settings: `beta`, and the options `loss` (ipo: arXiv 2310.12036, equation 17, on mean
            log-probabilities as its authors advise), `label_smoothing` (conservative DPO),
            `rpo_alpha` (weight of the chosen response's mean negative log-likelihood, arXiv
            2404.19733), `length_normalise` (rewards per token, arXiv 2405.14734).

    Returns:
        The sum of the pairs' losses, and the sums of DPO_METRICS (without gradient). `accuracy` counts
        the pairs whose chosen reward is above the rejected one by more than `rounding`: a tie is no
        win, so it is 0 where policy and reference are equal. `end_logp` is of the end-of-turn tokens of
        chosen responses.
    """
    logps = response_sums(token_logps, lengths)
    count = torch.tensor(lengths, dtype=logps.dtype, device=logps.device)
    ratio, noise = logps - reference, rounding(logps.detach(), count, settings.dtype)
    if settings.length_normalise or settings.loss == "ipo":
        ratio, noise = ratio / count, noise / count
    delta = ratio[0::2] - ratio[1::2]
    if settings.loss == "ipo":
        losses = (delta - 1 / (2 * settings.beta)) ** 2
    else:
        smooth = settings.label_smoothing
        losses = -(1 - smooth) * F.logsigmoid(settings.beta * delta) - smooth * F.logsigmoid(
            -settings.beta * delta
        )
    if settings.rpo_alpha:
        losses = losses - settings.rpo_alpha * logps[0::2] / count[0::2]
    with torch.no_grad():
        chosen, rejected = settings.beta * ratio[0::2], settings.beta * ratio[1::2]
        won = (delta > noise[0::2] + noise[1::2]).to(logps.dtype)
        ends = token_logps[count.long().cumsum(0) - 1][0::2]
        metrics = (won, chosen - rejected, chosen, rejected, logps[0::2], logps[1::2], ends)
        sums = torch.stack([metric.sum() for metric in metrics]).double()
    return losses.sum(), sums


def rl_loss(
    token_logps: Tensor,
    sampled: Tensor,
    reference: Tensor,
    lengths: Sequence[int],
    advantages: Tensor,
    settings: Rl,
) -> tuple[Tensor, Tensor]:
    """GRPO's clipped surrogate (arXiv 2402.03300, equation 3) and its variants, summed over responses.

    Args:
        token_logps: [N] log-probabilities of the tokens of S responses.
        sampled, reference: [N], the same under the policy that sampled them and under the reference.
        lengths: tokens of each response.
        advantages: [S].
        settings: `ratio`, `clip`, `clip_high`, `aggregate`, `length`, and `beta`, the weight of the KL
            divergence, of which the estimate is exp(d) - d - 1 with d = reference - policy (Schulman's k3).

    Returns:
        The sum of losses, to be divided by the number of responses, or with `aggregate: token` of tokens, of
        the global batch; and the sums of RL_METRICS (without gradient).
    """
    count = torch.tensor(lengths, device=token_logps.device)
    of_token = advantages.to(token_logps.dtype).repeat_interleave(count)
    log_ratio = token_logps - sampled
    if settings.ratio == "response":
        log_ratio = (response_sums(log_ratio, lengths) / count).repeat_interleave(count)
    ratio = log_ratio.exp()
    held = ratio.clamp(1 - settings.clip, 1 + settings.clip_high)
    losses = -torch.min(ratio * of_token, held * of_token)
    behind = reference - token_logps
    kl = behind.exp() - behind - 1
    if settings.beta:
        losses = losses + settings.beta * kl
    weights = _weights(count, settings).to(token_logps.dtype)
    with torch.no_grad():
        clipped = (ratio < 1 - settings.clip) & (of_token < 0) | (ratio > 1 + settings.clip_high) & (
            of_token > 0
        )
        metrics = torch.stack([kl, ratio, clipped.to(kl.dtype)]) * weights
    return (losses * weights).sum(), metrics.sum(dim=1).double()


def _weights(count: Tensor, settings: Rl) -> Tensor:
    """The weight of each token of responses of so many tokens [S] in the sum of losses: [N]."""
    if settings.aggregate == "response":
        return (1 / count).repeat_interleave(count)
    ones = torch.ones(int(count.sum()), device=count.device)
    return ones if settings.aggregate == "token" else ones / settings.length
