"""The kernels compile for A100, H100 and MI300 without spills and with wide stores.

Three counterexamples show that the checks can fail.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip('triton', reason='needs Triton')

# Another process compiles the kernels, since Triton may interpret them in this one.
PROGRAM = """
import json
import machine_code

rows = list(machine_code.report())
narrow = machine_code.lerp_source(aligned=False)
rows.append(machine_code.report_row('narrow', narrow, 'sm_80'))
*cramped, options = machine_code.sources()['flip_crop fp16']
rows.append(machine_code.report_row('cramped', (*cramped, options | {'maxnreg': 24}), 'sm_80'))
rows.append(machine_code.report_row('divide', machine_code.divide_source(), 'sm_80'))
print(json.dumps(rows))
"""


@pytest.fixture(scope='module')
def rows():
    """{(kernel, target): row of the report}."""
    done = subprocess.run(
        [sys.executable, '-c', PROGRAM], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return {(row['kernel'], row['target']): row for row in json.loads(done.stdout)}


def test_every_kernel_compiles_for_every_target(rows):
    assert len(rows) == 8 * 3 + 3
    assert {target for _, target in rows} == {'sm_80', 'sm_90', 'gfx942'}


def test_no_kernel_spills(rows):
    spilling = [key for key, row in rows.items() if row['spilled'] > 0]
    assert spilling == [('cramped', 'sm_80')]


def test_all_stores_are_16_bytes_wide(rows):
    narrow = [key for key, row in rows.items() if set(row['stores']) != {'16'}]
    assert narrow == [('narrow', 'sm_80'), ('divide', 'sm_80')]


def test_flip_crop_subtracts_and_multiplies_separately(rows):
    """As torch does. A fused multiply-add would round otherwise than the recipes' augment."""
    fused = {kernel for (kernel, _), row in rows.items() if row['fused'] > 0}
    assert fused == {'lookahead', 'mean', 'narrow'}


def test_divisions_round_to_nearest(rows):
    """As torch's do. Triton's plain division becomes div.full, which may be wrong in two bits."""
    rough = [key for key, row in rows.items() if row['rough'] > 0]
    assert rough == [('divide', 'sm_80')]
