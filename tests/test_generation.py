"""Drawing text: greedy is the argmax, seeds repeat, top_k bounds, long texts outlive the context."""

import math

import pytest
import torch

from lowrank_geo.data import ByteTokenizer
from lowrank_geo.generation import continue_text, generate
from lowrank_geo.models.decoder import Decoder, DecoderConfig

PROMPT = torch.tensor([1, 2, 3])


@pytest.fixture
def model():
    return Decoder(
        DecoderConfig(vocab_size=257, width=16, layers=1, heads=2, hidden=16, context=12)
    )


def test_temperature_zero_takes_the_most_likely_token_each_time(model):
    tokens = PROMPT.tolist()
    for _ in range(6):
        tokens.append(model(torch.tensor([tokens]))[0, -1].argmax().item())
    assert generate(model, PROMPT, count=6, temperature=0).tolist() == tokens


def test_draws_repeat_with_the_seed_only(model):
    draws = [generate(model, PROMPT, count=9, top_k=None, seed=seed) for seed in (3, 3, 4)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_top_k_of_one_is_greedy_and_so_is_a_tiny_temperature(model):
    greedy = generate(model, PROMPT, count=6, temperature=0)
    assert torch.equal(generate(model, PROMPT, count=6, top_k=1, temperature=9.0), greedy)
    assert torch.equal(generate(model, PROMPT, count=6, temperature=1e-30), greedy)


def test_draws_follow_the_softmax(model):
    p = model(PROMPT[None])[0, -1].div(0.5).softmax(-1)
    top = p.topk(3)
    counts = torch.zeros(257)
    for seed in range(600):
        counts[generate(model, PROMPT, count=1, temperature=0.5, top_k=3, seed=seed)[-1]] += 1
    # Standard error at most .0204: five of them.
    assert (counts[top.indices] / 600 - top.values / top.values.sum()).abs().max() < 0.102
    assert counts.sum() == counts[top.indices].sum()


@pytest.mark.parametrize("length", [1, 11, 12, 13, 50])
def test_neither_prompt_nor_text_need_fit_the_context(model, length):
    prompt = torch.randint(0, 257, (length,))
    text = generate(model, prompt, count=40)
    assert text.shape == (length + 40,) and torch.equal(text[:length], prompt)


def test_past_the_context_the_last_half_is_read_anew(model):
    prompt = torch.randint(0, 257, (12,))
    text = generate(model, prompt, count=2, temperature=0)
    assert text[13] == model(text[None, 7:13])[0, -1].argmax()


def test_text_begins_with_the_prompt(model):
    assert continue_text(model, ByteTokenizer(), "dé", count=3).startswith("dé")
    assert continue_text(model, ByteTokenizer(), "dé", count=0) == "dé"


@pytest.mark.parametrize(
    "prompt, options, said",
    [
        ([], {}, "a prompt of at least one token, got none"),
        ([1], {"count": -1}, "tokens >= 0, got -1"),
        ([1], {"temperature": -0.1}, "temperature >= 0, got -0.1"),
        ([1], {"temperature": math.nan}, "temperature >= 0, got nan"),
        ([1], {"top_k": 0}, "top_k >= 1, got 0"),
        ([1], {"seed": -1}, "a seed >= 0 and below 2\\^63, got -1"),
    ],
)
def test_refuses(model, prompt, options, said):
    with pytest.raises(ValueError, match=said):
        generate(model, torch.tensor(prompt, dtype=torch.int64), **{"count": 1, **options})


def test_refuses_a_diverged_model(model):
    model.norm.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="it has diverged"):
        generate(model, PROMPT, count=1)
