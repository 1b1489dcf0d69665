"""What a recipe's --compile uses besides CUDA graphs (graph.py).

forward = compiled(forward)  # torch.compile with our settings
loader.augment = faster_augment(loader)  # flip_crop if it fits
"""

import copy
import os

import torch
from torch._inductor import config as inductor_config

from kernels.flip_crop import flip_crop, runs_on, triton


def compiled(function):
    """torch.compile(function), for inputs of fixed shapes.

    This also changes settings of torch.compile for the whole process.
    """
    if 'TORCHINDUCTOR_COMPILE_THREADS' not in os.environ:
        # Otherwise each process on this machine would use all cores to compile.
        processes = int(os.environ.get('LOCAL_WORLD_SIZE') or 1)
        inductor_config.compile_threads = max(1, min(32, os.cpu_count() // processes))
    # Otherwise torch 2.11 does not notice that a bias is frozen, and goes on training it.
    torch._dynamo.config.skip_tensor_guards_with_matching_dict_tags = False
    return torch.compile(function, fullgraph=True, dynamic=False)


def faster_augment(loader):
    """flip_crop if it can replace loader.augment, otherwise loader.augment.

    It can if it gives the same bits on the next batch, in the loader's dtype and with its
    augmentation. If it cannot, this prints why.
    """
    reason = why_not_here(loader.device)
    if reason is None:
        try:
            if torch.equal(first_batch(loader, flip_crop), first_batch(loader, loader.augment)):
                return flip_crop
            reason = "its batch differs from that of the recipe's augment, which was edited"
        except Exception as error:  # Triton has errors of many kinds, such as a missing compiler
            reason = ' '.join(str(error).split()[:40]) or repr(error)
    print(f'flip_crop, the Triton kernel, is not used: {reason}', flush=True)
    return loader.augment


def why_not_here(device):
    """Why the kernels cannot run on `device`, or None if they can."""
    if triton is None:
        return 'Triton is not installed'
    if not runs_on(device):
        return f'the device is {device}; TRITON_INTERPRET=1 runs the kernels on a CPU'
    if device.type == 'cuda' and torch.version.cuda:
        if torch.cuda.get_device_capability(device) < (8, 0):
            name = torch.cuda.get_device_name(device)
            return f'Triton needs a GPU of compute capability 8.0, and {name} has less'
    return None


def first_batch(loader, augment):
    """The inputs that the loader would serve next with `augment`. The loader stays as it is."""
    loader = copy.copy(loader)
    loader.augment = augment
    inputs, _ = next(iter(loader))
    return inputs
