"""A convolutional classifier, adapted in a plain loop that is saved and resumed half-way."""

import torch
from torch import nn

import adalora

STEPS = 120


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128, 4)
    )


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images with one bright quadrant, which is the label."""
    generator = torch.Generator().manual_seed(step)
    labels = torch.randint(0, 4, (32,), generator=generator)
    images = torch.rand(32, 1, 8, 8, generator=generator)
    for image, label in zip(images, labels.tolist(), strict=True):
        row, column = divmod(label, 2)
        image[0, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 0.5
    return images, labels


def prepare() -> tuple[nn.Module, torch.optim.Optimizer]:
    config = adalora.AdaLoraConfig(target_modules=["0", "4"], init_r=4, target_r=2)
    model = adalora.inject(build(), config)
    optimizer = torch.optim.AdamW(adalora.adapter_parameters(model), lr=3e-2)
    adalora.RankAllocator(model, total_step=STEPS).attach(optimizer)
    return model, optimizer


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> float:
    for step in steps:
        images, labels = batch(step)
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


if __name__ == "__main__":
    model, optimizer = prepare()
    train(model, optimizer, range(STEPS // 2))
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}

    model, optimizer = prepare()  # as after a crash
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    print(f"loss {train(model, optimizer, range(STEPS // 2, STEPS)):.3f}")
    print(adalora.rank_report(model).table())
