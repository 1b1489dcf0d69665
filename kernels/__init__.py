"""Triton kernels that give the results of the scripts' torch functions with fewer launches and bytes.

    from kernels import flip_crop, lookahead, mean, require, running_mean

Importing them needs neither a GPU nor Triton; running them needs both, or Triton's interpreter (TRITON_INTERPRET=1).
Each of the two files stands alone: it can be copied into another project.
"""

import torch

from kernels.flip_crop import flip_crop, triton
from kernels.weight_average import _lerp_kernel, lookahead, mean, running_mean


def require(device):
    """Raise RuntimeError, or an error of Triton's, if the kernels cannot run on `device`, a torch.device."""
    if triton is None:
        raise RuntimeError('Triton is not installed')
    if device.type != ('cuda' if isinstance(_lerp_kernel, triton.JITFunction) else 'cpu'):
        raise RuntimeError(f'the device is {device}; TRITON_INTERPRET=1 interprets them, slowly, on the CPU alone')
    if device.type == 'cuda' and torch.version.cuda and torch.cuda.get_device_capability(device) < (8, 0):
        raise RuntimeError(f'Triton needs compute capability 8.0; {torch.cuda.get_device_name(device)} has less')
    lookahead([torch.zeros(8, device=device)], [torch.zeros(8, device=device)], 0.5)    # Triton may lack a C compiler
