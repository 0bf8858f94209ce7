"""Dumps of a run: the log-probs of both sides for the same tokens, in files of many kinds."""

from iscorrect.dumps.dump import LogProbDump, concatenate
from iscorrect.dumps.formats import DumpWriter, dump_files, read_dump, stream_dump, write_dump

__all__ = [
    "DumpWriter", "LogProbDump", "concatenate", "dump_files", "read_dump", "stream_dump",
    "write_dump",
]
