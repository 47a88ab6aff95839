"""A transformer of one's own learns to copy what it read far back: `python examples/own_transformer.py`.

Random symbols come in two halves, the second the first again. Attention that sees only near symbols can't know them; a
branch that spans the sequence can. Seconds on one core.
"""

import torch
from torch import nn

import longnet

WIDTH, HEADS, SYMBOLS, HALF = 64, 4, 16, 32
PATTERN = longnet.DilationPattern((8, 2 * HALF), (1, 2), queries="all")


class Block(nn.Module):
    """Attention and a perceptron, each behind a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])
        self.attention = longnet.DilatedSelfAttention(WIDTH, HEADS, PATTERN, rope=10_000.0)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x (B, T, C), changed."""
        x = x + self.attention(self.norms[0](x), is_causal=True)
        return x + self.mlp(self.norms[1](x))


def main(steps: int = 100) -> float:
    """Train, and return the loss of the second half in nats a symbol; log(16) = 2.77 is chance."""
    torch.manual_seed(0)
    embed, head = nn.Embedding(SYMBOLS, WIDTH), nn.Linear(WIDTH, SYMBOLS)
    model = nn.Sequential(embed, Block(), Block(), head)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    loss = torch.tensor(torch.nan)
    for step in range(steps):
        first = torch.randint(SYMBOLS, (16, HALF))
        symbols = torch.cat([first, first], dim=1)
        logits = model(symbols[:, :-1])[:, HALF:]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), symbols[:, HALF + 1 :].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            print(f"step {step}: {loss.item():.3f} nats a symbol")
    print(f"in the end {loss.item():.3f}, chance {torch.log(torch.tensor(float(SYMBOLS))).item():.3f}")
    return loss.item()


if __name__ == "__main__":
    main()
