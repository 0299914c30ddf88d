import copy

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from torch import nn

import tritern
from tritern import Int8Embedding, TernaryLinear, TriternError
from tritern.calibration import codes as codes_module
from tritern.calibration import fitting
from tritern.calibration.codes import descend, search
from tritern.calibration.fitting import _token_weights, measure, targets_of
from tritern.calibration.stream import Group, Stream, trace


@pytest.fixture(scope="module")
def calibrated(tiny_path, sentences):
    model = SentenceTransformer(tiny_path, device="cpu")
    return tritern.patch(model, calibration_texts=sentences[:200])


def test_calibrated_layers_are_closer_to_the_original(tiny, tiny_path, calibrated, sentences):
    plain = tritern.patch(SentenceTransformer(tiny_path, device="cpu"))
    before, after = (tritern.evaluate(m, tiny, sentences[200:]) for m in (plain, calibrated))
    assert after.cosine > before.cosine + 0.2 and after.overlap > before.overlap + 0.1
    assert after.rank_correlation > before.rank_correlation + 0.1
    layers = [[n for n, m in x.named_modules() if isinstance(m, TernaryLinear)] for x in (plain, calibrated)]
    assert layers[0] == layers[1] and len(layers[0]) == 12


def test_saved_and_loaded(calibrated, sentences, tmp_path):
    calibrated.save_pretrained(str(tmp_path))
    assert "without training, its weights fitted to 200 texts" in (tmp_path / "README.md").read_text()
    loaded = SentenceTransformer(str(tmp_path), device="cpu")
    assert (loaded.encode(sentences[:20]) == calibrated.encode(sentences[:20])).all()


def test_layers_make_up_for_int8_tables_and_16_bit_activations_serve(tiny, tiny_path, sentences):
    model = SentenceTransformer(tiny_path, device="cpu").train()
    tritern.patch(model, embedding_bits=8, activation_bits=16, calibration_texts=sentences[:100])
    assert all(m.training for m in model.modules())
    assert any(isinstance(m, Int8Embedding) for m in model.modules())
    assert all(m.activation_bits == 16 for m in model.modules() if isinstance(m, TernaryLinear))
    assert tritern.evaluate(model.eval(), tiny, sentences[200:]).cosine > 0.95


def objective(codes, scale, H, C):
    return scale**2 * ((codes @ H) * codes).sum(1) - 2 * scale * (codes * C).sum(1)


