"""For slime: --use-tis --custom-tis-function-path slime_corrections.token_tis, and the like."""

from iscorrect import icepop, sequence_mis, token_tis as token_tis_correction
from iscorrect.adapters.slime import tis_function

token_tis = tis_function(token_tis_correction(cap=2.0))
token_icepop = tis_function(icepop(low=0.5, high=5.0))
masked_sequences = tis_function(sequence_mis(high=3.0))
