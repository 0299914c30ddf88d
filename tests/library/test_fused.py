"""Fused blocks: the kernels run in Triton's interpreter where there is no GPU."""

import copy
import pickle
import warnings

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import (
    AutoModel,
    BertConfig,
    CamembertConfig,
    ElectraConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
    XLMRobertaConfig,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import output_capturing

import tritern
from tritern.engine import fused
from tritern.engine.fused import block as fused_block
from tritern.nn import linear
from tritern_kernels import blocks, internals, reference

pytestmark = pytest.mark.filterwarnings("ignore:the blocks run unfused for now")
SIZES = {
    "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 64, "initializer_range": 0.2, "max_position_embeddings": 70, "pad_token_id": 0,
}  # fmt: skip
BERTS = [BertConfig, RobertaConfig, XLMRobertaConfig, CamembertConfig, ElectraConfig]
DECODERS = [Qwen3Config, Qwen2Config, MistralConfig, LlamaConfig]


def model_of(config, device, **patch):
    torch.manual_seed(0)
    model = AutoModel.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:  # biases and norms that do something
            torch.nn.init.normal_(parameter, 1.0 if "norm" in name.lower() and "weight" in name else 0.0, 0.1)
    return tritern.patch(model, **patch).to(device)


def bert(device, **settings):
    return model_of(BertConfig(**SIZES, **settings), device)


def decoder(device, config=Qwen3Config, **settings):
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    if config is Qwen2Config:  # its heads share the hidden features
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return model_of(config(**SIZES | heads | {"use_cache": False} | settings), device)


def batch(device, texts=3, length=20):
    ids = torch.randint(1, 60, (texts, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, length // 2 :] = 0
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


@pytest.mark.parametrize("config", BERTS + DECODERS)
def test_fused_blocks_give_the_models_outputs(config, device, on_gpu):
    model = model_of(config(**SIZES), device) if config in BERTS else decoder(device, config)
    inputs = batch(device)
    with torch.inference_mode():
        expected = model(**inputs).last_hidden_state
        assert len(fused.fused_blocks(tritern.fuse(model))) == 2
        assert len(fused.fused_blocks(tritern.fuse(model))) == 2  # again: the same
        for _ in range(2):  # with kernels to be compiled, then with planned launches
            got = model(**inputs).last_hidden_state
            # last bits of LayerNorm, now and then an int8 step: 1/127 of a value
            assert torch.nn.functional.cosine_similarity(got, expected, dim=-1).min() > 0.9995
            assert (got - expected).abs().mean() < 2e-3 * expected.abs().mean()
    assert len(on_gpu) == 4


@pytest.mark.parametrize("make", [bert, decoder])
def test_a_text_alone_and_in_a_batch(make, device, on_gpu):
    model, inputs = make(device), batch(device)
    tritern.fuse(model)
    with torch.inference_mode():
        whole = model(input_ids=inputs["input_ids"]).last_hidden_state
        alone = model(input_ids=inputs["input_ids"][1:2]).last_hidden_state
    assert torch.allclose(whole[1:2], alone, atol=1e-6 if device == "cpu" else 1e-3)


def near(found, expected):
    """Equal but for last bits, of which int8 rounding makes a whole step here and there."""
    return (found - expected).square().mean() < (0.005**2) * expected.square().mean()


def blocks_of(model):
    return model.encoder.layer if hasattr(model, "encoder") else model.layers


@pytest.mark.parametrize("make", [bert, decoder])
def test_saved_copied_and_pickled_as_before(make, device, on_gpu, tmp_path):
    model, inputs = make(device), batch(device)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tritern.fuse(model)
    with torch.inference_mode():
        expected = model(**inputs).last_hidden_state
        after = model.state_dict()
        assert before.keys() == after.keys() and all(
            torch.equal(before[name], after[name]) for name in before
        )
        model.save_pretrained(tmp_path)
        loaded = AutoModel.from_pretrained(tmp_path).to(device).eval()
        assert not isinstance(blocks_of(loaded)[0], fused_block.Fused)
        tritern.fuse(loaded)
        # a file's tensors need not lie as kernels want them: on a CPU the loaded model may run unfused
        assert torch.allclose(loaded(**inputs).last_hidden_state, expected, atol=1e-5)
        for other in (loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            first = blocks_of(other)[0]
            assert isinstance(first, fused_block.Fused)
            assert type(first).__name__ in ("BertLayer", "Qwen3DecoderLayer")
            assert "_tritern_merged" not in vars(copy.deepcopy(first))
            assert other is loaded or torch.equal(other(**inputs).last_hidden_state, expected)


def test_new_weights_are_seen(device, on_gpu):
    model, other, inputs = bert(device), bert(device), batch(device)
    tritern.fuse(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.9)
        for layer in other.modules():
            if isinstance(layer, tritern.TernaryLinear):
                layer.weight.copy_(layer.weight.flip(0))
        tritern.fuse(other)
        expected = other(**inputs).last_hidden_state
        model(**inputs)
        for assign in (False, True):
            model.load_state_dict(other.state_dict(), assign=assign)
            assert torch.equal(model(**inputs).last_hidden_state, expected)
        for m in (model, other):  # parts of the merged product, written without a trace
            m.encoder.layer[0].attention.self.key.bias.data.copy_(torch.ones(32))
            m.encoder.layer[1].attention.self.value.bias.data.fill_(0.5)
        changed = other(**inputs).last_hidden_state
        assert torch.equal(model(**inputs).last_hidden_state, changed) and not torch.equal(changed, expected)
        unfused = bert(device)
        unfused.load_state_dict(other.state_dict())
        assert near(unfused(**inputs).last_hidden_state, changed)


def test_activations_in_int8_are_handed_on_only_while_they_are_right(device, on_gpu):
    model, inputs = bert(device), batch(device)
    tritern.fuse(model)
    second = model.encoder.layer[1]
    seen = []
    before = blocks.bert_qkv
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(
            blocks, "bert_qkv", lambda x, known, weights: seen.append(known) or before(x, known, weights)
        )
        model(**inputs)
        assert [known is None for known in seen] == [True, False]
        first = model.encoder.layer[0](model.embeddings(inputs["input_ids"]), None)
        seen.clear()
        assert torch.equal(second(first.mul_(2.0)), second(first * 1.0))
        assert seen[0] is None  # changed in place: quantized anew
        seen.clear()
        handle = second.register_forward_pre_hook(lambda module, args: (args[0].add_(1.0), None)[1])
        model(**inputs)
        assert [known is None for known in seen] == [True, True]
        handle.remove()
        seen.clear()
        kept = model(**inputs, output_hidden_states=True).hidden_states  # transformers' own hooks
        assert [known is None for known in seen] == [True, False]
        assert all(not vars(hidden) for hidden in kept)  # nothing is held longer than to the next block
        with torch.inference_mode():
            hidden = model.encoder.layer[0](model.embeddings(inputs["input_ids"]), None)
            seen.clear()
            assert torch.equal(second(hidden.mul_(2.0)), second(hidden * 1.0))
            assert seen[0] is None


def test_a_decoder_hands_on_its_next_blocks_norm(device, on_gpu):
    model, inputs = decoder(device), batch(device)
    tritern.fuse(model)
    second, seen, before = model.layers[1], [], blocks.decoder_qkv
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(blocks, "decoder_qkv", lambda x, known, *a: seen.append(known) or before(x, known, *a))
        expected = model(**inputs).last_hidden_state
        assert [known is None for known in seen] == [True, False]
        handle = model.layers[0].register_forward_hook(lambda *_: None)  # somebody looks at what comes out
        seen.clear()
        assert torch.equal(model(**inputs).last_hidden_state, expected)
        assert [known is None for known in seen] == [True, True]
        handle.remove()
        # another norm than what has been applied: a new one, or one that somebody looks at
        second.input_layernorm = copy.deepcopy(second.input_layernorm)
        second.input_layernorm.weight.mul_(2.0)
        seen.clear()
        doubled = model(**inputs).last_hidden_state
        assert [known is None for known in seen] == [True, True] and not torch.equal(doubled, expected)
        tritern.fuse(model)
        seen.clear()
        assert torch.equal(model(**inputs).last_hidden_state, doubled)
        assert [known is None for known in seen] == [True, False]
        seen.clear()
        looked_at = []
        second.input_layernorm.register_forward_hook(lambda *a: looked_at.append(a))
        assert near(model(**inputs).last_hidden_state, doubled)
        assert len(seen) == 1 and len(looked_at) == 1


def test_a_decoder_with_a_cache_or_other_rotations_runs_unfused(device, on_gpu):
    model, inputs = decoder(device), batch(device)
    tritern.fuse(model)
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state
        assert len(on_gpu) == 2
        on_gpu.clear()
        cached = model(**inputs, use_cache=True)
        assert not on_gpu and cached.past_key_values is not None
        assert near(cached.last_hidden_state, expected)
        x = torch.randn(2, 5, 32, device=device)
        for turn in (torch.ones(1, 5, 16, device=device).bfloat16(), torch.ones(1, 1, 16, device=device)):
            model.layers[0](x, position_embeddings=(turn, turn))
        assert not on_gpu


def test_every_text_has_its_own_positions(device, on_gpu):
    model, inputs = decoder(device), batch(device)
    positions = torch.arange(20, device=device) * torch.tensor([[1], [2], [3]], device=device)
    with torch.inference_mode():
        expected = model(**inputs, position_ids=positions).last_hidden_state
        tritern.fuse(model)
        got = model(**inputs, position_ids=positions).last_hidden_state
    assert torch.nn.functional.cosine_similarity(got, expected, dim=-1).min() > 0.9995
    assert len(on_gpu) == 2


@pytest.mark.parametrize("config", DECODERS)
def test_attention_is_called_as_by_the_model(config, device, on_gpu):
    settings = {} if config is LlamaConfig else {"sliding_window": 7, "use_sliding_window": True}
    if config in (Qwen2Config, Qwen3Config):
        settings["max_window_layers"] = 1
    model, calls = decoder(device, config, **settings), []
    if config is LlamaConfig:  # from a file that was converted: Llama does not look at it
        model.config.sliding_window = 7

    def attention(module, query, key, value, mask, **kwargs):
        calls.append((query.shape, key.shape, value.shape, mask is None, kwargs))
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register("looked_at", attention)
    AttentionMaskInterface.register("looked_at", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.set_attn_implementation("looked_at")
    with torch.inference_mode():
        model(**batch(device))
        tritern.fuse(model)
        model(**batch(device))
    assert len(on_gpu) == 2 and len(calls) == 4

    def plain(call):
        *shapes, kwargs = call
        return shapes, {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}

    for own, of_fused in zip(calls, calls[2:]):
        assert plain(own) == plain(of_fused)


def test_everything_but_serving_runs_unfused(device, on_gpu):
    model, inputs = bert(device), batch(device)
    tritern.fuse(model)
    model(**inputs)  # with gradients
    model.train()
    with torch.no_grad():
        model(**inputs)
        model.eval()
        model.set_attn_implementation("eager")
        assert len(model(**inputs, output_attentions=True).attentions) == 2
        model.set_attn_implementation("sdpa")
        on_gpu.clear()
        model(**inputs)
        assert len(on_gpu) == 2  # the hooks that collected attentions do not count
        model.encoder.layer[0].output.dense.register_forward_hook(lambda *_: None)
        on_gpu.clear()
        model(**inputs)
        assert model.encoder.layer[0] not in on_gpu
        model.encoder.layer[1].intermediate.intermediate_act_fn = torch.nn.ReLU()
        on_gpu.clear()
        model(**inputs)
        assert not on_gpu
        tritern.dequantize(model)
        model(**inputs)
        assert not on_gpu and tritern.warmup(model) is model
        with pytest.raises(tritern.TriternError, match="no block to fuse"):
            tritern.fuse(model)


def test_weights_that_do_not_lie_as_they_should_run_unfused(device, on_gpu):
    model, inputs = bert(device), batch(device)
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state
        tritern.fuse(model)
        dense = model.encoder.layer[0].intermediate.dense
        dense.weight = torch.nn.functional.pad(dense.weight, (0, 64))[:, : dense.weight.shape[1]]
        assert near(model(**inputs).last_hidden_state, expected)


def test_mixed_dtypes_run_unfused(device, on_gpu, monkeypatch):
    model, inputs = bert(device), batch(device)
    tritern.fuse(model)
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state
        assert len(on_gpu) == 2
        dense = model.encoder.layer[0].output.dense
        dense.bias.data = dense.bias.data.half()
        assert near(model(**inputs).last_hidden_state, expected)
    assert len(on_gpu) == 3  # the second block's


class FirstBlock(torch.nn.Module):
    """A fused model's first block, of x [texts, 7, 32] alone."""

    def __init__(self, make, device):
        super().__init__()
        model = make(device)
        tritern.fuse(model)
        self.block = blocks_of(model)[0].requires_grad_(False)
        x = torch.zeros(2, 7, 32, device=device)
        self.others = self.block._tritern_family.example(self.block, x)

    def forward(self, x):
        return self.block(x, **self.others)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("make", [bert, decoder])
def test_a_traced_block_is_unfused(make, device, on_gpu):
    """torch.jit.trace, and with it the older ONNX export, records operators: a launch would be missing."""
    run, (x, y) = FirstBlock(make, device), torch.randn(2, 2, 7, 32, device=device)
    with torch.inference_mode():
        expected = run(y)
        assert len(on_gpu) == 1
        traced = torch.jit.trace(run, x, check_trace=False)
        assert len(on_gpu) == 1
        graph = make_fx(run)(x)
        assert len(on_gpu) == 1
    for recorded in (traced, graph):
        # last bits of norms, now and then an int8 step
        assert torch.nn.functional.cosine_similarity(recorded(y), expected, dim=-1).min() > 0.9995
    assert str(traced.inlined_graph).count("tritern::linear") >= 6
    assert graph.code.count("tritern.linear") >= 6


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "error::torch.jit.TracerWarning")
def test_a_traced_layer_is_an_operator(monkeypatch, device):
    """Where a layer would launch by itself, it leaves an operator to what records."""
    launched, x = [], torch.randn(2, 32, device=device)
    layer = tritern.TernaryLinear.from_linear(torch.nn.Linear(32, 8)).to(device)
    monkeypatch.setattr(
        linear, "linear_unchecked", lambda *a: launched.append(a) or torch.ops.tritern.linear(*a)
    )
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    with torch.no_grad():
        layer(x)
        assert len(launched) == 1
        assert "tritern::linear" in str(torch.jit.trace(layer, x, check_trace=False).inlined_graph)
        assert "tritern.linear" in make_fx(layer)(x).code
        torch.func.vmap(layer)(x)
    assert len(launched) == 1


def _missing(self):
    raise AttributeError("no such attribute")


Collector = type(output_capturing._active_collector)
CHANGES = {
    "the collector is gone": lambda m: m.delattr(output_capturing, "_active_collector"),
    "it is called otherwise": lambda m: m.setattr(Collector, "get", lambda self, default: default),
    "it gives something else": lambda m: m.setattr(Collector, "get", lambda self: [1]),
    "torch tells of no hooks": lambda m: m.delattr(torch.nn.modules.module, "_has_any_global_hook"),
    "attention has no name": lambda m: m.setattr(
        PreTrainedConfig, "_attn_implementation", property(_missing)
    ),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("make", [bert, decoder])
def test_without_internals_of_transformers_blocks_run_unfused(change, make, device, on_gpu, monkeypatch):
    run, x = FirstBlock(make, device), torch.randn(2, 7, 32, device=device)
    internals.changed.cache_clear()
    with torch.inference_mode():
        expected = run(x)
        assert len(on_gpu) == 1
        CHANGES[change](monkeypatch)
        with pytest.warns(UserWarning, match="not as tritern knows it: fused blocks run unfused") as warned:
            try:
                for _ in range(2):
                    got = run(x)
                    assert torch.nn.functional.cosine_similarity(got, expected, dim=-1).min() > 0.9995
            except AttributeError as error:  # attention itself asks for its name
                assert change == "attention has no name" and "no such attribute" in str(error)
        assert len([w for w in warned if "tritern" in str(w.message)]) == 1
        monkeypatch.undo()
    assert len(on_gpu) == 1


@pytest.mark.parametrize("make", [bert, decoder])
@pytest.mark.parametrize("change", ["forward", "parts"])
def test_blocks_that_transformers_has_changed_are_not_fused(change, make, device, on_gpu, monkeypatch):
    model, inputs = make(device), batch(device)
    kind = type(blocks_of(model)[0])
    internals.changed.cache_clear()
    if change == "forward":
        before = kind.forward

        def forward(self, hidden_states, attention_mask=None, something_new=None, **kwargs):
            return before(self, hidden_states, attention_mask, **kwargs)

        monkeypatch.setattr(kind, "forward", forward)
    else:
        family = fused.FusedBert if make is bert else fused.FusedDecoder
        monkeypatch.setattr(family._tritern_family, "parts", _missing)
    with pytest.warns(
        UserWarning, match=rf"{kind.__name__} is not as tritern knows it: such blocks"
    ) as warned:
        assert len(fused.fused_blocks(tritern.fuse(model))) == 0
    assert len(warned) == 1 and not any(isinstance(m, fused_block.Fused) for m in model.modules())
    with torch.inference_mode():
        model(**inputs)
    assert not on_gpu


def test_fuse_says_where_nothing_runs_fused(monkeypatch):
    model = bert("cpu")
    with pytest.warns(UserWarning, match=r"it is on the CPU\..*model\.to\('cuda'\) they run fused"):
        assert len(fused.fused_blocks(tritern.fuse(model))) == 2
    monkeypatch.setattr(fused, "unsupported", lambda device: "there are no kernels for 'mps' devices")
    with pytest.warns(UserWarning, match="run unfused for now: there are no kernels for 'mps' devices"):
        fused._warn_without_kernels(torch.device("mps"))
    monkeypatch.undo()
    monkeypatch.setattr(fused, "unsupported", lambda device: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fused._warn_without_kernels(torch.device("cuda", 0))


def test_what_cannot_be_fused_is_said(device):
    with pytest.raises(tritern.TriternError, match=r"no block to fuse.*tritern.patch\(\) first"):
        tritern.fuse(AutoModel.from_config(BertConfig(**SIZES)))
    for model in (
        bert(device, hidden_act="relu"),
        bert(device, is_decoder=True),
        model_of(BertConfig(**SIZES), device, activation_bits=16),
        decoder(device, hidden_act="gelu"),
        decoder(device, head_dim=24),
    ):
        with pytest.raises(tritern.TriternError, match="no block to fuse"):
            tritern.fuse(model)


class Exact(torch.nn.Module):
    """A ternary layer in float64, but for the int8 activations, which are those of the layer."""

    def __init__(self, layer):
        super().__init__()
        self.codes, self.scale, self.bias = layer.packed().codes(), layer.weight_scale, layer.bias

    def forward(self, x):
        y = reference.linear(x.flatten(0, -2).float(), self.codes, self.scale, self.bias)
        return y.view(*x.shape[:-1], -1)


def exact_form(model):
    """The model in float64: what its dtype loses is the distance to this."""
    exact = copy.deepcopy(model)
    for name, layer in list(exact.named_modules()):
        if isinstance(layer, tritern.TernaryLinear):
            exact.set_submodule(name, Exact(layer))
    return exact.double()


def check_that_fusing_loses_nothing(model, inputs):
    """Fused blocks are as near to the model in float64 as unfused ones are, in the same dtype."""
    exact = exact_form(model)
    there = inputs["attention_mask"].bool()
    with torch.inference_mode():
        expected = exact(**inputs).last_hidden_state[there]

        def errors():
            error = model(**inputs).last_hidden_state[there].double() - expected
            return error.square().mean().sqrt(), error.abs().max()

        (rms, largest), _ = errors(), tritern.fuse(model)
        for _ in range(2):  # with kernels to be compiled, then with planned launches
            fused_rms, fused_largest = errors()
            # other values are rounded to another int8 step, by chance: that moves the largest error more
            assert fused_rms <= 1.1 * rms and fused_largest <= 1.5 * largest
    assert expected.dtype == torch.float64 and 0 < rms < 0.1 * expected.square().mean().sqrt()


@pytest.mark.parametrize("make", [bert, decoder])
def test_fused_in_half_precision(make, device, on_gpu):
    """(Not in bfloat16, to which Triton's interpreter rounds towards zero.)"""
    check_that_fusing_loses_nothing(make(device).half(), batch(device, 8))
    assert len(on_gpu) == 4


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("make", [bert, decoder])
def test_fused_on_the_gpu(make, dtype):
    sizes = {"hidden_size": 384, "intermediate_size": 1536, "initializer_range": 0.05}
    if make is decoder:
        sizes |= {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64}
        model = decoder("cuda", **sizes)
    else:
        model = model_of(BertConfig(**SIZES | sizes | {"num_attention_heads": 12}), "cuda")
    model, inputs = model.to(dtype), batch("cuda", 30, 60)
    check_that_fusing_loses_nothing(model, inputs)
    with torch.inference_mode():
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = model(**inputs).last_hidden_state
        graph.replay()
        assert torch.equal(captured, model(**inputs).last_hidden_state)


@pytest.mark.gpu
def test_what_is_handed_on_stays_on_its_stream():
    model, inputs = bert("cuda"), batch("cuda")
    tritern.fuse(model)
    first, second = model.encoder.layer
    with torch.inference_mode():
        x = model.embeddings(inputs["input_ids"])
        other = torch.cuda.Stream()
        other.wait_stream(torch.cuda.current_stream())
        for stream, right in ((torch.cuda.current_stream(), True), (other, False)):
            hidden = first(x, None)
            torch.cuda.synchronize()
            with torch.cuda.stream(stream):
                assert (fused_block.handed_on(second, hidden) is not None) == right
