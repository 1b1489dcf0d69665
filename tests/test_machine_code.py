"""The kernels' machine code, compiled without a GPU: no spills, no local memory, wide stores."""

import re
import subprocess
from importlib import import_module
from pathlib import Path

import pytest

triton = pytest.importorskip('triton', reason='needs Triton')
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {'sm_80': GPUTarget('cuda', 80, 32), 'sm_90': GPUTarget('cuda', 90, 32), 'gfx942': GPUTarget('hip', 'gfx942', 64)}
TOOLS = Path(triton.__file__).parent / 'backends' / 'nvidia' / 'bin'
flip_crop, weight_average = (import_module(f'kernels.{name}') for name in ('flip_crop', 'weight_average'))


def flip_crop_source(dtype, cutout):
    signature = {'batch': f'*{dtype}', 'images': '*u8', 'index': '*i64', 'flip': '*i1', 'shift': '*i64', 'corner': '*i64',
                 'mean': '*fp32', 'std': '*fp32', 'size': 'i32'}
    constants = {'HEIGHT': 32, 'WIDTH': 32, 'CHANNELS': 3, 'CUTOUT': cutout, 'ROWS': flip_crop.ROWS, 'COLUMNS': 128}
    return flip_crop._flip_crop_kernel, signature, constants, {'num_warps': 1, 'enable_fp_fusion': False}


def lerp_source(copy_back):
    return (weight_average._lerp_kernel, {'table': '*i64', 'share': 'fp32'},
            {'COPY_BACK': copy_back, 'ALIGNED': True, 'BLOCK': weight_average.BLOCK}, {'num_warps': weight_average.WARPS})


def mean_source():
    return (weight_average._mean_kernel, {'table': '*i64', 'networks': 'i32'},
            {'ALIGNED': True, 'BLOCK': weight_average.BLOCK}, {'num_warps': weight_average.WARPS})
