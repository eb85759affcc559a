"""What a run is made of: its data and its model, new from the config or as a run folder describes them."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowrank_geo.convert import convert
from lowrank_geo.data import (
    Batches,
    BPETokenizer,
    ByteTokenizer,
    Corpus,
    Tokenizer,
    encode_corpus,
    load_corpus,
    load_tokenizer,
    windows,
)
from lowrank_geo.models.decoder import Decoder, DecoderConfig
from lowrank_geo.models.presets import decoder
from lowrank_geo.plan import Plan, plan_ranks
from lowrank_geo.train import checkpoint
from lowrank_geo.train.config import TrainConfig
from lowrank_geo.train.run_folder import read_complete_record

BPE_VOCABULARY = 4096
EVALUATED = 128  # windows of the held-out text that an evaluation reads


class Data(NamedTuple):
    """The text of a run as tokens; `windows` is the fixed part of the held-out text that is evaluated."""

    corpus: Corpus
    tokenizer: Tokenizer
    batches: Batches
    windows: tuple[Tensor, Tensor]  # (W, T) each


def read_data(config: TrainConfig, tokenizer: Tokenizer | None = None) -> Data:
    """Read, tokenize and split the text; a run that goes on passes the tokenizer it has.

    Raises: ValueError or OSError, in one sentence, for text that is missing, unreadable or too
        short, and for an unknown preset.
    """
    context = empty_model(config).config.context
    corpus = load_corpus(config.data)
    if tokenizer is None and config.tokenizer == "bpe":
        tokenizer = BPETokenizer.train(corpus.train, vocabulary(config))
    tokenizer = tokenizer or ByteTokenizer()
    tokens = encode_corpus(corpus, tokenizer)
    batches = Batches(tokens.train, context=context, batch=config.batch, seed=config.seed)
    return Data(corpus, tokenizer, batches, windows(tokens.held_out, context, EVALUATED))


def vocabulary(config: TrainConfig) -> int:
    """The size that a config asks for; a bpe tokenizer of little text may end up smaller."""
    if config.tokenizer == "bytes":
        return ByteTokenizer.vocab_size
    return config.vocab_size or BPE_VOCABULARY


def empty_model(config: TrainConfig, vocab_size: int | None = None) -> Decoder:
    """The dense model on the meta device.

    Raises: ValueError for an unknown preset.
    """
    size = vocab_size or vocabulary(config)
    return decoder(config.model, vocab_size=size, context=config.context, device="meta")


def plan_of(config: TrainConfig, vocab_size: int | None = None) -> Plan:
    """The ranks that a config asks for, without making the model.

    Raises: ValueError for a preset, rank, ratio, budget or init that cannot be.
    """
    return plan_ranks(empty_model(config, vocab_size), init=config.init, **config.size)


def new_model(config: TrainConfig, vocab_size: int) -> Decoder:
    """The converted model of a config and its seed, drawn on the CPU so that all devices agree."""
    plan = plan_of(config, vocab_size)
    torch.manual_seed(config.seed)
    return convert(decoder(config.model, vocab_size=vocab_size, context=config.context), plan)


def load_model(run: Path) -> tuple[Decoder, Tokenizer]:
    """The model of a run's newest valid checkpoint, on the CPU, and its tokenizer.

    Raises: ValueError or OSError, in one sentence, if there is none, or it is not what run.json says.
    """
    record = read_complete_record(run)
    found = checkpoint.newest(run / "checkpoints")
    if found is None:
        raise ValueError(f"a run needs a checkpoint to be used, got none in {run}; resume it")
    model = described_model(record, found.path)
    return filled(model, checkpoint.load(found).model), load_tokenizer(run)


def check_described(record: dict[str, Any], config: TrainConfig, vocab_size: int) -> None:
    """Raise ValueError unless the config of a run.json asks for the model that it describes: before that is made."""
    asked = empty_model(config, vocab_size).config
    if model_config(record) != asked:
        raise ValueError(
            f"--resume needs a run.json whose config asks for its model, got --model {config.model} of width "
            f"{asked.width} and {asked.layers} layers; it is damaged, start a new run"
        )


def model_config(record: dict[str, Any]) -> DecoderConfig:
    """The decoder of a run.json.

    Raises: ValueError if it describes none.
    """
    try:
        return DecoderConfig(**record["model"])
    except TypeError as error:
        raise ValueError(f"run.json needs a model, got a damaged one: {error}") from error


def described_model(record: dict[str, Any], path: Path) -> Decoder:
    """The converted model that a run.json describes, without memory: on the meta device.

    Raises: ValueError if it describes none, or one that the checkpoint at `path` does not fit.
    """
    config = model_config(record)
    try:
        plan = Plan.from_json(record["plan"])
    except TypeError as error:
        raise ValueError(f"run.json needs a plan, got a damaged one: {error}") from error
    tensors = len(checkpoint.shapes(path))
    if config.layers > tensors:  # before a module is made for each
        raise ValueError(
            f"checkpoint {path} needs tensors for {config.layers} layers, got {tensors} tensors; "
            "it belongs to another model than its run.json"
        )
    model = convert(Decoder(config, device="meta"), plan)
    checkpoint.check_fit(path, model.state_dict())
    return model


def filled(model: Decoder, tensors: dict[str, Tensor]) -> Decoder:
    """A model from the meta device with `tensors` as its parameters."""
    model.load_state_dict(tensors, assign=True)
    if model.config.tie_embeddings:
        model.lm_head.weight = model.embed.weight
    return model.eval()
