"""`python -m lab`: the commands of the lab, one section each."""

import sys
from pathlib import Path

import torch

from lab.check import check_all
from lab.data import make_set
from lab.errors import Parser, UserError, report_errors
from lab.machine import DTYPES, pick_device, pick_dtype, process_count
from lab.networks import print_predictions
from lab.options import flat, nearest_keys
from lab.recipes import load_recipe
from lab.summary import report
from lab.training import evaluate_saved, train_runs

#### run ###########################################################################################

RUN = """Train the networks that a recipe describes, and log every run.

    python -m lab run airbench94.py --runs 100 --out logs/mine opt.train_epochs=8
    torchrun --nproc_per_node=8 -m lab run airbench94.py --runs 1000 --out logs/thousand

Processes with the same --out share the runs. The same command again makes the runs that are
missing. `python -m lab run RECIPE --help` lists the recipe's hyperparameters.
"""


def run_parser():
    parser = Parser('python -m lab run', RUN)
    add = parser.add_argument
    add('recipe', metavar='RECIPE', help="a recipe's file, like airbench94.py")
    add('--runs', type=int, help='how many (default: 25, or 1 on a CPU)')
    add('--seed', type=int, default=0, help='run i has the seed SEED + i (default: 0)')
    add('--out', help='folder of the log (default: a new folder in logs)')
    add('--data', help="folder with images, or 'digits' (default: cifar10, downloaded if needed)")
    add('--device', help='cuda, cuda:1, mps or cpu (default: the best available)')
    add('--dtype', choices=DTYPES, help='default: float16 on a CUDA GPU, otherwise float32')
    add('--kernels', choices=('auto', 'on', 'off'), default='auto', help='Triton kernels')
    add('--compile', action='store_true', help='use torch.compile: meant for many runs on a GPU')
    add('--save', action='store_true', help="keep each run's network, as runs/00000.pt in the log")
    add('--load', metavar='FILE', help='evaluate a network that --save kept, and train nothing')
    add('overrides', nargs='*', default=[], metavar='KEY=VALUE', help='hyperparameters')
    return parser


def print_run_help(parser, argv):
    """Print the help, with the recipe's hyperparameters if the arguments name a recipe."""
    files = [arg for arg in argv if arg.endswith('.py')]
    if files:
        values = flat(load_recipe(files[0]).hyp)
        lines = [f'  {key}={value}' for key, value in values.items()]
        parser.epilog = '\n'.join([f'hyperparameters of {files[0]}, KEY=VALUE:', *lines])
    parser.print_help()


def check_run(args):
    """Raise UserError for a wrong value."""
    if args.runs is not None and args.runs < 1:
        raise UserError(f'--runs {args.runs}: must be at least 1')
    if not 0 <= args.seed < 2**32:
        raise UserError(f'--seed {args.seed}: must be from 0 to {2**32 - 1}')
    if args.out == '':
        raise UserError('--out: must name a folder')
    if process_count() > 1 and args.out is None and args.load is None:
        raise UserError(f'{process_count()} processes need one --out DIR, in which they share runs')


def run(argv):
    parser = run_parser()
    if '--help' in argv or '-h' in argv:
        print_run_help(parser, argv)
        return 0
    args, unknown = parser.parse_known_intermixed_args(argv)
    recipe = load_recipe(args.recipe)
    if unknown:
        keys = nearest_keys(unknown[0], recipe.hyp)
        raise UserError(f'{unknown[0]}: no such option; as KEY=VALUE, the nearest are {keys}')
    check_run(args)
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    recipe.keep_freed_memory()
    torch.backends.cudnn.benchmark = True
    if args.load is not None:
        evaluate_saved(args, recipe, device, dtype)
        return 0
    return train_runs(args, recipe, device, dtype)


#### report ########################################################################################

REPORT = """Print a table with a row for each log, and whether two of them differ.

    python -m lab report logs/thousand               # a folder that --out named
    python -m lab report old.json new.json           # also: is new better, and is it faster?
    python -m lab report logs/* --plot accuracies.png

A log may still be growing. Everything is computed from its runs. Accuracies are with test-time
augmentation; failed runs have none, and are only counted.
"""


