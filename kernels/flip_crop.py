"""A training batch in one launch: gather, shift, reflect, flip, cut out and normalize uint8 images.

    batch = flip_crop(images, index, flip, shift, mean=mean, std=std, dtype=torch.float16)
    python kernels/flip_crop.py     # the benchmark: on a GPU if there is one

Why: the published loader (Jordan 2024, listing 4) keeps the set in half precision, pads it, copies it by a mask once
for each of 25 shifts, flips it, and then gathers every batch. In plain torch, flip_crop_ref gathers each batch out of
the uint8 set by index arithmetic: 27 operators, several of which read and write a whole batch. The kernel reads
an image's 3,072 bytes (32 x 32 x 3) and its 25 bytes of draws, writes 6,144 bytes in half precision, and nothing else.

How: a program is one warp and one image. It walks down the image in tiles of 8 rows x 128 columns, of which an image
fills 96; a column is a channel of a pixel, so that source column, mean and deviation are computed once for all rows.
Eight neighbouring outputs belong to a thread, which stores 16 bytes at once. Compiled for an A100, half precision (see
tests/machine_code.py): 64 registers and 59,000 instructions, counted by threads, an image; with cutout 92 and 80,000;
no spills. A flat block of pixels would compute columns anew for each pixel.

A bound, not a measurement: the bytes of a batch of 1024 take 6.3 microseconds at 1.5 TB/s. No GPU has run this yet.
"""
from __future__ import annotations

import statistics
import time
from functools import partial
from itertools import islice

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

try:
    import triton
    import triton.language as tl
except ImportError:     # then the torch path is all there is
    triton = None

jit = triton.jit if triton else lambda function: function
ROWS = 8    # of a tile


def reflect(position, size):
    """Mirror positions in (-size, 2 * size - 1) into [0, size); the border itself is not repeated."""
    return torch.minimum(position.abs(), 2 * (size - 1) - position.abs())


def flip_crop_ref(images, index, flip, shift, corner=None, size=0, *, mean, std, dtype):
    """flip_crop in plain torch."""
    height, width, channels = images.shape[1:]
    y, x = torch.arange(height, device=images.device), torch.arange(width, device=images.device)
    rows = reflect(y + shift[:, :1], height)
    columns = reflect(torch.where(flip[:, None], width - 1 - x, x) + shift[:, 1:], width)
    pixels = (index[:, None, None] * height + rows[:, :, None]) * width + columns[:, None, :]
    values = images.view(-1, channels).index_select(0, pixels.flatten()).view(*pixels.shape, channels).float()
    mean, std = (torch.as_tensor(v, dtype=torch.float32, device=images.device) for v in (mean, std))
    values.sub_(255 * mean).mul_(1 / (255 * std))
    if size:
        in_rows = (y >= corner[:, :1]) & (y < corner[:, :1] + size)
        in_columns = (x >= corner[:, 1:]) & (x < corner[:, 1:] + size)
        values.masked_fill_((in_rows[:, :, None] & in_columns[:, None, :])[..., None], 0)
    return values.to(dtype).permute(0, 3, 1, 2)


@jit
def _reflect(position, size: tl.constexpr):
    return tl.minimum(tl.abs(position), 2 * (size - 1) - tl.abs(position))


@jit
def _flip_crop_kernel(batch, images, index, flip, shift, corner, mean, std, size, HEIGHT: tl.constexpr,
                      WIDTH: tl.constexpr, CHANNELS: tl.constexpr, CUTOUT: tl.constexpr, ROWS: tl.constexpr,
                      COLUMNS: tl.constexpr):
    image = tl.program_id(0).to(tl.int64)
    source = images + tl.load(index + image) * (HEIGHT * WIDTH * CHANNELS)
    target = batch + image * (HEIGHT * WIDTH * CHANNELS)
    dy, dx = tl.load(shift + 2 * image).to(tl.int32), tl.load(shift + 2 * image + 1).to(tl.int32)

    # A column of the tile is a channel of a pixel: all that depends on it is computed once, for all rows.
    place = tl.arange(0, COLUMNS)[None, :]
    x, channel = place // CHANNELS, place % CHANNELS
    column = _reflect(tl.where(tl.load(flip + image), WIDTH - 1 - x, x) + dx, WIDTH) * CHANNELS + channel
    inside = place < WIDTH * CHANNELS
    offset = 255 * tl.load(mean + channel)
    scale = tl.div_rn(1.0, 255 * tl.load(std + channel))
    if CUTOUT:
        top, left = tl.load(corner + 2 * image).to(tl.int32), tl.load(corner + 2 * image + 1).to(tl.int32)
        in_columns = (x >= left) & (x < left + size)

    for first in range(0, HEIGHT, ROWS):
        y = first + tl.arange(0, ROWS)[:, None]
        row = _reflect(y + dy, HEIGHT) * (WIDTH * CHANNELS)
        mask = inside & (y < HEIGHT)
        value = (tl.load(source + (row + column), mask=mask, other=0).to(tl.float32) - offset) * scale
        if CUTOUT:
            value = tl.where(in_columns & (y >= top) & (y < top + size), 0.0, value)
        tl.store(target + (y * (WIDTH * CHANNELS) + place), value.to(batch.dtype.element_ty), mask=mask)


