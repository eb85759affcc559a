"""A Trainer on a tiny encoder, and as a script the same on every process of torchrun."""

import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

sys.path.append(str(Path(__file__).resolve().parent))
from peft_models import config, tiny  # noqa: E402 (torchrun starts without the path of conftest)

from lowrank_geo.optim import LoRAPreconditioned  # noqa: E402
from lowrank_geo.peft import optimizer_for  # noqa: E402


class Samples(torch.utils.data.Dataset):
    """Sentences of random words; the label says whether the first word is of the lower half."""

    def __init__(self, count=16):
        generator = torch.Generator().manual_seed(7)
        self.ids = torch.randint(3, 40, (count, 6), generator=generator)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        ids = self.ids[index]
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "labels": int(ids[0] < 21),
        }


def arguments(folder, **changes):
    settings = dict(
        output_dir=str(folder),
        per_device_train_batch_size=8,
        max_steps=6,
        save_steps=3,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        lr_scheduler_type="cosine",
        seed=11,
        dataloader_pin_memory=False,
        average_tokens_across_devices=False,  # else transformers 5.24 doubles losses that count no tokens
    )
    return TrainingArguments(**settings | changes)


def model(**changes):
    torch.manual_seed(9)
    return get_peft_model(tiny("encoder"), config("encoder", **{"init": "zero"} | changes))


def trainer(folder, name="muon", *, callbacks=None, base=None, **changes):
    """A Trainer with an optimizer of ours on a fresh model."""
    net = model() if base is None else base
    chosen = optimizer_for(net, name, lr=0.02, euclidean_lr=2e-3, weight_decay=0.01, total_steps=6)
    return Trainer(
        net,
        arguments(folder, **changes),
        train_dataset=Samples(),
        optimizer_cls_and_kwargs=chosen,
        callbacks=callbacks,
    )


def lora_trainer(folder, **changes):
    """A Trainer with the manifold step on plain LoRA."""
    torch.manual_seed(9)
    settings = dict(r=3, lora_alpha=6, target_modules=["query", "value"], task_type="SEQ_CLS")
    net = get_peft_model(tiny("encoder"), LoraConfig(**settings))
    optimizer = LoRAPreconditioned(net, lr=0.02, euclidean_lr=2e-3)
    return Trainer(
        net, arguments(folder, **changes), train_dataset=Samples(), optimizers=(optimizer, None)
    )


def trained(net):
    return {n: p.detach().clone() for n, p in net.named_parameters() if p.requires_grad}


if __name__ == "__main__":
    out, name = Path(sys.argv[1]), sys.argv[2]
    settings = dict(ddp_backend="gloo", max_steps=3, save_steps=100)
    run = (
        lora_trainer(out / "run", **settings)
        if name == "lora"
        else trainer(out / "run", name, **settings)
    )
    run.train()
    rank = run.args.process_index
    torch.save(trained(run.model), out / f"rank{rank}.pt")
