"""The kernels' machine code, without a GPU: registers, spills, widths of loads and stores.

    python tests/machine_code.py

For NVIDIA's 8.0 (A100) and 9.0 (H100), disassembled with the tools in the triton package, and for
AMD's gfx942 (MI300). The instructions are those in the program's text and, except for AMD, those in
its longest loop. flip_crop runs its loop four times for a 32 x 32 image. The column 'fused' counts
fp32 multiply-adds that round once. The column 'rough' counts divisions that may be wrong in the
last bits, in the PTX of NVIDIA's.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

os.environ['TRITON_INTERPRET'] = '0'  # interpreted functions cannot be compiled
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import mangle_type

from kernels.flip_crop import ROWS, _flip_crop_kernel
from kernels.weight_average import BLOCK, OPTIONS, _lerp_kernel, _mean_kernel

TARGETS = {
    'sm_80': GPUTarget('cuda', 80, 32),
    'sm_90': GPUTarget('cuda', 90, 32),
    'gfx942': GPUTarget('hip', 'gfx942', 64),
}
TOOLS = Path(triton.__file__).parent / 'backends' / 'nvidia' / 'bin'
COLUMNS = (
    'kernel',
    'target',
    'registers',
    'spilled',
    'instructions',
    'loop',
    'fused',
    'rough',
    'loads',
    'stores',
)
AMD_BYTES = {
    'byte': 1,
    'ubyte': 1,
    'short': 2,
    'ushort': 2,
    'dword': 4,
    'dwordx2': 8,
    'dwordx3': 12,
    'dwordx4': 16,
}


#### Compiling #####################################################################################


def pointer(dtype):
    """Triton's name for the type of a tensor's address, for example '*u1' for torch.bool."""
    return mangle_type(torch.empty(0, dtype=dtype))


def flip_crop_source(dtype, cutout):
    """(kernel, types of its arguments, constants, options): what flip_crop launches."""
    types = {
        'batch': pointer(dtype),
        'images': pointer(torch.uint8),
        'index': pointer(torch.int64),
        'flip': pointer(torch.bool),
        'shift': pointer(torch.int64),
        'corner': pointer(torch.int64),
        'mean': pointer(torch.float32),
        'scale': pointer(torch.float32),
        'size': 'i32',
    }
    constants = {
        'HEIGHT': 32,
        'WIDTH': 32,
        'CHANNELS': 3,
        'CUTOUT': cutout,
        'ROWS': ROWS,
        'COLUMNS': 128,
    }
    return _flip_crop_kernel, types, constants, {'num_warps': 1, 'enable_fp_fusion': False}


def lerp_source(aligned=True):
    """The same for lookahead."""
    types = {'table': pointer(torch.int64), 'share': 'fp32'}
    constants = {'ALIGNED': aligned, 'BLOCK': BLOCK}
    return _lerp_kernel, types, constants, OPTIONS


def mean_source():
    """The same for mean, of eight networks."""
    constants = {'NETWORKS': 8, 'ALIGNED': True, 'BLOCK': BLOCK}
    return _mean_kernel, {'table': pointer(torch.int64)}, constants, OPTIONS


@triton.jit
def _divide_kernel(result, divisor):
    tl.store(result, 1.0 / divisor)


def divide_source():
    """The same for a division as Triton makes it unless told otherwise."""
    return _divide_kernel, {'result': pointer(torch.float32), 'divisor': 'fp32'}, {}, {}


def sources():
    """{name: (kernel, types, constants, options)} of all kernels."""
    found = {}
    for name, dtype in (('fp16', torch.float16), ('bf16', torch.bfloat16), ('fp32', torch.float32)):
        found[f'flip_crop {name}'] = flip_crop_source(dtype, cutout=False)
        found[f'flip_crop {name} cutout'] = flip_crop_source(dtype, cutout=True)
    found['lookahead'] = lerp_source()
    found['mean'] = mean_source()
    return found


def compiled(kernel, types, constants, options, target):
    """Compile as the launcher does for tensors that start at multiples of 16 bytes."""
    names = kernel.arg_names
    signature = {name: types.get(name, 'constexpr') for name in names}
    attributes = {}
    for place, name in enumerate(names):
        if signature[name].startswith('*'):
            attributes[place,] = [['tt.divisibility', 16]]
    constants = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=target, options=options)


#### Reading #######################################################################################


def run_tool(name, option, path):
    return subprocess.run([TOOLS / name, option, path], capture_output=True, text=True, check=True)


def disassemble(cubin):
    """(text, usage) of an NVIDIA binary: its machine code, and {'REG': registers, ...}."""
    with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
        Path(file.name).write_bytes(cubin)
        text = run_tool('nvdisasm', '-c', file.name).stdout
        usage = run_tool('cuobjdump', '-res-usage', file.name).stdout
    counts = re.findall(r'(REG|STACK|LOCAL):(\d+)', usage)
    return text, {key: int(value) for key, value in counts}


def sass_widths(names, kind):
    """{bytes that a thread moves at once: how many instructions}, for one kind of instruction."""
    widths = Counter()
    for name in names:
        if name.startswith(kind):
            suffix = re.search(r'\.[US]?(8|16|64|128)$', name)
            widths[int(suffix[1]) // 8 if suffix else 4] += 1
    return widths


def longest_loop(text):
    """How many instructions the longest loop has, from its label to the branch back; or 0."""
    place = 0
    labels = {}
    longest = 0
    for line in text.splitlines():
        label = re.match(r'(\.L_\w+):', line)
        if label:
            labels[label[1]] = place
        elif re.search(r'/\*[0-9a-f]{4,}\*/', line):
            place += 1
            branch = re.search(r'\bBRA\b.*?`\((\.L_\w+)\)', line)
            # A branch to itself is no loop. It ends the program's text.
            if branch and labels.get(branch[1], place) < place - 1:
                longest = max(longest, place - labels[branch[1]])
    return longest


def sass_report(asm):
    """The values for COLUMNS from 'registers' on, for an NVIDIA binary."""
    text, usage = disassemble(asm['cubin'])
    names = re.findall(r'/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]+)', text)
    spilled = usage['STACK'] + usage['LOCAL']
    for name in names:
        if name.startswith(('LDL', 'STL')):  # loads and stores of local memory
            spilled += 1
    fused = sum(name.startswith('FFMA') for name in names)
    rough = len(re.findall(r'\b(?:div|rcp)\.(?:full|approx)', asm['ptx']))
    loads = sass_widths(names, 'LDG')
    stores = sass_widths(names, 'STG')
    return usage['REG'], spilled, len(names), longest_loop(text), fused, rough, loads, stores


def amd_number(text, key):
    return int(re.search(rf'\.{key}:\s+(\d+)', text)[1])


def amd_widths(text, kind):
    sizes = re.findall(rf'\b(?:buffer|global|flat)_{kind}_(\w+)', text)
    return Counter(AMD_BYTES[size] for size in sizes)


def amd_report(text):
    """The same for AMD's assembly."""
    spilled = 0
    for key in ('private_segment_fixed_size', 'vgpr_spill_count', 'sgpr_spill_count'):
        spilled += amd_number(text, key)
    names = re.findall(r'^\t[a-z]\w+', text, re.MULTILINE)
    registers = amd_number(text, 'vgpr_count')
    fused = len(re.findall(r'\bv_(?:pk_)?fmac?_f32', text))
    loads = amd_widths(text, 'load')
    stores = amd_widths(text, 'store')
    return registers, spilled, len(names), 0, fused, 0, loads, stores


def report_row(name, source, target):
    """{column: value}."""
    binary = compiled(*source, TARGETS[target])
    if TARGETS[target].backend == 'cuda':
        values = sass_report(binary.asm)
    else:
        values = amd_report(binary.asm['amdgcn'])
    return dict(zip(COLUMNS, (name, target, *values)))


def report():
    """The rows of all kernels and targets."""
    for name, source in sources().items():
        for target in TARGETS:
            yield report_row(name, source, target)


def main():
    form = '{:21} {:7} {:>9} {:>7} {:>12} {:>5} {:>5} {:>5}  {:22} {}'
    print(f'triton {triton.__version__}; loads and stores: bytes per thread x how many')
    print(form.format(*COLUMNS))
    for row in report():
        for key in ('loads', 'stores'):
            row[key] = ', '.join(f'{width} x {n}' for width, n in sorted(row[key].items()))
        print(form.format(*row.values()))


if __name__ == '__main__':
    main()