def check(images, index, flip, shift, corner, size, mean, std, dtype):
    """Raise ValueError for what the kernel would read or write wrongly, and RuntimeError where it cannot run."""
    if triton is None or images.device.type != ('cuda' if isinstance(_flip_crop_kernel, triton.JITFunction) else 'cpu'):
        raise RuntimeError('flip_crop needs Triton and a GPU, or TRITON_INTERPRET=1 before it is imported')
    if size < 0:
        raise ValueError(f'size={size}: must not be negative')
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f'dtype={dtype}: must be float16, bfloat16 or float32')
    if images.ndim != 4:
        raise ValueError(f'images: must have the shape (N, H, W, C), not {tuple(images.shape)}')
    n = len(index)
    channels = images.shape[3:]
    forms = {'images': (images, torch.uint8, images.shape), 'index': (index, torch.int64, (n,)),
             'flip': (flip, torch.bool, (n,)), 'shift': (shift, torch.int64, (n, 2)),
             'mean': (mean, torch.float32, channels), 'std': (std, torch.float32, channels)}
    if size:
        forms['corner'] = (corner, torch.int64, (n, 2))
    for name, (tensor, kind, shape) in forms.items():
        if tensor is None or (tensor.dtype, tensor.shape, tensor.device) != (kind, shape, images.device):
            raise ValueError(f'{name}: must be a {kind} tensor of shape {tuple(shape)} on {images.device}')
        if not tensor.is_contiguous():
            raise ValueError(f'{name}: must be contiguous')


