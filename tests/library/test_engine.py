"""``encode`` through the engine: sentence-transformers' results, and a text's own bits in any company."""

import copy
import pickle
import random
import threading

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import AutoModel

import tritern
from tests.library import families
from tritern.engine import pipeline
from tritern.engine.encoder import Encoder, attach, capture
from tritern.engine.families import FAMILIES, family_of
from tritern.engine.packing import Size
from tritern.engine.padded import Padded
from tritern.engine.path import path_of, way_of
from tritern.engine.pipeline import embed_here
from tritern.engine.runner import Graph, Packed, PackedModel
from tritern.engine.tokens import FastTokenizer, fast_tokenizer

PACKED = ["bert", "roberta", "xlm-roberta", "mpnet", "electra", "modernbert", "nomic-bert", "qwen2", "qwen3"]
PACKED += ["mistral", "embedding-gemma"]


def own(model, inputs, method="encode", **arguments):
    """sentence-transformers' own method."""
    return getattr(SentenceTransformer, method)(plain(model), inputs, **arguments)


def plain(model):
    """The model without the engine."""
    other = copy.copy(model)
    other.__class__ = getattr(type(model), "_tritern_base", type(model))
    return other


def cosines(one, other):
    one, other = (torch.as_tensor(np.asarray(v, np.float64)) for v in (one, other))
    return torch.nn.functional.cosine_similarity(one, other, dim=-1)


@pytest.fixture(scope="module")
def model(minilm_path):
    """MiniLM with the engine and prompts; not to be changed."""
    model = SentenceTransformer(minilm_path, device="cpu")
    attach(model)
    model.prompts |= {"query": "query: ", "document": "passage: "}
    return model


@pytest.fixture
def never_elsewhere(monkeypatch):
    """Fails where sentence-transformers' own encode is used."""

    def refuse(*_, **__):
        raise AssertionError("sentence-transformers' own encode was used")

    return lambda: monkeypatch.setattr(SentenceTransformer, "encode", refuse)


# ---------------------------------------------------------------- encode's arguments


@pytest.mark.parametrize("method", ["encode", "encode_query", "encode_document"])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"prompt": "Find: "},
        {"prompt_name": "query"},
        {"batch_size": 3},
        {"show_progress_bar": True},
        {"show_progress_bar": False},
        {"convert_to_tensor": True},
        {"convert_to_numpy": False},
        {"convert_to_numpy": False, "convert_to_tensor": True},
        {"device": "cpu"},
        {"normalize_embeddings": True},
        {"truncate_dim": 64},
        {"truncate_dim": 64, "normalize_embeddings": True},
        {"precision": "float32"},
    ],
)
def test_arguments_mean_what_they_mean(model, texts, method, arguments, never_elsewhere, monkeypatch):
    expected = own(model, texts, method, **arguments)
    monkeypatch.setattr(pipeline, "INLINE", 2)
    never_elsewhere()
    found = getattr(model, method)(texts, **arguments)
    assert type(found) is type(expected) and len(found) == len(expected)
    assert found[0].dtype == expected[0].dtype and found[0].shape == expected[0].shape
    assert (
        cosines(torch.stack(found) if isinstance(found, list) else found, own_array(expected)) > 0.9999
    ).all()
    lengths = [np.linalg.norm(np.asarray(v)) for v in (found, own_array(expected))]
    assert abs(lengths[0] - lengths[1]) < 1e-4
    one = getattr(model, method)(texts[0], **arguments)
    assert one.shape == expected[0].shape and cosines(one, own_array(expected)[0]) > 0.9999


def own_array(vectors):
    return torch.stack(vectors) if isinstance(vectors, list) else vectors


@pytest.mark.parametrize("precision", ["int8", "uint8", "binary", "ubinary"])
@pytest.mark.parametrize("kind", [{}, {"convert_to_tensor": True}, {"convert_to_numpy": False}])
def test_precisions(tiny, sentences, precision, kind, never_elsewhere):
    model, texts = tiny, sentences[:200]
    attach(model)
    expected = own(model, texts, precision=precision, **kind)
    never_elsewhere()
    found = model.encode(texts, precision=precision, **kind)
    assert type(found) is type(expected)
    one, other = (np.stack([np.asarray(v) for v in vectors]) for vectors in (found, expected))
    assert one.dtype == other.dtype and one.shape == other.shape
    assert (one == other).mean() > 0.999  # values on an edge may fall on either side


