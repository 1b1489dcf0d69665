"""The device to train on, and what a record says about the machine."""

import os
import platform
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import torch

from lab.errors import UserError

DTYPES = ('float32', 'bfloat16', 'float16')


def number_from(variable, default):
    """The number in an environment variable, or `default` if it is empty or not there."""
    text = os.environ.get(variable) or default
    if not str(text).isdecimal():
        raise UserError(f'{variable}={text} in the environment: must be a number')
    return int(text)


def process_count():
    """How many processes torchrun, or another launcher, started for this command."""
    return max(1, number_from('WORLD_SIZE', 1))


def rank():
    """This process's number among them, from 0."""
    return number_from('RANK', 0) if process_count() > 1 else 0


def is_first_process():
    return rank() == 0


def has_unusable_gpu():
    """Whether there is an NVIDIA GPU that this torch, built for CUDA, cannot use."""
    hidden = os.environ.get('CUDA_VISIBLE_DEVICES') in ('', '-1')
    devices = list(Path('/dev').glob('nvidia[0-9]*'))
    return bool(devices and not hidden and torch.version.cuda and not torch.cuda.is_available())


def pick_device(name=None):
    """The device called `name`, or the best available one. Under torchrun, each process has a GPU.

    Raises UserError if there is no such device, or if there is a GPU without a usable driver.
    """
    if name is None:
        if has_unusable_gpu():
            raise UserError('this torch finds no driver for the NVIDIA GPU; see nvidia-smi')
        name = 'cpu'
        if torch.cuda.is_available():
            name = 'cuda'
        elif torch.backends.mps.is_available():
            name = 'mps'
    if name == 'cuda':
        name = f'cuda:{number_from("LOCAL_RANK", 0)}'
    try:
        torch.zeros(1, device=name).item()
    except Exception as error:  # which kind depends on how torch was built
        raise UserError(f'--device {name}: there is no such device here') from error
    device = torch.device(name)
    if device.type == 'cuda':
        torch.cuda.set_device(device)  # CUDA graphs synchronize the current device
    return device


def pick_dtype(name, device):
    """The torch dtype called `name`, or the device's default. Raises UserError."""
    if name is None:
        name = 'float16' if device.type == 'cuda' else 'float32'
    if device.type == 'cpu' and name == 'float16':
        raise UserError('--dtype float16 needs a GPU; CPUs have bfloat16')
    if device.type == 'cpu' and name == 'bfloat16' and not torch.cpu._is_avx512_bf16_supported():
        print('this CPU has no bfloat16 arithmetic; emulating it takes longer than float32')
    return getattr(torch, name)


def describe_device(device):
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    capability = torch.backends.cpu.get_cpu_capability()
    return f'{platform.machine()} {device.type}, {capability}, {torch.get_num_threads()} threads'


def find_commit():
    """This repository's commit, with '-dirty' if files differ from it, or None without git."""
    command = ['git', 'describe', '--always', '--exclude=*', '--abbrev=40', '--dirty']
    options = {'cwd': Path(__file__).parent, 'stderr': subprocess.DEVNULL, 'text': True}
    with suppress(OSError, subprocess.CalledProcessError):  # no git, or no repository
        return subprocess.check_output(command, **options).strip()
    return None


def describe_machine(device):
    """What may differ between the runs of a log. Each run's record has its own."""
    return {
        'argv': sys.argv,
        'device': describe_device(device),
        'commit': find_commit(),
        'python': platform.python_version(),
        'torch': torch.__version__,
    }
