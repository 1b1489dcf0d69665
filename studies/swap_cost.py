"""Seconds of a run of swap94 on 1 to 64 GPUs, from a model of its steps and all-reduces.

    python -m studies.swap_cost                                # a table for each of three links
    python -m studies.swap_cost --launch 2 --plot seconds.png  # steps of at least 2 ms; a picture
    python -m studies.swap_cost logs/swap94-*h200.json         # SWAP's Table 1 from swap94's logs

**Nothing here was measured on several GPUs.** It follows from counted operations, bytes and
all-reduces, and from these assumptions:

- A step takes as long as its operations at the GPU's rate, but at least as long as its launches.
  The rate is airbench94's as published: 0.36 PFLOP in 3.29 A100-seconds (Jordan 2024). The time of
  the launches is measured: the 600 steps of records/record94.py took 5.14 seconds on an H200,
  without --compile.
- An all-reduce of n bytes among p GPUs takes 2 log2(p) latencies, and sends 2 (p - 1) / p n bytes
  at each GPU's bandwidth: Rabenseifner's algorithm (Thakur, Rabenseifner and Gropp 2005, section
  4.4). Nothing overlaps with it.
- The bandwidths are the nominal ones, in one direction: 300 GB/s for an A100's NVLink, 12.5 and
  1.25 GB/s for 100 and 10 Gbit/s Ethernet. The latencies, 10 and 50 microseconds, are assumed.
- The methods are studies.swap's, for swap94's own network. They reach different accuracies, as
  logs/README.md says: large-batch takes as many steps as SWAP's phase 1, and no more. "small/swap"
  is the seconds of small-batch divided by those of SWAP, which is faster where this is above 1.
- All GPUs share the batches of phase 1, and the GPUs of a worker share those of phase 2. If there
  are fewer GPUs than workers, they train them in turn. swap94.py itself cuts a batch into
  phase1.shards, and refuses more GPUs than that. Validation is left out, as on the recipes' clock.

Given logs of swap94.py, we print the paper's Table 1 for them: the accuracies that they measured,
next to the seconds that their settings would take on eight GPUs.
"""

import math
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch

import swap94
from lab.errors import Parser, UserError, report_errors
from lab.flops import evaluated_images, flop_of_steps, flop_per_image
from lab.options import override
from lab.summary import log_name, read_content, save_figure
from studies.show import new_figure, print_table
from studies.swap import METHODS
from studies.swap_tables import PUBLISHED, ROWS

GPUS = [1, 2, 4, 8, 16, 32, 64]
RANKS = 8  # of Table 1
TRAINING_IMAGES, TESTS, CLASSES = 50_000, 10_000, 10


@dataclass
class Link:
    name: str
    bandwidth: float  # bytes a second, of a GPU in one direction
    latency: float  # seconds

    def all_reduce(self, gpus, size):
        """Seconds of an all-reduce of `size` bytes."""
        if gpus == 1:
            return 0.0
        return 2 * math.log2(gpus) * self.latency + 2 * (gpus - 1) / gpus * size / self.bandwidth


LINKS = [
    Link('NVLink, 300 GB/s', 300e9, 10e-6),
    Link('Ethernet, 100 Gbit/s', 12.5e9, 50e-6),
    Link('Ethernet, 10 Gbit/s', 1.25e9, 50e-6),
]


@dataclass
class Gpu:
    rate: float  # operations a second
    launch: float  # seconds that a step takes at least


@dataclass
class Part:
    """A part of a run, in which some GPUs take steps together."""

    flops: list  # operations of each step on one of the GPUs
    gpus: int
    turns: int = 1  # how often this happens, one after another


@cache
def gradient_bytes():
    """What a rank sends with a step's all-reduce: the gradient, in fp32."""
    net = swap94.make_net(swap94.hyp, CLASSES, device='meta', dtype=torch.float32)
    return 4 * sum(p.numel() for p in net.parameters() if p.requires_grad)


