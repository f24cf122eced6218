"""A stock transformers Trainer with one callback. Any classification model will do: python trainer.py MODEL."""

import sys

from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from adalora import AdaLoraConfig, rank_report, save_adapter
from adalora.integrations.transformers import AdaLoraCallback


def main(name: str, out: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(name)
    texts = [f"{word} {noun}" for word in ("good", "bad") for noun in ("film", "book", "meal", "day") for _ in range(8)]
    rows = Dataset.from_dict({"text": texts, "label": [int(text.startswith("good")) for text in texts]})
    rows = rows.map(lambda batch: tokenizer(batch["text"]), batched=True, remove_columns="text")
    trainer = Trainer(
        AutoModelForSequenceClassification.from_pretrained(name, num_labels=2),
        TrainingArguments(out, num_train_epochs=3, learning_rate=3e-3, report_to="none", dataloader_pin_memory=False),
        train_dataset=rows,
        data_collator=DataCollatorWithPadding(tokenizer),
        callbacks=[AdaLoraCallback(AdaLoraConfig(init_r=4, target_r=2))],  # the one line
    )
    trainer.train()
    print(rank_report(trainer.model).heatmap(color=sys.stdout.isatty()))
    save_adapter(trainer.model, f"{out}/adapter")


if __name__ == "__main__":
    from adalora.tasks.encoder import packaged_encoder

    main(sys.argv[1] if len(sys.argv) > 1 else str(packaged_encoder()), "runs/trainer-example")
