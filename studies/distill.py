"""Into which layers of a student a teacher's knowledge goes (Gotmare et al. 2019, section 5).

    python -m studies.distill                               # ten minutes on two CPU cores
    torchrun --nproc_per_node=8 -m studies.distill --scale paper --data cifar10
    python -m studies.distill --show --out logs/mine        # the table and the pictures again

We train a VGG-16, and then the same shallow network twice: on the labels, and on the teacher's
softened outputs. As in Hinton et al. 2015 (arXiv:1503.02531), the student's loss is T^2 times the
divergence of its outputs from the teacher's, both at temperature T. The factor keeps the gradients
as large as with labels. The paper has T = 5, and does not mix in the labels. SVCCA compares each
layer of both students with each layer of the teacher (Figure 6). The paper: distillation makes the
student's deeper layers more similar to the teacher's, and hardly changes the shallow ones.

--scale paper trains 5 students of each kind, as in the paper. It does not say for how long: here
100 epochs, and 200 for the teacher. That is 160 PFLOP with the teacher's outputs, or 25
A100-minutes at airbench94's rate of 0.36 PFLOP in 3.29 seconds. --scale small trains narrow
networks on 2500 images.
"""

import sys

import numpy as np
import torch
import torch.nn.functional as F

import airbench94
from lab.summary import new_figure
from studies.common import (
    COLOURS,
    Study,
    by_seed,
    mean_and_interval,
    paired_p,
    run_study,
    save_both,
    two_whole_seeds,
)
from studies.modes import NETS, cross_entropy, loaders_of, make_network, train_by_steps
from studies.networks import make_student
from studies.svcca import (
    compared_images,
    draw_matrices,
    has_noise,
    noise_floors,
    observe,
    similarities,
)

SCALES = {
    'paper': {
        'images': None,  # of the training set: all
        'compared': 2000,  # test images, for SVCCA
        'share': 1.0,  # of both networks' full widths
        'batch_size': 100,
        'lr': 0.05,  # of the teacher
        'student_lr': 0.01,
        'teacher_epochs': 200,
        'epochs': 100,
        'temperature': 5.0,
        'runs': 5,
    },
    'small': {
        'images': 2500,
        'compared': 2000,
        'share': 0.125,
        'batch_size': 25,
        'lr': 0.01,
        'student_lr': 0.01,
        'teacher_epochs': 30,
        'epochs': 20,
        'temperature': 5.0,
        'runs': 6,
    },
    'smoke': {
        'images': 100,
        'compared': 200,
        'share': 0.0625,
        'batch_size': 20,
        'lr': 0.02,
        'student_lr': 0.01,
        'teacher_epochs': 1,
        'epochs': 1,
        'temperature': 5.0,
        'runs': 2,
    },
}
STUDENTS = {'labels': 'on labels', 'teacher': 'on the teacher'}


#### Training ######################################################################################


def plan(settings, records):
    return [({'part': 'students'}, seed) for seed in range(settings['runs'])]


def distillation(teacher, temperature):
    """A loss(net, inputs, labels) for modes.train: T^2 KL(teacher || net), both softened by T."""

    def loss(net, inputs, labels):
        with torch.no_grad():
            targets = F.log_softmax(teacher(inputs).float() / temperature, dim=1)
        answers = F.log_softmax(net(inputs).float() / temperature, dim=1)
        divergence = F.kl_div(answers, targets, reduction='batchmean', log_target=True)
        return temperature**2 * divergence

    return loss


def train_cell(cell, seed, place):
    """Accuracies, in [0, 1], of teacher and students, and how similar their layers are."""
    settings = place.settings
    loader, tests = loaders_of(place, settings['batch_size'])
    loader.seed = seed
    teacher = make_network(settings['net'], loader, settings['share'], seed)
    images = compared_images(place)
    observe(teacher, images)  # if the images are too few, it says so before we train
    train_by_steps(teacher, loader, settings['lr'], settings['teacher_epochs'])
    teacher.eval()
    losses = {'labels': cross_entropy, 'teacher': distillation(teacher, settings['temperature'])}
    of_teacher = observe(teacher, images)
    found = {'teacher_acc': airbench94.evaluate(teacher, tests), 'noise': {}}
    for name, loss in losses.items():
        options = {'seed': seed, 'device': place.device, 'dtype': place.dtype}
        student = make_student(place.num_classes, share=settings['share'], **options)
        loader.epoch = 0  # both students see the same images in the same order
        train_by_steps(student, loader, settings['student_lr'], settings['epochs'], loss)
        layers = observe(student, images), of_teacher
        alike = similarities(*layers)
        found[name] = {'val_acc': airbench94.evaluate(student, tests), 'similarities': alike}
        found['noise'][name] = noise_floors(*layers, seed)
    return found