@pytest.mark.parametrize("inputs", [(), np.array(["a b", "c"]), ("a", "b"), [], "", [""], ["", "  ", "\n"]])
def test_kinds_of_inputs(model, inputs):
    expected, found = own(model, inputs), model.encode(inputs)
    assert type(found) is type(expected) and found.shape == expected.shape and found.dtype == expected.dtype
    assert np.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    "wrong",
    [None, 5, ["a", None], ["a", 5], "lone \ud800", ["a", "\udfff"], b"bytes", [b"bytes"], {"text": 5}],
)
def test_what_is_no_text_is_refused_as_ever(model, wrong):
    with pytest.raises(Exception) as expected:  # noqa: B017, PT011 - compared below
        own(model, wrong)
    with pytest.raises(type(expected.value)) as found:
        model.encode(wrong)
    assert str(found.value) == str(expected.value)
    assert model.encode("still works").shape == (384,)


@pytest.mark.parametrize(
    "arguments",
    [
        {"batch_size": 0},
        {"precision": "int4"},
        {"prompt_name": "no such"},
        {"nonsense": 1},
        {"truncate_dim": -1},
    ],
)
def test_wrong_arguments_fare_as_ever(model, texts, arguments):
    try:
        expected = own(model, texts, **arguments)
    except Exception as error:  # noqa: BLE001 - compared
        with pytest.raises(type(error)) as found:
            model.encode(texts, **arguments)
        assert str(found.value) == str(error)
    else:
        assert np.allclose(model.encode(texts, **arguments), expected, atol=1e-5)


@pytest.mark.parametrize("output_value", ["token_embeddings", None])
def test_other_outputs_are_sentence_transformers_own(model, texts, output_value):
    expected, found = (
        f(texts, output_value=output_value) for f in (lambda *a, **k: own(model, *a, **k), model.encode)
    )
    assert len(found) == len(expected)
    for one, other in zip(found, expected):
        pairs = (
            [(one, other)]
            if output_value
            else [(one[k], other[k]) for k in ("sentence_embedding", "input_ids")]
        )
        assert all(torch.allclose(a.float(), b.float(), atol=1e-6) for a, b in pairs)


def test_a_text_of_a_megabyte(model):
    text = "seven words make a short plain sentence " * 25000
    assert cosines(model.encode(text), own(model, text[:20000])) > 0.9999


def test_more_texts_than_are_tokenized_at_once(tiny, sentences, never_elsewhere):
    attach(tiny)
    texts = [f"{s} {WORD}" for WORD in families.WORDS[:8] for s in sentences]
    expected = own(tiny, texts, batch_size=256)
    never_elsewhere()
    assert (cosines(tiny.encode(texts), expected) > 0.9999).all()


# ---------------------------------------------------------------- the same bits


def companies(texts, seed, count=50):
    """Random choices of texts in random orders, each text once at least."""
    generator = random.Random(seed)
    numbers = list(range(len(texts)))
    generator.shuffle(numbers)
    for i in range(count):
        those = numbers[i::count] + generator.sample(numbers, generator.choice([0, 1, 7, 40]))
        generator.shuffle(those)
        yield those, generator.choice([1, 2, 7, 32, 100, 512])


def thousand(sentences):
    """Texts of 1 to 60 words."""
    generator = random.Random(1)
    return [" ".join(" ".join(generator.sample(sentences, 4)).split()[: 1 + i % 60]) for i in range(1000)]


def test_a_text_has_the_same_bits_in_any_company(tiny, sentences, never_elsewhere):
    model, texts = tritern.patch(tiny), thousand(sentences)
    never_elsewhere()
    expected = model.encode(texts)
    for those, batch_size in companies(texts, 0):
        assert np.array_equal(model.encode([texts[i] for i in those], batch_size=batch_size), expected[those])
    for i in range(0, 1000, 97):
        assert np.array_equal(model.encode(texts[i]), expected[i])


