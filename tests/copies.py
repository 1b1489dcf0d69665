"""The scripts repeat each other on purpose. What is meant to be the same in them is kept so from here.

    python tests/copies.py      # copies the original's shared sections over those of the other scripts

A section begins with its banner, `#### Name ####...`, and ends before the next one; what is above the first banner
is the Header. test_copies.py fails when a shared section differs, and when a section is not declared here.
"""

import argparse
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ORIGINAL = 'airbench94.py'
LOCAL = {'Header', 'Hyperparameters'}
SHARED = {'Setup', 'Augmentation and loader', 'Network', 'Whitening', 'Optimizer', 'Lookahead', 'Evaluation', 'Loss',
          'Operations', 'Training', 'Fast path', 'Data sources', 'Log', 'Ranks', 'Limits', 'Command line', 'Main'}
COPIES = {'airbench95.py': (SHARED, LOCAL), 'airbench96.py': (SHARED, LOCAL)}


def sections(source):
    """{name: text with its banner} of a script, in order."""
    header, *rest = re.split(r'^(?=#### )', source, flags=re.MULTILINE)
    return {'Header': header} | {re.match(r'#### (.*?) #*\n', text)[1]: text for text in rest}


def faults(original, copy, shared, local):
    """What is wrong with a copy, as a list of lines; original and copy are sources."""
    original, copy = sections(original), sections(copy)
    lines = [f'{name} is declared neither shared nor local' for name in copy if name not in shared | local]
    lines += [f'{name} is missing' for name in original if name in shared | local and name not in copy]
    lines += [f'{name} differs from {ORIGINAL}' for name in copy if name in shared and copy[name] != original[name]]
    if not lines and list(copy) != list(original):
        lines.append(f'the order of the sections differs from {ORIGINAL}')
    return lines


def repaired(original, copy, local):
    """The copy's source with all sections but its local ones taken from the original, in the original's order."""
    own = sections(copy)
    return ''.join(own[name] if name in local else text for name, text in sections(original).items())


def main():
    argparse.ArgumentParser(description=f"Copy {ORIGINAL}'s shared sections over the other scripts'.").parse_args()
    original = (ROOT / ORIGINAL).read_text()
    for name, (shared, local) in COPIES.items():
        copy = (ROOT / name).read_text()
        print(f'{name}:', '; '.join(faults(original, copy, shared, local)) or 'was up to date')
        (ROOT / name).write_text(repaired(original, copy, local))


if __name__ == '__main__':
    main()
