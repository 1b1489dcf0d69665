"""`lab check`: does everything work on this machine, and how fast is it?

Each part is a process with a time limit, so that a crash or a hang in one does not stop the others:

    python -m lab.check PART FILE DATA    # what such a process runs; FILE gets its result

A part that needs less than its limit leaves the rest to those after it.
"""

import importlib.metadata
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from lab.errors import UserError, first_lines
from lab.machine import describe_machine, has_unusable_gpu, pick_device, pick_dtype
from lab.options import override
from lab.recipes import load_recipe
from lab.runs import write_json
from lab.training import choose_data, make_faster, make_loaders, warm_up

ROOT = Path(__file__).resolve().parent.parent
AIRBENCH = 'airbench94.py'
RECORD = 'records/record94.py'
NARROW = ['net.widths.block1=8', 'net.widths.block2=16', 'net.widths.block3=16']


class CheckError(Exception):
    """What is wrong, in one line."""


def pick_gpu():
    """A CUDA GPU, or the CPU."""
    device = pick_device()
    return device if device.type == 'cuda' else torch.device('cpu')


def prepare(file, device):
    """(recipe, dtype), with the settings of torch that `lab run` makes.

    But on a CPU one thread does everything. It needs a minute or two, and other jobs on the
    machine do not hold it up as they do threads that wait for each other.
    """
    if device.type == 'cpu':
        torch.set_num_threads(1)
    recipe = load_recipe(ROOT / file)
    recipe.keep_freed_memory()
    torch.backends.cudnn.benchmark = True
    return recipe, pick_dtype(None, device)


def dtype_name(dtype):
    return str(dtype).removeprefix('torch.')


#### Machine and data ##############################################################################


