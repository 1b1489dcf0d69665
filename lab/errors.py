"""A user's mistakes, and how a program reports them."""

import argparse
import os
import sys
import traceback
from contextlib import suppress

import torch


class UserError(ValueError):
    """An error that the user can fix. Its text is one line that says what is wrong."""


class Parser(argparse.ArgumentParser):
    """Shows a description as it is, and raises UserError for a wrong call."""

    def __init__(self, prog, description):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(prog, description=description, formatter_class=formatter)

    def error(self, message):
        raise UserError(f'{message}; see {self.prog} --help')


def first_lines(error):
    """The first two lines of an error's text, as one line.

    With TRACEBACK=1 in the environment, this also prints the traceback.
    """
    if os.environ.get('TRACEBACK'):
        traceback.print_exception(error)
    text = str(error).strip() or repr(error)
    return ' '.join(text.splitlines()[:2])


def drop_output():
    """Throw away what stdout still has to print, so that Python does not try it again at exit."""
    with suppress(OSError, ValueError, AttributeError):  # a stdout of tests, or none
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


def report_errors(name, main, *args):
    """Call main(*args) and return its exit code, or print what went wrong in one line.

    Args:
        name: of the program, with which the line starts.

    Returns:
        What main returns; 2 after a UserError, an OSError or when memory runs out; 130 after
        Ctrl-C; 141 if nobody reads our output any more, as in `... | head`, which is no mistake.
    """
    if sys.stderr is None:  # closed with 2>&-; progress bars need one
        sys.stderr = open(os.devnull, 'w')
    try:
        code = main(*args)
        if sys.stdout:
            sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        message = 'interrupted'
        code = 130
    except BrokenPipeError:
        drop_output()
        return 141
    except (UserError, OSError, torch.OutOfMemoryError) as error:
        message = first_lines(error)
        code = 2
    with suppress(OSError):
        sys.stdout.flush()
    with suppress(OSError):
        print(f'{name}: {message}', file=sys.stderr, flush=True)
    return code
