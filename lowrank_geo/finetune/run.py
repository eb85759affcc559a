"""One fine-tuning run with Hugging Face's Trainer, and a table of several methods."""

import gc
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

from lowrank_geo.finetune.config import FinetuneConfig
from lowrank_geo.finetune.examples import Examples, load_examples
from lowrank_geo.finetune.memory import peak_bytes, reset_peak
from lowrank_geo.finetune.methods import Allocation, method_named
from lowrank_geo.finetune.models import base_model, check_fits
from lowrank_geo.finetune.saving import check_empty, save
from lowrank_geo.finetune.tokens import Collator, Tokens, check_embedded
from lowrank_geo.peft import RankCallback

TASK_TYPES = {"seq-cls": "SEQ_CLS", "causal-lm": "CAUSAL_LM"}


def accuracy(prediction: Any) -> dict[str, float]:
    """The share of examples whose largest logit is that of their label."""
    logits, labels = torch.as_tensor(prediction.predictions), torch.as_tensor(prediction.label_ids)
    return {"accuracy": (logits.argmax(-1) == labels).float().mean().item()}


def mean_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """The cross entropy of a classifier as its share of the mean over all batches of a step.

    Of a model that computes its loss itself, Trainer adds up the means of the batches that it accumulates.
    """
    total = nn.functional.cross_entropy(outputs["logits"], labels, reduction="sum")
    return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)


def finetune(
    config: FinetuneConfig,
    out: Path | None = None,
    *,
    method: str = "fixed-rank",
    examples: Examples | None = None,
) -> dict[str, Any]:
    """Fine-tune, evaluate on held-out examples, and save adapter and result in `out` if it is given.

    Returns "loss" and "accuracy" on held-out examples, or "loss" alone for language models, "trained" and "total"
    parameters, "samples_per_second", and "peak_memory" in bytes. A fixed-rank adapter is also saved as plain LoRA.

    Raises: ValueError for unknown methods, tasks and optimizers, and data or adapters that do not fit.
    """
    chosen = method_named(method)
    if out is not None:
        check_empty(out)
    examples = load_examples(config.data, config.task) if examples is None else examples
    set_seed(config.seed)
    model, tokenizer = base_model(config, examples)
    check_fits(model, config)
    train, held_out = (
        Tokens(rows, tokenizer, config) for rows in (examples.train, examples.held_out)
    )
    for tokens in (train, held_out):
        check_embedded(model, tokens)
    model = chosen.wrap(model, config, TASK_TYPES[config.task])
    optimizer = chosen.make(model, config, chosen.rate(config))
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(
            model,
            arguments(config, scratch),
            data_collator=Collator(tokenizer, config.task),
            train_dataset=train,
            eval_dataset=held_out,
            compute_metrics=accuracy if config.task == "seq-cls" else None,
            compute_loss_func=mean_loss if config.task == "seq-cls" else None,
            optimizers=(optimizer, None),
            callbacks=[Allocation(), RankCallback()],
        )
        trainer.remove_callback(PrinterCallback)  # the log is in `out`, and the result is returned
        reset_peak()
        speed = trainer.train().metrics["train_samples_per_second"]
        memory = peak_bytes()
        scores = trainer.evaluate()
    result = {
        "method": method,
        **{key: scores[f"eval_{key}"] for key in ("loss", "accuracy") if f"eval_{key}" in scores},
        "trained": count(p for p in model.parameters() if p.requires_grad),
        "total": count(model.parameters()),
        "samples_per_second": speed,
        "peak_memory": memory,
    }
    if out is not None:
        save(
            model,
            tokenizer,
            out,
            method,
            {**result, "labels": examples.labels, "config": asdict(config)},
            trainer.state.log_history,
        )
    return result


def arguments(config: FinetuneConfig, scratch: str) -> TrainingArguments:
    """Trainer's settings; the rates are those of the optimizer."""
    return TrainingArguments(
        output_dir=scratch,
        per_device_train_batch_size=config.batch,
        gradient_accumulation_steps=config.accumulate,
        per_device_eval_batch_size=64,
        max_steps=config.steps,
        warmup_steps=max(1, config.steps // 20),
        lr_scheduler_type="cosine",
        logging_steps=max(1, config.steps // 10),
        save_strategy="no",
        report_to=[],
        seed=config.seed,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        log_level="error",
    )


def count(parameters: Any) -> int:
    """How many numbers parameters hold."""
    return sum(p.numel() for p in parameters)


def compare(
    config: FinetuneConfig, methods: list[str], seeds: int, *, report: Any = None
) -> list[dict[str, Any]]:
    """The results of several methods, each with seeds 0, 1, ... and its own learning rate unless one is set.

    `report(result)` is called after each run.
    """
    for name in methods:
        method_named(name)
    examples = load_examples(config.data, config.task)
    found = []
    for name in methods:
        for seed in range(config.seed, config.seed + seeds):
            gc.collect()
            result = finetune(replace(config, seed=seed), method=name, examples=examples)
            found.append({**result, "seed": seed})
            if report is not None:
                report(found[-1])
    return found