def test_the_bundled_model_gives_a_text_the_same_bits(sentences):
    model = tritern.load("minilm-l6-ternary", device="cpu")
    words = [
        "cats",
        "and",
        "the",
        "quick",
        "brown",
        "fox",
        "of",
        "market",
        "Zürich",
        "running",
        "isn't",
        "42",
    ]
    generator = random.Random(2)
    texts = [" ".join(generator.choices(words, k=1 + i % 30)) for i in range(200)]
    expected = model.encode(texts)
    for those, batch_size in companies(texts, 3, count=10):
        assert np.array_equal(model.encode([texts[i] for i in those], batch_size=batch_size), expected[those])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_text_has_the_same_bits_in_any_company_on_a_gpu(dtype, sentences):
    model = tritern.load("minilm-l6-ternary", device="cuda", model_kwargs={"dtype": dtype})
    assert path_of(model).kind == "packed"
    texts = thousand(sentences)
    expected = model.encode(texts, convert_to_tensor=True)
    for those, batch_size in companies(texts, 0):
        found = model.encode([texts[i] for i in those], batch_size=batch_size, convert_to_tensor=True)
        assert torch.equal(found, expected[those])
    for i in range(0, 1000, 97):
        assert torch.equal(model.encode(texts[i], convert_to_tensor=True), expected[i])
    reference = own(tritern.load("minilm-l6-ternary", device="cpu"), texts)
    assert cosines(expected.float().cpu(), reference).mean() > 0.999


# ---------------------------------------------------------------- packed


def packed_vectors(model, texts, tokens=None, capture=None):
    """Vectors by the packed way, on whatever device the model is."""
    family = family_of(model[0].auto_model)
    assert not isinstance(family, str), family
    runs = PackedModel(model, family, capture)
    return embed_here(Packed(runs, model, fast_tokenizer(model[0]), "", tokens), texts, lambda v: v), runs


@pytest.mark.parametrize("name", PACKED)
def test_packed_families_give_the_vectors_of_encode(name, tmp_path, device):
    model = families.build(name, tmp_path).to(device)
    texts = [*families.TEXTS, "be", "", "[PAD] bo [PAD] ba", " ".join(families.WORDS[:70])]
    expected = own(model, texts, batch_size=1)
    found, _ = packed_vectors(model, texts)
    assert (cosines(found.cpu(), expected) > 0.9999).all()
    # the same bits alone, in other company and in smaller runs
    for those in ([0], [6, 1, 0], [7, 3], [2, 0, 1, 4]):
        assert torch.equal(packed_vectors(model, [texts[i] for i in those], 64)[0], found[those])


@pytest.mark.parametrize("name", ["bert", "qwen3", "mpnet", "roberta"])
@pytest.mark.filterwarnings("ignore:the blocks run unfused for now")
def test_packed_ternary_models_run_fused(name, tmp_path, device, on_gpu):
    model = tritern.patch(families.build(name, tmp_path)).to(device)
    texts = [*families.TEXTS, "be"]
    unfused, _ = packed_vectors(model, texts)
    if name != "mpnet":
        tritern.fuse(model)
    found, _ = packed_vectors(model, texts)
    assert len(on_gpu) == (0 if name == "mpnet" else 2)
    assert (cosines(found.cpu(), unfused.cpu()) > 0.999).all()  # int8 rounding
    assert torch.equal(packed_vectors(model, texts[2:4])[0], found[2:4])


@pytest.mark.parametrize("mode", ["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"])
@pytest.mark.parametrize("dense", [False, True])
def test_poolings_and_what_follows(mode, dense, tiny, sentences, device):
    from sentence_transformers.base.modules import Dense, Normalize

    following = [Dense(32, 24), Normalize()] if dense else [Normalize()]
    model = SentenceTransformer(modules=[tiny[0], Pooling(32, mode), *following], device=device)
    texts = sentences[:20]
    found, _ = packed_vectors(model, texts, 128)
    assert (cosines(found.cpu(), own(model, texts, batch_size=1)) > 0.9999).all()
    assert torch.equal(packed_vectors(model, texts[3:4])[0][0], found[3])


def test_a_text_longer_than_a_run_has_one_of_its_own(tiny, sentences, device):
    model, texts = tiny.to(device), [*sentences[:6], " ".join(families.WORDS[:60]), *sentences[6:9]]
    found, runs = packed_vectors(model, texts, 16)
    assert (cosines(found.cpu(), own(model, texts, batch_size=1)) > 0.9999).all()
    assert not runs.graphs