def version_of(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def find_driver():
    """The NVIDIA driver's version, or None."""
    command = ['nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader']
    with suppress(OSError, subprocess.CalledProcessError, IndexError):
        return subprocess.check_output(command, text=True).split()[0]
    return None


def find_cpu():
    """The CPU's name."""
    with suppress(OSError):
        for line in Path('/proc/cpuinfo').read_text().splitlines():
            if line.startswith('model name'):
                return line.partition(':')[2].strip()
    return platform.processor() or platform.machine()


def check_machine(data):
    """Versions and hardware."""
    device = pick_device()
    figures = describe_machine(device) | {
        'torchvision': version_of('torchvision'),
        'triton': version_of('triton') or version_of('pytorch-triton-rocm'),
        'cuda': torch.version.cuda or torch.version.hip,
        'driver': find_driver(),
        'cpu': find_cpu(),
        'cores': os.cpu_count(),
        'threads': torch.get_num_threads(),
    }
    names = ('python', 'torch', 'torchvision', 'triton', 'cuda', 'driver')
    versions = [f'{name} {figures[name]}' for name in names if figures[name]]
    hardware = figures['device']
    if device.type == 'cuda':
        properties = torch.cuda.get_device_properties(device)
        figures['capability'] = f'{properties.major}.{properties.minor}'
        figures['memory'] = properties.total_memory
        hardware += f', capability {figures["capability"]}'
    rest = '{cpu}, {cores} cores; commit {commit}'.format(**figures)
    return f'{", ".join(versions)}; {hardware}; {rest}', figures


def check_data(data):
    """Which images the runs use. Downloads CIFAR-10 if it must."""
    recipe = load_recipe(ROOT / AIRBENCH)
    image_set, _ = choose_data(data or None, recipe, [])
    figures = image_set.describe()
    line = '{path}: {train} training and {test} test images'.format(**figures)
    if image_set.is_cifar10:
        line += ', exactly CIFAR-10'
    if image_set.path == 'digits' and not data:
        line += ', since CIFAR-10 could not be downloaded'
    return line, figures


#### Kernels #######################################################################################


def units_apart(got, expected, *operands):
    """The largest difference, in units in the last place of the largest operand."""
    got, expected, *operands = [tensor.cpu() for tensor in (got, expected, *operands)]
    largest = torch.stack([operand.abs() for operand in operands]).amax(0)
    unit = torch.nextafter(largest, torch.full_like(largest, torch.inf)) - largest
    apart = (got.double() - expected.double()).abs() / unit.double()
    return apart.max().item()


def check_flip_crop(recipe, device):
    """Compare flip_crop with the recipe's augment, in every dtype, with and without cutout."""
    from kernels import flip_crop

    is_interpreted = device.type == 'cpu'
    n, batch_size = (20, 4) if is_interpreted else (50000, 1024)
    g = torch.Generator().manual_seed(0)
    draws = (
        torch.randint(0, 256, (n, 32, 32, 3), dtype=torch.uint8, generator=g),
        torch.randint(0, n, (batch_size,), generator=g),
        torch.rand(batch_size, generator=g) < 0.5,
        torch.randint(-2, 3, (batch_size, 2), generator=g),
        torch.randint(0, 20, (batch_size, 2), generator=g),
    )
    draws = [values.to(device) for values in draws]
    pixel_mean = 255 * torch.tensor(recipe.CIFAR_MEAN, device=device)
    pixel_scale = 1 / (255 * torch.tensor(recipe.CIFAR_STD, device=device))
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        options = {'mean': pixel_mean, 'scale': pixel_scale, 'dtype': dtype}
        for size in (0, 12):
            got = flip_crop(*draws, size, **options)
            expected = recipe.augment(*draws, size, **options)
            # The interpreter rounds bfloat16 towards zero.
            allowed = 1 if is_interpreted and dtype == torch.bfloat16 else 0
            apart = units_apart(got, expected, got, expected)
            if not apart <= allowed:
                case = f'in {dtype_name(dtype)} with a cutout of {size} pixels'
                raise CheckError(f'flip_crop is {apart:.3g} units off augment {case}')


def check_averages(recipe, device):
    """Compare lookahead and mean with plain torch. Returns by how many units they differ."""
    from kernels import lookahead, mean, prepare_lookahead
    from kernels.weight_average import lookahead_ref, mean_ref

    hyp = override(recipe.hyp, NARROW if device.type == 'cpu' else [])
    networks = []
    for seed in range(3):
        net = recipe.make_net(hyp, seed=seed, device=device, dtype=torch.float16)
        weights = [value for value in net.state_dict().values() if value.is_floating_point()]
        networks.append([weight + 0.1 * torch.randn_like(weight) for weight in weights])
    units = {'lookahead': 0.0, 'mean': 0.0}

    averages, weights, _ = networks
    got = [torch.empty_like(average) for average in averages]
    got_weights = [torch.empty_like(weight) for weight in weights]
    prepared = prepare_lookahead(got, got_weights)
    once = partial(lookahead, got, got_weights)
    for step, decay in ((prepared, 0.8), (prepared, 0.3), (once, 0.5)):
        copy_all(got, averages)
        copy_all(got_weights, weights)
        step(decay)
        expected = [average.clone() for average in averages]
        lookahead_ref(expected, [weight.clone() for weight in weights], decay)
        for i, average in enumerate(got):
            if not torch.equal(average, got_weights[i]):
                raise CheckError('lookahead gave averages and weights that differ')
            apart = units_apart(average, expected[i], averages[i], weights[i])
            units['lookahead'] = max(units['lookahead'], apart)

    mean(got, networks)
    mean_ref(expected, networks)
    for average, reference, *weights in zip(got, expected, *networks):
        units['mean'] = max(units['mean'], units_apart(average, reference, *weights))
    for name, apart in units.items():
        if not apart <= 1:
            raise CheckError(f'{name} is {apart:.3g} units in the last place off plain torch')
    return units


def copy_all(targets, sources):
    for target, source in zip(targets, sources):
        target.copy_(source)


def check_kernels(data):
    """The Triton kernels against plain torch; without a GPU, in Triton's interpreter."""
    from kernels.fast_path import why_not_here

    device = pick_gpu()
    reason = why_not_here(device)
    if reason:
        return f'not here: {reason}', {}
    recipe = load_recipe(ROOT / AIRBENCH)
    check_flip_crop(recipe, device)
    units = check_averages(recipe, device)
    largest = max(units.values())
    line = (
        'flip_crop gives the bits of augment; lookahead and mean differ from plain torch by at '
        f'most {largest:.2g} in the last place'
    )
    if device.type == 'cpu':
        line = f"in Triton's interpreter: {line}"
    return line, units


#### The same training twice #######################################################################


def random_images(n, seed):
    """(images, labels) that a network can learn: a pattern for each class, smooth noise, noise."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 10, (n,), generator=g)
    patterns = torch.rand(10, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    smooth = patterns[labels] + torch.rand(n, 3, 4, 4, generator=g)
    pixels = F.interpolate(smooth, size=32, mode='bilinear')
    pixels = 110 * pixels + 33 * torch.rand(pixels.shape, generator=g)
    return pixels.to(torch.uint8).permute(0, 2, 3, 1), labels


def random_loaders(recipe, hyp, batches, device, dtype):
    """(train_loader, test_loader) of random images; a single batch of tests."""
    train_set = random_images(batches * hyp['opt']['batch_size'], seed=1)
    # Only on a GPU, the test batches are as large as those of CIFAR-10.
    test_set = random_images(2000 if device.type == 'cuda' else 50, seed=2)
    return recipe.make_loaders(train_set, test_set, hyp, device=device, dtype=dtype)


def train(recipe, loaders, hyp, seed, **options):
    """(losses after each epoch, final weights) of a training."""
    net, record = recipe.train(*loaders, hyp, seed, **options)
    if 'failed' in record:
        raise CheckError(record['failed'])
    losses = [epoch['train_loss'] for epoch in record['epochs']]
    return losses, {name: value.clone() for name, value in net.state_dict().items()}


def compare(training, reference):
    """The largest relative differences between two results of `train`: of losses and of weights.

    The difference of two tensors is its norm, relative to the reference's norm.
    """
    losses, weights = training
    reference_losses, reference_weights = reference
    by_loss = [abs(loss / other - 1) for loss, other in zip(losses, reference_losses)]
    by_tensor = {}
    for name, other in reference_weights.items():
        difference = (weights[name].double() - other.double()).norm()
        by_tensor[name] = (difference / other.double().norm().clamp_min(1e-30)).item()
    largest = max(by_tensor, key=by_tensor.get)
    return {'losses': max(by_loss), 'weights': by_tensor[largest], 'tensor': largest}


def judge(figures, limits):
    """A line about what `compare` found. Raises CheckError if it is beyond the limits."""
    found = 'losses {losses:.2g}, weights {weights:.2g} ({tensor})'.format(**figures)
    allowed = 'losses {losses:g}, weights {weights:g}'.format(**limits)
    line = f'largest relative differences: {found}; allowed: {allowed}'
    if not all(figures[name] <= limit for name, limit in limits.items()):
        raise CheckError(line)
    return line


BATCHES = 10
# 15 or 20 steps, of both variants of a step. A pool's gradient jumps when rounding makes another
# pixel the largest. Lower learning rates keep such differences from growing.
BOTH_VARIANTS = {
    AIRBENCH: ['opt.train_epochs=2', 'opt.whiten_bias_epochs=1', 'opt.lr=1'],
    RECORD: [
        'opt.train_epochs=2',
        'growth.until=0.5',
        'opt.lr=0.02',
        'opt.lr_biases=0.004',
        'opt.lr_head=0.07',
    ],
}
GRAPH_SETTINGS = {
    AIRBENCH: [*NARROW, 'opt.batch_size=32'],
    RECORD: [*NARROW, 'opt.batch_size=32', 'growth.size=20'],
}
GRAPH_LIMITS = {
    'cpu': {'losses': 1e-9, 'weights': 1e-9},
    'cuda': {'losses': 1e-6, 'weights': 1e-6},  # there, a graph's learning rates are in fp32
}
COMPILED_SETTINGS = {
    AIRBENCH: [],
    RECORD: ['selection.keep=1'],  # otherwise rounding changes which images are in the batches
}
# Half precision rounds by 5e-4, which moves maxima of the pools.
COMPILED_LIMITS = {'losses': 0.02, 'weights': 0.2}


def call_again(function):
    """Stands in for a CUDA graph: to replay it, we call the function."""
    function()  # as a warm-up, which must leave no trace
    return function


def compare_graphs(file, data, capture=None, wrap_step=None):
    """A GraphedStep against the recipe's train_step, in float64, with a narrow network.

    Args:
        capture: as for GraphedStep; by default CUDA graphs, or without a GPU `call_again`.
        wrap_step: changes the train_step that is graphed, for tests.
    """
    from kernels import GraphedStep

    device = pick_gpu()
    if capture is None and device.type == 'cpu':
        capture = call_again
    recipe, _ = prepare(file, device)
    hyp = override(recipe.hyp, [*BOTH_VARIANTS[file], *GRAPH_SETTINGS[file]])
    loaders = random_loaders(recipe, hyp, BATCHES, device, torch.float64)
    eager = train(recipe, loaders, hyp, seed=0)
    train_step = wrap_step(recipe.train_step) if wrap_step else recipe.train_step
    step = GraphedStep(train_step, recipe.make_optimizer, capture)
    graphed = {
        'net': recipe.make_net(hyp, device=device, dtype=torch.float64),
        'fused': True,
        'train_step': step,
        'make_optimizer': step.make_optimizer,
    }
    train(recipe, loaders, hyp, seed=1, **graphed)  # a run must not depend on the one before
    figures = compare(train(recipe, loaders, hyp, seed=0, **graphed), eager)
    figures['variants'] = len(step.variants)
    line = judge(figures, GRAPH_LIMITS[device.type])
    what = 'CUDA graphs' if capture is None else 'graphs that call the step again, without a GPU,'
    return f'{what} against eager steps, float64: {line}', figures


def compare_compiled(file, data):
    """What --compile does, the recipe's fast_path, against eager training, at full size."""
    device = pick_gpu()
    recipe, dtype = prepare(file, device)
    hyp = override(recipe.hyp, [*BOTH_VARIANTS[file], *COMPILED_SETTINGS[file]])
    loaders = random_loaders(recipe, hyp, BATCHES, device, dtype)
    eager = train(recipe, loaders, hyp, seed=0)
    faster = recipe.fast_path(loaders[0], hyp)
    seconds = warm_up(recipe, loaders, hyp, faster)
    print(f'compiled in {seconds:.0f} s', flush=True)
    figures = compare(train(recipe, loaders, hyp, seed=0, **faster), eager)
    figures['warm_up_seconds'] = seconds
    line = judge(figures, COMPILED_LIMITS)
    what = f'--compile against eager, {dtype_name(dtype)}'
    return f'{what}: {line}; compiled in {seconds:.0f} s', figures


#### Profile #######################################################################################

STEPS = 10
# All steps are of the kind that most are.
ONE_VARIANT = {
    AIRBENCH: ['opt.train_epochs=1', 'opt.whiten_bias_epochs=0'],
    RECORD: ['opt.train_epochs=1', 'growth.until=0'],
}


class WatchedStep:
    """A train_step that, after some steps, times STEPS steps, and then profiles as many.

    So the time includes what `train` does between the steps, such as augmenting images.
    """

    def __init__(self, train_step, clock, activities):
        self.train_step = train_step
        self.clock = clock
        self.calls = 0
        self.times = []
        self.profiler = profile(activities=activities, acc_events=True)

    def __call__(self, *args):
        first = self.calls - 2  # after two steps that choose algorithms and fill caches
        if first in (0, STEPS):
            self.times.append(self.clock())
        if first == STEPS:
            self.profiler.start()
        if first == 2 * STEPS:
            self.clock()  # waits for the GPU
            self.profiler.stop()
        self.calls += 1
        return self.train_step(*args)

    def seconds(self):
        """Seconds per step, without the profiler."""
        start, end = self.times
        return (end - start) / STEPS


def figures_on_gpu(watched):
    """Milliseconds per step: on the wall and in GPU kernels; kernels and launches per step."""
    kernels = 0
    launches = 0
    busy = 0.0
    for event in watched.profiler.events():
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            busy += event.time_range.elapsed_us()
            if not event.name.startswith(('Memcpy', 'Memset')):
                kernels += 1
        is_launch = 'LaunchKernel' in event.name or 'GraphLaunch' in event.name
        if event.device_type == DeviceType.CPU and is_launch:
            launches += 1
    return {
        'wall_ms': 1000 * watched.seconds(),
        'gpu_ms': busy / STEPS / 1000,
        'kernels': kernels / STEPS,
        'launches': launches / STEPS,
    }


def most_expensive(watched):
    """{operator: share of the CPU time} of the five most expensive operators."""
    operators = watched.profiler.key_averages()
    total = sum(operator.self_cpu_time_total for operator in operators)
    operators.sort(key=self_time, reverse=True)
    return {operator.key: operator.self_cpu_time_total / total for operator in operators[:5]}


def self_time(operator):
    return operator.self_cpu_time_total


def profile_training(recipe, loaders, hyp, faster):
    """The WatchedStep of a training."""
    device = loaders[0].device
    activities = [ProfilerActivity.CPU]
    if device.type == 'cuda':
        activities.append(ProfilerActivity.CUDA)
    train_step = faster.get('train_step', recipe.train_step)
    watched = WatchedStep(train_step, partial(recipe.clock, device), activities)
    train(recipe, loaders, hyp, seed=0, **faster | {'train_step': watched})
    return watched


def profile_steps(file, data):
    """Where the time of a step goes, eager and with --compile; without a GPU only eager."""
    device = pick_gpu()
    recipe, dtype = prepare(file, device)
    settings = ONE_VARIANT[file]
    if device.type == 'cpu':
        settings = [*settings, 'opt.batch_size=32']
    hyp = override(recipe.hyp, settings)
    batches = 2 * STEPS + 3
    loaders = random_loaders(recipe, hyp, batches, device, dtype)
    if device.type == 'cpu':
        watched = profile_training(recipe, loaders, hyp, {})
        figures = {'wall_ms': 1000 * watched.seconds(), 'operators': most_expensive(watched)}
        shares = [f'{name} {share:.0%}' for name, share in figures['operators'].items()]
        return (
            f'{figures["wall_ms"]:.0f} ms a step of 32 images on one thread: {", ".join(shares)}',
            figures,
        )
    lines = []
    figures = {}
    for mode in ('eager', 'compiled'):
        options = {'compiles': mode == 'compiled', 'kernels': 'auto'}
        faster = make_faster(recipe, loaders[0], hyp, **options)
        faster.pop('forward', None)  # to evaluate is not part of a step
        train(recipe, loaders, hyp, seed=0, **faster)
        figures[mode] = figures_on_gpu(profile_training(recipe, loaders, hyp, faster))
        line = (
            '{wall_ms:.2f} ms a step, {gpu_ms:.2f} ms in {kernels:.0f} GPU kernels, '
            '{launches:.0f} launches'
        ).format(**figures[mode])
        print(mode, line, flush=True)
        lines.append(f'{mode}: {line}')
    return '; '.join(lines), figures


#### Runs ##########################################################################################

RUNS = 3
SECONDS_FOR_RUNS = 20  # no run starts later than that after the first one
LOWEST_ACCURACY = {'cifar10': 0.93, 'digits': 0.85}


def make_runs(recipe, loaders, hyp, faster, wanted):
    """The records of up to `wanted` runs."""
    records = []
    start = time.perf_counter()
    for seed in range(wanted):
        if time.perf_counter() - start < SECONDS_FOR_RUNS:
            _, record = recipe.train(*loaders, hyp, seed, **faster)
            if 'failed' in record:
                raise CheckError(f'run {seed} failed: {record["failed"]}')
            print('run {seed}: {tta_val_acc:.4f}, {seconds:.2f} s'.format(**record), flush=True)
            records.append(record)
    return records


def check_runs(file, data):
    """Accuracy and seconds of whole runs, as `lab run` makes them: eager and with --compile."""
    device = pick_device()
    recipe, dtype = prepare(file, device)
    image_set, hyp = choose_data(data or None, recipe, [])
    is_gpu = device.type == 'cuda'
    if not is_gpu:
        hyp = override(hyp, ['opt.train_epochs=3'])
    lines = []
    figures = {'data': image_set.path}
    for mode in ('eager', 'compiled') if is_gpu else ('eager',):
        loaders = make_loaders(recipe, image_set, hyp, device, dtype)
        options = {'compiles': mode == 'compiled', 'kernels': 'auto'}
        faster = make_faster(recipe, loaders[0], hyp, **options)
        seconds = warm_up(recipe, loaders, hyp, faster) if is_gpu else 0.0
        print(f'{mode}: warm-up of {seconds:.1f} s', flush=True)
        records = make_runs(recipe, loaders, hyp, faster, RUNS if is_gpu else 1)
        figures[mode] = {
            'n': len(records),
            'warm_up_seconds': seconds,
            'mean': statistics.fmean(record['tta_val_acc'] for record in records),
            'seconds': statistics.fmean(record['seconds'] for record in records),
            'records': records,
        }
        line = '{mean:.2%} in {seconds:.2f} s (n={n})'.format(**figures[mode])
        if is_gpu:
            line += f', warm-up {seconds:.0f} s'
        lines.append(f'{mode}: {line}')
    epochs = hyp['opt']['train_epochs']
    where = 'one thread, ' if device.type == 'cpu' else ''
    line = f'{image_set.path}, {epochs} epochs, {dtype_name(dtype)}, {where}{"; ".join(lines)}'
    name = 'cifar10' if image_set.is_cifar10 else image_set.path
    lowest = LOWEST_ACCURACY.get(name, 0)
    if any(figures[mode]['mean'] < lowest for mode in figures if mode != 'data'):
        raise CheckError(f'{line}; expected at least {lowest:.0%}')
    return line, figures


#### Benchmarks ####################################################################################


def run_benchmarks(data):
    """What `python -m kernels.bench` prints."""
    from kernels import bench

    bench.main([])
    return 'see below', {}


#### Parts #########################################################################################

# For each part: a function, seconds with a GPU, and seconds without; None if it needs one. The
# function gets what --data says, which most parts do not need, and returns a line and a dict of
# figures, or raises an exception.
PARTS = {
    'machine': (check_machine, 25, 20),
    'data': (check_data, 40, 15),
    'kernels': (check_kernels, 35, 35),
    'graphs airbench94': (partial(compare_graphs, AIRBENCH), 30, 30),
    'graphs record94': (partial(compare_graphs, RECORD), 30, 30),
    'compile airbench94': (partial(compare_compiled, AIRBENCH), 100, None),
    'compile record94': (partial(compare_compiled, RECORD), 100, None),
    'profile airbench94': (partial(profile_steps, AIRBENCH), 40, 25),
    'profile record94': (partial(profile_steps, RECORD), 40, 25),
    'runs airbench94': (partial(check_runs, AIRBENCH), 65, 65),
    'runs record94': (partial(check_runs, RECORD), 65, 55),
    'benchmarks': (run_benchmarks, 30, None),
}


@dataclass
class Part:
    """A process to run. Two arguments are added to its command: the file for its result, and data.

    The result is JSON: {'line', 'figures'}, or {'failed'} with a line that says why.
    """

    name: str
    command: list  # None if the part needs a GPU, and there is none
    limit: float  # seconds
    environment: dict = field(default_factory=dict)


def make_parts(is_gpu, scratch):
    """All parts. `scratch` is a folder for what torch.compile and Triton keep.

    It is empty at first, so that what we call compiling is not reading what was compiled before.
    """
    environment = {
        'PYTHONPATH': os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')])),
        'TORCHINDUCTOR_CACHE_DIR': str(scratch / 'inductor'),
        'TRITON_CACHE_DIR': str(scratch / 'triton'),
    }
    parts = []
    for name, (_, gpu_limit, cpu_limit) in PARTS.items():
        limit = gpu_limit if is_gpu else cpu_limit
        command = [sys.executable, '-m', 'lab.check', name]
        if limit is None:
            command, limit = None, 0
        part = Part(name, command, limit, environment)
        if name == 'kernels' and not is_gpu:
            part.environment = environment | {'TRITON_INTERPRET': '1'}
        parts.append(part)
    return parts


def run_alone(name, file, data):
    """Run a part in this process, and write its result to a file. Returns the exit code."""
    function, _, _ = PARTS[name]
    try:
        line, figures = function(data)
        result = {'line': line, 'figures': figures}
    except Exception as error:
        traceback.print_exc()
        result = {'failed': describe_error(error)}
    write_json(Path(file), result)
    return 1 if 'failed' in result else 0


def describe_error(error):
    if isinstance(error, (CheckError, UserError)):
        return str(error)
    return f'{type(error).__name__}: {first_lines(error)}'


#### Running them ##################################################################################


def one_line(text):
    """Text without what could break a terminal's or a table's line."""
    text = ''.join(c if c.isprintable() else ' ' for c in str(text))
    return ' '.join(text.replace('|', '/').split())


def show(text, end='\n'):
    """Print progress, which is no part of the report. A terminal's line is written over."""
    if sys.stderr.isatty():
        print(f'\r{text:<78}', end=end, file=sys.stderr, flush=True)
    elif end == '\n':
        print(text, file=sys.stderr, flush=True)


def wait(process, name, limit):
    """The exit code of a process, or None if it has not ended after `limit` seconds."""
    start = time.monotonic()
    while True:
        seconds = time.monotonic() - start
        if seconds >= limit:
            return None
        show(f'{name}: {seconds:.0f} s of at most {limit:.0f} s', end='')
        with suppress(subprocess.TimeoutExpired):
            return process.wait(min(1, limit - seconds))


def kill_group(process):
    """End a process and all that it has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def describe_end(code, limit, output):
    """Why a process has failed without saying so itself, in one line."""
    if code is None:
        reason = f'took longer than {limit:.0f} s'
    elif code < 0:
        reason = f'was ended by {signal.Signals(-code).name}'
    else:
        reason = f'left no result (exit code {code})'
    lines = [line for line in map(one_line, output.splitlines()) if line]
    return f'{reason}; its last line: {lines[-1][:200]}' if lines else reason


def read_result(file):
    """The result that a part has written, or None."""
    with suppress(OSError, ValueError):
        result = json.loads(file.read_text())
        if isinstance(result, dict) and {'line', 'failed'} & result.keys():
            return result
    return None


def run_process(part, data, limit, scratch):
    """Run a part's process. Returns (exit code, None after the limit; result or None; output)."""
    file = scratch / 'result.json'
    file.unlink(missing_ok=True)
    printed = scratch / 'output.txt'
    with printed.open('wb') as output:
        process = subprocess.Popen(
            [*part.command, file, data],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | part.environment,
            start_new_session=True,  # a process group
        )
    try:
        code = wait(process, part.name, limit)
    finally:
        kill_group(process)
    return code, read_result(file), printed.read_bytes().decode(errors='replace')


def run_part(part, data, limit, scratch):
    """Run a part. Returns its row of the report.

    Its 'status' is 'passed', 'failed', 'skipped' or, after Ctrl-C, 'interrupted'.
    """
    row = {'part': part.name, 'status': 'skipped', 'result': 'needs a GPU', 'seconds': 0.0}
    row |= {'limit': limit, 'figures': {}, 'output': ''}
    if part.command is None:
        return row
    start = time.monotonic()
    try:
        code, result, output = run_process(part, data, limit, scratch)
    except KeyboardInterrupt:
        seconds = time.monotonic() - start
        return row | {'status': 'interrupted', 'result': 'interrupted', 'seconds': seconds}
    row |= {'seconds': time.monotonic() - start, 'output': output[-20000:]}
    if code not in (0, 1) or result is None:
        row |= {'status': 'failed', 'result': describe_end(code, limit, output)}
    elif 'failed' in result:
        row |= {'status': 'failed', 'result': one_line(result['failed'])}
    else:
        row |= {'status': 'passed', 'result': one_line(result['line'])}
        row['figures'] = result.get('figures', {})
    return row


def run_parts(parts, data, file, scratch):
    """Run the parts, and write a report after each of them. Returns the report.

    A part's limit grows by what the earlier ones have left. Ctrl-C ends the part and the rest.
    """
    report = {'argv': sys.argv, 'started': time.strftime('%Y-%m-%d %H:%M:%S'), 'parts': []}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, report)  # an error now is better than one in ten minutes
    spare = 0
    for part in parts:
        limit = part.limit + spare
        if part.command is not None and not sys.stderr.isatty():
            show(f'{part.name}: at most {limit:.0f} s')
        row = run_part(part, data, limit, scratch)
        spare = max(0, limit - row['seconds'])
        if part.name == 'data':
            # So that the next parts do not try to download it again.
            data = row['figures'].get('path') or data or 'digits'
        if part.command is not None:
            show(f'{part.name}: {row["status"]} after {row["seconds"]:.0f} s')
        report['parts'].append(row)
        write_json(file, report)
        if row['status'] == 'interrupted':
            break
    return report


