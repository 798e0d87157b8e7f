"""Tagging every word of a padded batch: a tag says whether the same word stands elsewhere in the sentence too."""

import torch
from torch import Tensor, nn
from torch.nn import LSTM
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

VOCABULARY, SENTENCES, LONGEST = 6, 5, 6
IGNORED = -1


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 6)
        self.dropout = nn.Dropout(0.1)
        self.lstm = LSTM(6, 8, num_layers=2, bidirectional=True, dropout=0.0)
        self.head = nn.Linear(2 * 8, 2)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        x = pack_padded_sequence(self.dropout(self.embedding(tokens)), lengths, enforce_sorted=False)
        out, _ = pad_packed_sequence(self.lstm(x)[0], total_length=len(tokens))
        return self.head(self.dropout(out))


def sentences(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """tokens [T, B], lengths [B] in any order, tags [T, B]."""
    lengths = torch.randint(1, LONGEST + 1, (SENTENCES,), generator=generator)
    tokens = torch.randint(VOCABULARY, (LONGEST, SENTENCES), generator=generator)
    padding = torch.arange(LONGEST).unsqueeze(1) >= lengths
    same = (tokens == tokens.unsqueeze(1)) & ~padding  # [T, T, B]
    return tokens, lengths, (same.sum(1) > 1).long().masked_fill(padding, IGNORED)


def train(dtype: torch.dtype, steps: int, seed: int) -> list[float]:
    torch.manual_seed(seed)
    tokens, lengths, tags = sentences(torch.Generator().manual_seed(seed))
    model = Tagger().to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        scores = model(tokens, lengths)
        loss = F.cross_entropy(scores.flatten(0, 1), tags.flatten(), ignore_index=IGNORED)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    print(*train(torch.float32, 100, 0), sep="\n")
