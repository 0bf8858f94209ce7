"""A CPU that a program takes for a GPU, and what the program asks of it."""

from rehearsal.device import Rehearsal
from rehearsal.ledger import Ledger

__all__ = ["Ledger", "Rehearsal"]
