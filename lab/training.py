"""What `lab run` does: prepare a recipe, train the missing runs, and log them."""

import shutil
import time
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from lab import runs
from lab.data import ImageSet, load_set
from lab.errors import UserError, first_lines
from lab.flops import costs_of_run
from lab.machine import describe_machine, is_first_process, process_count
from lab.networks import load_network, save_network, tta_level
from lab.options import flat, override
from lab.recipes import is_joint, read_source
from lab.summary import commonest_share, print_phases, print_summary, summarize

#### Output ########################################################################################

COLUMNS = {  # and their widths
    'run': 5,
    'epoch': 12,
    'train_loss': 10,
    'train_acc': 9,
    'val_acc': 9,
    'tta_val_acc': 11,
    'seconds': 9,
}


def print_line(line):
    """Print a line in one write, because torchrun's processes would mix their lines otherwise."""
    print(f'{line}\n', end='', flush=True)


def print_row(row):
    """Print a row of the table, from a dict with some of COLUMNS."""
    cells = []
    for name, width in COLUMNS.items():
        value = row.get(name)
        if value is None:
            value = ''
        elif isinstance(value, float):
            value = f'{value:.4f}'
        cells.append(str(value).rjust(width))
    print_line(f'| {" | ".join(cells)} |')


#### Preparing #####################################################################################


def choose_data(data, recipe, overrides):
    """(ImageSet, hyp). Raises UserError if there is no data.

    Without CIFAR-10, the bare command trains on the digits, and says so.
    """
    hyp = override(recipe.hyp, overrides)
    if data != 'digits':
        try:
            return load_set(data, recipe), hyp
        except UserError as error:
            if data is not None or overrides or process_count() > 1:
                raise
            print(f'\n*** THIS IS NOT CIFAR-10: {error}')
            print("*** Training on scikit-learn's handwritten digits instead.\n", flush=True)
    return load_set('digits', recipe), override(recipe.digits_hyp(), overrides)


def make_loaders(recipe, image_set, hyp, device, dtype):
    """(train_loader, test_loader). Raises UserError if `hyp` does not suit so many images."""
    options = {'device': device, 'dtype': dtype, 'mean': image_set.mean, 'std': image_set.std}
    try:
        loaders = recipe.make_loaders(image_set.train, image_set.test, hyp, **options)
        len(loaders[0])  # raises ValueError if the images don't fill a batch
    except ValueError as error:
        raise UserError(first_lines(error)) from error
    for loader in loaders:
        loader.num_classes = len(image_set.classes)
    return loaders


def check_network(recipe, hyp, train_loader):
    """Raise UserError if the smallest images that the recipe trains on shrink to nothing."""
    sizes = [value for key, value in flat(hyp).items() if key.endswith('growth.size')]
    size = min(sizes, default=32)
    where = {'device': train_loader.images.device, 'dtype': train_loader.dtype}
    net = recipe.make_net(hyp, train_loader.num_classes, **where).eval()
    try:
        with torch.no_grad():
            net(torch.zeros(1, 3, size, size, **where))
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        line = f'this network cannot take images of {size} x {size} pixels'
        raise UserError(f'{line}: {first_lines(error)}') from error


def is_kernel(value):
    """Whether this is one of the functions that launch a Triton kernel."""
    module = getattr(value, '__module__', None)
    return module in ('kernels.flip_crop', 'kernels.weight_average')


def use_kernels(loader):
    """Let a Triton kernel augment the loader's images. Returns whether it does.

    It does not replace a function that gives other results, for example after you edited it.
    """
    try:
        from kernels import faster_augment
    except ImportError as error:
        print(f'flip_crop, the Triton kernel, is not used: {error}', flush=True)
        return False
    loader.augment = faster_augment(loader)
    return is_kernel(loader.augment)


def make_faster(recipe, train_loader, hyp, *, compiles, kernels):
    """Arguments for `train` that make it faster, and perhaps a faster train_loader.augment.

    Args:
        compiles: whether to use torch.compile.
        kernels: 'on', 'off', or 'auto' for on where the device is CUDA and they work.
    """
    augment = train_loader.augment
    faster = {}
    if compiles:
        try:
            faster = recipe.fast_path(train_loader, hyp)
        except ImportError as error:
            raise UserError(f'--compile: {error}') from error
    if kernels == 'off':
        train_loader.augment = augment
        faster = {name: value for name, value in faster.items() if not is_kernel(value)}
    wants_kernel = kernels == 'on' or (kernels == 'auto' and train_loader.device.type == 'cuda')
    if wants_kernel and not is_kernel(train_loader.augment):
        works = use_kernels(train_loader)
        if kernels == 'on' and not works:
            needed = "a GPU, Triton, kernels/, and the original recipe's augment"
            raise UserError(f'--kernels on needs {needed}')
    return faster


