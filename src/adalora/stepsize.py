"""How far one optimizer step moves ΔW: the scale that makes the first one as long as LoRA's.

Adam moves each entry by about the learning rate η, whatever its gradient. The first step of LoRA, B = 0 and A
Kaiming-uniform with rows of norm √⅓, gives ‖ΔW‖ = s η √(r·out/3); that of PΛQ with Λ = 0 gives ‖ΔW‖ = s η √r ‖p‖‖q‖.
Both are equal for s√(out/3) / (‖p‖‖q‖) in the place of s. The rank is the one in the end, not the larger one at the
start: what is pruned was not meant to carry anything.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping

from .config import AdaLoraConfig

LORA_SCALE = 8.0  # α/√r of LoRA as it is usually tuned: α 16 at rank 4
INIT_STD = 0.02  # of A and B in the authors' code; the paper gives none


def usual_alpha(config: AdaLoraConfig, shapes: Mapping[str, tuple[int, int]], rank: float) -> float:
    """lora_alpha for matrices (out, in) by name and `rank` triplets each in the end."""
    gains = [math.sqrt(out / 3) / _start_norm(config, out, in_) for out, in_ in shapes.values()]
    scale = LORA_SCALE / math.sqrt(max(rank, 1)) * statistics.median(gains)
    return float(f"{scale * config.init_r:.3g}")


def _start_norm(config: AdaLoraConfig, out: int, in_: int) -> float:
    """‖p‖‖q‖ of a triplet at the start, or what stands in its place where p starts from 0 as in LoRA."""
    if config.init_lora_weights == "lora":
        return math.sqrt(out / 3)
    return INIT_STD**2 * math.sqrt(out * in_) if config.init_lora_weights == "gaussian" else 1.0
