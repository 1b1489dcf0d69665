"""What the studies share: their command line, their records, and where they train.

A study compares settings, and calls each of them a cell. It trains several networks in every cell,
with different seeds. Each network's record is a JSON file in OUT/cells, and OUT/study.json holds
all of them. Either of the two is enough for the tables and pictures, except that variance also
needs OUT/votes.npz if OUT/cells is gone.
"""

import copy
import dataclasses
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

import torch
from filelock import Timeout
from tqdm import tqdm

import airbench94
from lab import networks
from lab.data import ImageSet, load_set, progress, read_tensors
from lab.errors import Parser, UserError, report_errors
from lab.machine import DTYPES, describe_machine, is_first_process, pick_device, pick_dtype
from lab.options import override
from lab.runs import locked, open_log, read_json, write_json, write_tensors

#### Training ######################################################################################


def first_images(loader, n):
    """A copy of `loader` with its first n images, or with all of them if n is None."""
    loader = copy.copy(loader)
    loader.images = loader.images[:n]
    loader.labels = loader.labels[:n]
    return loader


@dataclass
class Place:
    """Where a study trains: with the settings of a scale, on an ImageSet, on a device."""

    settings: dict
    folder: Path  # of the records
    image_set: ImageSet
    device: torch.device
    dtype: torch.dtype

    def __post_init__(self):
        self.test_loader = self.loader(self.image_set.test, 1000)

    @property
    def num_classes(self):
        return len(self.image_set.classes)

    @property
    def has_digits(self):
        """Whether the classes are digits, which are no digits any more when they are mirrored."""
        return self.image_set.classes == [str(digit) for digit in range(10)]

    def loader(self, images_and_labels, batch_size, aug=None, kind=airbench94.CifarLoader, **more):
        """A loader of the class `kind`. more: further arguments for it."""
        options = {'device': self.device, 'dtype': self.dtype}
        options |= {'mean': self.image_set.mean, 'std': self.image_set.std}
        loader = kind(*images_and_labels, batch_size, aug, **options, **more)
        loader.num_classes = self.num_classes  # a part of the images may lack some
        return loader

    def training_loader(self, batch_size, aug=None, kind=airbench94.CifarLoader, **more):
        """A loader of as many training images as the scale has.

        Raises UserError if they don't fill a batch.
        """
        images, labels = self.image_set.train
        n = self.settings['images']
        loader = self.loader((images[:n], labels[:n]), batch_size, aug, kind, train=True, **more)
        try:
            len(loader)
        except ValueError as error:
            raise UserError(f'{self.image_set.path}: {error}') from error
        return loader

    def hyp(self, recipe, assignments):
        """The recipe's hyp with each KEY=VALUE of `assignments` set. Digits are not mirrored."""
        if self.has_digits:
            assignments = [*assignments, 'aug.flip=False']
        return override(recipe.hyp, assignments)

    def train(self, recipe, loader, hyp, seed, **options):
        """A network that recipe.train makes. Raises UserError if it diverges."""
        few = first_images(self.test_loader, 100)  # the recipe looks at them after each epoch
        net, record = recipe.train(loader, few, hyp, seed, **options)
        if 'failed' in record:
            raise UserError(f'the network of seed {seed} diverges: {record["failed"]}')
        return net

    def accuracies(self, net, hyp):
        """The test accuracies, in [0, 1], without and with test-time augmentation."""
        return {
            'val_acc': airbench94.evaluate(net, self.test_loader),
            'tta_val_acc': airbench94.evaluate(net, self.test_loader, networks.tta_level(hyp)),
        }

    def save_weights(self, name, seed, weights):
        """Keep the weights of a network for later stages. weights: {name: tensor}."""
        file = self.weights_file(name, seed)
        file.parent.mkdir(exist_ok=True)
        write_tensors(file, {key: value.detach() for key, value in weights.items()})

    def load_weights(self, name, seed):
        """What an earlier stage gave to save_weights, on this device. Raises UserError."""
        way_out = f'delete the records of seed {seed}, and they will be made again'
        weights = read_networks(self.weights_file(name, seed), way_out)
        return {key: value.to(self.device) for key, value in weights.items()}

    def weights_file(self, name, seed):
        return self.folder / 'networks' / f'{name}-{seed}.pt'

    def load_network(self, file):
        """A network, with weights in fp32, from a file that --save wrote.

        Raises UserError if it is something else, or if it has other classes than the set.
        """
        recipe = networks.find_recipe(file, networks.read_network(file))
        # With bfloat16, make_net keeps weights in fp32 and uses torch.autocast.
        dtype = torch.float32 if self.dtype == torch.float32 else torch.bfloat16
        net, saved = networks.load_network(file, recipe, self.device, dtype)
        if saved['classes'] != self.image_set.classes:
            raise UserError(f'{file}: its classes are not those of the set')
        return net


#### Jobs and records ##############################################################################


