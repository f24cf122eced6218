"""How far one optimizer step moves ΔW: start and scale with which LoRA's usual learning rates serve.

Adam moves each entry by about the learning rate η, whatever its gradient. So two things are to be set.

How fast p and q turn: entries of size σ are others after σ/η steps. In LoRA B starts from 0 and may point anywhere
after a few; PΛQ must turn what it has. With σ = 1/√n, unit vectors, η = 1e-3 turns too little in a short run, and
a larger η moves Λ too far (docs/log.md has the scores). σ = 0.01 goes with η = 1e-3, whatever the width.

How fast Λ grows: the first step of LoRA, B = 0 and A Kaiming-uniform with rows of norm √⅓, gives
‖ΔW‖ = s η √(r·out/3); that of PΛQ with Λ = 0 gives ‖ΔW‖ = s η √r ‖p‖‖q‖. Both are equal for s√(out/3) / (‖p‖‖q‖) in
the place of s. The rank is the one in the end, not the larger one at the start: what is pruned was not meant to
carry anything.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping

from .config import AdaLoraConfig

LORA_SCALE = 8.0  # α/√r of LoRA as it is usually tuned: α 16 at rank 4
START_STD = {"gaussian": 0.02, "orthogonal": 0.01}  # of entries of A and B; 0.02 is the authors' code, not the paper


def usual_alpha(config: AdaLoraConfig, shapes: Mapping[str, tuple[int, int]], rank: float) -> float:
    """lora_alpha for matrices (out, in) by name and `rank` triplets each in the end."""
    variance = START_STD[config.init_lora_weights] ** 2
    gains = [math.sqrt(out / 3) / (variance * math.sqrt(out * in_)) for out, in_ in shapes.values()]
    scale = LORA_SCALE / math.sqrt(max(rank, 1)) * statistics.median(gains)
    return float(f"{scale * config.init_r:.3g}")
