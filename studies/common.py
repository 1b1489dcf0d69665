"""What the studies share: their calls, the user's mistakes, and pictures."""

import argparse
import os
import sys


class UserError(ValueError):
    """A mistake that the user can mend, told in one line."""


class Parser(argparse.ArgumentParser):
    """Shows a study's docstring as it is, and raises UserError for a wrong call."""

    def __init__(self, prog, description):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(prog, description=description, formatter_class=formatter)

    def error(self, message):
        raise UserError(f'{message}; see --help')


def exit_code(name, study, argv):
    """Call study(argv). Returns 0, or 2 after a mistake, which is told in one line."""
    try:
        study(argv)
    except (UserError, OSError) as error:
        message = ' '.join(str(error).split())
        print(f'{name}: {message}', file=sys.stderr)
        return 2
    return 0


def new_figure(width, height):
    """A matplotlib figure, in inches, that opens no window. Raises UserError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError('--plot needs matplotlib: pip install matplotlib') from error
    return Figure(figsize=(width, height), layout='constrained')


def save_figure(figure, file):
    """Write a figure whole or not at all, in the format of its name. Raises UserError."""
    kind = file.suffix.lower().removeprefix('.')
    if kind not in figure.canvas.get_supported_filetypes():
        raise UserError(f'--plot {file}: matplotlib cannot write that; end it in .png or .svg')
    temporary = file.with_name(f'{file.name}.{os.getpid()}.tmp')
    try:
        figure.savefig(temporary, format=kind, dpi=150)
        os.replace(temporary, file)
    except (OSError, RuntimeError) as error:  # .pgf needs LaTeX, and says RuntimeError
        raise UserError(f'--plot {file}: cannot be written, choose another: {error}') from error
    finally:
        if temporary.exists():
            temporary.unlink()
    print(f'\nplot in {file}')
