"""What the studies share: their calls, the user's mistakes, trained cells, and pictures.

A study trains networks in several cells, the settings that it compares, with several seeds each.
Every network's record is a JSON file in OUT/cells; OUT/study.json has all of them. Tables and
pictures are made of either alone.
"""

import argparse
import hashlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

import numpy as np
import scipy.stats
import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

import airbench94
import airbench95
import airbench96
import swap94
from airbench94 import UserError

SCRIPTS = (airbench94, airbench95, airbench96, swap94)
MISTAKES = tuple(script.UserError for script in SCRIPTS)  # each script has its own


class Parser(argparse.ArgumentParser):
    """Shows a study's docstring as it is, and raises UserError for a wrong call."""

    def __init__(self, prog, description):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(prog, description=description, formatter_class=formatter)

    def error(self, message):
        raise UserError(f'{message}; see --help')


def exit_code(name, study, argv):
    """Call study(argv). Returns 0; 2 after a mistake, told in one line; or 130 after Ctrl-C."""
    try:
        study(argv)
    except KeyboardInterrupt:
        print(f'{name}: interrupted; the same line again goes on', file=sys.stderr)
        return 130
    except (*MISTAKES, OSError) as error:
        message = ' '.join(str(error).split())
        print(f'{name}: {message}', file=sys.stderr)
        return 2
    return 0


#### Cells #########################################################################################


def first_images(loader, n, kind=airbench94.CifarLoader):
    """A loader of the first n images of another, or of all if n is None, of the class `kind`."""
    part = airbench94.first_images(loader, n)
    part.__class__ = kind
    return part


def load_network(path, loader):
    """(network of fp32, what was saved) of a file that one of the scripts has written.

    Raises UserError if it is none, or of other classes than the loader's.
    """
    for script in SCRIPTS:
        try:
            net, saved = script.load_network(path, device=loader.device, dtype=torch.float32)
        except MISTAKES as error:
            mistake = error
            continue
        if saved['classes'] != loader.classes:
            raise UserError(f'{path}: its classes are not those of the set')
        return net, saved
    raise mistake


@dataclass
class Place:
    """Where a study trains: with the settings of a scale, on the images of two loaders."""

    settings: dict
    folder: Path  # of the records
    train_loader: airbench94.CifarLoader
    test_loader: airbench94.CifarLoader

    def training(self, hyp, images=None, kind=airbench94.CifarLoader):
        """A loader for `hyp` of the first so many training images."""
        loader = first_images(self.train_loader, images, kind)
        loader.batch_size = hyp['opt']['batch_size']
        loader.aug = hyp['aug']
        return loader

    def train(self, script, loader, hyp, seed, **options):
        """A network that script.train makes. Raises UserError if it diverges."""
        few = first_images(self.test_loader, 100)  # the script looks at them after each epoch
        net, record = script.train(loader, few, hyp, seed, **options)
        if 'failed' in record:
            raise UserError(f'the network of seed {seed} diverges: {record["failed"]["reason"]}')
        return net

    def accuracies(self, net, tta_level):
        """In [0, 1], without and with test-time augmentation."""
        return {
            'val_acc': airbench94.evaluate(net, self.test_loader),
            'tta_val_acc': airbench94.evaluate(net, self.test_loader, tta_level),
        }


@dataclass
class Study:
    """A study's parts.

    scales: the settings of each kind of network at each scale, {net: {scale: settings}}, in JSON's
    types. The first kind is the default; settings['net'] becomes its name.
    plan(settings, records) lists the networks that are wanted so far, as (cell, seed): all at once,
    or the next ones once it knows the records of the first.
    train(cell, seed, place) makes one's record.
    show(config, records, folder) prints the table, and draws the pictures into the folder.
    files: names for the saved networks that the study can be given, in settings['files'].
    """

    name: str
    about: str
    scales: dict
    plan: Callable
    train: Callable
    show: Callable
    files: tuple = ()


def cell_file(folder, cell, seed):
    settings = '-'.join(f'{key}={value}' for key, value in cell.items())
    return folder / 'cells' / f'{settings}-seed={seed}.json'


def read_json(file):
    """What a file holds. Raises UserError if it is damaged."""
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f'{file}: is damaged; delete it, and it is made again') from error


