"""CifarLoader beside the published loader, on the CPU: the table in the README's section on augmentation.

    python tests/compare_loaders.py

The published loader (Jordan 2024, listing 4), written anew here for fp32, normalizes, flips and pads the whole set
in its first epoch, crops the whole set by one masked copy per shift in every epoch, and gathers batches from that.
Both serve batches of 1024 of 50,000 made-up images. Times: A B A B A B in this process. Memory: a process each, its
largest resident size above that with the uint8 set loaded, as Linux counts it.
"""

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import airbench94

ROUNDS, EPOCHS, BATCH = 3, 5, 1024


class PublishedLoader:
    def __init__(self, loader):
        self.labels, self.epoch = loader.labels, 0
        self.images = (loader.images.float() / 255).permute(0, 3, 1, 2).to(memory_format=torch.channels_last)

    def __iter__(self):
        n = len(self.images)
        if self.epoch == 0:
            mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (airbench94.CIFAR_MEAN, airbench94.CIFAR_STD))
            self.normalized = (self.images - mean) / std
            self.flipped = torch.where((torch.rand(n) < 0.5).view(-1, 1, 1, 1), self.normalized.flip(-1), self.normalized)
            self.padded = F.pad(self.flipped, (2, 2, 2, 2), 'reflect')
        shifts = torch.randint(0, 5, (n, 2))
        images = torch.empty(n, 3, 32, 32)
        for y in range(5):
            for x in range(5):
                chosen = (shifts[:, 0] == y) & (shifts[:, 1] == x)
                images[chosen] = self.padded[chosen, :, y:y + 32, x:x + 32]
        if self.epoch % 2 == 1:
            images = images.flip(-1)
        self.epoch += 1
        for index in torch.randperm(n).split(BATCH)[:n // BATCH]:
            yield images[index], self.labels[index]


def make_loaders():
    """{name: a function that makes the loader, at its first epoch}."""
    with tempfile.TemporaryDirectory() as folder:
        for name, n in (('train.pt', 50000), ('test.pt', 1)):
            torch.save({'images': torch.randint(0, 256, (n, 32, 32, 3), dtype=torch.uint8),
                        'labels': torch.zeros(n, dtype=torch.int64), 'classes': airbench94.CIFAR_CLASSES}, Path(folder, name))
        loader = airbench94.CifarLoader(folder, True, BATCH, airbench94.hyp['aug'], device='cpu', dtype=torch.float32)

    def ours():
        loader.epoch = 0
        return loader
    return {'published': lambda: PublishedLoader(loader), 'ours': ours}


def seconds_of_epochs(loader):
    seconds = []
    for _ in range(EPOCHS):
        start = time.perf_counter()
        for _ in loader:
            pass
        seconds.append(time.perf_counter() - start)
    return seconds


def mebibytes(field):
    return int(re.search(rf'{field}:\s+(\d+) kB', Path('/proc/self/status').read_text())[1]) / 1024


def main():
    loaders = make_loaders()
    if len(sys.argv) == 2:
        Path('/proc/self/clear_refs').write_text('5')       # the peak starts anew
        before = mebibytes('VmRSS')
        seconds_of_epochs(loaders[sys.argv[1]]())
        print(f"{sys.argv[1]}: {mebibytes('VmHWM') - before:.0f} MiB extra")
        return
    for _ in range(ROUNDS):
        for name, make in loaders.items():
            first, *later = seconds_of_epochs(make())
            print(f"{name}: first {first:.2f} s, later {' '.join(f'{s:.2f}' for s in later)} s, "
                  f'ten epochs {first + 9 * sum(later) / len(later):.2f} s', flush=True)
    for name in loaders:
        subprocess.run([sys.executable, __file__, name], check=True)


if __name__ == '__main__':
    main()
