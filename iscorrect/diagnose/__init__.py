"""What made trainer and engine disagree, and what to do about it."""

from iscorrect.diagnose.advice import Advice, advise
from iscorrect.diagnose.causes import NOISE, Finding, diagnose
from iscorrect.dumps import Estimate, Tokens

__all__ = ["NOISE", "Advice", "Estimate", "Finding", "Tokens", "advise", "diagnose"]
