"""The scripts repeat each other on purpose. What is meant to be the same in them is kept so here.

    python tests/copies.py      # copies the original's shared sections over those of the others

A section begins with its banner, `#### Name ####...`, and ends before the next one; what is above
the first banner is the Header. test_copies.py fails when a shared section differs, and when a
section is not declared here.
"""

import argparse
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ORIGINAL = 'airbench94.py'
RECIPE = [
    'Header', 'Imports', 'Hyperparameters', 'Augmentation and loader', 'Network', 'Whitening',
    'Optimizer', 'Lookahead', 'Loss and evaluation',
]  # fmt: skip
TOOLING = [
    'Helpers', 'Fast path', 'Kernels', 'Data', 'Log', 'Saved networks', 'Command line', 'Main',
]  # fmt: skip
AIRBENCH = [*RECIPE, 'Training', *TOOLING]
LOCAL = {'Header', 'Hyperparameters'}
SWAP = ['Teams', 'Training', 'Checkpoints', 'Averaging', 'SWAP']
OF_RECORD = ['Doubtful images', 'Training']
RECORD = [*(name for name in RECIPE if name != 'Lookahead'), *OF_RECORD, *TOOLING]
# Of each copy: its sections in order, and which of them are its own.
COPIES = {
    'airbench95.py': (AIRBENCH, LOCAL),
    'airbench96.py': (AIRBENCH, LOCAL),
    'swap94.py': ([*RECIPE, *SWAP, *TOOLING], LOCAL | {'Imports', 'Main', *SWAP}),
    'records/94.py': (RECORD, LOCAL | {'Network', 'Optimizer', *OF_RECORD, 'Kernels'}),
}


def sections(source):
    """{name: text with its banner} of a script, in order."""
    header, *rest = re.split(r'^(?=#### )', source, flags=re.MULTILINE)
    return {'Header': header} | {re.match(r'#### (.*?) #*\n', text)[1]: text for text in rest}


def faults(original, copy, order, local):
    """What is wrong with a copy, as a list of lines; original and copy are sources."""
    original, copy = sections(original), sections(copy)
    lines = [f'{name} is declared neither shared nor local' for name in copy if name not in order]
    lines += [f'{name} is missing' for name in order if name not in copy]
    lines += [
        f'{name} differs from {ORIGINAL}'
        for name in order
        if name in copy and name not in local and copy[name] != original[name]
    ]
    if not lines and list(copy) != order:
        lines.append('the order of the sections is another')
    return lines


def repaired(original, copy, order, local):
    """The copy's source, with all sections but its local ones taken from the original."""
    original, copy = sections(original), sections(copy)
    return ''.join((copy if name in local else original)[name] for name in order)


def main():
    argparse.ArgumentParser(
        description=f"Copy {ORIGINAL}'s shared sections over the other scripts'."
    ).parse_args()
    original = (ROOT / ORIGINAL).read_text()
    for name, rules in COPIES.items():
        copy = (ROOT / name).read_text()
        print(f'{name}:', '; '.join(faults(original, copy, *rules)) or 'was up to date')
        (ROOT / name).write_text(repaired(original, copy, *rules))


if __name__ == '__main__':
    main()