#### Table and pictures ############################################################################


def gains_of(records):
    """How much more similar each layer becomes to the teacher's: (seeds, student's layers)."""
    found = []
    for record in records:
        with_teacher, without = [np.array(record[n]['similarities']) for n in ('teacher', 'labels')]
        found.append((with_teacher - without).mean(1))
    return np.array(found)


def gains_of_noise(records):
    """What noise with as many directions would gain: (student's layers,), in the mean of the seeds.

    None if the records are old, and have no noise floors.
    """
    if not has_noise(records):
        return None
    floors = {n: np.mean([record['noise'][n] for record in records], axis=(0, 2)) for n in STUDENTS}
    return floors['teacher'] - floors['labels']


def print_table(records):
    print(f'accuracy in %, n={len(records)}, with its 95% interval               of the paper:')
    accuracies = {'labels': [100 * record['labels']['val_acc'] for record in records]}
    accuracies['teacher'] = [100 * record['teacher']['val_acc'] for record in records]
    for name, published in (('labels', 83.01), ('teacher', 85.18)):
        mean, half = mean_and_interval(accuracies[name])
        print(f'student {STUDENTS[name]:16} {mean:6.2f} +-{half:5.2f} {published:24} (best of 5)')
    mean, half = mean_and_interval([100 * record['teacher_acc'] for record in records])
    print(f'teacher {"":16} {mean:6.2f} +-{half:5.2f}')
    p = paired_p(accuracies['teacher'], accuracies['labels'])
    print(f'teacher better than labels: one-sided p={p:.2g}')
    gains, of_noise = gains_of(records), gains_of_noise(records)
    print("\nsimilarity to the teacher's layers gained by distillation, by layer:")
    for i, values in enumerate(gains.T):
        mean, half = mean_and_interval(values)
        row = f'  layer {i + 1}: {mean:+.3f} +-{half:.3f}'
        if of_noise is not None:
            row += f'   noise: {of_noise[i]:+.3f}'
        print(row)
    shallow, deep = gains[:, :2].mean(1), gains[:, 2:].mean(1)
    p = paired_p(deep, shallow)
    print(f'the linear layers gain more than the convolutions: one-sided p={p:.2g}')


def draw_gains(records, stem):
    """How much more similar each layer becomes to the teacher's, on average. Crosses: noise."""
    figure = new_figure(5, 3.4)
    axes = figure.subplots()
    for layer, values in enumerate(gains_of(records).T, 1):
        mean, half = mean_and_interval(values)
        axes.errorbar(layer, mean, half, fmt='o', color=COLOURS[0], capsize=3)
    of_noise = gains_of_noise(records)
    if of_noise is not None:
        axes.plot(range(1, layer + 1), of_noise, 'x', color='grey', label='noise')
        axes.legend(frameon=False)
    axes.axhline(0, color='grey', linewidth=0.8)
    axes.set(xlabel='layer of the student', ylabel='similarity gained by distillation')
    axes.set_xticks(range(1, layer + 1))
    save_both(figure, stem)


def show(config, records, folder):
    records = by_seed(two_whole_seeds(records, plan(config['settings'], []), folder))
    print_table(records)
    matrices, noise = {}, {}
    for name, title in STUDENTS.items():
        of_seeds = [record[name]['similarities'] for record in records]
        matrices[f'student {title}'] = np.mean(of_seeds, axis=0)
        if has_noise(records):
            floors = [record['noise'][name] for record in records]
            noise[f'student {title}'] = np.mean(floors, axis=0)
    draw_matrices(matrices, noise, folder / 'svcca', ('student', 'teacher'))
    draw_gains(records, folder / 'gains')


STUDY = Study('distill', __doc__, dict.fromkeys(NETS, SCALES), plan, train_cell, show)

if __name__ == '__main__':
    sys.exit(run_study(STUDY))
