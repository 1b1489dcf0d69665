"""The angle between a worker's descent and the way to SWAP's average (Gupta et al. 2020, Figure 4).

    python -m studies.cosine                                # in ten minutes, on two CPU cores
    python -m studies.cosine --scale full --dtype bfloat16  # swap94.py's networks, in 20 minutes
    torchrun --nproc_per_node=8 -m studies.cosine --scale paper --net resnet9 --data cifar10
    python -m studies.cosine --show --out logs/mine         # the table and the picture again

We train SWAP, and then each of its workers once more, which takes the same steps. At every step of
phase 2 we compute the cosine between the descent, which is the negative gradient of the step's
batch, and the way from the worker's weights to those of the average (section 4.2). In the paper it
falls as training goes on: the workers move around the middle of the basin, not towards it.

--scale paper trains 3 seeds: with ResNet-9, 270 PFLOP, or 40 A100-minutes at airbench94's rate of
0.36 PFLOP in 3.29 seconds. --scale full trains one seed, and watches three of its workers. --scale
small trains narrow networks on a tenth of the images.
"""

import sys

import numpy as np
import torch
import torch.nn.functional as F

import swap94
from studies.common import Study, for_each_seed, in_cell, run_study
from studies.show import COLOURS, mean_text, new_figure, paired_p, print_table, save_both
from studies.swap import hyp_of, measure, scales, train_swap, train_worker

SCALES = scales(
    {
        'paper': {'runs': 3, 'watched': None},
        'full': {'runs': 1, 'watched': 3},  # of the workers
        'small': {'runs': 5, 'watched': None},
    }
)

#### What to train #################################################################################


def plan(settings, records):
    return for_each_seed([{'method': 'swap'}], settings)


def watched(target, cosines):
    """swap94.compute_loss, but it also appends the cosine of each step to a list.

    target: the average, {name: parameter}.
    """

    def compute_loss(net, inputs, labels, label_smoothing):
        loss, outputs = swap94.compute_loss(net, inputs, labels, label_smoothing)
        named = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
        gradients = torch.autograd.grad(loss, [p for _, p in named], retain_graph=True)
        way = torch.cat([(target[name] - p).flatten() for name, p in named])
        descent = -torch.cat([gradient.flatten() for gradient in gradients])
        cosines.append(F.cosine_similarity(way.double(), descent.double(), dim=0).item())
        return loss, outputs

    return compute_loss


def train(cell, seed, place):
    """The cosines of each worker at each step, and accuracies from 0 to 1."""
    hyp = hyp_of(place, 'swap')
    net, trained, phase1, workers = train_swap(place, hyp, seed)
    target = {name: p.detach().clone() for name, p in net.named_parameters()}
    record = {'val_acc': trained['val_acc'], 'workers': [], 'cosines': []}
    for worker in range(len(workers))[: place.settings['watched']]:
        cosines = []
        loss = watched(target, cosines)
        result = train_worker(place, hyp, seed, worker, net, phase1, loss)
        record['workers'].append(measure(place, hyp, net, result['losses']))
        record['cosines'].append(cosines)
    return record | {'epochs': hyp['phase2']['train_epochs']}


#### What to show ##################################################################################


def thirds(records):
    """Mean cosine of each third of phase 2: (networks of a seed, 3)."""
    rows = []
    for record in records:
        parts = np.array_split(np.array(record['cosines']), 3, axis=1)
        rows.append([part.mean() for part in parts])
    return np.array(rows)


def print_cosines(records):
    seeds, workers = len(records), len(records[0]['cosines'])
    about = f'n={seeds}, with {workers} workers each; +-: 95% interval'
    print(f'cosine of descent and the way to the average; {about}')
    means = thirds(records)
    names = ('first', 'second', 'last')
    rows = [[f'{name} third', mean_text(values, '.4f')] for name, values in zip(names, means.T)]
    print_table(['phase 2', 'cosine'], rows)
    if seeds > 1:
        p = paired_p(means[:, 0], means[:, 2])
        print(f'lower in the last third than in the first: one-sided p={p:.2g}')
    print('the paper (Figure 4) sees it fall over the training, without a figure in its text')


def draw_cosines(records, stem):
    """The cosine at each step: of the workers of one seed, and its mean over all."""
    figure = new_figure(8, 4)
    axes = figure.subplots()
    cosines = np.array([cosines for record in records for cosines in record['cosines']])
    epochs = np.linspace(0, records[0]['epochs'], cosines.shape[1], endpoint=False)
    for values in records[0]['cosines']:
        axes.plot(epochs, values, color=COLOURS[5], linewidth=0.7, alpha=0.6)
    axes.plot([], [], color=COLOURS[5], label=f'workers of seed {records[0]["seed"]}')
    axes.plot(epochs, cosines.mean(0), color=COLOURS[0], label=f'mean of {len(cosines)} workers')
    axes.axhline(0, color='black', linewidth=0.8)
    axes.set(xlabel='epochs of phase 2', ylabel='cosine of descent and way')
    axes.legend()
    save_both(figure, stem)


def show(config, records, folder):
    records = in_cell(records)
    print_cosines(records)
    draw_cosines(records, folder / 'cosine')


STUDY = Study('cosine', __doc__, SCALES, plan, train, show)

if __name__ == '__main__':
    sys.exit(run_study(STUDY))
