"""Train many networks in one process, compiled, and with kernels where they work.

python -m examples.many_networks 10 networks.pt     # how many, and the file for their weights
"""

import sys
from pathlib import Path

import airbench94 as ab
from lab.errors import UserError, report_errors
from lab.runs import write_tensors


def train_many(count, train_loader, test_loader, hyp):
    """[(weights, record), ...] for the seeds 0, 1, ..."""
    faster = ab.fast_path(train_loader, hyp)
    ab.warm_up(train_loader, test_loader, hyp, faster)
    networks = []
    for seed in range(count):
        net, record = ab.train(train_loader, test_loader, hyp, seed, **faster)
        # All runs share the compiled network, so we copy the weights that we keep.
        weights = {name: value.cpu().clone() for name, value in net.state_dict().items()}
        networks.append((weights, record))
        print(f'seed {seed}: {record["tta_val_acc"]:.4f} in {record["seconds"]:.2f} s', flush=True)
    return networks


def main(args):
    if len(args) != 2 or not args[0].isdecimal():
        raise UserError('needs a number and a file: python -m examples.many_networks 10 nets.pt')
    ab.keep_freed_memory()
    device, dtype = ab.pick_device()
    _, hyp, statistics, *sets = ab.load_sets(None)
    loaders = ab.make_loaders(*sets, hyp, device=device, dtype=dtype, **statistics)
    write_tensors(Path(args[1]), train_many(int(args[0]), *loaders, hyp))
    return 0


if __name__ == '__main__':
    sys.exit(report_errors('examples.many_networks', main, sys.argv[1:]))
