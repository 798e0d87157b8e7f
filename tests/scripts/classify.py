"""Sequence classification: which of two words comes first in a sentence of any length."""

import torch
from torch import Tensor, nn
from torch.nn import LSTM
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence

VOCABULARY, SENTENCES, LONGEST = 9, 6, 7
PADDING, FIRST, SECOND = 0, 1, 2


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 6, padding_idx=PADDING)
        self.lstm = LSTM(6, 10, num_layers=2, batch_first=True)
        self.head = nn.Linear(10, 2)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        x = pack_padded_sequence(self.embedding(tokens), lengths, batch_first=True, enforce_sorted=False)
        _, (h_n, _) = self.lstm(x)
        return self.head(h_n[-1])


def sentences(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """tokens [B, T], lengths [B] in any order, labels [B]."""
    lengths = torch.randint(2, LONGEST + 1, (SENTENCES,), generator=generator)
    labels = torch.randint(2, (SENTENCES,), generator=generator)
    tokens = torch.randint(SECOND + 1, VOCABULARY, (SENTENCES, LONGEST), generator=generator)
    for row, (length, label) in enumerate(zip(lengths.tolist(), labels.tolist())):
        early, late = torch.randperm(length, generator=generator)[:2].sort().values.tolist()
        tokens[row, early], tokens[row, late] = (SECOND, FIRST) if label else (FIRST, SECOND)
        tokens[row, length:] = PADDING
    return tokens, lengths, labels


def train(dtype: torch.dtype, steps: int, seed: int) -> list[float]:
    torch.manual_seed(seed)
    tokens, lengths, labels = sentences(torch.Generator().manual_seed(seed))
    model = Classifier().to(dtype)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(tokens, lengths), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    print(*train(torch.float32, 100, 0), sep="\n")
