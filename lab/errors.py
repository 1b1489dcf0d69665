"""A user's mistakes, and how a program reports them."""

import argparse
import os
import sys
import traceback
from contextlib import redirect_stdout, suppress

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
    return ' '.join(text.splitlines()[:2]).strip()


class Output:
    """A stream like stdout, without which we go on once nobody can read it any more.

    So no run is lost if the reader of a pipe is gone, or the disk is full. `error` is what happened
    when we last tried to write, or None.
    """

    def __init__(self, stream):
        self.stream = stream
        self.error = None

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        self.attempt(self.stream.write, text)
        return len(text)

    def flush(self):
        self.attempt(self.stream.flush)

    def attempt(self, function, *args):
        """Call a function that writes, unless one has failed before."""
        if self.error is not None:
            return
        try:
            function(*args)
        except OSError as error:
            self.error = error
            self.drop()

    def drop(self):
        """Throw away what is still to be written, so that Python does not try it again at exit."""
        with suppress(OSError, ValueError):  # tests have streams that are no files
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.stream.fileno())
            os.close(null)


def prepare_streams():
    """Make stdout and stderr streams that always can be written to. Returns stdout's Output."""
    if sys.stderr is None:  # closed with 2>&-; progress bars need one
        sys.stderr = open(os.devnull, 'w')
    if sys.stdout is None:
        sys.stdout = open(os.devnull, 'w')
    if hasattr(sys.stdout, 'reconfigure'):
        sys.stdout.reconfigure(errors='backslashreplace')  # for names that it cannot encode
    return Output(sys.stdout)


def report_errors(name, main, *args):
    """Call main(*args) and return its exit code, or print what went wrong in one line.

    Args:
        name: of the program, with which the line starts.

    Returns:
        What main returns; 2 after a UserError, an OSError or when memory runs out, and if the
        output could not be written; 130 after Ctrl-C. If only the reader of a pipe is gone, as in
        `... | head`, that is no mistake.
    """
    output = prepare_streams()
    message = None
    with redirect_stdout(output):
        try:
            code = main(*args)
        except KeyboardInterrupt:
            message = 'interrupted'
            code = 130
        except (UserError, OSError, torch.OutOfMemoryError) as error:
            message = first_lines(error)
            code = 2
        output.flush()
    if message is None and output.error and not isinstance(output.error, BrokenPipeError):
        message = f'nothing can be printed any more: {first_lines(output.error)}'
        # torchrun would take 2 for a lost process, and end the others, which are still at work.
        has_others = os.environ.get('WORLD_SIZE', '1') not in ('', '1')
        code = 0 if has_others else 2
    if message is not None:
        with suppress(OSError):
            print(f'{name}: {message}', file=sys.stderr, flush=True)
    return code
