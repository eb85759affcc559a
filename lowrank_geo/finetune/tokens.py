"""Examples as the tokens that a model reads, one by one and in padded batches."""

from typing import Any

from torch.utils.data import Dataset
from transformers import DataCollatorWithPadding

from lowrank_geo.finetune.config import FinetuneConfig


class Tokens(Dataset):
    """Tokenised examples; for language models the labels are the tokens themselves."""

    def __init__(self, rows: list[tuple[str, int]], tokenizer: Any, config: FinetuneConfig) -> None:
        texts = [text for text, _ in rows]
        found = tokenizer(texts, truncation=True, max_length=config.length)
        self.rows = [
            {"input_ids": ids, "attention_mask": mask}
            for ids, mask in zip(found["input_ids"], found["attention_mask"], strict=True)
        ]
        if config.task == "seq-cls":
            for row, (_, label) in zip(self.rows, rows, strict=True):
                row["labels"] = label

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


class Collator:
    """Pads a batch; for language models padding is no target."""

    def __init__(self, tokenizer: Any, task: str) -> None:
        self.pad, self.task = DataCollatorWithPadding(tokenizer), task

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        batch = self.pad(rows)
        if self.task == "causal-lm":
            batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        return batch
