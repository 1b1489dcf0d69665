"""What the studies share: the user's mistakes, and pictures."""

import os


class UserError(ValueError):
    """A mistake that the user can mend, told in one line."""


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
