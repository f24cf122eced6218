"""The naive twin of AdaLoRA: the method written straight from its equations, slowly, for the tests to trust.

Nothing here comes from the library (or from PEFT): the two must only meet in a test. Sources are the paper
(Zhang et al., ICLR 2023, arXiv 2303.10512) and the authors' code (`loralib/loralib/adalora.py` and the
training loops of QingruZhang/AdaLoRA). Where they differ, the code made the published numbers and wins; the
difference is noted.

Symbols: A = Q (r, in), E = Lambda as a column (r, 1), B = P (out, r). Any dtype; float64 judges best.
Deliberately absent: dropout, mixed precision, gradient clipping, learning-rate schedules.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

Scores = Sequence[Sequence[float] | Tensor]  # one sequence of r numbers per module
Keeps = list[list[bool]]  # one list of r flags per module


# --- Forward passes -----------------------------------------------------------------------------------------


def scaling(lora_alpha: float, init_r: int) -> float:
    """alpha / (r_init + 1e-5), whatever is pruned later (SVDLinear of adalora.py; the paper: alpha / r)."""
    return lora_alpha / (init_r + 1e-5)


def delta_weight(A: Tensor, E: Tensor, B: Tensor, lora_alpha: float, init_r: int) -> Tensor:
    """Scaled P Lambda Q of eq. 3 as a sum of r rank-one matrices, (out, in)."""
    delta = A.new_zeros(B.shape[0], A.shape[1])
    for i in range(A.shape[0]):
        delta = delta + E[i, 0] * torch.outer(B[:, i], A[i, :])
    return delta * scaling(lora_alpha, init_r)


def linear_forward(
    x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, E: Tensor, B: Tensor, lora_alpha: float, init_r: int
) -> Tensor:
    """Eq. 3, (W0 + P Lambda Q) x, for x of shape (..., in) and W of shape (out, in)."""
    return F.linear(x, W + delta_weight(A, E, B, lora_alpha, init_r), bias)


def conv_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    E: Tensor,
    B: Tensor,
    lora_alpha: float,
    init_r: int,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
) -> Tensor:
    """Eq. 3 on the weight (out, in / groups, *kernel) flattened to (out, in / groups * kernel size)."""
    delta = delta_weight(A, E, B, lora_alpha, init_r).reshape(weight.shape)
    dims = weight.dim() - 2
    dilations = _per_dimension(dilation, dims)
    sides = _padding_sides(weight.shape[2:], padding, dilations)
    flat = [side for pair in reversed(sides) for side in pair]  # F.pad counts from the last dimension
    x = F.pad(x, flat, mode="constant" if padding_mode == "zeros" else padding_mode)
    convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[dims]
    return convolve(x, weight + delta, bias, _per_dimension(stride, dims), 0, dilations, groups)


def _per_dimension(value: int | Sequence[int], dims: int) -> list[int]:
    return [value] * dims if isinstance(value, int) else list(value)


def _padding_sides(
    kernel: Sequence[int], padding: int | Sequence[int] | str, dilations: Sequence[int]
) -> list[tuple[int, int]]:
    """(before, after) per spatial dimension, with torch's rule that 'same' puts the odd element after."""
    if padding == "same":
        totals = [d * (k - 1) for k, d in zip(kernel, dilations, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    if padding == "valid":
        return [(0, 0)] * len(kernel)
    if isinstance(padding, str):
        raise ValueError(f"padding is {padding!r}; the string forms are 'same' and 'valid'")
    return [(p, p) for p in _per_dimension(padding, len(kernel))]


def embedding_forward(
    ids: Tensor,
    weight: Tensor,
    A: Tensor,
    E: Tensor,
    B: Tensor,
    lora_alpha: float,
    init_r: int,
    embed_scale: float = 1.0,
) -> Tensor:
    """Eq. 3 on a table (num, dim) with A (r, num), B (dim, r): Delta W is the transpose of P Lambda Q."""
    table = weight + delta_weight(A, E, B, lora_alpha, init_r).T
    return table[ids] * embed_scale


# --- Orthogonality regularizer ------------------------------------------------------------------------------


def penalty(As: Sequence[Tensor], Bs: Sequence[Tensor], form: str) -> Tensor:
    """Distance of every A A^T and B^T B from the identity, one scalar for the model, not multiplied by gamma.

    "norm": mean over all A and B of the unsquared Frobenius norm (compute_orth_regu of adalora.py).
    "squared": sum over all of the squared norm (eq. 4, summed over modules as in sec. 3.2).
    """
    grams = [A @ A.T for A in As] + [B.T @ B for B in Bs]
    errors = [G - torch.eye(len(G), dtype=G.dtype, device=G.device) for G in grams]
    if form == "norm":
        # vector_norm has gradient 0 at an exactly orthogonal matrix, where sqrt(sum of squares) gives NaN.
        return torch.stack([torch.linalg.vector_norm(error) for error in errors]).sum() / len(errors)
    if form == "squared":
        return torch.stack([(error**2).sum() for error in errors]).sum()
    raise ValueError(f"form is {form!r}; use 'norm' or 'squared'")


def penalty_gradients(
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    form: str,
) -> tuple[list[Tensor], list[Tensor]]:
    """Autograd's gradient of `penalty` for every A and every B."""
    leaves_A = [A.detach().clone().requires_grad_() for A in As]
    leaves_B = [B.detach().clone().requires_grad_() for B in Bs]
    gradients = torch.autograd.grad(penalty(leaves_A, leaves_B, form), leaves_A + leaves_B)
    return list(gradients[: len(As)]), list(gradients[len(As) :])


# --- Budget schedule ----------------------------------------------------------------------------------------


def budget_schedule(
    step: int, initial: int, target: int, tinit: int, tfinal: int, deltaT: int, total_step: int
) -> tuple[int, bool]:
    """(triplets granted at the 0-based step, mask due?), as schedule_threshold of adalora.py truncates it.

    Eq. 14 as printed has an extra -tf in its numerator and overshoots b(0); this is the code's cubic. The
    order of the float operations matters: int() may land one below where the exact value is an integer.
    """
    if step <= tinit:
        return initial, False
    if step > total_step - tfinal:
        return target, True
    mul_coeff = 1 - (step - tinit) / (total_step - tfinal - tinit)
    budget = int(target + (initial - target) * (mul_coeff**3))
    return budget, step % deltaT == 0


# --- Importance ---------------------------------------------------------------------------------------------


class Importance:
    """Two exponential averages per named tensor, from zero, no bias correction (update_ipt of adalora.py)."""

    def __init__(self, beta1: float, beta2: float) -> None:
        self.beta1 = beta1
        self.beta2 = beta2
        self._sensitivity: dict[str, Tensor] = {}
        self._uncertainty: dict[str, Tensor] = {}

    def update(self, name: str, weight_after_step: Tensor, grad: Tensor) -> None:
        """Eqs. 10-12: I = |w * g|, Ibar from I, Ubar from |I - Ibar| with the new Ibar.

        The code takes w after the optimizer's step, Algorithm 1 before it; g is that of loss + penalty.
        """
        raw = (weight_after_step.detach() * grad.detach()).abs()
        zero = torch.zeros_like(raw)
        smooth = self.beta1 * self._sensitivity.get(name, zero) + (1 - self.beta1) * raw
        spread = self.beta2 * self._uncertainty.get(name, zero) + (1 - self.beta2) * (raw - smooth).abs()
        self._sensitivity[name] = smooth
        self._uncertainty[name] = spread

    def sensitivity(self, name: str) -> Tensor:
        """Ibar of eq. 11, elementwise."""
        return self._sensitivity[name]

    def uncertainty(self, name: str) -> Tensor:
        """Ubar of eq. 12, elementwise."""
        return self._uncertainty[name]

    def score(self, name: str) -> Tensor:
        """s = Ibar * Ubar of eq. 13, elementwise."""
        return self._sensitivity[name] * self._uncertainty[name]


def triplet_scores(sA: Tensor, sE: Tensor, sB: Tensor) -> list[float]:
    """Eq. 9, S_i = s(E_i) + mean_j s(A_ij) + mean_j s(B_ji), accumulated in double precision."""
    r, columns = sA.shape
    rows = sB.shape[0]
    scores = []
    for i in range(r):
        mean_A = sum(float(sA[i, j]) for j in range(columns)) / columns
        mean_B = sum(float(sB[j, i]) for j in range(rows)) / rows
        scores.append(float(sE[i, 0]) + mean_A + mean_B)
    return scores


def importance_scores(importance: Importance, module: str) -> list[float]:
    """The paper's metric: eq. 9 over s = Ibar * Ubar of the tensors `module`.A, .E and .B."""
    return triplet_scores(*(importance.score(f"{module}.{part}") for part in "AEB"))


def sensitivity_scores(importance: Importance, module: str) -> list[float]:
    """Table 4's "s = I": eq. 9 over the smoothed Ibar, as rankselector.py does with beta2 outside (0, 1)."""
    return triplet_scores(*(importance.sensitivity(f"{module}.{part}") for part in "AEB"))


def magnitude_scores(E: Tensor) -> list[float]:
    """Table 4's S = |lambda|, of the current values, no smoothing (sec. 3.2)."""
    return [abs(float(value)) for value in E[:, 0]]


# --- Allocation ---------------------------------------------------------------------------------------------


def keep_top(score_lists: Scores, budget: int, minimum: int | Sequence[int] | None = None) -> Keeps:
    """T of eqs. 5-8 exactly: the `budget` best triplets of all; ties go to the first module, then index.

    With a minimum, each module first gets that many of its own best (all, if it has fewer).
    """
    if not all(math.isfinite(score) for scores in score_lists for score in scores):
        raise ValueError("scores must be finite to be ranked")
    floors = [minimum or 0] * len(score_lists) if minimum is None or isinstance(minimum, int) else minimum
    floors = [min(floor, len(scores)) for floor, scores in zip(floors, score_lists, strict=True)]
    if budget < sum(floors):
        raise ValueError(f"budget {budget} is below the {sum(floors)} triplets that the minimum guarantees")
    ranking = sorted((-float(s), m, i) for m, scores in enumerate(score_lists) for i, s in enumerate(scores))
    keeps = [[False] * len(scores) for scores in score_lists]
    for _, m, i in ranking:
        if sum(keeps[m]) < floors[m]:
            keeps[m][i] = True
    for _, m, i in ranking:
        if sum(map(sum, keeps)) < budget:
            keeps[m][i] = True
    return keeps


def authors_threshold(score_lists: Scores, budget: int) -> float:
    """The k-th smallest score, k = total - budget (mask_to_target_rank of adalora.py); k = 0 raises."""
    everything = torch.tensor([float(s) for scores in score_lists for s in scores], dtype=torch.float64)
    return torch.kthvalue(everything, len(everything) - budget).values.item()


def authors_mask(score_lists: Scores, budget: int) -> Keeps:
    """mask_to_target_rank of adalora.py: prune where score <= threshold; ties prune too much, NaN is kept."""
    threshold = authors_threshold(score_lists, budget)
    return [[not (float(score) <= threshold) for score in scores] for scores in score_lists]


# --- Optimizers ---------------------------------------------------------------------------------------------


class SGD:
    """w <- w - lr * g, the plain step of eqs. 5-8 and Algorithm 1."""

    def __init__(self, lr: float) -> None:
        self.lr = lr

    def step(self, name: str, weight: Tensor, grad: Tensor) -> None:
        """Update the weight in place."""
        weight -= self.lr * grad


class AdamW:
    """torch.optim.AdamW's rule: decoupled decay first, then the step of bias-corrected moments."""

    def __init__(self, lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
        self.lr = lr
        self.betas = betas
        self.eps = eps
        self.weight_decay = weight_decay
        self.moments: dict[str, tuple[int, Tensor, Tensor]] = {}

    def step(self, name: str, weight: Tensor, grad: Tensor) -> None:
        """Update the weight in place; only this changes the moments kept under the tensor's name."""
        steps, mean, square = self.moments.get(name, (0, torch.zeros_like(weight), torch.zeros_like(weight)))
        beta1, beta2 = self.betas
        steps = steps + 1
        mean = beta1 * mean + (1 - beta1) * grad
        square = beta2 * square + (1 - beta2) * grad * grad
        self.moments[name] = (steps, mean, square)
        mean_hat = mean / (1 - beta1**steps)
        square_hat = square / (1 - beta2**steps)
        weight -= self.lr * self.weight_decay * weight
        weight -= self.lr * mean_hat / (square_hat.sqrt() + self.eps)


# --- A whole run --------------------------------------------------------------------------------------------


@dataclass
class Trajectory:
    """What happened at each 0-based step; tensors are those left behind by the step, after any mask."""

    importance: Importance
    losses: list[float] = field(default_factory=list)  # task loss of the step's forward, without the penalty
    penalties: list[float] = field(default_factory=list)  # not multiplied by the orthogonality weight
    budgets: list[int] = field(default_factory=list)  # triplets granted
    masked: list[bool] = field(default_factory=list)  # was E masked at the end of this step?
    scores: list[list[list[float]] | None] = field(default_factory=list)  # where triplets were chosen
    keeps: list[Keeps] = field(default_factory=list)  # the latest choice, even where it was not applied
    A: list[list[Tensor]] = field(default_factory=list)  # [step][module]
    E: list[list[Tensor]] = field(default_factory=list)
    B: list[list[Tensor]] = field(default_factory=list)


def train_reference(
    modules: Sequence[Mapping[str, Tensor]],
    loss_fn: Callable[[int, list[Tensor]], Tensor],
    *,
    lora_alpha: float,
    init_r: int,
    target: int,
    tinit: int,
    tfinal: int,
    deltaT: int,
    total_step: int,
    lr: float,
    optimizer: str = "adamw",
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    beta1: float = 0.85,
    beta2: float = 0.85,
    orth_reg_weight: float = 0.1,
    orth_reg_form: str = "norm",
    importance: str = "sensitivity*uncertainty",
    minimum: int | Sequence[int] | None = None,
) -> Trajectory:
    """Algorithm 1 in the authors' order: backward, optimizer, importance with post-step weights, mask.

    modules: dicts with W (out, in) or (out, in / groups, *kernel), A, E, B; only A, E, B train, on clones.
    loss_fn(step, weights): the task loss given every module's W + Delta W. target: triplets left at the end,
    over all modules. The averages of module m are named "m.A", "m.E", "m.B". Weight decay is AdamW's only.

    The last choice is forced at step T - tfinal with the target budget, as PEFT does. The authors mask at
    that step only if deltaT divides it, otherwise one step later; importance stops before T - tfinal in both,
    so the triplets are the same. The choice is re-applied after every later step. With tfinal = 0 it is made
    at the last step, T - 1.
    """
    if total_step <= tinit + tfinal:
        raise ValueError(f"total_step {total_step} must exceed tinit {tinit} + tfinal {tfinal}")
    tensors = [{part: module[part].detach().clone().requires_grad_() for part in "AEB"} for module in modules]
    weights = [module["W"].detach() for module in modules]
    rule = _make_optimizer(optimizer, lr, betas, eps, weight_decay)
    averages = Importance(beta1, beta2)
    run = Trajectory(averages)
    initial = sum(len(t["E"]) for t in tensors)
    freeze_step = min(total_step - tfinal, total_step - 1)
    keep = [[True] * len(t["E"]) for t in tensors]
    for step in range(total_step):
        deltas = [delta_weight(t["A"], t["E"], t["B"], lora_alpha, init_r) for t in tensors]
        loss = loss_fn(step, [W + d.reshape(W.shape) for W, d in zip(weights, deltas, strict=True)])
        orthogonality = penalty([t["A"] for t in tensors], [t["B"] for t in tensors], orth_reg_form)
        gradients = _gradients(loss + orth_reg_weight * orthogonality, tensors)

        for m, t in enumerate(tensors):
            for part, tensor in t.items():
                rule.step(f"{m}.{part}", tensor.data, gradients[m][part])
                if step < total_step - tfinal:
                    averages.update(f"{m}.{part}", tensor, gradients[m][part])

        budget, due = budget_schedule(step, initial, target, tinit, tfinal, deltaT, total_step)
        scores = None
        if step >= freeze_step:
            budget, due = target, True
        if due and step <= freeze_step:
            scores = _module_scores(importance, averages, [t["E"].data for t in tensors])
            keep = keep_top(scores, budget, minimum)
        if due:
            _mask([t["E"].data for t in tensors], keep)
        _record(run, loss, orthogonality, budget, due, scores, keep, tensors)
    return run


def _make_optimizer(
    name: str,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> SGD | AdamW:
    if name == "adamw":
        return AdamW(lr, betas, eps, weight_decay)
    if name == "sgd" and weight_decay == 0:
        return SGD(lr)
    raise ValueError(f"optimizer {name!r}, weight_decay {weight_decay}; use 'adamw', or 'sgd' without decay")


def _gradients(objective: Tensor, tensors: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Gradients of the full objective of sec. 3.2, loss and penalty together, laid out as the tensors are."""
    flat = iter(torch.autograd.grad(objective, [tensor for t in tensors for tensor in t.values()]))
    return [{part: next(flat) for part in t} for t in tensors]


def _module_scores(metric: str, averages: Importance, Es: Sequence[Tensor]) -> list[list[float]]:
    """S_k of every module k, by the paper's metric (eq. 9 with eq. 13) or one of Table 4's two others."""
    if metric == "sensitivity*uncertainty":
        return [importance_scores(averages, str(m)) for m in range(len(Es))]
    if metric == "sensitivity":
        return [sensitivity_scores(averages, str(m)) for m in range(len(Es))]
    if metric == "magnitude":
        return [magnitude_scores(E) for E in Es]
    raise ValueError(f"importance is {metric!r}; use 'sensitivity*uncertainty', 'sensitivity' or 'magnitude'")


def _mask(Es: Sequence[Tensor], keeps: Keeps) -> None:
    """The zeroing of eqs. 5-8 (mask_to_target_rank), in place; A, B and the moments are left alone."""
    for E, keep in zip(Es, keeps, strict=True):
        for i, kept in enumerate(keep):
            if not kept:
                E[i, 0] = 0.0


def _record(
    run: Trajectory,
    loss: Tensor,
    orthogonality: Tensor,
    budget: int,
    masked: bool,
    scores: list[list[float]] | None,
    keep: Keeps,
    tensors: Sequence[Mapping[str, Tensor]],
) -> None:
    run.losses.append(loss.item())
    run.penalties.append(orthogonality.item())
    run.budgets.append(budget)
    run.masked.append(masked)
    run.scores.append(scores)
    run.keeps.append([list(flags) for flags in keep])
    run.A.append([t["A"].detach().clone() for t in tensors])
    run.E.append([t["E"].detach().clone() for t in tensors])
    run.B.append([t["B"].detach().clone() for t in tensors])