def test_every_family_is_tested():
    names = {type(families.transformer).__name__}  # of the class below, by the models built above
    names = {"CamembertModel", "LlamaModel"}  # BERT's and Mistral's code, in other classes
    configs = [families.TEXT_FAMILIES[name][0] for name in PACKED if name in families.TEXT_FAMILIES]
    names |= {type(AutoModel.from_config(config)).__name__ for config in configs}
    assert names | {"Gemma3TextModel"} == set(FAMILIES)


@pytest.mark.parametrize("name", ["distilbert", "deberta-v2", "t5", "albert", "gpt2"])
def test_other_families_have_no_packed_form(name, tmp_path):
    model = families.build(name, tmp_path)
    assert "has no packed form" in str(family_of(model[0].auto_model))


# ---------------------------------------------------------------- graphs


class Recorded:
    """In place of CUDA graphs: what would be captured, and how often it is replayed."""

    def __init__(self):
        self.captured, self.replayed = [], 0

    def __call__(self, run, arrays):
        vectors = run()
        self.captured.append(len(arrays))

        def replay():
            self.replayed += 1
            vectors.copy_(run())

        return Graph(replay, arrays, vectors)


@pytest.fixture
def no_streams(monkeypatch, device):
    """Recorded graphs work where there is no GPU."""
    if device == "cpu":

        class Stream:
            def wait_event(self, event):
                pass

            def record_event(self):
                return None

        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: Stream())
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
        empty = torch.empty
        monkeypatch.setattr(torch, "empty", lambda *a, pin_memory=False, **k: empty(*a, **k))


def test_a_size_is_captured_once_and_replayed_after(tiny, sentences, device, no_streams):
    model, graphs = tiny.to(device), Recorded()
    family = family_of(model[0].auto_model)
    runs = PackedModel(model, family, graphs)
    way = Packed(runs, model, fast_tokenizer(model[0]), "", 256)
    expected = packed_vectors(model, sentences[:40], 256)[0]
    for _ in range(2):
        assert torch.equal(embed_here(way, sentences[:40], lambda v: v), expected)
    assert sorted(graphs.captured) == sorted(
        {Size.holding(*s).length for s in [(256, 1), (64, 1)]} & set(graphs.captured)
    )
    assert len(graphs.captured) == len(set(graphs.captured)) == len(runs.graphs)
    assert graphs.replayed >= 2 * len(graphs.captured)
    runs.warm(model, Size.holding(32, 1))
    assert Size.holding(32, 1) in runs.graphs


def test_graphs_of_tensors_that_have_moved_are_dropped(tiny, sentences, device, no_streams):
    model = tiny.to(device)

    def moves_a_table(run, arrays):
        vectors = run()
        if list(runs.graphs) == [Size.holding(32, 1)]:  # as merging does, when a block first runs
            table = model[0].auto_model.embeddings.word_embeddings
            table.weight.data = table.weight.data.clone()
        return Graph(lambda: None, arrays, vectors)

    runs = PackedModel(model, family_of(model[0].auto_model), moves_a_table)
    for tokens in (32, 64):
        runs.warm(model, Size.holding(tokens, 1))
    assert list(runs.graphs) == [Size.holding(64, 1)]
    runs.warm(model, Size.holding(32, 1))
    assert len(runs.graphs) == 2


@pytest.mark.gpu
def test_moving_a_model_to_where_it_is_keeps_its_graphs_right(sentences):
    model = tritern.load("minilm-l6-ternary", device="cuda")
    expected = model.encode(sentences)
    for count in (1, 40, 400, 3):
        model.to("cuda")
        assert np.array_equal(model.encode(sentences[:count], device="cuda"), expected[:count])


