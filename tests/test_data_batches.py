"""Batches.at is a function of (seed, step); ranks share out one global batch; epochs cover the text."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowrank_geo.data import Batches, ByteTokenizer, Corpus, encode_corpus, windows

TOKENS = np.arange(1000, dtype=np.uint16)  # every token says where it is
CORPUS = Corpus(["first", "", "zweité"], ["held out"], "three texts", "")


def batches(*, context: int = 7, batch: int = 6, seed: int = 3) -> Batches:
    return Batches(TOKENS, context=context, batch=batch, seed=seed)


def test_a_batch_does_not_depend_on_the_batches_before() -> None:
    steps = [0, 1, 23, 24, 25, 500]
    forward = {step: batches().at(step) for step in steps}
    for step in reversed(steps):
        assert all(map(torch.equal, batches().at(step), forward[step]))


def test_the_sequence_does_not_change_between_versions() -> None:
    # Recorded from the code: a run resumed with a newer version must see the batches it would have seen.
    firsts = [
        batches(seed=seed).at(step).inputs[0, 0].item() for seed in (0, 1) for step in (0, 40)
    ]
    assert firsts == [456, 234, 118, 656]


@pytest.mark.parametrize("step", [0, 23, 10**6])  # 143 windows: an epoch ends within step 23
@pytest.mark.parametrize("world", [1, 2, 3, 6])
def test_the_ranks_partition_the_global_batch(world: int, step: int) -> None:
    parts = [batches().at(step, rank=rank, world=world) for rank in range(world)]
    for part, whole in zip(zip(*parts, strict=True), batches().at(step), strict=True):
        assert torch.equal(torch.cat(part), whole)


@given(
    context=st.integers(1, 999),
    batch=st.integers(1, 300),
    seed=st.integers(0, 2**64 - 1),
    step=st.integers(0, 2**40),
)
def test_the_target_is_the_next_token(context: int, batch: int, seed: int, step: int) -> None:
    inputs, targets = batches(context=context, batch=batch, seed=seed).at(step)
    assert inputs.shape == targets.shape == (batch, context)
    assert torch.equal(targets, (inputs + 1) % 1000)  # the text is a ring
    assert torch.equal(inputs[:, 1:], targets[:, :-1])


@pytest.mark.parametrize("context", [1, 7, 10, 999])
def test_every_token_is_a_target_in_every_epoch(context: int) -> None:
    source = batches(context=context, batch=1)
    per_epoch = source.windows_per_epoch
    for epoch in range(3):
        seen = [source.at(epoch * per_epoch + step).targets for step in range(per_epoch)]
        assert torch.cat(seen).unique().numel() == 1000


def test_seeds_and_epochs_shuffle_differently() -> None:
    source = batches(context=10, batch=100)
    orders = [source.at(0), source.at(1), batches(context=10, batch=100, seed=4).at(0)]
    starts = [tuple(examples.inputs[:, 0].tolist()) for examples in orders]
    assert len(set(starts)) == 3
    assert len({row[0] % 10 for row in starts}) > 1  # windows are cut at another offset
    assert list(starts[0]) != sorted(starts[0])


def test_a_batch_can_be_longer_than_an_epoch() -> None:
    inputs = batches(context=500, batch=5).at(0).inputs
    starts = inputs[:, 0].tolist()
    assert abs(starts[0] - starts[1]) == 500 and abs(starts[2] - starts[3]) == 500


def test_batches_are_contiguous_int64_and_own_their_memory() -> None:
    before = TOKENS.copy()
    for tensor in (*batches().at(0), *windows(TOKENS, 7)):
        assert tensor.dtype == torch.int64 and tensor.is_contiguous()
        tensor.zero_()
    assert (before == TOKENS).all()


def test_tokens_may_lie_in_a_file(tmp_path: Path) -> None:
    TOKENS.tofile(tmp_path / "tokens")
    mapped = np.memmap(tmp_path / "tokens", dtype=np.uint16)
    assert all(map(torch.equal, Batches(mapped, context=7, batch=6, seed=3).at(5), batches().at(5)))


def test_encode_corpus_ends_every_document() -> None:
    tokenizer = ByteTokenizer()
    train, held_out = encode_corpus(CORPUS, tokenizer)
    assert train.dtype == np.uint16
    assert train.tolist() == [*b"first", 256, 256, *"zweité".encode(), 256]
    assert held_out.tolist() == [*b"held out", 256]


def test_windows_are_disjoint_and_fixed() -> None:
    inputs, targets = windows(TOKENS, 8)
    assert torch.equal(
        targets.flatten(), torch.arange(1, 993)
    )  # 124 windows, the rest is too short
    assert torch.equal(targets, inputs + 1)
    assert all(map(torch.equal, windows(TOKENS, 8), (inputs, targets)))


@pytest.mark.parametrize("limit, count", [(1, 1), (3, 3), (124, 124), (500, 124)])
def test_a_limit_spreads_the_windows(limit: int, count: int) -> None:
    starts = windows(TOKENS, 8, limit).inputs[:, 0]
    assert len(starts) == len(starts.unique()) == count
    assert starts[0] == 0 and (starts % 8 == 0).all()
    assert starts[-1] + 8 * (124 // count + 1) >= 992


@pytest.mark.parametrize("context", [1, 999])
def test_the_shortest_text_is_one_window(context: int) -> None:
    tokens = TOKENS[: context + 1]
    assert windows(tokens, context).inputs.shape == (1, context)
    assert Batches(tokens, context=context, batch=2, seed=0).at(0).inputs.shape == (2, context)


def test_refuses_a_text_shorter_than_a_window() -> None:
    with pytest.raises(
        ValueError, match=r"windows needs more than 1000 tokens, one window, got 1000;"
    ):
        windows(TOKENS, 1000)
    with pytest.raises(
        ValueError, match=r"Batches needs more than 1000 tokens, one window, got 1000;"
    ):
        batches(context=1000)
    with pytest.raises(ValueError, match=r"needs more than 4 tokens, one window, got 0;"):
        windows(TOKENS[:0], 4)


@pytest.mark.parametrize("tokens", [TOKENS.astype(float), TOKENS.reshape(10, 100)])
def test_refuses_what_is_not_a_row_of_tokens(tokens: np.ndarray) -> None:
    with pytest.raises(ValueError, match="needs integer tokens in one dimension, got"):
        windows(tokens, 4)


@pytest.mark.parametrize(
    "settings, reason",
    [
        ({"context": 0}, "context of at least 1, got 0"),
        ({"batch": 0}, "batch of at least 1, got 0"),
        ({"seed": -1}, r"seed in \[0, 2\*\*64\), got -1"),
        ({"seed": 2**64}, "seed in"),
    ],
)
def test_refuses_impossible_settings(settings: dict[str, int], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        batches(**settings)


@pytest.mark.parametrize("world", [0, 4, 12])
def test_refuses_a_batch_that_the_processes_cannot_share(world: int) -> None:
    with pytest.raises(
        ValueError, match=rf"world that divides the batch of 6, got {world}; change"
    ):
        batches().at(0, world=world)


@pytest.mark.parametrize("step, rank", [(-1, 0), (0, 2), (0, -1)])
def test_refuses_a_step_or_rank_out_of_range(step: int, rank: int) -> None:
    with pytest.raises(ValueError, match=rf"got step {step} and rank {rank}; count"):
        batches().at(step, rank=rank, world=2)


def test_refuses_a_limit_below_one() -> None:
    with pytest.raises(ValueError, match="windows needs limit of at least 1, got 0"):
        windows(TOKENS, 8, 0)