def report_logs(argv):
    parser = Parser('python -m lab report', REPORT)
    log_help = 'a log.json, or the folder of a log'
    parser.add_argument('logs', nargs='+', type=Path, metavar='LOG', help=log_help)
    parser.add_argument('--plot', metavar='FILE', help='draw a histogram: .png, .svg or .pdf')
    args = parser.parse_args(argv)
    report(args.logs, args.plot)
    return 0


#### data ##########################################################################################

DATA = """Make a set of images for `python -m lab run RECIPE --data DEST`.

    python -m lab data cifar10              # into the folder cifar10, where recipes look for it
    python -m lab data svhn my_svhn         # or cifar100
    python -m lab data PICTURES DEST        # from PICTURES/train/CLASS/* and PICTURES/test/CLASS/*

Pictures arrive as a viewer shows them: upright, on white where they are transparent, and squeezed
to 32 x 32 pixels. Hidden files are skipped, files of other kinds are counted.
"""


def make_data(argv):
    parser = Parser('python -m lab data', DATA)
    source_help = 'cifar10, cifar100, svhn, or a folder of pictures'
    parser.add_argument('source', metavar='SOURCE', help=source_help)
    parser.add_argument('dest', nargs='?', metavar='DEST', help='a folder, for the images')
    args = parser.parse_args(argv)
    dest = args.dest
    if dest is None and args.source in ('cifar10', 'cifar100', 'svhn'):
        dest = args.source
    if not dest:
        parser.error('DEST must name a folder')
    make_set(args.source, dest)
    return 0


#### predict #######################################################################################

PREDICT = """Print the three most probable classes for each picture.

    python -m lab run airbench94.py --save --out logs/mine
    python -m lab predict logs/mine/runs/00000.pt cat.png dog.png
"""


def predict(argv):
    parser = Parser('python -m lab predict', PREDICT)
    parser.add_argument('network', metavar='SAVED', help='a network that --save kept')
    parser.add_argument('pictures', nargs='+', metavar='PICTURE', help='a picture, of any size')
    args = parser.parse_args(argv)
    device = torch.device('cpu')  # fast enough, and the same everywhere
    print_predictions(args.network, args.pictures, device, torch.float32)
    return 0


#### check #########################################################################################

CHECK = """Check that everything works on this machine, and measure how fast it is.

    python -m lab check > report.md          # a table that you can paste into an issue

It takes less than ten minutes on a GPU, where it trains on CIFAR-10, which it downloads if it must.
Without a GPU it takes less than five, and trains on the digits. Exit code: 1 if anything failed.
"""


def check(argv):
    parser = Parser('python -m lab check', CHECK)
    parser.add_argument('--data', help="folder with images, or 'digits'")
    parser.add_argument('--out', metavar='FILE.json', help='default: logs/check-TIME.json')
    args = parser.parse_args(argv)
    return check_all(args.data, args.out)


#### Main ##########################################################################################

LAB = """The lab: runs any recipe, and shows what came of it.

    python -m lab run airbench94.py --runs 100 --out logs/mine opt.train_epochs=8
    python -m lab report logs/mine logs/other --plot both.png
    python -m lab data PICTURES DEST
    python -m lab predict logs/mine/runs/00000.pt cat.png dog.png
    python -m lab check

`python -m lab COMMAND --help` says more about each.
"""

COMMANDS = {
    'run': run,
    'report': report_logs,
    'data': make_data,
    'predict': predict,
    'check': check,
}


def main(argv):
    """Run a command, given as a list of arguments. Returns the exit code. Raises UserError."""
    name = argv[0] if argv else '--help'
    if name in ('-h', '--help'):
        print(LAB)  # not the docstring, which python -OO drops
        return 0
    if name not in COMMANDS:
        raise UserError(f'{name}: no such command; the commands are {", ".join(COMMANDS)}')
    return COMMANDS[name](argv[1:])


if __name__ == '__main__':
    if sys.stdout is not None:
        sys.stdout.reconfigure(errors='backslashreplace')  # for file names it cannot encode
    sys.exit(report_errors('lab', main, sys.argv[1:]))
