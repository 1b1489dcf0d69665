"""Triton kernels that give the results of the scripts' torch functions with fewer launches and bytes.

    from kernels import flip_crop, lookahead, mean, require, running_mean

Importing them needs neither a GPU nor Triton; running them needs both, or Triton's interpreter (TRITON_INTERPRET=1).
Each of the two files stands alone: it can be copied into another project.
"""

import os

import torch

from kernels.flip_crop import flip_crop, triton
from kernels.weight_average import lookahead, mean, running_mean


def require(device):
    """Raise RuntimeError, or an error of Triton's, if the kernels cannot run on `device`, a torch.device."""
    interpreted = os.environ.get('TRITON_INTERPRET') == '1'
    if triton is None:
        raise RuntimeError('Triton is not installed')
    if device.type != ('cpu' if interpreted else 'cuda'):
        raise RuntimeError(f'{device} is none; TRITON_INTERPRET=1 interprets them on the CPU, slowly, and only there')
    if device.type == 'cuda' and torch.version.cuda and torch.cuda.get_device_capability(device) < (8, 0):
        raise RuntimeError(f'Triton needs compute capability 8.0; {torch.cuda.get_device_name(device)} has less')
    lookahead([torch.zeros(8, device=device)], [torch.zeros(8, device=device)], 0.5)    # Triton may lack a C compiler
