"""The command line: ``fastres train``, ``sweep``, ``eval``, ``predict``, ``export``, ``models``, ``bench``, ``cache``.

A command's module, and with it PyTorch, is imported only when the command runs.
"""

from __future__ import annotations

import signal
import sys
from importlib import import_module

from fastres.arguments import COMMANDS, make_parser
from fastres.errors import FastresError
from fastres.output import lasting_output
from fastres.threads import fit_threads
from fastres.train.signals import Interrupted, terminate_orderly


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 2 for a user's error, 128 + N after signal N."""
    with lasting_output() as (out, _):
        try:
            argv = sys.argv[1:] if argv is None else argv
            args = make_parser(argv).parse_args(argv)
            out.goes_on = args.command in ("train", "sweep")  # a run outlasts who watches it
            if args.command != "cache":
                fit_threads()
            with terminate_orderly():
                module, name = COMMANDS[args.command][0].split(":")
                return getattr(import_module(module), name)(args)
        except FastresError as error:
            return complain(f"error: {error}", 2)
        except BrokenPipeError:
            return 128 + signal.SIGPIPE
        except Interrupted as stop:
            return complain(str(stop), 128 + stop.signum)
        except KeyboardInterrupt:
            return complain("stopped before anything was to be saved", 130)
        except (RuntimeError, MemoryError) as error:
            if (remedy := remedy_of(error, training=out.goes_on)) is None:
                raise
            reason = (str(error).strip() or "out of memory").splitlines()[0].split(". ")[0]
            return complain(f"error: {reason}: {remedy}", 2)


def complain(line: str, status: int) -> int:
    """Say one line on standard error; returns the status."""
    print(f"fastres: {' '.join(line.splitlines())}", file=sys.stderr)
    return status


def remedy_of(error: RuntimeError | MemoryError, training: bool) -> str | None:
    """What to do where the machine had too little of something; None: it had not."""
    from fastres.train.memory import is_out_of_memory

    if is_out_of_memory(error):
        return "lower --batch-size, raise --accumulate or set --checkpoint-every" if training else "give it more memory"
    if "DataLoader worker" in str(error):
        return "a process that decodes images ended; where memory was short, lower --workers"
    if "can't start new thread" in str(error):
        return "let this user have more processes (ulimit -u), or set OMP_NUM_THREADS=1"
    return None


if __name__ == "__main__":
    sys.exit(main())
