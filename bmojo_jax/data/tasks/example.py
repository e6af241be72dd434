"""What every generated task gives: a row and the places where something is asked of the model."""

from typing import NamedTuple

from jaxtyping import Array, Bool, Int


class Example(NamedTuple):
    """One row with A questions, or (every field with an axis in front) a batch of rows.

    The hidden state at an asked position predicts the label: logits are made there only.
    """

    tokens: Int[Array, "*B L"]
    asked: Int[Array, "*B A"]  # positions
    labels: Int[Array, "*B A"]
    trained: Bool[Array, "*B A"]  # which count in the training loss
    scored: Bool[Array, "*B A"]  # which count in a test
    # Tokens between the question and what answers it; None where the task has no such distance.
    distance: Int[Array, "*B A"] | None = None
