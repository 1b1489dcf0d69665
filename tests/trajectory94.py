"""The record's own recipe in float64, narrow, on made-up images: what it gives, and gave.

    python tests/trajectory94.py      # writes tests/golden/records/94.json anew: for another recipe

No published script is behind these numbers. They say that the recipe is still the one with which
the record was made; a change that moves them makes another recipe.
"""

import argparse
import json
import sys
from importlib import import_module
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
FILE = ROOT / 'tests' / 'golden' / 'records' / '94.json'
SETTINGS = [
    'net.widths.block1=8', 'net.widths.block2=16', 'net.widths.block3=16', 'opt.batch_size=16',
    'opt.train_epochs=6.5',
]  # fmt: skip


def made_up_images(n, seed):
    """A split whose classes can be told apart by their tint."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 10, (n,), generator=g)
    images = torch.randint(0, 156, (n, 32, 32, 3), generator=g, dtype=torch.uint8)
    images += (10 * labels).to(torch.uint8)[:, None, None, None]
    return images, labels


def trajectory():
    """{'losses': of each step, 'logits': by level, 'weight_norms', 'buffer_norms'}."""
    script = import_module('records.94')
    hyp = script.override(script.hyp, SETTINGS)
    options = {'device': 'cpu', 'dtype': torch.float64}
    train_loader = script.CifarLoader('digits', True, 16, hyp['aug'], **options)
    test_loader = script.CifarLoader('digits', False, **options)
    for loader, n in ((train_loader, 96), (test_loader, 20)):
        loader.images, loader.labels = made_up_images(n, seed=n)
        loader.set_statistics(script.CIFAR_MEAN, script.CIFAR_STD)
    losses = []

    def recording_compute_loss(*args):
        loss, outputs = script.compute_loss(*args)
        losses.append(loss.item())
        return loss, outputs

    net, _ = script.train(
        train_loader, test_loader, hyp, seed=3, compute_loss=recording_compute_loss
    )
    buffers = [b for b in net.buffers() if b.is_floating_point()]
    return {
        'losses': losses,
        'logits': {str(i): script.infer(net, test_loader, i).tolist() for i in range(3)},
        'weight_norms': [p.detach().norm().item() for p in net.parameters()],
        'buffer_norms': [b.norm().item() for b in buffers],
    }


def main():
    argparse.ArgumentParser(
        description='Write the golden trajectory of records/94.py.'
    ).parse_args()
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(json.dumps({'torch': torch.__version__} | trajectory(), indent=1) + '\n')


if __name__ == '__main__':
    main()