@pytest.mark.gpu
def test_graphs_are_captured_anew_after_a_change(sentences):
    model = tritern.load("minilm-l6-ternary", device="cuda")
    before = model.encode(sentences[:5])
    with torch.no_grad():
        model[0].auto_model.embeddings.LayerNorm.bias.data = model[0].auto_model.embeddings.LayerNorm.bias + 1
    assert (cosines(model.encode(sentences[:5]), before) < 0.99).all()
    half = copy.deepcopy(model).half()
    assert half.encode(sentences[:5]).dtype == np.float16
    cpu = model.to("cpu").encode(sentences[:5])
    assert (cosines(cpu, model.to("cuda").encode(sentences[:5])) > 0.99).all()


@pytest.mark.gpu
def test_threads_share_a_model_on_a_gpu(sentences):
    model = tritern.warmup(tritern.load("minilm-l6-ternary", device="cuda"))
    expected, wrong = model.encode(sentences), []

    def work(first):
        for i in range(first, 400, 4):
            with torch.cuda.stream(torch.cuda.Stream()):
                if not np.array_equal(model.encode(sentences[i]), expected[i]):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert not wrong


# ---------------------------------------------------------------- which path, and staying right


def test_patch_and_loading_attach_the_engine(tiny, tmp_path):
    assert not isinstance(tiny, Encoder)
    assert (
        tritern.patch(tiny) is tiny
        and isinstance(tiny, Encoder)
        and type(tiny).__name__ == "SentenceTransformer"
    )
    tiny.save_pretrained(str(tmp_path / "model"))
    for loaded in (
        SentenceTransformer(str(tmp_path / "model"), device="cpu"),
        tritern.load(tmp_path / "model", device="cpu"),
    ):
        assert isinstance(loaded, Encoder)
        assert np.array_equal(loaded.encode("ba be bi"), tiny.encode("ba be bi"))
        assert "Encoded by the engine, in batches of texts of one length: it is on a CPU" in str(
            tritern.summary(loaded)
        )
    assert (tmp_path / "model" / "modules.json").read_text().count("tritern") == 0
    assert not isinstance(AutoModel.from_pretrained(str(tmp_path / "model")), Encoder)


@pytest.mark.parametrize(
    "change",
    [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: m.double().float()],
)
def test_copies_and_pickles_encode_alike(tiny, sentences, change):
    model = tritern.patch(tiny)
    expected = model.encode(sentences[:80])
    other = change(model)
    assert isinstance(other, Encoder) and np.array_equal(other.encode(sentences[:80]), expected)
    assert np.array_equal(model.encode(sentences[:80]), expected)


def test_bfloat16(tiny, sentences):
    model = tritern.patch(tiny).bfloat16()
    found, expected = (f(sentences[:70]) for f in (model.encode, lambda t: own(model, t)))
    assert found.dtype == expected.dtype == np.float32 and (cosines(found, expected) > 0.99).all()
    assert model.encode(sentences[:70], convert_to_tensor=True).dtype == torch.bfloat16


def hook_inside(model):
    model[0].auto_model.encoder.layer[0].register_forward_hook(lambda *_: None)


def replaced_forward(model):
    forward = model[0].forward
    model[0].forward = lambda *a, **k: forward(*a, **k)


def compiled(model):
    model.compile(backend="eager")


def slow(model):
    model.tokenizer.is_fast = False


def of_a_class_of_its_own(model):
    class Mine(type(model)):
        def forward(self, features, **kwargs):
            return super().forward(features, **kwargs)

    model.__class__ = Mine


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (hook_inside, "its modules have hooks or another forward"),
        (replaced_forward, "its modules have hooks or another forward"),
        (compiled, "it is compiled"),
        (of_a_class_of_its_own, "has a forward or preprocess of its own"),
        (lambda m: m[0].processing_kwargs.update(text={"max_length": 5}), "it has processing_kwargs"),
    ],
)
def test_what_the_engine_does_not_take(tiny, sentences, change, why):
    model = tritern.patch(tiny)
    change(model)
    assert why in str(path_of(model)) and why in str(tritern.summary(model))
    assert isinstance(way_of(model), str)
    assert np.array_equal(model.encode(sentences[:9]), own(model, sentences[:9]))


def test_autocast_is_left_to_sentence_transformers(tiny, sentences):
    model = tritern.patch(tiny)
    with torch.autocast("cpu", torch.bfloat16):
        assert "autocast" in path_of(model).reason
        assert np.array_equal(model.encode(sentences[:9]), own(model, sentences[:9]))


