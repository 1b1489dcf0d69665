"""The recipes repeat each other on purpose. This keeps what they share the same.

    python tests/copies.py      # copies the originals' shared sections over the other recipes'

A section starts with its banner, `#### Name ####...`, and ends before the next one. What comes
before the first banner is the Header. test_copies.py fails if a shared section differs from its
original, or if a section is not declared here.
"""

import argparse
import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ORIGINAL = 'airbench94.py'
RECORD = 'records/record94.py'  # the original of what record95.py and swap94.py share with it
AIRBENCH = [
    'Header', 'Imports', 'Hyperparameters', 'Data', 'Augmentation and loader', 'Network',
    'Whitening', 'Optimizer', 'Lookahead', 'Loss and evaluation', 'Training', 'Fast path',
    'Helpers', 'Main',
]  # fmt: skip
IN_RECORD = [
    'Header', 'Imports', 'Hyperparameters', 'Data', 'Augmentation and loader', 'Network',
    'Whitening', 'Optimizer', 'Moving average', 'Loss and evaluation', 'Uncertain images',
    'Growth and selection', 'Training', 'Fast path', 'Helpers', 'Main',
]  # fmt: skip
IN_SWAP = [
    'Header', 'Imports', 'Hyperparameters', 'Data', 'Augmentation and loader', 'Network',
    'Whitening', 'Optimizer', 'Moving average', 'Loss and evaluation', 'Growth and selection',
    'Ranks', 'Training', 'Averaging', 'SWAP', 'Fast path', 'Helpers', 'Main',
]  # fmt: skip
OWN = ['Header', 'Hyperparameters']
OWN_OF_RECORD = [
    *OWN, 'Network', 'Optimizer', 'Moving average', 'Uncertain images', 'Growth and selection',
    'Training', 'Fast path',
]  # fmt: skip
OWN_OF_SWAP = [
    *OWN, 'Imports', 'Network', 'Ranks', 'Training', 'Averaging', 'SWAP', 'Fast path', 'Main',
]  # fmt: skip


def origins(order, own, of_record=()):
    """{section: the recipe that it is copied from, or None if it is the copy's own}, in order."""
    declared = dict.fromkeys(order, ORIGINAL)
    return declared | dict.fromkeys(of_record, RECORD) | dict.fromkeys(own)


COPIES = {  # the record comes before the recipe that copies from it
    'airbench95.py': origins(AIRBENCH, OWN),
    'airbench96.py': origins(AIRBENCH, OWN),
    RECORD: origins(IN_RECORD, OWN_OF_RECORD),
    'records/record95.py': origins(IN_RECORD, OWN, OWN_OF_RECORD),
    'swap94.py': origins(
        IN_SWAP, OWN_OF_SWAP, ['Optimizer', 'Moving average', 'Growth and selection']
    ),
}


def sections(source):
    """{name: text with its banner} of a recipe, in order."""
    header, *rest = re.split(r'^(?=#### )', source, flags=re.MULTILINE)
    return {'Header': header} | {re.match(r'#### (.*?) #*\n', text)[1]: text for text in rest}


def originals():
    """{name: sections} of the recipes that others copy from."""
    return {name: sections((ROOT / name).read_text()) for name in (ORIGINAL, RECORD)}


def faults(source, declared, originals):
    """What is wrong with a copy, as a list of lines. `declared` is one of COPIES."""
    copy = sections(source)
    lines = [f'{name} is declared neither shared nor own' for name in copy if name not in declared]
    lines += [f'{name} is missing' for name in declared if name not in copy]
    for name, origin in declared.items():
        if origin and name in copy and copy[name] != originals[origin][name]:
            lines.append(f'{name} differs from {origin}')
    if not lines and list(copy) != list(declared):
        lines.append('the sections are in another order')
    return lines


def repaired(source, declared, originals):
    """The copy's source, with its shared sections copied anew from their originals.

    Raises KeyError if one of its own sections is missing.
    """
    copy = sections(source)
    parts = [originals[origin][name] if origin else copy[name] for name, origin in declared.items()]
    return ''.join(parts)


def main():
    argparse.ArgumentParser(
        description="Copy the originals' shared sections over the other recipes'."
    ).parse_args()
    is_whole = True
    for name, declared in COPIES.items():
        file = ROOT / name
        source = file.read_text()
        found = faults(source, declared, originals())
        lost = [section for section in sections(source) if section not in declared]
        lost += [s for s, origin in declared.items() if not origin and s not in sections(source)]
        if lost:
            is_whole = False
            print(f'{name}: NOT repaired, since {"; ".join(found)}')
            continue
        if found:
            temporary = file.with_suffix('.tmp')
            temporary.write_text(repaired(source, declared, originals()))
            temporary.chmod(file.stat().st_mode)
            os.replace(temporary, file)
        print(f'{name}: {"repaired: " + "; ".join(found) if found else "was up to date"}')
    if not is_whole:
        sys.exit('A section that this tool does not know was added, or an own one is missing.')


if __name__ == '__main__':
    main()
