"""Time and count the kernels, plain torch and the published methods side by side.

    python -m kernels.bench                 # both benchmarks, from the repository's root
    python -m kernels.bench flip_crop       # or weight_average

It runs on a GPU if there is one. Without one it leaves the kernels out, since the interpreter's
time says nothing about them. A time is from a call until the device has finished its work.
"""

import argparse
import math
import statistics
import time
from functools import partial

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels.flip_crop import flip_crop, flip_crop_ref
from kernels.weight_average import lookahead, lookahead_ref, mean, mean_ref, prepare_lookahead

#### Timing ########################################################################################


def pick_device():
    return torch.device('cuda' if torch.cuda.is_available() else 'cpu')


def describe(device):
    """The hardware and torch's version, for a table's heading."""
    hardware = f'{torch.get_num_threads()} CPU threads'
    if device.type == 'cuda':
        hardware = torch.cuda.get_device_name(device)
    return f'{hardware}, torch {torch.__version__}'


def milliseconds(function, device):
    """How long a call takes, until the device has finished its work."""
    start = time.perf_counter()
    function()
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    return 1000 * (time.perf_counter() - start)


def compare(title, methods, moved, rounds, device):
    """Call the methods in turns, and print a table of their times.

    Args:
        title: what a call does.
        methods: {name: function without arguments}.
        moved: how many bytes a call must at least read and write; we also time a copy of as many.
        rounds: how often we call each; the first call may compile, and is listed by itself.
    """
    source = torch.ones(moved // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    methods = methods | {'copy': partial(target.copy_, source)}
    times = {name: [] for name in methods}
    for _ in range(rounds):
        for name, method in methods.items():
            times[name].append(milliseconds(method, device))

    copy_median = statistics.median(times['copy'][1:])
    print(f'{title}: milliseconds, n={rounds - 1} after the first')
    print('                   first   median      20%      80%     GB/s  of copy')
    for name, (first, *later) in times.items():
        median = statistics.median(later)
        low, _, _, high = statistics.quantiles(later, n=5)
        speed = moved / median / 1e6
        print(
            f'{name:14} {first:9.3f} {median:8.3f} {low:8.3f} {high:8.3f}'
            f' {speed:8.1f} {copy_median / median:8.1%}'
        )


#### Counting ######################################################################################

# How torch splits lists of tensors on CUDA (ATen/native/cuda/MultiTensorApply.cuh). torch 2.14 for
# CUDA 13 takes seven times as many tensors and blocks in a launch.
CHUNK = 65536  # elements that a block takes
MAX_BLOCKS = 320  # in a launch
MAX_TENSORS = (110, 64, 48, 36, 30)  # in a launch, for 1 to 5 lists


def count_bytes(tensor):
    """The tensor's bytes in memory, where an expanded dimension takes no more of them."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride()):
        if size == 0 or stride != 0:
            elements *= size
    return elements * tensor.element_size()


def is_list(value):
    """Whether an argument or a result is a list of tensors."""
    if not isinstance(value, (list, tuple)) or len(value) == 0:
        return False
    return all(isinstance(item, torch.Tensor) for item in value)


def strides(tensor):
    """The strides that matter: those of dimensions with more than one element."""
    return [stride for size, stride in zip(tensor.shape, tensor.stride()) if size != 1]


def are_alike(lists, name):
    """Whether CUDA takes these lists of an operator together, and not one tensor after another."""
    for tensors in lists:
        for tensor, first in zip(tensors, lists[0]):
            without_gaps = torch.empty_like(tensor, device='meta')
            if strides(tensor) != strides(without_gaps):
                return False
            if tensor.shape != first.shape or strides(tensor) != strides(first):
                return False
    if name == '_foreach_copy_':  # it may copy from one dtype to another
        return all(len({tensor.dtype for tensor in tensors}) == 1 for tensors in lists)
    return len({tensor.dtype for tensors in lists for tensor in tensors}) == 1


def count_list_launches(name, lists, results):
    """The launches of an operator on lists of tensors, as CUDA makes them.

    A launch has limited room for tensors and for blocks. A large tensor may need several launches.
    """
    sizes = [tensor.numel() for tensor in lists[0] if tensor.numel() > 0]
    if not are_alike(lists, name):
        return len(sizes)
    max_tensors = MAX_TENSORS[len(lists) + len(results) - 1]
    launches = 0
    tensors = 0
    blocks = 0
    for size in sizes:
        tensors += 1
        chunks = math.ceil(size / CHUNK)
        for chunk in range(1, chunks + 1):
            blocks += 1
            is_last = chunk == chunks
            if blocks == MAX_BLOCKS or (is_last and tensors == max_tensors):
                launches += 1
                blocks = 0
                tensors = 0 if is_last else 1
    if blocks > 0:
        launches += 1
    return launches


def count_operator_launches(operator, args, result):
    """The launches of an operator on CUDA, or fewer: some, such as sort, take several."""
    name = operator.overloadpacket.__name__
    if operator.is_view or torch.Tag.inplace_view in operator.tags:  # such as resize_ and set_
        return 0
    if name == '_unsafe_view' or name.startswith(('empty', 'new_empty')):
        return 0
    if not any(isinstance(value, torch.Tensor) for value in tree_leaves((args, result))):
        return 0  # for example the profiler's marks
    if name.startswith('_foreach_') or name == '_fused_sgd_':
        lists = [value for value in args if is_list(value)]
        results = [result] if is_list(result) else []
        return count_list_launches(name, lists, results)
    return 1


class Traffic(TorchDispatchMode):
    """Counts what torch's operators launch on CUDA, and the bytes that they read and write.

    See `count_launches`. For the bytes, we take it that an operator reads all its tensors, and
    writes its result, or its first argument if it works in place.
    """

    def __init__(self):
        super().__init__()
        self.launches = 0
        self.bytes = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not torch._C._dispatch_has_kernel_for_dispatch_key(operator.name(), 'CPU'):
            # In inference mode, we see what is called, such as reshape, and count its parts. What
            # has a kernel on the CPU has one on CUDA too, even if it could be taken apart.
            with self:
                result = operator.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = operator(*args, **kwargs)
        launches = count_operator_launches(operator, args, result)
        if launches > 0:
            self.launches += launches
            self.count_operator_bytes(operator.overloadpacket.__name__, args, result)
        return result

    def count_operator_bytes(self, name, args, result):
        read = [value for value in tree_leaves(args) if isinstance(value, torch.Tensor)]
        written = result
        if name in ('index', 'index_select', 'gather'):  # reads only a part of its first
            read[0] = result
        elif name == 'index_put_':  # writes as much as its last, and reads no target
            written = read[-1]
            read = read[1:]
        elif name.endswith('_'):
            written = args[0]
        if name == 'index' and not any(index.dtype == torch.bool for index in read[1:]):
            read[1:] = self.write_out(read[1:])
        for value in [*read, *tree_leaves(written)]:
            if isinstance(value, torch.Tensor):
                self.bytes += count_bytes(value)

    def write_out(self, indices):
        """Count what CUDA writes to give an operator's index tensors one shape in memory."""
        whole = []
        for index in torch.broadcast_tensors(*indices):
            if not index.is_contiguous():
                self.launches += 1
                self.bytes += count_bytes(index)
                index = index.contiguous()
                self.bytes += count_bytes(index)
            whole.append(index)
        return whole


def count_launches(function):
    """How many launches torch's operators in function() take on CUDA, on whatever device it runs.

    It is a lower bound: we count one launch for most operators, but CUDA takes more for some, such
    as a sort or an index that is a mask. Views and empty tensors take none. `torch._foreach` and
    fused SGD launch once for up to 30 to 110 tensors if they are alike, and otherwise once for
    each.

    Optimizers choose their way by the device. On a CPU, pass foreach=True or fused=True to get the
    operators of CUDA: torch.optim.SGD's default is foreach=True there, and foreach=False here.

    It sees neither Triton kernels nor what torch.compile has compiled.
    """
    with Traffic() as traffic:
        function()
    return traffic.launches


#### flip_crop #####################################################################################

IMAGES = 50000
BATCH = 1024
TRANSLATE = 2
EPOCHS = 10
IMAGE_BYTES = 32 * 32 * 3  # in the set
DRAWS_BYTES = 8 + 1 + 2 * 8  # an image's index, flip and shift


class PublishedLoader:
    """The published method (Jordan 2024, listing 4), rewritten. A call serves an epoch.

    It keeps the set in half precision, pads it, copies it with a mask for each of 25 shifts, flips
    it, and gathers every batch.
    """

    def __init__(self, images, mean, scale, dtype):
        self.images = images.to(dtype).permute(0, 3, 1, 2)
        self.mean = mean.to(dtype).view(1, 3, 1, 1)
        self.scale = scale.to(dtype).view(1, 3, 1, 1)
        self.padded = None  # the first epoch makes it
        self.epoch = 0

    def __call__(self):
        n = len(self.images)
        device = self.images.device
        if self.epoch == 0:
            images = (self.images - self.mean) * self.scale
            flip = (torch.rand(n, device=device) < 0.5).view(-1, 1, 1, 1)
            images = torch.where(flip, images.flip(-1), images)
            self.padded = F.pad(images, [TRANSLATE] * 4, 'reflect')
        shifts = torch.randint(-TRANSLATE, TRANSLATE + 1, (n, 2), device=device)
        images = torch.empty_like(self.images)
        for dy in range(-TRANSLATE, TRANSLATE + 1):
            for dx in range(-TRANSLATE, TRANSLATE + 1):
                chosen = (shifts[:, 0] == dy) & (shifts[:, 1] == dx)
                top = TRANSLATE + dy
                left = TRANSLATE + dx
                images[chosen] = self.padded[chosen, :, top : top + 32, left : left + 32]
        if self.epoch % 2 == 1:
            images = images.flip(-1)
        self.epoch += 1
        order = torch.randperm(n, device=device)
        for batch in range(n // BATCH):
            images[order[batch * BATCH : (batch + 1) * BATCH]]


def serve_epoch(function, images, mean, scale, dtype):
    """Serve an epoch with `function`: flip_crop, or another with the same arguments."""
    n = len(images)
    device = images.device
    order = torch.randperm(n, device=device)
    flip = torch.rand(n, device=device) < 0.5
    shift = torch.randint(-TRANSLATE, TRANSLATE + 1, (n, 2), device=device)
    for batch in range(n // BATCH):
        here = slice(batch * BATCH, (batch + 1) * BATCH)
        draws = (order[here], flip[here], shift[here])
        function(images, *draws, mean=mean, scale=scale, dtype=dtype)


def draw_only(images, index, flip, shift, *, mean, scale, dtype):
    """Stands in for flip_crop, to count only what happens around it."""


def count_traffic(images, mean, scale):
    """Print what an epoch in half precision launches and moves: the mean of EPOCHS epochs."""
    options = (images, mean, scale, torch.float16)
    methods = {
        'published': PublishedLoader(*options),
        'torch path': partial(serve_epoch, flip_crop_ref, *options),
        'kernel': partial(serve_epoch, draw_only, *options),
    }
    batches = len(images) // BATCH
    served = batches * BATCH
    print(f'an epoch in half precision, counted: the mean of {EPOCHS}')
    print('               launches       MB  bytes an image')
    for name, method in methods.items():
        with Traffic() as traffic:
            for _ in range(EPOCHS):
                method()
        launches = traffic.launches / EPOCHS
        moved = traffic.bytes / EPOCHS
        if name == 'kernel':  # torch's counter cannot see it
            launches += batches
            moved += served * (IMAGE_BYTES + DRAWS_BYTES + 2 * IMAGE_BYTES)
        print(f'{name:14} {launches:8.0f} {moved / 1e6:8.0f} {moved / served:15.0f}')


def benchmark_flip_crop(device):
    dtype = torch.float16 if device.type == 'cuda' else torch.float32
    images = torch.randint(0, 256, (IMAGES, 32, 32, 3), dtype=torch.uint8, device=device)
    mean = torch.full((3,), 125.0, device=device)
    scale = torch.full((3,), 1 / 64, device=device)
    options = (images, mean, scale, dtype)
    methods = {
        'published': PublishedLoader(*options),
        'torch path': partial(serve_epoch, flip_crop_ref, *options),
    }
    if device.type == 'cuda':
        methods['kernel'] = partial(serve_epoch, flip_crop, *options)
    served = IMAGES // BATCH * BATCH
    moved = served * IMAGE_BYTES * (1 + dtype.itemsize)
    print(f'flip_crop: {IMAGES} images in batches of {BATCH}, {dtype}, {describe(device)}')
    compare('an epoch', methods, moved, 1 + EPOCHS, device)
    count_traffic(images, mean, scale)


#### weight_average ################################################################################

ROUNDS = 50
NETWORKS = 8


def airbench94_tensors(device):
    """Tensors of the shapes and dtypes of airbench94's weights and running statistics."""
    halves = [(24, 3, 2, 2), (24,), (10, 256)]  # whitening, its bias, and the last layer
    singles = []
    for inputs, width in ((24, 64), (64, 256), (256, 256)):
        halves += [(width, inputs, 3, 3), (width, width, 3, 3)]
        singles += [(width,)] * 8  # scale, bias, mean and variance of two BatchNorms
    tensors = [torch.randn(shape, device=device).half() for shape in halves]
    return tensors + [torch.randn(shape, device=device) for shape in singles]


def lookahead_loop(averages, weights, decay):
    """The published method: one tensor after another."""
    for average, weight in zip(averages, weights):
        average.lerp_(weight, 1 - decay)
        weight.copy_(average)


def mean_loop(averages, networks):
    """The usual method: one tensor after another."""
    for average, *weights in zip(averages, *networks):
        average.copy_(torch.stack(weights).mean(0))


def benchmark_weight_average(device):
    networks = [airbench94_tensors(device) for _ in range(NETWORKS)]
    weights = networks[0]
    averages = [weight.clone() for weight in weights]
    size = sum(weight.numel() * weight.element_size() for weight in weights)
    print(f'weight_average: {len(weights)} tensors, {size / 1e6:.1f} MB, {describe(device)}')
    lookaheads = {
        'loop': partial(lookahead_loop, averages, weights, 0.5),
        'torch path': partial(lookahead_ref, averages, weights, 0.5),
    }
    means = {
        'loop': partial(mean_loop, averages, networks),
        'torch path': partial(mean_ref, averages, networks),
    }
    if device.type == 'cuda':
        lookaheads['kernel'] = partial(lookahead, averages, weights, 0.5)
        lookaheads['prepared'] = partial(prepare_lookahead(averages, weights), 0.5)
        means['kernel'] = partial(mean, averages, networks)
    compare('lookahead', lookaheads, 4 * size, 1 + ROUNDS, device)
    compare(f'mean of {NETWORKS}', means, (NETWORKS + 1) * size, 1 + ROUNDS, device)


def main(argv=None):
    benchmarks = {'flip_crop': benchmark_flip_crop, 'weight_average': benchmark_weight_average}
    parser = argparse.ArgumentParser('python -m kernels.bench')
    parser.add_argument(
        'names', nargs='*', metavar='name', help=f'{" or ".join(benchmarks)}; default: both'
    )
    names = parser.parse_args(argv).names or list(benchmarks)
    for name in names:
        if name not in benchmarks:
            parser.error(f'no benchmark is called {name!r}')
    for name in names:
        benchmarks[name](pick_device())


if __name__ == '__main__':
    main()