@pytest.mark.parametrize("name", ["clip", "siglip", "static", "router"])
def test_other_kinds_of_models_encode_as_ever(name, tmp_path):
    model = families.build(name, tmp_path)
    attach(model)
    texts = families.TEXTS
    assert np.allclose(model.encode(texts), own(model, texts), atol=1e-6)
    assert path_of(model).kind in ("sentence-transformers", "padded")


def test_prompts_that_are_not_pooled(tiny, sentences):
    attach(tiny)
    tiny[1].include_prompt = False
    found, expected = (
        f(sentences[:70], prompt="ba be bi ") for f in (tiny.encode, lambda t, **k: own(tiny, t, **k))
    )
    assert (cosines(found, expected) > 0.9999).all()
    assert (cosines(found, tiny.encode(sentences[:70])) < 0.9999).all()


def test_training_goes_on_after_encode(tiny, sentences):
    model = tritern.patch(tiny).train()
    model.encode(sentences[:3])
    assert not model.training  # as ever
    features = model.preprocess(sentences[:3])
    model.train()(features)["sentence_embedding"].sum().backward()
    assert any(p.grad is not None for p in model.parameters())


def test_fuse_can_be_declined(tiny, tmp_path):
    model = tritern.patch(tiny, fuse=False)
    assert vars(model)["_tritern_fuse"] is False
    model.save_pretrained(str(tmp_path))
    assert vars(tritern.load(tmp_path, device="cpu", fuse=False))["_tritern_fuse"] is False
    assert vars(tritern.load(tmp_path, device="cpu"))["_tritern_fuse"] is True
    with pytest.raises(tritern.TriternError, match="fuse must be True or False"):
        tritern.patch(tiny, fuse="no")


# ---------------------------------------------------------------- what goes wrong on the way


def threads_of_ours():
    return [t for t in threading.enumerate() if "_guarded" in str(getattr(t, "_target", ""))]


def test_a_failing_tokenizer_is_told_and_the_model_works_on(tiny, sentences, monkeypatch):
    model = tritern.patch(tiny)
    expected = model.encode(sentences)
    call, calls = FastTokenizer.__call__, []

    def fails_later(self, texts):
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("the tokenizer broke")
        return call(self, texts)

    with monkeypatch.context() as patched:
        patched.setattr(FastTokenizer, "__call__", fails_later)
        with pytest.raises(RuntimeError, match="the tokenizer broke"):
            model.encode(sentences * 6)
    assert not threads_of_ours() and np.array_equal(model.encode(sentences), expected)


def test_ctrl_c_ends_the_threads(tiny, sentences, monkeypatch):
    model = tritern.patch(tiny)
    expected = model.encode(sentences)
    put = pipeline._put_in_place

    def interrupted(*arguments):
        put(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "_put_in_place", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model.encode(sentences * 20)
    assert not threads_of_ours() and np.array_equal(model.encode(sentences), expected)


def test_a_failing_model_is_told(tiny, sentences, monkeypatch):
    model = tritern.patch(tiny)
    monkeypatch.setattr(Padded, "vectors", lambda self, batch: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.encode(sentences)
    with pytest.raises(ZeroDivisionError):
        model.encode("ba")
    assert not threads_of_ours()


def test_capturing_on_a_cpu_does_nothing(tiny):
    capture(tritern.patch(tiny), [16, 32])


# ---------------------------------------------------------------- attention


def test_no_path_with_varying_shapes_takes_cudnns_attention(tiny, sentences, monkeypatch):
    from tritern.distillation.objective import DistillationLoss
    from tritern.modes import evaluating

    taken = torch.backends.cuda.cudnn_sdp_enabled
    assert taken()
    with evaluating(tiny):
        assert not taken()
    assert taken()
    seen = []
    monkeypatch.setattr(DistillationLoss, "_teacher_outputs", lambda *_: seen.append(taken()) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        DistillationLoss.forward(object.__new__(DistillationLoss), [{}])
    way = way_of(tiny)
    way.on_cpu = False  # as on a GPU
    monkeypatch.setattr(
        type(tiny), "forward", lambda *_, **__: seen.append(taken()) or {"sentence_embedding": 0}
    )
    way.vectors({})
    assert seen == [False, False] and taken()
