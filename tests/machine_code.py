"""The kernels' machine code, which needs no GPU to be made: registers, spills, widths of loads and stores.

    python tests/machine_code.py

For NVIDIA's 8.0 (A100) and 9.0 (H100), disassembled by the tools in the triton package, and for AMD's gfx942 (MI300).
Instructions are those of the program's text, and of the longest loop in it (not counted for AMD); flip_crop's is
executed four times for a 32 x 32 image.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from importlib import import_module
from pathlib import Path

os.environ['TRITON_INTERPRET'] = '0'    # interpreted functions cannot be compiled
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {'sm_80': GPUTarget('cuda', 80, 32), 'sm_90': GPUTarget('cuda', 90, 32),
           'gfx942': GPUTarget('hip', 'gfx942', 64)}
TOOLS = Path(triton.__file__).parent / 'backends' / 'nvidia' / 'bin'
COLUMNS = ('kernel', 'target', 'registers', 'spilled', 'instructions', 'loop', 'loads', 'stores')


def kernels():
    """{name: (kernel, types of its arguments, constants, options)}, as the launchers call them."""
    flip_crop, average = (import_module(f'kernels.{name}') for name in ('flip_crop', 'weight_average'))
    arguments = {'images': '*u8', 'index': '*i64', 'flip': '*i1', 'shift': '*i64', 'corner': '*i64', 'mean': '*fp32',
                 'std': '*fp32', 'size': 'i32'}
    shape = {'HEIGHT': 32, 'WIDTH': 32, 'CHANNELS': 3, 'ROWS': flip_crop.ROWS, 'COLUMNS': 128}
    blocks = {'ALIGNED': True, 'BLOCK': average.BLOCK}
    options = {'num_warps': average.WARPS}
    found = {f'flip_crop {dtype}{" cutout" * cutout}': (
        flip_crop._flip_crop_kernel, {'batch': f'*{dtype}'} | arguments, shape | {'CUTOUT': cutout},
        {'num_warps': 1, 'enable_fp_fusion': False}) for dtype in ('fp16', 'bf16', 'fp32') for cutout in (False, True)}
    for name, copy_back in (('lookahead', True), ('running_mean', False)):
        found[name] = average._lerp_kernel, {'table': '*i64', 'share': 'fp32'}, blocks | {'COPY_BACK': copy_back}, options
    found['mean'] = average._mean_kernel, {'table': '*i64', 'networks': 'i32'}, blocks, options
    return found


def compiled(kernel, types, constants, options, target):
    names = kernel.arg_names
    signature = {name: types.get(name, 'constexpr') for name in names}
    attributes = {(i,): [['tt.divisibility', 16]] for i, name in enumerate(names) if signature[name].startswith('*')}
    constants = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=target, options=options)


def disassemble(cubin):
    """(text of the machine code, {'REG': registers, 'STACK': bytes, 'LOCAL': bytes}) of an NVIDIA binary."""
    with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
        Path(file.name).write_bytes(cubin)
        text, usage = (subprocess.run([TOOLS / tool, option, file.name], capture_output=True, text=True, check=True).stdout
                       for tool, option in (('nvdisasm', '-c'), ('cuobjdump', '-res-usage')))
    return text, {key: int(value) for key, value in re.findall(r'(REG|STACK|LOCAL):(\d+)', usage)}


def sass_report(cubin):
    """COLUMNS from 'registers' on of an NVIDIA binary; stores and loads are counted by their bytes a thread."""
    text, used = disassemble(cubin)
    code = re.findall(r'/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]+)', text)

    def widths(kind):
        suffixes = [re.search(r'\.[US]?(8|16|64|128)$', name) for name in code if name.startswith(kind)]
        return Counter(int(suffix[1]) // 8 if suffix else 4 for suffix in suffixes)

    spilled = used['STACK'] + used['LOCAL'] + sum(name.startswith(('LDL', 'STL')) for name in code)
    return used['REG'], spilled, len(code), loop_length(text), widths('LDG'), widths('STG')


def loop_length(text):
    """Instructions between a label and the branch back to it, in the loop that has most; 0 without one."""
    place, labels, longest = 0, {}, 0
    for line in text.splitlines():
        if label := re.match(r'(\.L_\w+):', line):
            labels[label[1]] = place
        elif re.search(r'/\*[0-9a-f]{4,}\*/', line):
            place += 1
            target = re.search(r'\bBRA\b.*?`\((\.L_\w+)\)', line)
            if target and target[1] in labels and labels[target[1]] < place - 1:
                longest = max(longest, place - labels[target[1]])
    return longest


def amd_report(text):
    """The same of AMD's assembly."""
    number = lambda key: int(re.search(rf'\.{key}:\s+(\d+)', text)[1])
    sizes = {'byte': 1, 'ubyte': 1, 'short': 2, 'ushort': 2, 'dword': 4, 'dwordx2': 8, 'dwordx3': 12, 'dwordx4': 16}

    def widths(kind):
        return Counter(sizes[size] for size in re.findall(rf'\b(?:buffer|global|flat)_{kind}_(\w+)', text))

    spilled = number('private_segment_fixed_size') + number('vgpr_spill_count') + number('sgpr_spill_count')
    code = re.findall(r'^\t[a-z]\w+', text, re.MULTILINE)
    return number('vgpr_count'), spilled, len(code), 0, widths('load'), widths('store')


def report():
    """Rows of COLUMNS for all kernels and targets."""
    for name, source in kernels().items():
        for target, gpu in TARGETS.items():
            binary = compiled(*source, gpu)
            columns = sass_report(binary.asm['cubin']) if gpu.backend == 'cuda' else amd_report(binary.asm['amdgcn'])
            yield dict(zip(COLUMNS, (name, target, *columns)))


def main():
    form = '{:21} {:7} {:>9} {:>7} {:>12} {:>5}  {:22} {}'
    print('loads and stores: bytes a thread x how many\n' + form.format(*COLUMNS))
    for row in report():
        for key in ('loads', 'stores'):
            row[key] = ', '.join(f'{width} x {n}' for width, n in sorted(row[key].items()))
        print(form.format(*row.values()))


if __name__ == '__main__':
    main()
