"""Adapters on a base quantised by torchao, through PEFT's own quantisation utilities, on the CPU."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft_models import batch, config, descent, logits, tiny
from tiny_models import relative

import lowrank_geo
from lowrank_geo.peft import export_lora
from lowrank_geo.peft.layer import FixedRankLayer

pytest.importorskip("torchao")
pytestmark = pytest.mark.filterwarnings("ignore")  # torchao's own


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """A function that loads a tiny decoder with int8 weights, and its logits in float32."""
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import AutoModelForCausalLM, TorchAoConfig

    folder = tmp_path_factory.mktemp("quantized")
    tiny("decoder").save_pretrained(folder)

    def load():
        return AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=TorchAoConfig(Int8WeightOnlyConfig()), dtype=torch.float32
        ).eval()

    return load


def test_a_zero_core_leaves_the_quantised_logits_bit_for_bit(quantized):
    expected = logits(quantized(), batch("decoder"))
    model = get_peft_model(quantized(), config("decoder", init="zero")).eval()
    assert torch.equal(logits(model, batch("decoder")), expected)
    backends = {
        m.quantization_backend.backend_name
        for m in model.modules()
        if isinstance(m, FixedRankLayer)
    }
    assert backends == {"torchao"}


def test_a_quantised_base_is_close_to_the_float_one_and_the_adapter_counts(quantized):
    torch.manual_seed(0)
    model = get_peft_model(quantized(), config("decoder")).eval()
    torch.manual_seed(0)
    plain = get_peft_model(tiny("decoder"), config("decoder")).eval()
    found, wanted = logits(model, batch("decoder")), logits(plain, batch("decoder"))
    assert relative(found, wanted) < 0.05
    assert not torch.equal(found, logits(quantized(), batch("decoder")))


def test_it_trains_saves_loads_and_exports(quantized, tmp_path):
    model, inputs = get_peft_model(quantized(), config("decoder", init="zero")), batch("decoder")
    optimizer = lowrank_geo.optim.RiemannianAdam(lowrank_geo.param_groups(model, lr=0.02))
    losses = descent(model, optimizer, inputs, 5)
    assert losses[-1] < losses[0]
    expected = logits(model.eval(), inputs)
    model.save_pretrained(tmp_path / "out")
    loaded = PeftModel.from_pretrained(quantized(), tmp_path / "out").eval()
    assert torch.equal(logits(loaded, inputs), expected)
    export_lora(model, tmp_path / "lora")
    lora = PeftModel.from_pretrained(quantized(), tmp_path / "lora").eval()
    assert relative(logits(lora, inputs), expected) < 2e-6


def test_merging_quantises_again_and_unmerging_and_unloading_work(quantized):
    model, inputs = get_peft_model(quantized(), config("decoder")).eval(), batch("decoder")
    expected, base = logits(model, inputs), logits(quantized(), inputs)
    model.merge_adapter()
    merged = logits(model, inputs)
    assert 0 < relative(merged, expected) < 0.05
    model.unmerge_adapter()
    assert relative(logits(model, inputs), expected) < 0.05
    assert relative(logits(model.unload(), inputs), base) < 0.05
    again = get_peft_model(quantized(), config("decoder")).eval()
    expected = logits(again, inputs)
    assert 0 < relative(logits(again.merge_and_unload(), inputs), expected) < 0.05
