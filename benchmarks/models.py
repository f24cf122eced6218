"""The models that are measured: real shapes, random weights, since cost does not depend on the values.

The models' own dropout is 0; only the adapters drop. Sequences have 64 tokens up to 2,048 tokens a batch and
128 above; Llama's always 256. Labels are random.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

Batch = dict[str, Tensor]

LABELS = 7
BERT_MATRICES = ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense")
DEBERTA_MATRICES = ("query_proj", "key_proj", "value_proj", *BERT_MATRICES[3:])
LLAMA_MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Shape:
    """One model: how to build it, which matrices are adapted, what its batches look like.

    `floor` says which parameters the frozen floor trains, by the ending of their names: biases, or the norms
    of a model without biases. Backward must pass through every layer all the same.
    """

    name: str
    title: str
    make: Callable[..., nn.Module]
    size: Mapping[str, int]
    targets: tuple[str, ...]
    floor: str = "bias"
    causal: bool = False

    def build(self) -> nn.Module:
        """A fresh model, the same for every arm."""
        torch.manual_seed(0)
        return self.make(**self.size).train()

    def smaller(self, **size: int) -> Shape:
        """The same kind of model with other numbers."""
        return dataclasses.replace(self, size={**self.size, **size})

    def length(self, tokens: int) -> int:
        """Tokens in each sequence of a batch of `tokens`."""
        length = 256 if self.causal else 64 if tokens <= 2048 else 128
        return min(length, tokens)

    def batch(self, tokens: int, device: str = "cpu") -> Batch:
        """A batch of `tokens` tokens in whole sequences, ids (n, length). Raises ValueError if none fits."""
        length = self.length(tokens)
        if tokens < 1 or tokens % length:
            raise ValueError(f"{tokens} tokens are no whole number of sequences of {length}; choose a multiple.")
        random = torch.Generator().manual_seed(1)
        ids = torch.randint(5, self.size["vocab_size"], (tokens // length, length), generator=random)
        labels = ids if self.causal else torch.randint(0, LABELS, (len(ids),), generator=random)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        return {name: value.to(device) for name, value in batch.items()}


def _bert(**size: Any) -> nn.Module:
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForSequenceClassification(BertConfig(**size, **still, num_labels=LABELS))


def _deberta(**size: Any) -> nn.Module:
    # The published configuration but for the vocabulary: relative positions in 256 buckets, whose projections
    # share the matrices of query and key, so that those are applied twice in each layer.
    config = DebertaV2Config(
        **size,
        num_labels=LABELS,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pooler_dropout=0.0,
        type_vocab_size=0,
        relative_attention=True,
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        norm_rel_ebd="layer_norm",
        position_biased_input=False,
        layer_norm_eps=1e-7,
    )
    return DebertaV2ForSequenceClassification(config)


def _llama(**size: Any) -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**size, use_cache=False, pad_token_id=0, bos_token_id=1, eos_token_id=2))


def _size(vocab: int, hidden: int, layers: int, heads: int, intermediate: int) -> dict[str, int]:
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": intermediate,
    }


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("minilm", "MiniLM-L6", _bert, _size(30522, 384, 6, 12, 1536), BERT_MATRICES),
        Shape("bert-base", "BERT-base", _bert, _size(30522, 768, 12, 12, 3072), BERT_MATRICES),
        Shape(
            "deberta-base",
            "DeBERTa-v3-base, vocabulary 2,000",
            _deberta,
            {**_size(2000, 768, 12, 12, 3072), "position_buckets": 256, "max_position_embeddings": 512},
            DEBERTA_MATRICES,
        ),
        Shape(
            "llama",
            "Llama, 4 layers of 512, vocabulary 2,000",
            _llama,
            _size(2000, 512, 4, 8, 1376),
            LLAMA_MATRICES,
            floor="norm.weight",
            causal=True,
        ),
    )
}
