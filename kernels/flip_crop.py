"""A training batch in one launch: gather, shift, reflect, flip, normalize and cut out uint8 images.

    batch = flip_crop(images, index, flip, shift, mean=mean, scale=scale, dtype=torch.float16)

Why: plain torch, flip_crop_ref below, needs 19 launches per batch and moves 62,500 bytes per image
in half precision, because each launch passes the batch to the next one through memory. The kernel
only reads the 3,072 bytes (32 x 32 x 3) and the 25 bytes of draws of an image, and writes 6,144.

How: one program is one warp and makes one image. It walks down the image in tiles of 8 rows and
128 columns; an image fills 96 of them. A column is one channel of one pixel, so we compute its
place in the source, its mean and its scale once for all rows. A flat block of pixels would compute
them again in each row. A thread owns eight neighbouring outputs and stores them 16 bytes at a time.
The README.md in this folder has registers and instructions.

A bound, not a measurement: the bytes of a batch of 1024 take 6.3 microseconds at 1.5 TB/s. On an
H200, an epoch of 48 batches takes 2.2 milliseconds, including its draws.
"""
# ruff: noqa: N803 - a kernel's constants are in capitals, as in Triton's own tutorials

from __future__ import annotations

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # flip_crop_ref works without it
    triton = None

ROWS = 8  # in a tile
DTYPES = (torch.float16, torch.bfloat16, torch.float32)  # that a batch can have


#### Plain torch ###################################################################################


def reflect(position, size):
    """Mirror positions in (-size, 2 * size - 1) into [0, size), without repeating the border."""
    distance = position.abs()
    return torch.minimum(distance, 2 * (size - 1) - distance)


def flip_crop_ref(images, index, flip, shift, corner=None, size=0, *, mean, scale, dtype):
    """flip_crop in plain torch."""
    height, width, channels = images.shape[1:]
    y = torch.arange(height, device=images.device)
    x = torch.arange(width, device=images.device)
    rows = reflect(y + shift[:, :1], height)
    columns = reflect(torch.where(flip[:, None], width - 1 - x, x) + shift[:, 1:], width)
    # One index for all pixels: index_select copies a whole pixel at once. With several index
    # tensors, CUDA would write out each of them, and a CPU would take twice as long.
    places = (index[:, None] * height + rows)[:, :, None] * width + columns[:, None, :]
    pixels = images.flatten(0, 2).index_select(0, places.flatten()).view(*places.shape, channels)
    batch = torch.empty(pixels.shape, dtype=dtype, device=images.device)
    torch.mul(pixels - mean, scale, out=batch)
    if size > 0:
        in_rows = (y >= corner[:, :1]) & (y < corner[:, :1] + size)
        in_columns = (x >= corner[:, 1:]) & (x < corner[:, 1:] + size)
        batch.masked_fill_((in_rows[:, :, None] & in_columns[:, None, :])[..., None], 0)
    return batch.permute(0, 3, 1, 2)


#### Kernel ########################################################################################


def jit(function):
    """triton.jit, or without Triton the function itself, which nothing calls then."""
    return triton.jit(function) if triton else function


@jit
def _reflect(position, size: tl.constexpr):
    distance = tl.abs(position)
    return tl.minimum(distance, 2 * (size - 1) - distance)


