"""An encoder over long rows of features, of a slide's tiles for one: `python examples/long_features.py`.

Each row is a bag of feature vectors of its own length; one vector in some of them carries a mark; the encoder learns
to say which rows have it. No causality; padding is masked; 1,500 vectors a row. Seconds on one core.
"""

import torch
from torch import nn

import longnet

FEATURES, WIDTH, HEADS, LONGEST = 24, 32, 4, 1500


class Encoder(nn.Module):
    """Features (B, T, F) → one logit a row: a projection, a dilated block, the mean of the real positions."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(FEATURES, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        pattern = longnet.DilationPattern.for_length(LONGEST, num_kv_heads=HEADS, budget=0.5)
        self.attention = longnet.DilatedSelfAttention(WIDTH, HEADS, pattern)
        self.score = nn.Linear(WIDTH, 1)

    def forward(self, features: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        """Return logits (B,); `padding` (B, T) is True where there is none of the row."""
        x = self.project(features)
        x = x + self.attention(self.norm(x), key_padding_mask=padding)
        return self.score(x).squeeze(-1).masked_fill(padding, -torch.inf).amax(1)


def main(steps: int = 40) -> float:
    """Train, and return the share of rows that are told right."""
    torch.manual_seed(0)
    model = Encoder()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    mark = 3 * torch.randn(FEATURES)
    right: list[torch.Tensor] = []
    for _ in range(steps):
        lengths = torch.randint(LONGEST // 2, LONGEST + 1, (8,))
        padding = torch.arange(LONGEST) >= lengths[:, None]
        features, labels = torch.randn(8, LONGEST, FEATURES), torch.rand(8) < 0.5
        for row in labels.nonzero().flatten().tolist():
            features[row, int(torch.randint(int(lengths[row]), ()))] += mark
        logits = model(features, padding)
        nn.functional.binary_cross_entropy_with_logits(logits, labels.float()).backward()
        optimizer.step()
        optimizer.zero_grad()
        right.append((logits > 0) == labels)
    share = torch.cat(right[-10:]).float().mean().item()
    print(f"{share:.0%} of the last 80 rows told right, each before it was learned from")
    return share


if __name__ == "__main__":
    main()
