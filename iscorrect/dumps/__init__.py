"""Dumps of a run: the log-probs of both sides for the same tokens, in files of many kinds."""

from iscorrect.dumps.dump import LogProbDump, concatenate
from iscorrect.dumps.readers import dump_files, read_dump, stream_dump
from iscorrect.dumps.tokens import Estimate, Tokens
from iscorrect.dumps.writers import DumpWriter, write_dump

__all__ = [
    "DumpWriter", "Estimate", "LogProbDump", "Tokens", "concatenate", "dump_files", "read_dump",
    "stream_dump", "write_dump",
]