def describe_compile_error(error):
    """One line that names what failed: a compiler's message is far down in the error's text."""
    line = first_lines(error)
    for further in str(error).splitlines()[2:]:
        if 'error:' in further:
            line = f'{line}: {further.strip()}'
            break
    return f'{line}; TRACEBACK=1 shows more'


def join_ranks(recipe, device):
    """Let all ranks meet. Raises UserError if the environment does not say where."""
    try:
        recipe.join_ranks(device)
    except ValueError as error:
        raise UserError(first_lines(error)) from error


def warm_up(recipe, loaders, hyp, faster):
    """Train briefly, which compiles and loads everything that a run needs. Returns the seconds."""
    if is_first_process():
        print('warming up', flush=True)
    start = time.perf_counter()
    try:
        recipe.warm_up(*loaders, hyp, faster)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # torch, its compilers and Triton have many kinds of errors
        line = describe_compile_error(error)
        raise UserError(f'the warm-up run failed: {line}') from error
    return time.perf_counter() - start


#### One command ###################################################################################


@dataclass
class Command:
    """What one `lab run` trains, and where it logs it."""

    recipe: object  # a module
    hyp: dict
    image_set: ImageSet
    loaders: tuple
    faster: dict  # arguments for the recipe's `train`
    folder: Path
    config: dict  # what all runs of the log have in common
    about: dict  # what each run's record says about the machine
    saves_networks: bool

    def make_run(self, run):
        """Train run number `run`, log it and print its result."""
        net, record = self.train(run)
        self.log_run(run, net, record)

    def train(self, run, **options):
        """(net, record) of a run. `options` are for the recipe's `train`."""

        def on_epoch(row):
            if is_first_process():
                print_row({'run': run} | row)

        seed = self.config['seed'] + run
        options |= self.faster
        return self.recipe.train(*self.loaders, self.hyp, seed, on_epoch, **options)

    def log_run(self, run, net, record):
        """Write the run and then print its result, even if it could not be written."""
        record |= self.count_costs(record) | self.about
        try:
            self.write_run(run, net, record)
        finally:
            self.print_result(run, record)

    def count_costs(self, record):
        """What `record` shall say about the operations of its run."""
        sizes = [len(labels) for _, labels in (self.image_set.train, self.image_set.test)]
        num_classes = len(self.image_set.classes)
        return costs_of_run(self.recipe, self.hyp, *sizes, num_classes, record)

    def write_run(self, run, net, record):
        """Write the network, if wanted, and then the record, which makes the run complete."""
        file = runs.run_file(self.folder, run)
        if self.saves_networks:
            weights = file.with_suffix('.pt')
            save_network(weights, net, self.recipe, self.hyp, self.image_set)
        runs.write_json(file, record)

    def print_result(self, run, record):
        print_row({'run': run, 'epoch': 'eval'} | record)
        for number, worker in enumerate(record.get('workers', [])):
            if worker.get('failed'):
                print_line(f'run {run}: worker {number} is left out: {worker["failed"]}')
        if 'failed' in record:
            print_line(f'run {run} failed: {record["failed"]}')

    def read_records(self):
        return runs.read_records(self.folder, self.config['seed'])

    def print_start(self, wanted, missing):
        print_line(
            '{path}: {train} training and {test} test images; '.format(**self.config['data'])
            + '{device}, {dtype}, {mode}, {kernels} kernels'.format(**self.config, **self.about)
        )
        default = flat(self.recipe.hyp)
        changes = [
            f'{key}={value}' for key, value in flat(self.hyp).items() if value != default.get(key)
        ]
        if changes:
            print_line(f'changes of hyp: {" ".join(changes)}')
        print_line(f'{missing} of {wanted} runs left; log in {self.folder}')

    def count_missing(self, wanted):
        return runs.count_missing(self.read_records(), wanted)

    def make_runs(self, wanted):
        runs.make_runs(self.folder, wanted, self.make_run)

    def make_missing_runs(self, wanted):
        """Make the runs that are missing, with a warm-up where that is useful."""
        missing = self.count_missing(wanted)
        if is_first_process():
            self.print_start(wanted, missing)
        if missing == 0:
            return
        is_compiled = self.config['mode'] == 'compiled'
        if is_compiled or self.loaders[0].device.type != 'cpu':
            seconds = warm_up(self.recipe, self.loaders, self.hyp, self.faster)
            self.about['warm_up_seconds'] = seconds
        if is_first_process():
            print_row({name: name for name in COLUMNS})
        try:
            self.make_runs(wanted)
        except BaseException:
            if is_first_process():
                print_line(f'to go on, run the same command with --out {self.folder}')
                with suppress(UserError, OSError):  # the disk may be full
                    self.close()
            raise

    def close(self):
        """Write log.json with the runs so far, and print their summary. Returns the summary."""
        records = list(self.read_records().values())
        chance = commonest_share(self.image_set.test[1])
        summary = summarize(records, self.hyp['target'], chance)
        try:
            log = self.config | {'runs': records, 'summary': summary}
            runs.write_json(self.folder / 'log.json', log)
        finally:
            print_phases(records)
            print_summary(summary, records, self.config['data'])
        return summary

    def open_log(self):
        """Open the log, and return a context in which it stays open."""
        runs.open_log(self.folder, self.config)
        return nullcontext()

    def finish(self, wanted):
        """Print the summary if no other process is still at work. Returns the exit code."""
        if runs.count_missing(self.read_records(), wanted) > 0:
            print('other processes are making the last runs; if they are lost, run the command')
            print(f'again; if runs are still missing then, delete {self.folder / "locks"}')
            return 0
        summary = self.close()
        # torchrun would take 1 for a lost process, and start everything again.
        return 1 if summary['failed'] and process_count() == 1 else 0

    def run(self, wanted):
        """Make `wanted` runs and return the exit code."""
        with self.open_log():
            self.make_missing_runs(wanted)
            return self.finish(wanted)


