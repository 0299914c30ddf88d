import pytest
import torch

import tritern


def test_nothing_to_compile_on_a_cpu(tiny):
    assert tritern.warmup(tritern.patch(tiny)) is tiny
    with pytest.raises(tritern.TriternError, match="max_tokens must be at least 1; received 0"):
        tritern.warmup(tiny, max_tokens=0)


@pytest.mark.gpu
def test_after_warmup_no_lookup_compiles(tiny, sentences, monkeypatch):
    from triton.runtime.jit import JITFunction

    model = tritern.patch(tiny, embedding_bits=4).cuda().half()
    tritern.warmup(model)
    expected = model[0].auto_model.embeddings.word_embeddings.to_embedding()

    def compiles(*args, **kwargs):
        raise AssertionError("compiled after the warm-up")

    monkeypatch.setattr(JITFunction, "_do_compile", compiles)
    for texts in (1, 7, 100):
        ids = model.tokenizer(sentences[:texts], padding=True, return_tensors="pt")["input_ids"].cuda()
        assert torch.equal(model[0].auto_model.embeddings.word_embeddings(ids), expected(ids))
        model.encode(sentences[:texts])


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [8, 16])
def test_after_warmup_no_number_of_tokens_compiles(bits, monkeypatch):
    from triton.runtime.jit import JITFunction

    layers = [torch.nn.Linear(384, 1536), torch.nn.Linear(1536, 384, bias=False), torch.nn.Linear(384, 1536)]
    model = tritern.patch(torch.nn.Sequential(*layers), activation_bits=bits).cuda().half()
    assert tritern.warmup(model) is model

    def compiles(*args, **kwargs):
        raise AssertionError("compiled after the warm-up")

    monkeypatch.setattr(JITFunction, "_do_compile", compiles)
    with torch.inference_mode():
        for tokens in [*range(1, 70), 100, 200, 500, 777, 1024, 3000, 5001, 9999, 16384, 16385, 40000]:
            model(torch.randn(tokens, 384, device="cuda", dtype=torch.float16))