def flip_crop(images, index, flip, shift, corner=None, size=0, *, mean, std, dtype):
    """Gather a normalized, augmented batch from the whole set, as the scripts' `augment` does: the same bits in
    float32, which half precision rounds once.
    images: the set, uint8 (N, H, W, C). Of each of the batch's B images: index, int64 (B,), its place in the set; flip,
    bool (B,), whether it is mirrored; shift, int64 (B, 2), its (dy, dx) in pixels, smaller than the image. If size is
    not 0, a square of that side is blank; corner, int64 (B, 2), is its first (y, x). mean, std: (C,), of pixel / 255.
    Values of index and shift are not checked: that would wait for the GPU. Returns (B, C, H, W) of `dtype` (float16,
    bfloat16, float32), channels_last. Raises ValueError for another dtype, shape, device or memory layout, and
    RuntimeError where Triton or a GPU is missing."""
    mean, std = (torch.as_tensor(v, dtype=torch.float32, device=images.device).contiguous() for v in (mean, std))
    check(images, index, flip, shift, corner, size, mean, std, dtype)
    height, width, channels = images.shape[1:]
    batch = torch.empty(len(index), height, width, channels, dtype=dtype, device=images.device)
    columns = triton.next_power_of_2(width * channels)
    if len(index):
        with torch.cuda.device_of(images):      # Triton launches on the current device
            _flip_crop_kernel[(len(index),)](
                batch, images, index, flip, shift, corner if size else shift, mean, std, size, height, width, channels,
                CUTOUT=size > 0, ROWS=ROWS, COLUMNS=columns, num_warps=min(8, max(1, columns // 128)),
                enable_fp_fusion=False)     # a fused multiply-add would round otherwise than torch
    return batch.permute(0, 3, 1, 2)


#### Benchmark #####################################################################################
IMAGES, BATCH, TRANSLATE, EPOCHS = 50000, 1024, 2, 10


class PublishedLoader:
    """The published method, written anew. Calling it serves an epoch."""
    def __init__(self, images, mean, std, dtype):
        self.images = images.to(dtype).div_(255).permute(0, 3, 1, 2)
        self.mean, self.std = (v.to(dtype).view(1, 3, 1, 1) for v in (mean, std))
        self.epoch = 0

    def __call__(self):
        n, t, device = len(self.images), TRANSLATE, self.images.device
        if self.epoch == 0:
            normalized = (self.images - self.mean) / self.std
            flip = (torch.rand(n, device=device) < 0.5).view(-1, 1, 1, 1)
            self.padded = F.pad(torch.where(flip, normalized.flip(-1), normalized), (t, t, t, t), 'reflect')
        shifts = torch.randint(-t, t + 1, (n, 2), device=device)
        images = torch.empty_like(self.images)
        for dy in range(-t, t + 1):
            for dx in range(-t, t + 1):
                chosen = (shifts[:, 0] == dy) & (shifts[:, 1] == dx)
                images[chosen] = self.padded[chosen, :, t + dy:t + dy + 32, t + dx:t + dx + 32]
        if self.epoch % 2 == 1:
            images = images.flip(-1)
        self.epoch += 1
        for index in torch.randperm(n, device=device).split(BATCH)[:n // BATCH]:
            images[index]


def serve_epoch(function, images, mean, std, dtype):
    """Serve an epoch by `function`: flip_crop or flip_crop_ref."""
    n, device = len(images), images.device
    order = torch.randperm(n, device=device)
    flip = torch.rand(n, device=device) < 0.5
    shift = torch.randint(-TRANSLATE, TRANSLATE + 1, (n, 2), device=device)
    batches = zip(*(draws.split(BATCH) for draws in (order, flip, shift)))
    for draws in islice(batches, n // BATCH):
        function(images, *draws, mean=mean, std=std, dtype=dtype)


class Traffic(TorchDispatchMode):
    """Counts the operators that compute, each one launch or more, and the bytes that they read and write."""
    def __init__(self):
        super().__init__()
        self.launches = self.bytes = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        name = operator.overloadpacket.__name__
        if not operator.is_view and not name.startswith('empty'):
            tensors = [v for v in tree_leaves(args) if isinstance(v, torch.Tensor)]
            written = tensors[0] if name.endswith('_') else result
            if name in ('index', 'index_select'):   # reads the chosen part of the first
                tensors[0] = result
            elif name == 'index_put_':              # writes as much as the last has
                written = tensors[-1]
                del tensors[0]
            self.launches += 1
            self.bytes += sum(v.numel() * v.element_size() for v in [*tensors, written])
        return result


def seconds(function, device):
    """That a call of `function` takes."""
    start = time.perf_counter()
    function()
    if device.type == 'cuda':
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main():
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    dtype = torch.float16 if device.type == 'cuda' else torch.float32
    images = torch.randint(0, 256, (IMAGES, 32, 32, 3), dtype=torch.uint8, device=device)
    mean, std = torch.full((3,), 0.5, device=device), torch.full((3,), 0.25, device=device)
    needed = IMAGES // BATCH * BATCH * 3072 * (1 + dtype.itemsize)
    source, target = torch.ones(2, needed // 2, dtype=torch.uint8, device=device)
    methods = {'published': PublishedLoader(images, mean, std, dtype),
               'torch path': partial(serve_epoch, flip_crop_ref, images, mean, std, dtype)}
    if device.type == 'cuda':
        methods['kernel'] = partial(serve_epoch, flip_crop, images, mean, std, dtype)
        methods['kernel']()     # compiles
    methods['copy'] = partial(target.copy_, source)

    print(f'{IMAGES} images in batches of {BATCH}, {dtype}, on', torch.cuda.get_device_name() if device.type == 'cuda'
          else f'{torch.get_num_threads()} CPU threads', f'torch {torch.__version__}')
    times = {name: [] for name in methods}
    for _ in range(EPOCHS):
        for name, method in methods.items():
            times[name].append(seconds(method, device))
    copy = statistics.median(times['copy'])
    print(f'{"seconds an epoch":16} {"first":>8} {"median":>8} {"20%":>8} {"80%":>8} {"GB/s":>8} {"of copy":>8}')
    for name, (first, *later) in times.items():
        low, _, _, high = statistics.quantiles(later, n=5)
        median = statistics.median(later)
        print(f'{name:16} {first:8.4f} {median:8.4f} {low:8.4f} {high:8.4f} {needed / median / 1e9:8.1f} '
              f'{copy / median:8.1%}')

    print(f'{"an epoch, fp16":16} {"launches":>8} {"MB":>8}      (mean of {EPOCHS})')
    for name, method in (('published', PublishedLoader(images, mean, std, torch.float16)),
                         ('torch path', partial(serve_epoch, flip_crop_ref, images, mean, std, torch.float16))):
        with Traffic() as traffic:
            for _ in range(EPOCHS):
                method()
        print(f'{name:16} {traffic.launches / EPOCHS:8.0f} {traffic.bytes / EPOCHS / 1e6:8.0f}')
    launches = IMAGES // BATCH
    print(f'{"kernel":16} {launches:8} {launches * BATCH * (3072 * 3 + 25) / 1e6:8.0f}')


if __name__ == '__main__':
    main()