def steps_of(hyp, phase, gpus):
    """The operations of each step of a phase, on one of the GPUs that share it."""
    settings = swap94.phase_settings(hyp, phase)
    return flop_of_steps(swap94, settings, TRAINING_IMAGES, CLASSES, gpus)


def evaluation_flop(hyp):
    """Operations to evaluate the final network, on all GPUs together."""
    _, of_view = flop_per_image(swap94, hyp, CLASSES)
    return evaluated_images(hyp, TRAINING_IMAGES, TESTS) * of_view


def parts_of(hyp, gpus):
    """The parts of a run."""
    workers = hyp['phase2']['workers']
    parts = [Part(steps_of(hyp, 'phase1', gpus), gpus)]
    if workers > 0:
        gpus_per_worker = max(1, gpus // workers)
        turns = math.ceil(workers / gpus)
        parts.append(Part(steps_of(hyp, 'phase2', gpus_per_worker), gpus_per_worker, turns))
        parts.append(Part([0.0], gpus))  # the average
    return parts


def part_seconds(part, gpu, link):
    seconds = sum(max(gpu.launch, flop / gpu.rate) for flop in part.flops)
    seconds += len(part.flops) * link.all_reduce(part.gpus, gradient_bytes())
    return part.turns * seconds


def run_seconds(hyp, gpus, gpu, link):
    """Seconds of a run."""
    seconds = sum(part_seconds(part, gpu, link) for part in parts_of(hyp, gpus))
    return seconds + evaluation_flop(hyp) / gpus / gpu.rate


#### Tables and picture ############################################################################


def print_seconds(link, seconds):
    print(f'\n{link.name}, {1e6 * link.latency:.0f} us: seconds of a run, modelled')
    # large-batch needs less than both, but it also reaches less.
    ratio = np.array(seconds['small-batch']) / seconds['swap']
    numbers = seconds | {'small/swap': ratio}
    rows = [[name, *(f'{value:.2f}' for value in values)] for name, values in numbers.items()]
    print_table(['GPUs', *map(str, GPUS)], rows)


def read_runs(path):
    """(name, hyp, the runs that finished) of a log of swap94.py. Raises UserError."""
    content = read_content(path)
    try:
        hyp = content['hyp']
        runs = [run for run in content['runs'] if not run.get('failed')]
        # Older logs of phase 1 alone have workers in hyp, too.
        hyp = hyp | {'phase2': hyp['phase2'] | {'workers': len(runs[0]['workers'])}}
        parts_of(hyp, RANKS)  # a hyp of other times lacks keys
        is_cifar10 = content['data']['is_cifar10']
    except (IndexError, KeyError, TypeError) as error:
        message = f"{path}: is no log of today's swap94.py with finished runs; leave it out"
        raise UserError(message) from error
    if not is_cifar10:
        raise UserError(f'{path}: its runs are not on CIFAR-10; leave it out')
    return log_name(path), hyp, runs


def worker_accuracies(runs):
    """Test accuracies of all workers that did not diverge, without TTA."""
    finished = [worker for run in runs for worker in run['workers'] if not worker.get('failed')]
    found = []
    for worker in finished:
        last_row = worker['epochs'][-1]  # where older logs have it
        found.append(worker.get('val_acc', last_row.get('val_acc')))
    return found


def accuracy_text(accuracies):
    """Mean and std in percent, from accuracies from 0 to 1."""
    values = 100 * np.array(accuracies)
    if len(values) < 2:
        return f'{values.mean():.2f}'
    return f'{values.mean():.2f} +- {values.std(ddof=1):.2f}'


def row_of(name, n, accuracies, seconds):
    return [name, str(n), *accuracies, *(f'{value:.2f}' for value in seconds)]


def print_table_1(paths, gpu, links):
    """Print the SWAP paper's Table 1 for some logs, and as published."""
    logs = [read_runs(path) for path in paths]
    print(f'test accuracy in % with its std; seconds on {RANKS} GPUs: **modelled, not measured**')
    rows = []
    for name, hyp, runs in logs:
        if hyp['phase2']['workers'] > 0:
            before = worker_accuracies(runs)
            parts = parts_of(hyp, RANKS)[:2]
            seconds = [sum(part_seconds(part, gpu, link) for part in parts) for link in links]
            accuracies = [accuracy_text(before), '-']
            rows.append(row_of(f'{name}, workers', len(before), accuracies, seconds))
        kinds = ('val_acc', 'tta_val_acc')
        accuracies = [accuracy_text([run[kind] for run in runs]) for kind in kinds]
        seconds = [run_seconds(hyp, RANKS, gpu, link) for link in links]
        rows.append(row_of(name, len(runs), accuracies, seconds))
    print_table(['log', 'n', 'without TTA', 'with TTA', *(link.name for link in links)], rows)
    print('\nthe paper (Table 1): ResNet-9 on 8 V100s, n=10, seconds measured')
    published = zip(ROWS, PUBLISHED[CLASSES])
    rows = [[row, f'{mean:.2f} +- {std:.2f}', str(s)] for row, (mean, std, s) in published]
    print_table(['', 'accuracy', 'seconds'], rows)


def draw(results, file):
    """Write a picture with a panel for each link. results: a list of (link, {method: seconds})."""
    figure = new_figure(11, 4)
    panels = figure.subplots(1, len(results), sharey=True)
    for axes, (link, seconds) in zip(panels, results):
        for (method, values), marker in zip(seconds.items(), 'osD'):
            axes.plot(GPUS, values, marker=marker, label=method)
        axes.set_xscale('log', base=2)
        axes.set_yscale('log')
        axes.set_xticks(GPUS, [str(gpus) for gpus in GPUS])
        axes.yaxis.set_major_formatter('{x:g}')
        axes.yaxis.set_minor_formatter('{x:g}')
        axes.set_title(link.name)
        axes.set_xlabel('GPUs')
        axes.grid(alpha=0.3, which='both')
    panels[0].set_ylabel('seconds of a run, modelled')
    panels[0].legend()
    save_figure(figure, file)


def parse_args(argv):
    parser = Parser('python -m studies.swap_cost', __doc__)
    add = parser.add_argument
    add('logs', nargs='*', type=Path, metavar='LOG', help="swap94.py's, for Table 1")
    add('--rate', type=float, default=109.0, help="a GPU's TFLOP/s (default: %(default)s)")
    add('--launch', type=float, default=8.5, help='least ms of a step (default: %(default)s)')
    add('--latency', type=float, help="us, instead of each link's own")
    add('--bandwidth', type=float, help='GB/s of one link, instead of the three')
    add('--plot', metavar='FILE', help='draw the tables: .png, .svg or .pdf')
    args = parser.parse_args(argv)
    if args.logs and args.plot:
        raise UserError('Table 1 has no picture; leave out --plot, or the logs')
    for name in ('rate', 'launch', 'latency', 'bandwidth'):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f'--{name} {value:g}: must be above 0')
    return args


def chosen_links(args):
    links = LINKS
    if args.bandwidth is not None:
        links = [Link(f'{args.bandwidth:g} GB/s', 1e9 * args.bandwidth, 50e-6)]
    if args.latency is not None:
        links = [Link(link.name, link.bandwidth, 1e-6 * args.latency) for link in links]
    return links


def show_costs(argv):
    args = parse_args(argv)
    gpu = Gpu(1e12 * args.rate, 1e-3 * args.launch)
    links = chosen_links(args)
    if args.logs:
        print_table_1(args.logs, gpu, links)
        return 0
    hyps = {method: override(swap94.hyp, own) for method, own in METHODS.items()}
    results = []
    for link in links:
        seconds = {
            method: [run_seconds(hyp, gpus, gpu, link) for gpus in GPUS]
            for method, hyp in hyps.items()
        }
        results.append((link, seconds))
        print_seconds(link, seconds)
    if args.plot is not None:
        draw(results, Path(args.plot))
    return 0


def main(argv=None):
    return report_errors('studies.swap_cost', show_costs, argv)


if __name__ == '__main__':
    sys.exit(main())
