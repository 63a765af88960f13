"""The machinery behind config.py and every script's command line: mistakes, exit codes, flags.

Generic: it knows no setting. No torch.
"""

import contextlib
import errno
import functools
import os
import signal
import sys
import time
import typing


class ConfigError(ValueError):
    """A mistake of the user's, worded for the user: what, which value, what to do."""


def script(main: typing.Callable) -> typing.Callable:
    """Wraps a script's main: what a user can cause ends in one line at most and an exit code, no traceback.

    2: a mistake in a config or on the command line. 1: a file that cannot be read or written, a full disk.
    130: Ctrl-C. 141: the reader of standard output has gone, as `head` does; nothing is said.
    """

    @functools.wraps(main)
    def wrapped(*arguments) -> None:
        if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # see quiet_imports
            signal.signal(signal.SIGINT, signal.default_int_handler)
        # The name of a file or document may be no text in the terminal's encoding.
        sys.stdout.reconfigure(errors="backslashreplace")
        try:
            try:
                main(*arguments)
            finally:
                sys.stdout.flush()  # here, and not at Python's end, where an error would be a traceback
        except ConfigError as error:
            fail(error)
        except KeyboardInterrupt:
            sys.exit(130)
        except BrokenPipeError:
            close_stdout()
            sys.exit(141)
        except OSError as error:
            close_stdout()
            where = error.filename or ("standard output" if error.errno == errno.ENOSPC else "")
            fail(f"{where}: {error.strerror}" if where else error, code=1)

    return wrapped


def close_stdout() -> None:
    """Drops what standard output still holds and cannot write: Python would try again at its end."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def quiet_imports() -> None:
    """Until `script` begins, Ctrl-C ends the process without the traceback of a half-imported package."""
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def show(text: str) -> None:
    """Prints, also into a pipe whose reader has seen enough."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        close_stdout()


def add_no_verify(parser) -> None:
    """Gives a script's argparse parser the flag --no-verify. Where it is used, that is said."""
    import argparse  # those who call this have it already; the others need not wait for it

    class Skip(argparse.Action):
        def __call__(self, parser, args, values, option=None):
            args.verify = False
            if int(os.environ.get("RANK", 0)) == 0:  # torchrun starts many processes; one says it
                print(f"note: {option}: no hash is compared, so damaged files go unnoticed", file=sys.stderr)

    what = "do not compare the files' hashes with those that were written down when they were saved"
    parser.add_argument("--no-verify", dest="verify", action=Skip, nargs=0, default=True, help=what)


def fail(error: object, code: int = 2) -> typing.NoReturn:
    """Prints what went wrong once, also where torchrun started many processes, and ends this one."""
    if int(os.environ.get("RANK", 0)):
        time.sleep(2)  # where the first process has the same to say, torchrun ends this one meanwhile
    print(f"error: {error}", file=sys.stderr, flush=True)
    sys.exit(code)
