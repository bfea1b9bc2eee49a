"""Text models: ``(N, T)`` integer tokens to ``(N, num_classes)`` logits."""

import torch
from torch import nn


class CharLSTM(nn.Module):
    """Predict the next character from the characters before it.

    An embedding, a two-layer LSTM, and a linear layer on the last time step. With 80
    characters and the default ``embedding=24, hidden=640`` it has 5,040,080
    parameters (the paper says 5,040,000); LEAF's own ``embedding=8, hidden=256`` gives
    819,920.

    Parameters
    ----------
    num_classes : int
        Characters to choose from.
    vocabulary : int
        Characters that can come in; tokens are in ``[0, vocabulary)``.
    embedding, hidden : int
        Widths of the embedding and of both LSTM layers.
    """

    def __init__(
        self, num_classes: int, *, vocabulary: int, embedding: int, hidden: int
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, embedding)
        self.lstm = nn.LSTM(embedding, hidden, num_layers=2, batch_first=True)
        self.output = nn.Linear(hidden, num_classes)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the logits of the character that follows each sequence."""
        states, _ = self.lstm(self.embedding(tokens))
        logits: torch.Tensor = self.output(states[:, -1])
        return logits


def char_lstm(
    num_classes: int,
    shape: tuple[int, ...],  # noqa: ARG001
    *,
    vocabulary: int,
    embedding: int,
    hidden: int,
) -> nn.Module:
    """Build a `CharLSTM`; it takes sequences of any length."""
    return CharLSTM(
        num_classes, vocabulary=vocabulary, embedding=embedding, hidden=hidden
    )
