"""Faster versions of the recipes' functions: Triton kernels, CUDA graphs and torch.compile.

    from kernels import GraphedStep, compiled, faster_augment
    from kernels import flip_crop, lookahead, mean, prepare_lookahead

You can import them without a GPU and without Triton. To run the kernels you need both, or
Triton's interpreter, which is slow: set TRITON_INTERPRET=1 before you import them. flip_crop.py and
weight_average.py stand alone: you can copy each of them into another project.
"""

from kernels.fast_path import compiled, faster_augment
from kernels.flip_crop import flip_crop
from kernels.graph import GraphedStep
from kernels.weight_average import lookahead, mean, prepare_lookahead

__all__ = [
    'GraphedStep',
    'compiled',
    'faster_augment',
    'flip_crop',
    'lookahead',
    'mean',
    'prepare_lookahead',
]
