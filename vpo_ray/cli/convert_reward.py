"""`vpo convert-reward KIND SOURCE TARGET`: published weights of a reward, as safetensors with a card.

vpo convert-reward laion_aesthetic sa_0_4_vit_l_14_linear.pth weights/aesthetic
vpo convert-reward mps MPS_overall_checkpoint.pth weights/mps --base CLIP-ViT-H-14-laion2B-s32B-b79K/
vpo convert-reward videoscore VideoScore/ weights/videoscore --template run_videoscore.py
vpo convert-reward videoreward VideoReward/ weights/videoreward --base Qwen2-VL-2B-Instruct/ \\
    --template VideoAlign/prompt_template.py
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

HELP = "turn the published weights of a reward, pickles too, into safetensors with a card"
KIND_NAMES = ("laion_aesthetic", "mps", "videoscore", "videoreward")


def add(parser: argparse.ArgumentParser) -> None:
    """Give the parser of `vpo convert-reward` its arguments."""
    parser.add_argument("kind", choices=KIND_NAMES, help="the reward.kind that will read it")
    parser.add_argument("source", type=Path, help="the published file or folder")
    parser.add_argument("target", type=Path, help="a new folder")
    parser.add_argument(
        "--base",
        type=Path,
        metavar="DIR",
        help="the model that the weights are for: of videoreward Qwen2-VL-2B-Instruct, of mps CLIP-ViT-H-14",
    )
    parser.add_argument(
        "--template",
        type=Path,
        metavar="FILE",
        help="upstream's Python file with the prompt (read, not run), or its text: kept as template.txt",
    )


def run(arguments: argparse.Namespace) -> int:
    """Convert, and print what was written and the check value."""
    from vpo_ray.engines.reward.convert import CARD, convert_reward

    target = arguments.target
    card = convert_reward(arguments.kind, arguments.source, target, arguments.base, arguments.template)
    files = ", ".join(sorted(path.name for path in target.glob("*.safetensors")))
    lines = [
        f"{target}: {len(card['tensors'])} tensors in {files}; {target / CARD} says what they are",
        f"check {card['check']['sha256'][:16]}, norm {card['check']['norm']:.6g}",
    ]
    template = card.get("template")
    if template is not None and template["sha256"] is None:
        lines.append(f"no template: give upstream's {template['name']} to the recipe's options.template")
    sys.stdout.writelines(f"{line}\n" for line in lines)
    return 0
