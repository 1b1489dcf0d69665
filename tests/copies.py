"""The scripts repeat each other on purpose. What is meant to be the same in them is kept so here.

    python tests/copies.py      # copies the originals' shared sections over those of the others

A section begins with its banner, `#### Name ####...`, and ends before the next one; what is above
the first banner is the Header. test_copies.py fails when a shared section differs, and when a
section is not declared here.
"""

import argparse
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ORIGINAL = 'airbench94.py'
RECORD = 'records/94.py'  # an original too, of what is its own
RECIPE = [
    'Header', 'Imports', 'Hyperparameters', 'Augmentation and loader', 'Network', 'Whitening',
    'Optimizer', 'Lookahead', 'Loss and evaluation',
]  # fmt: skip
TOOLING = [
    'Helpers', 'Fast path', 'Kernels', 'Data', 'Log', 'Saved networks', 'Command line', 'Main',
]  # fmt: skip
AIRBENCH = [*RECIPE, 'Training', *TOOLING]
BY_MUON = [name for name in RECIPE if name != 'Lookahead']
IN_RECORD = [*BY_MUON, 'Doubtful images', 'Growth and selection', 'Training', *TOOLING]
SWAP = ['Teams', 'Training', 'Checkpoints', 'Averaging', 'SWAP']
IN_SWAP = [*BY_MUON, 'Growth and selection', *SWAP, *TOOLING]
OWN = {'Header', 'Hyperparameters'}
OF_RECORD = {'Network', 'Optimizer', 'Growth and selection'}


def origins(order, own, of_record=()):
    """{section: the script that it is copied from, or None for the copy's own}, in order."""
    found = dict.fromkeys(order, ORIGINAL)
    found |= dict.fromkeys(of_record, RECORD)
    found |= dict.fromkeys(own)
    return found


COPIES = {
    'airbench95.py': origins(AIRBENCH, OWN),
    'airbench96.py': origins(AIRBENCH, OWN),
    RECORD: origins(IN_RECORD, OWN | OF_RECORD | {'Doubtful images', 'Training', 'Kernels'}),
    'swap94.py': origins(IN_SWAP, OWN | {'Imports', 'Kernels', 'Main', *SWAP}, OF_RECORD),
}


def originals():
    """{name: sections} of the scripts that others copy from."""
    return {name: sections((ROOT / name).read_text()) for name in (ORIGINAL, RECORD)}


def sections(source):
    """{name: text with its banner} of a script, in order."""
    header, *rest = re.split(r'^(?=#### )', source, flags=re.MULTILINE)
    return {'Header': header} | {re.match(r'#### (.*?) #*\n', text)[1]: text for text in rest}


def faults(source, declared, originals):
    """What is wrong with a copy, as a list of lines. declared: as `origins` makes it."""
    copy = sections(source)
    lines = [f'{name} is declared neither shared nor own' for name in copy if name not in declared]
    lines += [f'{name} is missing' for name in declared if name not in copy]
    for name, origin in declared.items():
        if origin and name in copy and copy[name] != originals[origin][name]:
            lines.append(f'{name} differs from {origin}')
    if not lines and list(copy) != list(declared):
        lines.append('the order of the sections is another')
    return lines


def repaired(source, declared, originals):
    """The copy's source, with all sections but its own taken from where they are declared."""
    copy = sections(source)
    parts = [originals[origin][name] if origin else copy[name] for name, origin in declared.items()]
    return ''.join(parts)


def main():
    argparse.ArgumentParser(
        description="Copy the originals' shared sections over the other scripts'."
    ).parse_args()
    for name, declared in COPIES.items():  # the record before those that copy from it
        copy = (ROOT / name).read_text()
        sources = originals()
        print(f'{name}:', '; '.join(faults(copy, declared, sources)) or 'was up to date')
        (ROOT / name).write_text(repaired(copy, declared, sources))


if __name__ == '__main__':
    main()