def read_cells(folder):
    """The records that are there, with their 'cell' and 'seed'. Raises UserError for others."""
    return [read_json(file) for file in sorted((folder / 'cells').glob('*.json'))]


def read_study(folder):
    """(what all records have in common, the records), of the cells, or else of study.json.

    Raises UserError if the folder has neither.
    """
    if not (folder / 'cells').is_dir() and (folder / 'study.json').exists():
        config = read_json(folder / 'study.json')
        return config, config.pop('records')
    records = read_cells(folder)
    if not records:
        raise UserError(f'{folder}: holds no records of a study; choose another --out')
    config = read_json(folder / 'config.json')
    airbench94.write_json(folder / 'study.json', config | {'records': records})
    return config, records


def in_cell(records, **settings):
    """Those records whose cell has these settings."""
    return [r for r in records if settings.items() <= r['cell'].items()]


def by_seed(records, **settings):
    """The same, in the order of their seeds, so that pairs compare."""
    return sorted(in_cell(records, **settings), key=itemgetter('seed'))


def whole_seeds(records, jobs):
    """The records of those seeds with which all of their jobs are done, so that pairs compare."""
    wanted = Counter(seed for _, seed in jobs)
    made = Counter(record['seed'] for record in records)
    return [record for record in records if made[record['seed']] == wanted[record['seed']]]


def two_whole_seeds(records, jobs, folder):
    """whole_seeds. Raises UserError if they are fewer than two."""
    whole = whole_seeds(records, jobs)
    if len({record['seed'] for record in whole}) < 2:
        raise UserError(f'{folder}: needs two seeds with all their networks; train on, then --show')
    return whole


def make_cells(jobs, study, place, folder):
    """Make those of `jobs` that are not there, and that no other process makes.

    Returns how many.
    """
    missing = [job for job in jobs if not cell_file(folder, *job).exists()]
    about = airbench94.describe_call(place.train_loader)
    made = 0
    for cell, seed in airbench94.progress(missing, study.name):
        file = cell_file(folder, cell, seed)
        try:
            with FileLock(folder / 'locks' / f'{file.stem}.lock', timeout=0):
                if file.exists():
                    continue
                start = time.perf_counter()
                record = {'cell': cell, 'seed': seed} | study.train(cell, seed, place) | about
                record['seconds'] = round(time.perf_counter() - start, 2)
                airbench94.write_json(file, record)
        except Timeout:
            continue
        made += 1
        tqdm.write(f'{file.stem}: {record["seconds"]:.0f} s')
    return made


def run_study(study, argv=None):
    """A study's command line: train what is missing, show what is there, return the exit code."""
    name = f'studies.{study.name}'
    parser = Parser(f'python -m {name}', study.about)
    add = parser.add_argument
    nets = list(study.scales)
    if len(nets) > 1:
        add('--net', choices=nets, default=nets[0])
    add('--scale', choices=study.scales[nets[0]], default='small')
    if study.files:
        add(
            'files',
            nargs='*',
            metavar='NETWORK',
            help=f'{len(study.files)} that --save has written',
        )
    add('--out', type=Path, help='folder of the records; the same line again goes on')
    add('--data', help="folder of a set, or 'digits' (default: cifar10, downloaded into it)")
    add('--device', help='cuda, cuda:1, mps or cpu (default: the best that is there)')
    add('--dtype', choices=airbench94.DTYPES, help='default: float16 on CUDA, float32 elsewhere')
    add('--show', action='store_true', help='train nothing; make table and pictures again')

    def call(argv):
        args = parser.parse_args(argv)
        net = nets[0] if len(nets) == 1 else args.net
        folder = args.out or Path('logs', '-'.join([study.name, net, args.scale]))
        if not args.show:
            settings = study.scales[net][args.scale] | {'net': net}
            if study.files:
                settings['files'] = check_files(study, args.files)
            train_cells(study, args, settings, folder)
        if airbench94.is_first_process():
            config, records = read_study(folder)
            study.show(config, records, folder)

    airbench94.keep_freed_memory()
    return exit_code(name, call, argv)


