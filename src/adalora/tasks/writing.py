"""What a causal language model writes behind prompts, and whether there is room for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from ..errors import DataError
from .chat import ChatFormat

AT_ONCE = 16  # prompts

_NO_LIMIT = 10**9


@dataclass(frozen=True)
class Writer:
    """At most `most` tokens behind each prompt of `format`. `name` is the model's, for errors."""

    format: ChatFormat
    most: int
    name: str

    def write(self, model: Any, prompts: Sequence[str], where: str) -> list[str]:
        """What the model writes behind each prompt, always taking the likeliest token.

        Raises DataError, which begins with `where`, for a prompt that leaves no room.
        """
        self.require_room(model, prompts, where)
        tokenizer = self.format.tokenizer
        ids = [self.format.tokens(prompt) for prompt in prompts]
        options = GenerationConfig(
            max_new_tokens=self.most,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            eos_token_id=self.format.stop_ids(),
            pad_token_id=tokenizer.pad_token_id,
        )
        texts = [""] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda i: len(ids[i]))
        training, device = model.training, next(model.parameters()).device
        model.eval()
        for start in range(0, len(order), AT_ONCE):
            chosen = order[start : start + AT_ONCE]
            # At the left: what is written goes on from the last token.
            batch = tokenizer.pad({"input_ids": [ids[i] for i in chosen]}, padding_side="left", return_tensors="pt")
            with torch.no_grad():
                whole = model.generate(**batch.to(device), generation_config=options)  # (prompts, tokens)
            written = whole[:, batch["input_ids"].shape[1] :]
            for i, text in zip(chosen, tokenizer.batch_decode(written, skip_special_tokens=True), strict=True):
                texts[i] = text.strip()
        model.train(training)
        return texts

    def require_room(self, model: Any, prompts: Sequence[str], where: str) -> None:
        """Raise DataError for the first prompt behind which `most` tokens are more than the model takes."""
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or _NO_LIMIT
        for index, prompt in enumerate(prompts):
            length = len(self.format.tokens(prompt))
            if length + self.most > limit:
                raise DataError(
                    f"{where}, row {index}: a prompt of {length} tokens and data.max_new_tokens={self.most} are more "
                    f"than the {limit} that {self.name!r} takes. Lower data.max_new_tokens, or remove this row."
                )
