"""Adapters on a base quantised by torchao, bitsandbytes or HQQ, through PEFT's quantisation utilities, on the CPU."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft_models import batch, config, descent, logits, tiny
from tiny_models import relative
from torch import nn

import lowrank_geo
from lowrank_geo.peft import export_lora
from lowrank_geo.peft.layer import FixedRankLayer
from lowrank_geo.peft.quantized import quantization_utils

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # torchao's and bitsandbytes' own
    pytest.mark.skipif(quantization_utils is None, reason="this PEFT has no generic back-ends"),
]


def plain():
    """A decoder whose rows are as long as the blocks of 4-bit formats."""
    return tiny("decoder", hidden_size=64, intermediate_size=128)


def loaded(folder, settings):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=settings, dtype=torch.float32, device_map="cpu"
    ).eval()


def torchao(folder):
    quantization = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    return loaded(folder, TorchAoConfig(quantization.Int8WeightOnlyConfig()))


def four_bit(folder):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    settings = dict(bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    return loaded(folder, BitsAndBytesConfig(load_in_4bit=True, **settings))


def eight_bit(folder):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    return loaded(folder, BitsAndBytesConfig(load_in_8bit=True))


def hqq(folder):
    """Quantised layer by layer: transformers 5 does not load HQQ yet."""
    quantize = pytest.importorskip("hqq.core.quantize")
    settings = quantize.BaseQuantizeConfig(nbits=8, group_size=64)
    model = plain()
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and "lm_head" not in name:
            parent, _, child = name.rpartition(".")
            new = quantize.HQQLinear(layer, settings, compute_dtype=torch.float32, device="cpu")
            setattr(model.get_submodule(parent), child, new)
    return model.eval()


class Kind(NamedTuple):
    """How to quantise, what PEFT calls it, and the largest relative error of the logits that its format allows."""

    load: Callable
    backend: str
    error: float


KINDS = {
    "torchao": Kind(torchao, "torchao", 0.05),
    "bitsandbytes-4bit": Kind(four_bit, "bnb 4bit", 0.3),
    "bitsandbytes-8bit": Kind(eight_bit, "bnb 8bit", 0.05),
    "hqq": Kind(hqq, "hqq", 0.05),
}


@pytest.fixture(scope="module", params=KINDS)
def quantized(request, tmp_path_factory):
    """The kind, with a `load` that needs no argument."""
    folder = tmp_path_factory.mktemp("quantized")
    plain().save_pretrained(folder)
    kind = KINDS[request.param]
    kind.load(folder)  # or skip
    return kind._replace(load=lambda: kind.load(folder))


def adapted(base, **changes):
    torch.manual_seed(0)
    return get_peft_model(base, config("decoder", **changes)).eval()


def test_a_zero_core_leaves_the_quantised_logits_bit_for_bit(quantized):
    expected = logits(quantized.load(), batch("decoder"))
    model = adapted(quantized.load(), init="zero")
    assert torch.equal(logits(model, batch("decoder")), expected)
    backends = {
        m.quantization_backend.backend_name
        for m in model.modules()
        if isinstance(m, FixedRankLayer)
    }
    assert backends == {quantized.backend}


def test_a_quantised_base_is_close_to_the_float_one_and_the_adapter_counts(quantized):
    model, reference = adapted(quantized.load()), adapted(plain())
    found, wanted = logits(model, batch("decoder")), logits(reference, batch("decoder"))
    assert relative(found, wanted) < quantized.error
    assert not torch.equal(found, logits(quantized.load(), batch("decoder")))


def test_it_trains_saves_loads_and_exports(quantized, tmp_path):
    model, inputs = adapted(quantized.load(), init="zero").train(), batch("decoder")
    optimizer = lowrank_geo.optim.RiemannianAdam(lowrank_geo.param_groups(model, lr=0.02))
    losses = descent(model, optimizer, inputs, 5)
    assert losses[-1] < losses[0]
    expected = logits(model.eval(), inputs)
    model.save_pretrained(tmp_path / "out")
    again = PeftModel.from_pretrained(quantized.load(), tmp_path / "out").eval()
    assert torch.equal(logits(again, inputs), expected)
    export_lora(model, tmp_path / "lora")
    lora = PeftModel.from_pretrained(quantized.load(), tmp_path / "lora").eval()
    assert relative(logits(lora, inputs), expected) < 5e-3  # bitsandbytes quantises activations


def test_a_start_of_pissa_leaves_the_logits(quantized):
    expected = logits(quantized.load(), batch("decoder"))
    model = adapted(quantized.load(), init="pissa")
    assert relative(logits(model, batch("decoder")), expected) < 1e-5


@pytest.mark.parametrize("evaluated", [False, True], ids=["fresh", "evaluated"])
def test_merging_quantises_again_and_unmerging_and_unloading_work(quantized, evaluated):
    inputs = batch("decoder")
    expected, base = logits(adapted(quantized.load()), inputs), logits(quantized.load(), inputs)
    model = adapted(quantized.load())
    if evaluated:  # after which bitsandbytes' weights may have another layout
        logits(model, inputs)
    model.merge_adapter()
    assert 0 < relative(logits(model, inputs), expected) < quantized.error
    model.unmerge_adapter()
    assert relative(logits(model, inputs), expected) < quantized.error
    assert relative(logits(model.unload(), inputs), base) < quantized.error
    again = adapted(quantized.load()).merge_and_unload()
    assert 0 < relative(logits(again, inputs), expected) < quantized.error
