"""Text models: ``(N, T)`` integer tokens to ``(N, num_classes)`` logits."""

import torch
from torch import nn

from autoflip_flwr.app.models.vision import Positive, checked


class CharLSTM(nn.Module):
    """Predict the next character from the characters before it.

    An embedding, a two-layer LSTM, and a linear layer on the last time step, for
    sequences of any length. See `char_lstm` for the sizes.
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


@checked
def char_lstm(
    num_classes: Positive,
    input_shape: tuple[Positive],  # noqa: ARG001
    *,
    embedding: Positive = 24,
    hidden: Positive = 640,
    vocabulary: Positive = 80,
) -> nn.Module:
    """Build a `CharLSTM` for tokens in ``[0, vocabulary)``.

    5,040,080 parameters with 80 classes (the paper says 5,040,000); LEAF's own
    ``embedding=8, hidden=256`` gives 819,920.
    """
    return CharLSTM(
        num_classes, vocabulary=vocabulary, embedding=embedding, hidden=hidden
    )
