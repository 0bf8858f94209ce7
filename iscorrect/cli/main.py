"""The command line: each command is a file beside this one."""

from __future__ import annotations

import argparse
import traceback
from collections.abc import Sequence
from types import ModuleType

from iscorrect import __version__
from iscorrect.cli import audit, compare, convert, demo, env, fp16_check, report, watch
from iscorrect.cli.terminal import encode_anything, tell
from iscorrect.errors import InputError
from iscorrect.text import visible

COMMANDS: dict[str, ModuleType] = {
    "demo": demo, "compare": compare, "report": report, "watch": watch, "convert": convert,
    "audit": audit, "fp16-check": fp16_check, "env": env,
}

CODES = """\
exit codes: 0 done; 1 a --fail-if condition holds, a checkpoint is not safe, or there was an alarm;
2 the input cannot be used, or the output cannot be written; 3 a fault of this program, with a
traceback"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; None: those of the process.

    Returns:
        0; 1 where a threshold was broken; 2 where the input cannot be used or the output not
        written, with the message on standard error; 3 for a fault of this program.
    """
    encode_anything()
    parser = argparse.ArgumentParser(
        prog="iscorrect", description="Corrected policy-gradient losses: what corrections do.",
        epilog=CODES, formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"iscorrect {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        command = commands.add_parser(
            name, help=module.HELP, description=module.__doc__, epilog=CODES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    options = parser.parse_args(arguments)
    try:
        code: int = options.run(options)
    except InputError as error:
        tell(visible(error))
        return 2
    except OSError as error:
        what = f"{error.strerror}: {error.filename}" if error.filename else error
        tell(f"iscorrect: {visible(what)}")
        return 2
    except MemoryError:
        tell("iscorrect: the memory does not suffice")
        return 2
    except Exception:
        tell(traceback.format_exc())
        return 3
    return code