@dataclass
class Stage:
    """A part of a study that needs what the stage before it made.

    jobs(settings): all that belongs to it, as (cell, seed). No other stage has the same cells.
    train(cell, seed, place): does one of them, and returns its record. Weights go to later stages
        through place.save_weights and place.load_weights.
    """

    jobs: Callable
    train: Callable


def in_stages(*stages):
    """(plan, train) of a study: each stage begins when the one before it is complete."""

    def plan(settings, records):
        done = done_jobs(records)
        jobs = []
        for stage in stages:
            jobs.extend(stage.jobs(settings))
            if not done.issuperset(cell_name(*job) for job in jobs):
                break
        return jobs

    def train(cell, seed, place):
        [stage] = [stage for stage in stages if (cell, seed) in stage.jobs(place.settings)]
        return stage.train(cell, seed, place)

    return plan, train


def for_each_seed(cells, settings):
    """The jobs of these cells with all seeds, seed by seed. Given networks have only seed 0."""
    seeds = range(1 if settings.get('files') else settings['runs'])
    return [(cell, seed) for seed in seeds for cell in cells]


def cell_name(cell, seed):
    settings = '-'.join(f'{key}={value}' for key, value in cell.items())
    return f'{settings}-seed={seed}'


def done_jobs(records):
    return {cell_name(record['cell'], record['seed']) for record in records}


def cell_file(folder, cell, seed):
    return folder / 'cells' / f'{cell_name(cell, seed)}.json'


def read_file(file, way_out):
    """The dict in a JSON file. Raises UserError, with the way out, if it is damaged."""
    try:
        return read_json(file)
    except ValueError as error:
        raise UserError(f'{file}: {error}; {way_out}') from error


def read_cell(file):
    """A record. Raises UserError if it is damaged, or that of another cell."""
    way_out = 'delete it, and it will be made again'
    record = read_file(file, way_out)
    try:
        is_whole = file == cell_file(file.parent.parent, record['cell'], record['seed'])
    except (AttributeError, KeyError):
        is_whole = False
    if not is_whole:
        raise UserError(f'{file}: is not the record that its name says; {way_out}')
    return record


def read_cells(folder):
    """The existing records, with their 'cell' and 'seed'. Raises UserError for a damaged one."""
    return [read_cell(file) for file in sorted((folder / 'cells').glob('*.json'))]


def read_study(folder):
    """(what all records have in common, the records), from the cells, or else from study.json.

    Raises UserError if the folder has neither.
    """
    way_out = 'choose another --out'
    if not (folder / 'cells').is_dir() and (folder / 'study.json').exists():
        config = read_file(folder / 'study.json', way_out)
        return config, config.pop('records', [])
    records = read_cells(folder)
    if not records:
        raise UserError(f'{folder}: holds no records of a study; {way_out}')
    config = read_file(folder / 'config.json', way_out)
    write_json(folder / 'study.json', config | {'records': records})
    return config, records


def read_networks(file, way_out):
    """The networks in a file that write_tensors wrote, on the CPU. Raises UserError."""
    try:
        return read_tensors(file)
    except Exception as error:  # damaged files fail in many ways
        raise UserError(f'{file}: is missing or damaged; {way_out}') from error


def in_cell(records, **settings):
    """The records whose cell has these settings, sorted by seed, so that we can compare pairs."""
    found = [record for record in records if settings.items() <= record['cell'].items()]
    return sorted(found, key=itemgetter('seed'))


def whole_seeds(records, jobs, folder, least=1):
    """The records of those seeds whose jobs are all done, so that we can compare pairs.

    Raises UserError if there are fewer than `least`.
    """
    wanted = Counter(seed for _, seed in jobs)
    made = Counter(record['seed'] for record in records)
    whole = {seed for seed in made if made[seed] == wanted[seed]}
    if len(whole) < least:
        need = 'a seed' if least == 1 else f'{least} seeds'
        raise UserError(f'{folder}: needs {need} with all networks; train on, then --show')
    return [record for record in records if record['seed'] in whole]


def check_complete(records, jobs, folder):
    """Raise UserError if some of the jobs are not done."""
    done = done_jobs(records)
    missing = sum(cell_name(*job) not in done for job in jobs)
    if missing:
        raise UserError(f'{folder}: {missing} parts are missing; the same command again goes on')


def make_cells(jobs, study, place):
    """Do those of `jobs` that are not done, and that no other process is doing.

    Returns how many it did.
    """
    folder = place.folder
    missing = [job for job in jobs if not cell_file(folder, *job).exists()]
    about = describe_machine(place.device)
    made = 0
    for cell, seed in progress(missing, study.name):
        file = cell_file(folder, cell, seed)
        try:
            with locked(folder / 'locks' / f'{file.stem}.lock'):
                if file.exists():
                    continue
                start = time.perf_counter()
                record = {'cell': cell, 'seed': seed} | study.train(cell, seed, place) | about
                record['seconds'] = round(time.perf_counter() - start, 2)
                write_json(file, record)
        except Timeout:
            continue
        made += 1
        tqdm.write(f'{file.stem}: {record["seconds"]:.0f} s')
    return made


