"""The kernels compile for A100, H100 and MI300 without spills and with wide stores, and the check of that can fail."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip('triton', reason='needs Triton')

PROGRAM = """
import json, machine_code as m
rows = list(m.report())
kernel, types, constants, options = m.kernels()['lookahead']
narrow = m.compiled(kernel, types, constants | {'ALIGNED': False}, options, m.TARGETS['sm_80'])
kernel, types, constants, options = m.kernels()['flip_crop fp16']
cramped = m.compiled(kernel, types, constants, options | {'maxnreg': 24}, m.TARGETS['sm_80'])
for name, binary in (('narrow', narrow), ('cramped', cramped)):
    rows.append(dict(zip(m.COLUMNS, (name, 'sm_80', *m.sass_report(binary.asm['cubin'])))))
print(json.dumps(rows))
"""


@pytest.fixture(scope='module')
def rows():
    """{(kernel, target): row of the report}, made by a process of its own: this one's kernels may be interpreted."""
    done = subprocess.run([sys.executable, '-c', PROGRAM], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {(row['kernel'], row['target']): row for row in json.loads(done.stdout)}


def narrowest_store(row):
    return min(map(int, row['stores']))


def test_every_kernel_is_there_for_every_target(rows):
    assert len(rows) == 9 * 3 + 2
    assert {target for _, target in rows} == {'sm_80', 'sm_90', 'gfx942'}


def test_no_kernel_spills(rows):
    assert {key: row['spilled'] for key, row in rows.items() if row['spilled']}.keys() == {('cramped', 'sm_80')}


def test_all_stores_are_wide(rows):
    assert {key: narrowest_store(row) for key, row in rows.items() if narrowest_store(row) < 8}.keys() == {('narrow', 'sm_80')}


def test_registers_and_instructions_are_as_few_as_they_were(rows):
    for (kernel, target), row in rows.items():
        if kernel.startswith('flip_crop') and target != 'gfx942':
            executed = row['instructions'] + 3 * row['loop']    # four rounds of the loop make an image
            assert row['loop'] > 0 and 32 * executed <= 82_000 and row['registers'] <= 96, (kernel, target)
        elif kernel in ('lookahead', 'running_mean', 'mean'):
            assert row['registers'] <= 64, (kernel, target)