@jit
def _flip_crop_kernel(
    batch,
    images,
    index,
    flip,
    shift,
    corner,
    mean,
    scale,
    size,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    CUTOUT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    source = images + tl.load(index + image) * (HEIGHT * WIDTH * CHANNELS)
    target = batch + image * (HEIGHT * WIDTH * CHANNELS)
    is_flipped = tl.load(flip + image)
    dy = tl.load(shift + 2 * image).to(tl.int32)
    dx = tl.load(shift + 2 * image + 1).to(tl.int32)

    # What depends on the column alone is computed once, for all rows.
    place = tl.arange(0, COLUMNS)[None, :]
    x = place // CHANNELS
    channel = place % CHANNELS
    source_x = _reflect(tl.where(is_flipped, WIDTH - 1 - x, x) + dx, WIDTH)
    column = source_x * CHANNELS + channel
    in_image = place < WIDTH * CHANNELS
    channel_mean = tl.load(mean + channel)
    channel_scale = tl.load(scale + channel)
    if CUTOUT:
        top = tl.load(corner + 2 * image).to(tl.int32)
        left = tl.load(corner + 2 * image + 1).to(tl.int32)
        in_columns = (x >= left) & (x < left + size)

    for first in range(0, HEIGHT, ROWS):
        y = first + tl.arange(0, ROWS)[:, None]
        row = _reflect(y + dy, HEIGHT) * (WIDTH * CHANNELS)
        mask = in_image & (y < HEIGHT)
        pixel = tl.load(source + (row + column), mask=mask, other=0).to(tl.float32)
        value = (pixel - channel_mean) * channel_scale
        if CUTOUT:
            in_rows = (y >= top) & (y < top + size)
            value = tl.where(in_rows & in_columns, 0.0, value)
        output = value.to(batch.dtype.element_ty)
        tl.store(target + (y * (WIDTH * CHANNELS) + place), output, mask=mask)


#### Launcher ######################################################################################


if triton is None:
    DEVICE_TYPE = None
elif isinstance(_flip_crop_kernel, triton.JITFunction):
    DEVICE_TYPE = 'cuda'
else:  # Triton's interpreter
    DEVICE_TYPE = 'cpu'


def runs_on(device):
    """Whether the kernel runs on `device`: a GPU, or the CPU with Triton's interpreter."""
    return device.type == DEVICE_TYPE


def check_tensor(name, tensor, dtype, shape, device):
    """Raise ValueError unless the tensor is what the kernel expects."""
    found = None
    if tensor is not None:
        found = (tensor.dtype, tuple(tensor.shape), tensor.device)
    if found != (dtype, tuple(shape), device):
        raise ValueError(f'{name}: must be a {dtype} tensor of shape {tuple(shape)} on {device}')
    if not tensor.is_contiguous():
        raise ValueError(f'{name}: must be contiguous')


def flip_crop(images, index, flip, shift, corner=None, size=0, *, mean, scale, dtype):
    """Take a batch out of the training set: shifted, mirrored, normalized, as `augment` does.

    Output (y, x) is the pixel (reflect(y + dy), reflect(x' + dx)) of its image, where x' is
    W - 1 - x if the image is mirrored, and x otherwise. Its value is (pixel - mean) * scale,
    computed in float32 as torch does, and rounded to `dtype` once.

    Args:
        images: the whole set, uint8 (N, H, W, C).
        index: int64 (B,), which images are in the batch.
        flip: bool (B,), which of them are mirrored.
        shift: int64 (B, 2), (dy, dx) for each, in pixels, smaller than the image.
        corner: int64 (B, 2), the top left (y, x) of each one's blank square.
        size: the side of that square in pixels; 0 for no square.
        mean, scale: float32 (C,), in units of a pixel from 0 to 255; scale is 1 / std.
        dtype: of the batch: float16, bfloat16 or float32.

    All tensors must be contiguous and on one device. We do not check the values of index and shift,
    since the CPU would have to wait for the GPU.

    Returns:
        (B, C, H, W) of `dtype`, channels_last.

    Raises ValueError, which names the argument, for another dtype, shape, device or memory layout,
    and RuntimeError without Triton or without a GPU.
    """
    device = images.device
    if not runs_on(device):
        raise RuntimeError('flip_crop needs Triton and a GPU, or TRITON_INTERPRET=1 at its import')
    if size < 0:
        raise ValueError(f'size={size}: must not be negative')
    if dtype not in DTYPES:
        raise ValueError(f'dtype={dtype}: must be float16, bfloat16 or float32')
    if images.ndim != 4:
        raise ValueError(f'images: must have the shape (N, H, W, C), not {tuple(images.shape)}')
    height, width, channels = images.shape[1:]
    batch_size = index.numel()
    check_tensor('images', images, torch.uint8, images.shape, device)
    check_tensor('index', index, torch.int64, (batch_size,), device)
    check_tensor('flip', flip, torch.bool, (batch_size,), device)
    check_tensor('shift', shift, torch.int64, (batch_size, 2), device)
    check_tensor('mean', mean, torch.float32, (channels,), device)
    check_tensor('scale', scale, torch.float32, (channels,), device)
    if size > 0:
        check_tensor('corner', corner, torch.int64, (batch_size, 2), device)
    else:
        corner = shift  # the kernel needs a pointer, but does not read from it

    batch = torch.empty(batch_size, height, width, channels, dtype=dtype, device=device)
    if batch_size == 0:
        return batch.permute(0, 3, 1, 2)
    columns = triton.next_power_of_2(width * channels)
    with torch.cuda.device_of(images):  # Triton launches on the current device
        _flip_crop_kernel[(batch_size,)](
            batch,
            images,
            index,
            flip,
            shift,
            corner,
            mean,
            scale,
            size,
            HEIGHT=height,
            WIDTH=width,
            CHANNELS=channels,
            CUTOUT=size > 0,
            ROWS=ROWS,
            COLUMNS=columns,
            num_warps=min(8, max(1, columns // 128)),
            # The subtraction and the multiplication round one after the other, as torch's do.
            enable_fp_fusion=False,
        )
    return batch.permute(0, 3, 1, 2)
