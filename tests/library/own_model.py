"""The code of a model that comes with its checkpoint: layers that are not quite nn.Linear."""

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput


class OwnConfig(PreTrainedConfig):
    model_type = "own"

    def __init__(self, hidden_size=32, vocab_size=145, **kwargs):
        super().__init__(**kwargs)
        self.hidden_size, self.vocab_size = hidden_size, vocab_size


class LowRankLinear(nn.Linear):
    """A subclass with parameters of its own."""

    def __init__(self, size):
        super().__init__(size, size)
        self.down, self.up = nn.Linear(size, 4), nn.Linear(4, size)

    def forward(self, x):
        return super().forward(x) + self.up(self.down(x))


class Scaled(nn.Module):
    """Wraps a layer, and calls it."""

    def __init__(self, size):
        super().__init__()
        self.layer = nn.Linear(size, size)

    def forward(self, x):
        return self.layer(x) / 2


class Transposed(nn.Module):
    """Wraps a layer, and takes its weight."""

    def __init__(self, size):
        super().__init__()
        self.layer = nn.Linear(size, size)

    def forward(self, x):
        return torch.nn.functional.linear(x, self.layer.weight.t(), self.layer.bias)


class OwnModel(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        kinds = LowRankLinear, Scaled, Transposed
        self.blocks = nn.ModuleList(kind(config.hidden_size) for kind in kinds)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, **kwargs):
        x = self.embed(input_ids)
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return BaseModelOutput(last_hidden_state=x)
