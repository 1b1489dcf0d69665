"""A run of each record in float64, with a narrow network and random images: losses and outputs.

    python tests/record_trajectories.py      # writes tests/golden/records/ again

No published script is behind these numbers. They say that the recipe is still the one that made the
record. If your change moves them, it makes another recipe.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from lab.options import override  # noqa: E402
from records import record94, record95  # noqa: E402

FOLDER = ROOT / 'tests' / 'golden' / 'records'
RECORDS = {'record94': record94, 'record95': record95}
FLOAT64 = {'device': 'cpu', 'dtype': torch.float64}
# At the records' own rate, training amplifies the rounding errors in which CPUs differ.
SETTINGS = [
    'net.widths.block1=8', 'net.widths.block2=16', 'net.widths.block3=16', 'opt.batch_size=16',
    'opt.train_epochs=6.5', 'opt.lr=0.02',
]  # fmt: skip


def tinted_images(n, seed):
    """Random images and labels. The tint of an image tells its class."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 10, (n,), generator=g)
    images = torch.randint(0, 156, (n, 32, 32, 3), generator=g, dtype=torch.uint8)
    images += (10 * labels).to(torch.uint8)[:, None, None, None]
    return images, labels


def trajectory(recipe):
    """{'losses': of each step, 'logits': by level, 'weight_norms', 'buffer_norms'}."""
    hyp = override(recipe.hyp, SETTINGS)
    sets = tinted_images(96, seed=96), tinted_images(20, seed=20)
    train_loader, test_loader = recipe.make_loaders(*sets, hyp, **FLOAT64)
    losses = []

    def recording_compute_loss(*args):
        loss, outputs = recipe.compute_loss(*args)
        losses.append(loss.item())
        return loss, outputs

    net, _ = recipe.train(
        train_loader, test_loader, hyp, seed=3, compute_loss=recording_compute_loss
    )
    buffers = [b for b in net.buffers() if b.is_floating_point()]
    return {
        'losses': losses,
        'logits': {str(i): recipe.infer(net, test_loader, i).tolist() for i in range(3)},
        'weight_norms': [p.detach().norm().item() for p in net.parameters()],
        'buffer_norms': [b.norm().item() for b in buffers],
    }


def main():
    argparse.ArgumentParser(description="Write the records' golden trajectories.").parse_args()
    for name, recipe in RECORDS.items():
        file = FOLDER / f'{name}.json'
        temporary = file.with_suffix('.tmp')
        golden = {'torch': torch.__version__} | trajectory(recipe)
        temporary.write_text(json.dumps(golden, indent=1) + '\n')
        os.replace(temporary, file)
        print(f'wrote {file}')


if __name__ == '__main__':
    main()
