"""Examples as the tokens that a model reads, one by one and in padded batches."""

from typing import Any

from torch.utils.data import Dataset
from transformers import DataCollatorWithPadding

from lowrank_geo.finetune.config import FinetuneConfig


class Tokens(Dataset):
    """Tokenised examples; for language models the labels are the tokens themselves.

    Language models predict no token of a text of one, which is left out.

    Raises: ValueError for a text without tokens that is to be classified, and if nothing is left.
    """

    def __init__(self, rows: list[tuple[str, int]], tokenizer: Any, config: FinetuneConfig) -> None:
        texts = [text for text, _ in rows]
        found = tokenizer(texts, truncation=True, max_length=config.length)
        self.rows = [
            {"input_ids": ids, "attention_mask": mask}
            for ids, mask in zip(found["input_ids"], found["attention_mask"], strict=True)
        ]
        if config.task == "causal-lm":
            self.rows = [row for row in self.rows if len(row["input_ids"]) > 1]
            if not self.rows:
                raise ValueError(
                    f"causal-lm needs texts of two tokens or more, got none of {len(rows)} at length {config.length}; "
                    "raise it, or give other data"
                )
        elif empty := [
            text for text, row in zip(texts, self.rows, strict=True) if not row["input_ids"]
        ]:
            raise ValueError(
                f"seq-cls needs texts that the tokenizer knows, got no token of {empty[0]!r}; remove the row"
            )
        if config.task == "seq-cls":
            for row, (_, label) in zip(self.rows, rows, strict=True):
                row["labels"] = label

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


def check_embedded(model: Any, tokens: Tokens) -> None:
    """Raise ValueError for tokens that a model has no embedding of."""
    size = model.get_input_embeddings().num_embeddings
    largest = max(max(row["input_ids"]) for row in tokens.rows)
    if largest >= size:
        raise ValueError(
            f"--model needs an embedding for each token of its tokenizer, got token {largest} and {size} embeddings; "
            "use the tokenizer that the model was trained with"
        )


class Collator:
    """Pads a batch; for language models padding is no target."""

    def __init__(self, tokenizer: Any, task: str) -> None:
        self.pad, self.task = DataCollatorWithPadding(tokenizer), task

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        batch = self.pad(rows)
        if self.task == "causal-lm":
            batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        return batch
