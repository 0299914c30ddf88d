"""Models to time, and the times of their forward passes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

MODELS: dict[str, dict[str, Any]] = {
    "minilm": {"type": "bert", "hidden": 384, "layers": 6, "heads": 12, "intermediate": 1536},
    "bge-base": {"type": "bert", "hidden": 768, "layers": 12, "heads": 12, "intermediate": 3072},
    "bge-large": {"type": "bert", "hidden": 1024, "layers": 24, "heads": 16, "intermediate": 4096},
    "qwen3-0.6b": {"type": "qwen3", "hidden": 1024, "layers": 28, "heads": 16, "intermediate": 3072},
    "qwen3-8b": {"type": "qwen3", "hidden": 4096, "layers": 8, "of": 36, "heads": 32, "intermediate": 12288},
}

WARMUP_SECONDS, SECONDS = 0.05, 0.2


def build(name: str, dtype: torch.dtype, device: str) -> nn.Module:
    """A model with random weights, the same for every dtype up to rounding."""
    from transformers import AutoModel, BertConfig, Qwen3Config

    m = MODELS[name]
    shared = {"hidden_size": m["hidden"], "num_hidden_layers": m["layers"], "num_attention_heads": m["heads"]}
    shared |= {"intermediate_size": m["intermediate"]}
    if m["type"] == "bert":
        config = BertConfig(**shared)
    else:
        config = Qwen3Config(**shared, num_key_value_heads=8, head_dim=128, use_cache=False)
    with torch.device("meta"):
        model = AutoModel.from_config(config, attn_implementation="sdpa", dtype=dtype)
    small = type(config)(
        **(config.to_dict() | {"num_hidden_layers": 1, "vocab_size": 1000, "layer_types": None})
    )
    buffers = dict(AutoModel.from_config(small).named_buffers())  # positions and rotary frequencies
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.02, generator=generator)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
    return model.eval()


def blocks(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks of a model."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    return list(max(lists, key=len))


def forward(model: nn.Module, ids: Tensor) -> Tensor:
    """Normalized embeddings [texts, hidden]: the last token's of a decoder, the mean of an encoder."""
    hidden = model(input_ids=ids).last_hidden_state
    decoder = getattr(model.config, "model_type", "") == "qwen3"
    return nn.functional.normalize(hidden[:, -1] if decoder else hidden.mean(1), dim=-1)


def graphed(call: Callable[[], Tensor], encoder: bool = True) -> Callable[[], Tensor]:
    """The call as a CUDA graph.

    While a stream is captured, transformers writes out masks that are of no effect, which keeps attention
    from its fast kernels and makes compiled blocks compile again. For an encoder it is not told of the
    capture; a decoder's mask cannot be captured otherwise, so the calls before the capture write it out too.
    """
    from transformers import masking_utils

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with mock.patch.object(masking_utils, "is_tracing", lambda *_: not encoder):
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            out = call()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


def milliseconds(call: Callable[[], Tensor]) -> dict[str, float]:
    """p50 and p99 of single calls, each waited for; after a warm-up."""
    sync = torch.cuda.synchronize if torch.cuda.is_available() else (lambda: None)
    samples: list[float] = []
    end = time.perf_counter() + WARMUP_SECONDS
    while len(samples) < 2 or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        sync()
        samples.append(1e3 * (time.perf_counter() - start))
    samples.clear()
    end = time.perf_counter() + SECONDS
    while len(samples) < 5 or (time.perf_counter() < end and len(samples) < 1000):
        start = time.perf_counter()
        call()
        sync()
        samples.append(1e3 * (time.perf_counter() - start))
    return {"p50_ms": statistics.median(samples), "p99_ms": sorted(samples)[int(0.99 * (len(samples) - 1))]}


def host_microseconds(call: Callable[[], Tensor]) -> float:
    """Median time until a call returns, without waiting for the GPU."""
    samples = []
    for _ in range(13):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        samples.append(1e6 * (time.perf_counter() - start))
    return statistics.median(samples[3:])


def held(model: nn.Module) -> float:
    """MB of a model's parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())) / 1e6
