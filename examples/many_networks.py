"""Train many networks in one process, compiled, and with the kernels where they can run.

python -m examples.many_networks 10 networks.pt     # how many, and where they go
"""

import sys
from pathlib import Path

import airbench94 as ab


def train_many(count, data, hyp, device, dtype):
    """[(weights, record), ...] of trainings with seeds 0, 1, ..."""
    augment, faster = ab.load_kernels('auto', device)
    options = {'device': device, 'dtype': dtype}
    batch_size = hyp['opt']['batch_size']
    train_loader = ab.CifarLoader(data, True, batch_size, hyp['aug'], augment=augment, **options)
    test_loader = ab.CifarLoader(data, False, 2000, **options)
    faster |= ab.compiled(hyp, len(train_loader.classes), **options)
    ab.warm_up(train_loader, test_loader, hyp, faster)
    networks = []
    for seed in range(count):
        net, record = ab.train(train_loader, test_loader, hyp, seed, **faster)
        # All trainings share the compiled network's memory: what is kept is copied.
        weights = {name: value.cpu().clone() for name, value in net.state_dict().items()}
        networks.append((weights, record))
        print(f'seed {seed}: {record["tta_val_acc"]:.4f} in {record["seconds"]:.2f} s', flush=True)
    return networks


def main():
    if len(sys.argv) != 3 or not sys.argv[1].isdecimal():
        raise ab.UserError('needs a number and a file: python -m examples.many_networks 10 nets.pt')
    ab.download_cifar10('cifar10')
    device = ab.pick_device()
    networks = train_many(int(sys.argv[1]), 'cifar10', ab.hyp, device, ab.pick_dtype(None, device))
    ab.write_tensors(Path(sys.argv[2]), networks)
    return 0


if __name__ == '__main__':
    ab.keep_freed_memory()
    sys.exit(ab.report_errors(main))
