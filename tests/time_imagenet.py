"""Images per second of the loader, of a training step, and of both together.

    python tests/time_imagenet.py --data imagenette [--net resnet50] [--pixels 224] [--batch 256]

The pictures come with Heavy crops and random flips, as in the studies of ImageNet. The three
alternate in this process, three times, and we take the medians. The last line says how many loader
processes a GPU would need that takes --gpu images a second. That holds if each of them has a core
of its own, both there and here: so give at most as many --workers as there are idle cores. A
loader's speed also depends on the sizes of the files.
"""

import itertools
import math
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import swap94
from lab.errors import Parser, report_errors
from studies import imagenet
from studies.pictures import TrainingImages, segment

ROUNDS, STEPS = 3, 6


def parse_args():
    parser = Parser('python tests/time_imagenet.py', __doc__)
    add = parser.add_argument
    add('--net', choices=['resnet18', 'resnet50'], default='resnet18')
    add('--pixels', type=int, default=64, help='height and width of the crops (default: 64)')
    add('--batch', type=int, default=128, help='images in a step (default: 128)')
    add('--gpu', type=int, default=2500, help='images a second that a GPU takes (default: 2500)')
    add('--device', help='cuda, cuda:1, mps or cpu (default: the best available)')
    imagenet.add_options(parser)
    return parser.parse_args()


def images_per_second(place, batches, work):
    """How fast `batches` come, each followed by work(batch).

    The first ones don't count: so many does the loader read in advance.
    """
    for batch in itertools.islice(batches, 1 + 2 * place.workers):
        work(batch)
    start = swap94.clock(place.device)
    count = 0
    for batch in itertools.islice(batches, STEPS):
        work(batch)
        count += len(batch[1])
    return count / (swap94.clock(place.device) - start)


def main():
    args = parse_args()
    settings = {'net': args.net, 'blurs': False, 'label_smoothing': 0.0}
    place = imagenet.open_place(settings, args, None)
    schedule = [segment([0, 10**6], args.pixels, 0.08, 1, args.batch, [0, 0])]
    images = TrainingImages(place.train, schedule, 0, 'random')
    net = imagenet.make_net(place, 0).train()
    optimizer = imagenet.make_optimizer(net, 0.9, 1e-4)
    scaler = torch.amp.GradScaler(place.device.type, enabled=place.dtype == torch.float16)

    def stream():
        return place.batches(images, images.keys(images.epochs, swap94.Ranks()))

    def train(batch):
        imagenet.train_step(net, [batch], optimizer, scaler, place)

    def wait(batch):
        pass

    one = next(stream())
    about = f'{args.net}, {args.pixels} pixels, batches of {args.batch}, {place.dtype}'
    print(f'{about}, on {place.device}, {place.workers} loader processes; images a second:')
    found = {'loader': [], 'step': [], 'both': []}
    for _ in range(ROUNDS):
        found['loader'].append(images_per_second(place, stream(), wait))
        found['step'].append(images_per_second(place, itertools.repeat(one), train))
        found['both'].append(images_per_second(place, stream(), train))
        print(', '.join(f'{name} {values[-1]:.0f}' for name, values in found.items()), flush=True)
    medians = {name: statistics.median(values) for name, values in found.items()}
    print('median:', ', '.join(f'{name} {median:.0f}' for name, median in medians.items()))
    needed = math.ceil(args.gpu * max(1, place.workers) / medians['loader'])
    print(f'a GPU that takes {args.gpu} images a second needs {needed} loader processes')
    return 0


if __name__ == '__main__':
    sys.exit(report_errors('tests/time_imagenet.py', main))