#### Studies #######################################################################################


def add_options(parser):
    """The options for data and precision."""
    add = parser.add_argument
    add('--data', help="folder of a set, or 'digits' (default: cifar10, downloaded if needed)")
    add('--dtype', choices=DTYPES, help='default: float16 on a CUDA GPU, otherwise float32')


def make_parser(study):
    parser = Parser(f'python -m studies.{study.name}', study.about)
    add = parser.add_argument
    nets = list(study.scales)
    if len(nets) > 1:
        add('--net', choices=nets, default=nets[0])
    add('--scale', choices=study.scales[nets[0]], default='small')
    if study.files:
        about = f'{len(study.files)} that --save wrote'
        add('files', nargs='*', metavar='NETWORK', help=about)
    add('--out', type=Path, help='folder for the records; the same command again goes on')
    study.add_options(parser)
    add('--device', help='cuda, cuda:1, mps or cpu (default: the best available)')
    add('--show', action='store_true', help='train nothing; make table and pictures again')
    parser.set_defaults(net=nets[0], files=[])
    return parser


def settings_of(study, args):
    """The settings of a scale, with the network's name and the given files. Raises UserError."""
    settings = study.scales[args.net][args.scale] | {'net': args.net}
    if study.files:
        if len(args.files) not in (0, len(study.files)):
            names = ', '.join(study.files)
            found = f'{len(args.files)} networks'
            raise UserError(f'{found}: give all of {names}, or none; see --help')
        settings['files'] = args.files
    return settings


def train_missing(study, place):
    """Do what the study plans and has no record of yet, and wait for what others are doing."""
    settings, folder = place.settings, place.folder
    is_waiting = False
    while True:
        records = read_cells(folder)
        jobs = study.plan(settings, records)
        if done_jobs(records).issuperset(cell_name(*job) for job in jobs):
            return
        if make_cells(jobs, study, place) == 0:
            if is_first_process() and not is_waiting:
                way_out = f'if there are none, delete the files in {folder / "locks"}'
                print(f'waiting for other processes, which make the last networks; {way_out}')
            is_waiting = True
            time.sleep(1)


def train_planned(study, scale, place, data):
    """Do all that the study plans, together with other processes that use the same folder.

    data: what the records say about it.
    """
    settings, folder = place.settings, place.folder
    config = {'study': study.name, 'scale': scale, 'settings': settings, 'data': data}
    open_log(folder, config | {'dtype': str(place.dtype)})
    (folder / 'cells').mkdir(exist_ok=True)
    about = f'{study.name}, {settings["net"]}, {scale} scale, on {place.device}'
    print(f'{about}; records in {folder}', flush=True)
    train_missing(study, place)


def train_cells(study, args, folder):
    """Do all that the study plans, on a set that fits into memory."""
    settings = settings_of(study, args)
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    image_set = load_set(args.data, airbench94)
    if settings.get('files'):  # they were trained on images normalized in their own way
        saved = networks.read_network(settings['files'][0])
        image_set = dataclasses.replace(image_set, mean=saved['mean'], std=saved['std'])
    data = {'path': image_set.path, 'classes': len(image_set.classes), 'sha256': image_set.sha256}
    place = Place(settings, folder, image_set, device, dtype)
    train_planned(study, args.scale, place, data)


@dataclass
class Study:
    """A study's parts.

    scales: {net: {scale: settings}}, for each kind of network, in JSON's types. The first kind is
        the default; its name becomes settings['net'].
    plan(settings, records): the jobs, which are the networks that we want, as (cell, seed). It may
        ask for some of them only after it has seen the records of others.
    train(cell, seed, place): does a job, and returns its record.
    show(config, records, folder): prints the table, and draws the pictures into the folder.
    files: names for the saved networks that the user may give, in settings['files'].
    add_options(parser), train_cells(study, args, folder): for other data than a set in memory.
    """

    name: str
    about: str
    scales: dict
    plan: Callable
    train: Callable
    show: Callable
    files: tuple = ()
    add_options: Callable = add_options
    train_cells: Callable = train_cells


def run_study(study, argv=None):
    """A study's command line: train what is missing, show what there is, return the exit code."""

    def call():
        args = make_parser(study).parse_args(argv)
        folder = args.out or Path('logs', '-'.join([study.name, args.net, args.scale]))
        if not args.show:
            study.train_cells(study, args, folder)
        if is_first_process():
            config, records = read_study(folder)
            if config.get('study') != study.name:
                found = f'holds records of the study {config.get("study")}'
                raise UserError(f'{folder}: {found}; choose another --out')
            try:
                study.show(config, records, folder)
            except KeyError as error:
                if not args.show:  # we have just made the records, so that is not what is wrong
                    raise
                way_out = 'if another version of the study made it, train again with another --out'
                raise UserError(f'{folder}: something lacks {error}; {way_out}') from error
        return 0

    airbench94.keep_freed_memory()
    return report_errors(f'studies.{study.name}', call)
