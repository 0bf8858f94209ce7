"""What made trainer and engine disagree, and what to do about it."""

from iscorrect.diagnose.advice import Advice, advise
from iscorrect.diagnose.diagnosis import diagnose
from iscorrect.diagnose.findings import Cause, Finding
from iscorrect.diagnose.noise import NOISE
from iscorrect.diagnose.shared import Shared, shared_error
from iscorrect.dumps import Estimate, Tokens

__all__ = [
    "NOISE", "Advice", "Cause", "Estimate", "Finding", "Shared", "Tokens", "advise",
    "diagnose", "shared_error",
]