def print_report(report):
    """Print a table for an issue, then what failed."""
    print('| part | result | seconds |')
    print('|---|---|---|')
    failed = []
    for row in report['parts']:
        result = row['result']
        if row['status'] == 'failed':
            result = f'FAILED: {result}'
            failed.append(row)
        print(f'| {row["part"]} | {result} | {row["seconds"]:.0f} |')
    for row in report['parts']:
        if row['part'] == 'benchmarks' and row['status'] == 'passed':
            print(f'\n```\n{row["output"].strip()}\n```')
    print()
    for row in failed:
        print(f'failed: {row["part"]}: {row["result"]}')


def exit_code(report):
    """130 after Ctrl-C; 1 if a part failed; otherwise 0."""
    found = {row['status'] for row in report['parts']}
    if 'interrupted' in found:
        return 130
    return 1 if 'failed' in found else 0


def check_all(data, out):
    """`lab check`: run all parts, and print and write a report. Returns the exit code."""
    if data not in (None, 'digits') and not os.path.isdir(data):
        raise UserError(f'--data {data}: there is no such folder')
    if has_unusable_gpu():
        raise UserError('this torch finds no driver for the NVIDIA GPU; see nvidia-smi')
    is_gpu = torch.cuda.is_available()
    if data is None:
        data = '' if is_gpu else 'digits'
    file = Path(out or time.strftime('logs/check-%Y%m%d-%H%M%S.json'))
    with tempfile.TemporaryDirectory(prefix='check-', ignore_cleanup_errors=True) as scratch:
        report = run_parts(make_parts(is_gpu, Path(scratch)), data, file, Path(scratch))
    print_report(report)
    print(f'figures, and what the parts printed: {file}')
    return exit_code(report)


if __name__ == '__main__':
    sys.exit(run_alone(*sys.argv[1:]))