@pytest.fixture
def quadratic():
    """Codes by a threshold, H [150, 150] of dependent inputs and C [20, 150] of random weights."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 150, generator=generator) @ torch.randn(150, 150, generator=generator) / 12
    w = torch.randn(20, 150, generator=generator)
    return torch.sign(w) * (w.abs() > 0.7), x.T @ x / 500, w @ (x.T @ x) / 500


def test_descent_ends_where_no_single_code_and_no_scale_can_be_better(quadratic, monkeypatch):
    monkeypatch.setattr(codes_module, "SWEEPS", 100)
    monkeypatch.setattr(codes_module, "PAYS", 0)
    start, H, C = quadratic
    codes, scale = descend(start, torch.ones(20), H, C)
    assert set(codes.unique().tolist()) <= {-1.0, 0.0, 1.0} and (scale > 0).all()
    best = objective(codes, scale, H, C)
    optimal_start = (start * C).sum(1) / ((start @ H) * start).sum(1)
    assert (best < objective(start, optimal_start, H, C)).all()
    for k in range(0, 150, 7):
        for value in (-1.0, 0.0, 1.0):
            other = codes.clone()
            other[:, k] = value
            assert (objective(other, scale, H, C) >= best - 1e-4 * best.abs()).all()
    for factor in (0.99, 1.01):
        assert (objective(codes, factor * scale, H, C) > best).all()


def test_starting_again_makes_rows_better_and_none_worse(quadratic, monkeypatch):
    _, H, C = quadratic
    again = objective(*search(torch.ones(20), H.double(), C.double()), H, C)
    monkeypatch.setattr(codes_module, "KICKS", ())
    once = objective(*search(torch.ones(20), H.double(), C.double()), H, C)
    assert (again <= once + 1e-3).all() and (again < once - 0.1).sum() > 10


def test_codes_that_made_the_outputs_are_found():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 40, generator=generator).double()
    codes = torch.randint(-1, 2, (6, 40), generator=generator).double()
    scale = torch.rand(6, generator=generator).double() + 0.5
    y = x @ (scale[:, None] * codes).T
    found = search(torch.ones(6), x.T @ x / 400, y.T @ x / 400)
    assert torch.equal(found[0].double(), codes) and torch.allclose(found[1].double(), scale, atol=1e-4)


def batches_of(model, texts):
    return [dict(model.preprocess(texts[i : i + 8])) for i in range(0, len(texts), 8)]


def names_of(model):
    return [n for n, m in model.named_modules() if type(m) is nn.Linear and "pooler" not in n]


def test_what_is_summed(tiny, sentences):
    """Against the sums over every text alone, without padding."""
    batches = batches_of(tiny.eval(), sentences[:16])
    groups = trace(tiny, names_of(tiny), batches[0])
    assert [(len(g.names), g.times, g.added) for g in groups] == [
        (3, 1, False), (1, 1, True), (1, 1, False), (1, 1, True),
    ] * 2  # fmt: skip
    other = copy.deepcopy(tiny)
    other[0].auto_model.encoder.layer[0].output.dense.weight.data *= 0.5
    with torch.no_grad():
        for group in (groups[4], groups[5]):
            (targets,) = targets_of(Stream(tiny, batches), [group])
            moments = measure(targets, Stream(other, batches).inputs(group), batches)
            assert moments is not None
            expected, product = 0.0, 0.0
            for text in sentences[:16]:
                a, b = (Stream(m, batches_of(tiny, [text])).calls(0, [group])[0][0] for m in (tiny, other))
                x = torch.cat([b.input[0], torch.ones(b.input.shape[1], 1)], 1)
                y = a.outputs[group.names[-1]][0]
                if group.added:
                    block = tiny[0].auto_model.encoder.layer[0].output
                    assert (
                        not torch.equal(a.added, b.added) and a.added.shape == a.outputs[group.names[0]].shape
                    )
                    assert block.dense.out_features == a.added.shape[-1]
                    y = (y + a.added[0]).bfloat16().float() - b.added[0]
                else:
                    y = y.bfloat16().float()  # as the targets are kept
                expected, product = expected + x.T @ x / len(x), product + y.T @ x / len(x)
            assert torch.allclose(moments.squares.float(), expected, rtol=1e-3, atol=1e-3)
            found = moments.products[group.names[-1]].float()
            assert torch.allclose(found, product, rtol=1e-3, atol=1e-3)
            assert moments.tokens == sum(int(b["attention_mask"].sum()) for b in batches)


def test_the_residual_stream_is_what_the_block_adds(tiny, sentences):
    batches = batches_of(tiny.eval(), sentences[:8])
    groups = trace(tiny, names_of(tiny), batches[0])
    with torch.no_grad():
        (block,), (call,) = Stream(tiny, batches).calls(0, groups[:2])
        ((short,),) = Stream(tiny, batches).calls(0, groups[1:2], inputs_alone=True)
        assert torch.equal(short.input, call.input) and torch.equal(short.added, call.added)
        assert not short.outputs and "forward" not in vars(tiny.get_submodule(groups[1].names[0]))
        assert groups[1].names[0].endswith("attention.output.dense") and torch.equal(call.added, block.input)


@pytest.mark.parametrize("in_place", [False, True])
def test_an_addition_in_place_is_seen_as_it_was_before(in_place):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, batch):
            x = 2 * batch["x"]
            y = self.linear(x)
            if in_place:
                x += y
                return x
            return y + x

    model, batch = Block(), {"x": torch.randn(3, 4)}
    with torch.no_grad():
        (group,) = trace(model, ["linear"], batch)
        ((call,),) = Stream(model, [batch]).calls(0, [group])
    assert group.added and torch.equal(call.added, 2 * batch["x"])


def test_weights_of_tokens():
    batch = {"attention_mask": torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])}
    assert _token_weights(batch, torch.zeros(2, 4, 3)).tolist() == [0.5, 0.5, 0, 0, *[0.25] * 4]
    assert _token_weights(batch, torch.zeros(6, 3)).tolist() == [0.5, 0.5, *[0.25] * 4]
    assert _token_weights(batch, torch.zeros(8, 3)).tolist() == [0.25] * 8  # no tokens: as much as all texts
    assert _token_weights({}, torch.zeros(2, 4, 3)).tolist() == [1.0] * 8


class Blocks(nn.Module):
    """Three blocks; each sees the output of the one before, or of all before."""

    def __init__(self, chain):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3))
        self.chain = chain

    def forward(self, batch):
        x = batch["x"]
        seen = []
        for layer in self.layers:
            x = layer(x if self.chain or not seen else x + sum(seen))
            seen.append(x)
        return x


@pytest.mark.parametrize("chain", [True, False])
def test_finished_blocks_are_not_run_again_where_they_form_a_chain(chain):
    model = Blocks(chain)
    batches = [{"x": torch.randn(3, 8)} for _ in range(2)]
    group = Group(["layers.2.0"], 1, added=False)
    with torch.no_grad():
        expected = [Stream(model, batches).calls(i, [group])[0][0] for i in range(2)]
        stream = Stream(model, batches)
        stream.advance("layers.1.0")
        stream.advance("layers.2.0")
        model.layers[0][0].weight.zero_()  # so that a pass from the start would give something else
        found = [stream.calls(i, [group])[0][0] for i in range(2)]
    same = [torch.equal(a.outputs["layers.2.0"], b.outputs["layers.2.0"]) for a, b in zip(expected, found)]
    assert same == [chain, chain]
    assert not any("forward" in vars(m) or m._forward_hooks for m in model.modules())


def test_layers_that_texts_do_not_reach_and_shared_weights_are_patched_by_the_rule(tiny, sentences):
    tiny[0].auto_model.unused = nn.Linear(32, 16)
    tiny[0].auto_model.twin = nn.Linear(32, 32)
    query = tiny[0].auto_model.encoder.layer[0].attention.self.query
    tiny[0].auto_model.twin.weight = query.weight
    expected = [TernaryLinear.from_linear(m).weight for m in (tiny[0].auto_model.unused, query)]
    tritern.patch(tiny, calibration_texts=sentences[:32])
    bert = tiny[0].auto_model
    assert torch.equal(bert.unused.weight, expected[0]) and torch.equal(bert.twin.weight, expected[1])
    assert bert.twin.weight.data_ptr() == bert.encoder.layer[0].attention.self.query.weight.data_ptr()


def test_refusals_leave_the_model_as_it_was(tiny, sentences):
    before = {n: id(m) for n, m in tiny.named_modules()}
    for texts, match in (
        (sentences[:15] + ["", " ", sentences[0]], "at least 16 different texts.*received 15 that"),
        ("one text", "calibration_texts must be a list or another iterable; received one string"),
        ([*sentences[:20], None], "calibration_texts must be strings; number 20 is NoneType"),
        ((text.encode() for text in sentences[:20]), "number 0 is bytes .decode it"),
        (np.array([*sentences[:20], np.nan], object), "number 20 is float"),
        ([*sentences[:20], "a\ud800"], "number 20 holds an invalid character"),
        ([*sentences[:20], (sentences[0], "a\ud800")], "number 20 holds an invalid character"),
        ([*sentences[:20], {"text": "a\ud800"}], "number 20 holds an invalid character"),
        ([*sentences[:20], (sentences[0], None)], "the model does not take them: Unsupported input type"),
    ):
        with pytest.raises(TriternError, match=match):
            tritern.patch(tiny, calibration_texts=texts)
    with pytest.raises(TriternError, match="need a sentence-transformers model.*received BertModel"):
        tritern.patch(tiny[0].auto_model, calibration_texts=sentences)
    assert {n: id(m) for n, m in tiny.named_modules()} == before


def test_texts_come_in_any_iterable_and_are_read_once(tiny_path, sentences):
    pandas = pytest.importorskip("pandas")

    def fitted(texts):
        model = SentenceTransformer(tiny_path, device="cpu")
        return tritern.patch(model, calibration_texts=texts)

    expected = fitted(sentences[:20])
    for texts in (
        (text for text in sentences[:20]),
        pandas.Series(sentences[:20], index=range(5, 25)),
        np.array(sentences[:20]),
        [*sentences[:20], "", sentences[0]],
    ):
        model = fitted(texts)
        state = model.state_dict()
        assert all(torch.equal(state[name], value) for name, value in expected.state_dict().items())
        assert "fitted to 20 texts" in " ".join(model._model_card_text.split())


def test_other_inputs_of_the_model_are_taken(tiny, sentences):
    pairs = [(a, b) for a, b in zip(sentences[:20], sentences[20:40])]
    tritern.patch(tiny, calibration_texts=(pair for pair in pairs))
    assert "fitted to 20 texts" in " ".join(tiny._model_card_text.split())


def test_a_calibration_that_fails_half_way_leaves_the_model_as_it_was(tiny, sentences, monkeypatch):
    def fit(*arguments, fit=fitting._fit_alike, calls=[]):  # noqa: B006
        calls.append(arguments)
        return fit(*arguments) if len(calls) < 5 else 1 / 0

    tiny.train()
    vectors = tiny.encode(sentences[:9])
    tiny.train()
    before = {n: (id(m), m.training, dict(vars(m))) for n, m in tiny.named_modules()}
    monkeypatch.setattr(fitting, "_fit_alike", fit)
    with pytest.raises(ZeroDivisionError):
        tritern.patch(tiny, calibration_texts=sentences[:20], embedding_bits=8)
    after = {n: (id(m), m.training, dict(vars(m))) for n, m in tiny.named_modules()}
    assert str(after) == str(before) and not any(m._forward_hooks for m in tiny.modules())
    assert (tiny.encode(sentences[:9]) == vectors).all()
    monkeypatch.undo()
    assert tritern.summary(tritern.patch(tiny, calibration_texts=sentences[:20])).layers


def test_prompts_are_put_before_the_texts(tiny, sentences, monkeypatch):
    tiny.prompts = {"query": "bo: ", "document": "di: "}
    seen = []
    preprocess = tiny.preprocess
    monkeypatch.setattr(tiny, "preprocess", lambda x: seen.extend(x) or preprocess(x))
    tritern.patch(tiny, calibration_texts=sentences[:32])
    assert sorted({s[:4] for s in seen}) == ["bo: ", "di: "] and len(seen) == 32


def test_blocks_that_are_not_run_or_run_in_another_order():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            return self.linear(input=x)

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            for name in ("unused", "late", "early"):
                self.register_module(name, nn.ModuleList(Block() for _ in range(2)))

        def forward(self, batch):
            x = batch["x"]
            for layer in (*self.early, *self.late):
                x = layer(x)
            return x

    model, batches = Odd(), [{"x": torch.randn(3, 4)}]
    names = [n for n, m in model.named_modules() if type(m) is nn.Linear]
    with torch.no_grad():
        groups = trace(model, names, batches[0])
        assert [g.names for g in groups] == [
            [f"{n}.linear"] for n in ("early.0", "early.1", "late.0", "late.1")
        ]
        stream = Stream(model, batches)
        expected = stream.calls(0, [groups[3]])[0][0].input
        stream.advance("late.1.linear")
        assert len(stream.finished) == 3
        assert torch.equal(stream.calls(0, [groups[3]])[0][0].input, expected)


def test_a_forward_of_an_instances_own_stays():
    model = Blocks(chain=True)
    own = model.layers[0].forward
    model.layers[0].forward = own  # as accelerate's hooks do
    stream = Stream(model, [{"x": torch.randn(3, 8)}])
    with torch.no_grad():
        stream.advance("layers.2.0")
        stream.calls(0, [Group(["layers.2.0"], 1, added=False)])
    assert vars(model.layers[0])["forward"] is own and "forward" not in vars(model.layers[1])


def test_layers_that_see_nothing_or_other_rows_are_left_to_the_rule(tiny, sentences):
    bert = tiny[0].auto_model
    expected = TernaryLinear.from_linear(bert.encoder.layer[1].output.dense)
    nn.init.zeros_(bert.encoder.layer[1].intermediate.dense.weight)
    nn.init.zeros_(bert.encoder.layer[1].intermediate.dense.bias)  # GELU of 0 is 0
    tritern.patch(tiny, calibration_texts=sentences[:32])
    found = bert.encoder.layer[1].output.dense
    assert torch.equal(found.weight, expected.weight) and torch.equal(found.bias, expected.bias)


def test_runs_with_other_rows_do_not_match(tiny, sentences):
    tiny.eval()
    short, long = ([dict(tiny.preprocess(sentences[:n]))] for n in (4, 5))
    group = trace(tiny, names_of(tiny), short[0])[0]
    with torch.no_grad():
        assert (
            measure(targets_of(Stream(tiny, short), [group])[0], Stream(tiny, long).inputs(group), long)
            is None
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_with_large_inputs(tiny, tiny_path, sentences, dtype):
    model = SentenceTransformer(tiny_path, device="cpu", model_kwargs={"dtype": dtype})
    norm = model[0].auto_model.encoder.layer[0].attention.output.LayerNorm
    norm.weight.data *= 300
    original = copy.deepcopy(model).encode(sentences[200:])
    tritern.patch(model, calibration_texts=sentences[:100])
    assert tritern.evaluate(model, original, sentences[200:]).cosine > 0.9


def test_layers_that_run_many_times_are_not_made_worse(sentences, tmp_path):
    """The later runs of shared layers see what the first runs gave."""
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import AlbertConfig, AlbertModel, BertTokenizerFast

    from tests.conftest import WORDS

    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    torch.manual_seed(0)
    config = AlbertConfig(
        vocab_size=5 + len(WORDS), embedding_size=32, hidden_size=32, num_hidden_layers=12,
        num_attention_heads=2, intermediate_size=64, initializer_range=0.2, max_position_embeddings=64,
    )  # fmt: skip
    AlbertModel(config).save_pretrained(tmp_path / "model")
    BertTokenizerFast(vocab=str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "model")
    transformer = Transformer(str(tmp_path / "model"))
    model = SentenceTransformer(modules=[transformer, Pooling(32)], device="cpu")
    plain = tritern.patch(copy.deepcopy(model))
    calibrated = tritern.patch(copy.deepcopy(model), calibration_texts=sentences[:64])
    before, after = (tritern.evaluate(m, model, sentences[200:300]).cosine for m in (plain, calibrated))
    assert after > max(before, 0.9)


def test_few_texts_do_no_harm(minilm, minilm_path):
    from pydoc_data.topics import topics

    texts = [" ".join(text.split()[:40]) for text in topics.values()]
    few, held, skip = texts[:16], texts[16:], ["*.layer.[1-5].*"]
    original, other = minilm.encode(held), SentenceTransformer(minilm_path, device="cpu")
    calibrated = tritern.patch(other, calibration_texts=few, skip=skip)
    plain = tritern.evaluate(tritern.patch(minilm, skip=skip), original, held)
    found = tritern.evaluate(calibrated, original, held)
    assert found.cosine > plain.cosine + 0.02 and found.rank_correlation > plain.rank_correlation
