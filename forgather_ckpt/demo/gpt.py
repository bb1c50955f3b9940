"""A GPT over bytes: pre-norm, learned positions, dropout, the output tied to the embedding."""

import torch
import torch.nn.functional as F
from torch import nn

from forgather_ckpt.trainers.stages import Part

NUM_BYTES = 256


class Attention(nn.Module):
    """Causal self-attention, (batch, length, width) to the same."""

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, dropout_p=self.dropout if self.training else 0.0
        )
        merged: torch.Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return merged


class Block(nn.Module):
    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, num_heads, dropout)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x)))
        x = x + self.dropout(self.mlp(self.mlp_norm(x)))
        return x


class GPT(nn.Module):
    """Returns its own loss: the mean over the windows of the cross entropy of each next byte, in nats."""

    def __init__(self, *, context: int, width: int, num_heads: int, num_layers: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.embedding = nn.Embedding(NUM_BYTES, width)
        self.position = nn.Parameter(torch.zeros(context, width))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, num_heads, dropout) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, NUM_BYTES, bias=False)
        self.apply(_initialize)
        self.head.weight = self.embedding.weight

    def forward(self, window: torch.Tensor) -> torch.Tensor:
        """`window`: (batch, context + 1) of uint8, each byte the one to be told from those before it."""
        x = self.embed(window)
        for block in self.blocks:
            x = block(x)
        return self.pipeline_loss(self.predict(x), window)

    def embed(self, window: torch.Tensor) -> torch.Tensor:
        """A window to (batch, context, width)."""
        embedded: torch.Tensor = self.dropout(self.embedding(window[:, :-1].long()) + self.position)
        return embedded

    def predict(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, context, width) to the logits of the next bytes."""
        logits: torch.Tensor = self.head(self.norm(x))
        return logits

    def pipeline_parts(self) -> list[Part]:
        blocks = [Part(f"blocks.{number}") for number in range(len(self.blocks))]
        return [Part(["embedding", "position", "dropout"], GPT.embed), *blocks, Part(["norm", "head"], GPT.predict)]

    def pipeline_loss(self, logits: torch.Tensor, window: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits.flatten(0, 1), window[:, 1:].long().flatten())


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