def check_files(study, files):
    """The files as they are, if they are as many as the study needs, or none."""
    if len(files) not in (0, len(study.files)):
        names = ', '.join(study.files)
        raise UserError(f'{len(files)} networks: give all of {names}, or none; see --help')
    return files


def digest_of(loaders):
    """SHA-256 of the images and labels of some loaders, as a hexadecimal number."""
    digest = hashlib.sha256()
    for loader in loaders:
        digest.update(loader.images.cpu().numpy())
        digest.update(loader.labels.cpu().numpy())
    return digest.hexdigest()


def train_cells(study, args, settings, folder):
    """Make all that the study plans, together with other processes that have the same folder."""
    device = airbench94.pick_device(args.device)
    dtype = airbench94.pick_dtype(args.dtype, device)
    data = args.data
    if data is None:
        data = 'cifar10'
        airbench94.download_cifar10(data)
    options = {'device': device, 'dtype': dtype}
    loaders = [airbench94.CifarLoader(data, train, 1000, **options) for train in (True, False)]
    if settings.get('files'):
        _, saved = load_network(settings['files'][0], loaders[0])
        for loader in loaders:
            loader.set_statistics(saved['mean'], saved['std'])
    airbench94.open_log(
        folder,
        {
            'study': study.name,
            'scale': args.scale,
            'settings': settings,
            'data': {
                'path': data,
                'classes': len(loaders[0].classes),
                'sha256': digest_of(loaders),
            },
            'dtype': str(dtype),
        },
    )
    (folder / 'cells').mkdir(exist_ok=True)
    place = Place(settings, folder, *loaders)
    about = f'{study.name}, {settings["net"]}, {args.scale} scale, on {device}'
    print(f'{about}; records in {folder}', flush=True)
    while True:
        jobs = study.plan(settings, read_cells(folder))
        if all(cell_file(folder, *job).exists() for job in jobs):
            return
        if make_cells(jobs, study, place, folder) == 0:
            time.sleep(1)  # other processes are at the last ones


#### Pictures and tables ###########################################################################

# Of Okabe and Ito, whose colours people with any kind of colour vision tell apart.
COLOURS = ['#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000']


def mean_and_interval(values):
    """(mean, half of the 95% interval of the mean by Student's t: NaN for one value)."""
    values = np.array(values)
    if len(values) < 2:
        return values.mean(), np.nan
    half = scipy.stats.t.ppf(0.975, len(values) - 1) * scipy.stats.sem(values)
    return values.mean(), half


def paired_p(larger, smaller):
    """p of "`larger` is not the larger one in the mean", by Student's paired t-test.

    Both are in the same order; `smaller` may be a number. NaN for one pair, and 0 or 1 if all
    differences are alike.
    """
    differences = np.subtract(larger, smaller)
    if len(differences) < 2:
        return np.nan
    if np.allclose(differences, differences[0]):
        return float(differences[0] <= 0)
    return scipy.stats.ttest_1samp(differences, 0, alternative='greater').pvalue


def new_figure(width, height):
    """A matplotlib figure, in inches, that opens no window. Raises UserError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError('a picture needs matplotlib: pip install matplotlib') from error
    return Figure(figsize=(width, height), layout='constrained')


def save_figure(figure, file):
    """Write a figure whole or not at all, in the format of its name. Raises UserError."""
    kind = file.suffix.lower().removeprefix('.')
    if kind not in figure.canvas.get_supported_filetypes():
        raise UserError(f'--plot {file}: matplotlib cannot write that; end it in .png or .svg')
    temporary = file.with_name(f'{file.name}.{os.getpid()}.tmp')
    try:
        figure.savefig(temporary, format=kind, dpi=150)
        os.replace(temporary, file)
    except (OSError, RuntimeError) as error:  # .pgf needs LaTeX, and says RuntimeError
        raise UserError(f'--plot {file}: cannot be written, choose another: {error}') from error
    finally:
        if temporary.exists():
            temporary.unlink()
    print(f'\nplot in {file}')


def save_both(figure, stem):
    """Write a figure as stem.svg and stem.png."""
    for suffix in ('svg', 'png'):
        save_figure(figure, stem.with_name(f'{stem.name}.{suffix}'))