class JointCommand(Command):
    """A command whose ranks make each run together. Rank 0 logs it."""

    def train(self, run):
        self.checkpoints(run).mkdir(parents=True, exist_ok=True)
        return super().train(run, checkpoints=self.checkpoints(run))

    def log_run(self, run, net, record):
        if is_first_process():
            super().log_run(run, net, record)
            shutil.rmtree(self.checkpoints(run), ignore_errors=True)

    def checkpoints(self, run):
        """A folder from which a run continues if a rank was lost."""
        return self.folder / 'checkpoints' / f'{run:05}'

    def count_missing(self, wanted):
        missing = super().count_missing(wanted) if is_first_process() else None
        return runs.gather(missing)[0]

    def make_runs(self, wanted):
        runs.make_runs_together(self.folder, self.config['seed'], wanted, self.make_run)

    def open_log(self):
        return runs.open_log_together(self.folder, self.config)

    def finish(self, wanted):
        if not is_first_process():
            return 0
        for run in self.read_records():  # an earlier command may have been killed before it could
            shutil.rmtree(self.checkpoints(run), ignore_errors=True)
        return super().finish(wanted)


def prepare(args, recipe, device, dtype):
    """The Command for some arguments of `lab run`. Raises UserError."""
    image_set, hyp = choose_data(args.data, recipe, args.overrides)
    loaders = make_loaders(recipe, image_set, hyp, device, dtype)
    train_loader = loaders[0]
    check_network(recipe, hyp, train_loader)
    options = {'compiles': args.compile, 'kernels': args.kernels}
    faster = make_faster(recipe, train_loader, hyp, **options)
    if is_joint(recipe):
        join_ranks(recipe, device)
    config = {
        'script': Path(recipe.__file__).name,
        'hyp': hyp,
        'seed': args.seed,
        'data': image_set.describe(),
        'dtype': str(dtype).removeprefix('torch.'),
        'mode': 'compiled' if args.compile else 'eager',
        'source': read_source(recipe),
    }
    about = describe_machine(device)
    functions = [train_loader.augment, *faster.values()]
    about['kernels'] = 'Triton' if any(map(is_kernel, functions)) else 'torch'
    kind = Command
    if is_joint(recipe):
        kind = JointCommand
        about['ranks'] = process_count()
    folder = Path(args.out) if args.out else runs.new_folder(Path(recipe.__file__).stem)
    return kind(
        recipe, hyp, image_set, loaders, faster, folder, config, about, saves_networks=args.save
    )


def train_runs(args, recipe, device, dtype):
    """`lab run`: make the runs that are missing, and return the exit code."""
    command = prepare(args, recipe, device, dtype)
    wanted = args.runs or (1 if device.type == 'cpu' else 25)
    code = command.run(wanted)
    if dist.is_initialized():
        dist.destroy_process_group()
    return code


def evaluate_saved(args, recipe, device, dtype):
    """`lab run --load`: print a saved network's accuracy on the test images of --data."""
    net, saved = load_network(args.load, recipe, device, dtype)
    image_set = load_set(args.data, recipe)
    if image_set.classes != saved['classes']:
        raise UserError(f'--load {args.load}: its classes are not those of {image_set.path}')
    options = {'device': device, 'dtype': dtype, 'mean': saved['mean'], 'std': saved['std']}
    loader = recipe.CifarLoader(*image_set.test, **options)
    level = tta_level(saved['hyp'])
    tests = f'{len(loader.labels)} images of {image_set.path}'
    print(f'accuracy on {tests}: {recipe.evaluate(net, loader):.4f}')
    accuracy = recipe.evaluate(net, loader, level)
    print(f'with test-time augmentation, level {level}: {accuracy:.4f}')
