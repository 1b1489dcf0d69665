"""Triton kernels with the results of the scripts' torch functions, in fewer launches and bytes.

    from kernels import flip_crop, lookahead, mean, require, running_mean

Importing them needs neither a GPU nor Triton. Running them needs both, or Triton's interpreter,
which is slow: TRITON_INTERPRET=1 in the environment, before they are imported. The two files
flip_crop.py and weight_average.py stand alone: each can be copied into another project.
"""

import torch

from kernels.flip_crop import flip_crop, flip_crop_ref, runs_on, triton
from kernels.weight_average import lookahead, lookahead_ref, mean, running_mean, running_mean_ref

__all__ = ['flip_crop', 'lookahead', 'mean', 'require', 'running_mean']


def require(device, augment=flip_crop_ref, lookahead_torch=lookahead_ref):
    """Run the kernels that train on `device`, a torch.device, and compare them with torch.

    They are flip_crop, lookahead and running_mean, in fp16 and fp32. flip_crop is compiled for the
    shape of CIFAR-10's images, as training needs it. augment, lookahead_torch: what the kernels
    stand in for, by default the references here; a script passes its own, which somebody may have
    edited.

    Raises RuntimeError, in one line, if they cannot run there or give another result, and Triton's
    own errors if it cannot compile them, for example without a C compiler.
    """
    if triton is None:
        raise RuntimeError('Triton is not installed')
    if not runs_on(device):
        raise RuntimeError(f'the device is {device}; TRITON_INTERPRET=1 runs the kernels on a CPU')
    if device.type == 'cuda' and torch.version.cuda:
        if torch.cuda.get_device_capability(device) < (8, 0):
            name = torch.cuda.get_device_name(device)
            raise RuntimeError(f'Triton needs compute capability 8.0; {name} has less')
    check_flip_crop(device, augment)
    check_averages(device, lookahead_torch)


def check_flip_crop(device, augment):
    """Raise RuntimeError unless flip_crop gives the bits that augment gives."""
    numbers = torch.arange(2 * 32 * 32 * 3, device=device) * 7 % 251
    images = numbers.to(torch.uint8).view(2, 32, 32, 3)
    index = torch.tensor([1, 0], device=device)
    flip = torch.tensor([True, False], device=device)
    shift = torch.tensor([[2, -1], [-2, 1]], device=device)
    corner = torch.tensor([[3, 20], [0, 9]], device=device)
    mean = torch.tensor([125.3, 123.0, 113.9], device=device)
    scale = 1 / torch.tensor([63.0, 62.1, 66.7], device=device)
    for dtype in (torch.float16, torch.float32):
        for size in (0, 12):
            arguments = (images, index, flip, shift, corner, size)
            options = {'mean': mean, 'scale': scale, 'dtype': dtype}
            batch = flip_crop(*arguments, **options)
            expected = augment(*arguments, **options)
            if not torch.equal(batch, expected):  # which waits for the device
                case = f'{dtype}, size={size}, on {device}'
                raise RuntimeError(f'flip_crop does not do what augment does: {case}')


def sample_lists(device):
    """Averages and weights for check_averages: two lists of an fp16 and an fp32 tensor.

    They are whole numbers, and quarters of their differences are exact in fp16: however a formula
    rounds, the results are the same bits. They have more elements than a block of the kernel's.
    """
    numbers = torch.arange(5000, device=device)
    averages = numbers % 41 - 20
    weights = numbers % 7
    dtypes = (torch.float16, torch.float32)
    return [averages.to(dtype) for dtype in dtypes], [weights.to(dtype) for dtype in dtypes]


def check_averages(device, lookahead_torch):
    """Raise RuntimeError unless lookahead and running_mean average as torch does."""
    for name, average, average_ref, argument in (
        ('lookahead', lookahead, lookahead_torch, 0.75),
        ('running_mean', running_mean, running_mean_ref, 3),
    ):
        averages, weights = sample_lists(device)
        expected_averages, expected_weights = sample_lists(device)
        average(averages, weights, argument)
        average_ref(expected_averages, expected_weights, argument)
        for got, expected in zip(averages + weights, expected_averages + expected_weights):
            if not torch.equal(got, expected):  # which waits for the device
                case = f'{got.dtype}, on {device}'
                raise RuntimeError(f"{name} does not do what torch's {name} does: {case}")
