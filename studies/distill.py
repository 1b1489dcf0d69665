"""Into which layers of a student a teacher's knowledge goes (Gotmare et al. 2019, section 5).

    python -m studies.distill                               # ten minutes on two CPU cores
    python -m studies.distill --scale medium                # an hour or two
    torchrun --nproc_per_node=8 -m studies.distill --scale paper --data cifar10
    python -m studies.distill --show --out logs/mine        # the table and the pictures again

We train a VGG-16, and then the same shallow network twice: on the labels, and on the teacher's
softened outputs. As in Hinton et al. 2015 (arXiv:1503.02531), the student's loss is T^2 times the
divergence of its outputs from the teacher's, both at temperature T. The factor keeps the gradients
as large as with labels. The paper has T = 5, and does not mix in the labels. SVCCA
(studies/similarity.py) compares each layer of both students with each layer of the teacher (Figure
6). The paper: distillation makes the student's deeper layers more similar to the teacher's, and
hardly changes the shallow ones.

--scale paper trains 5 students of each kind, as in the paper. It does not say for how long: here
100 epochs, and 200 for the teacher, which has dropout. That is 160 PFLOP with the teacher's
outputs, or 25 A100-minutes at airbench94's rate of 0.36 PFLOP in 3.29 seconds. The others train
teachers without dropout: --scale medium a narrow one, whose students have their full widths and see
25,000 images as they are, so that they fit the labels; --scale small narrow networks on 2500
images.
"""

import sys

import numpy as np
import torch
import torch.nn.functional as F

import airbench94
from studies import sgd
from studies.common import Study, for_each_seed, in_cell, run_study, whole_seeds
from studies.networks import NETS, describe, make_network, make_student
from studies.show import (
    COLOURS,
    mean_and_interval,
    mean_text,
    new_figure,
    paired_p,
    print_table,
    save_both,
)
from studies.similarity import compared_images, draw_matrices, noise_floors, observe, similarities

PAPER = {
    'images': None,  # of the training set: all
    'compared': 2000,  # test images, for SVCCA
    'share': 1.0,  # of the teacher's full widths
    'student_share': 1.0,  # of the students'
    'student_augmented': True,  # whether they see shifted and mirrored images; the teacher does
    'dropout': 0.5,  # of the teacher
    'batch_size': 100,
    'lr': 0.05,  # of the teacher
    'student_lr': 0.01,
    'teacher_epochs': 200,
    'epochs': 100,
    'temperature': 5.0,
    'runs': 5,
}
MEDIUM = PAPER | {
    'images': 25_000,
    'share': 0.25,
    'student_augmented': False,
    'dropout': 0.0,
    'lr': 0.02,
    'student_lr': 0.003,  # at 0.01, students on the teacher may collapse
    'teacher_epochs': 20,
    'epochs': 20,
    'runs': 5,
}
SMALL = PAPER | {
    'images': 2500,
    'share': 0.125,
    'student_share': 0.125,
    'dropout': 0.0,
    'batch_size': 25,
    'lr': 0.01,
    'teacher_epochs': 30,
    'epochs': 20,
    'runs': 6,
}
SCALES = {'paper': PAPER, 'medium': MEDIUM, 'small': SMALL}
STUDENTS = {'labels': 'student on labels', 'teacher': 'student on the teacher'}
PUBLISHED = {'labels': 83.01, 'teacher': 85.18}  # section 5: best accuracy of 5 students, in %
CONVOLUTIONS = 2  # the first layers of the student; the others are linear

#### What to train #################################################################################


def plan(settings, records):
    return for_each_seed([{'part': 'students'}], settings)


def distillation(teacher, temperature):
    """A loss(net, inputs, labels) for sgd.train: T^2 KL(teacher || net), both softened by T."""

    def loss(net, inputs, labels):
        with torch.no_grad():
            targets = F.log_softmax(teacher(inputs).float() / temperature, dim=1)
        answers = F.log_softmax(net(inputs).float() / temperature, dim=1)
        divergence = F.kl_div(answers, targets, reduction='batchmean', log_target=True)
        return temperature**2 * divergence

    return loss


def train(cell, seed, place):
    """Accuracies, in [0, 1], of teacher and students, and how similar their layers are."""
    settings = place.settings
    loader, tests = sgd.loaders_of(place, settings['batch_size'], seed)
    teacher = make_network(settings, loader, seed)
    images = compared_images(place)
    observe(teacher, images)  # if the images are too few, it says so before we train
    sgd.train_by_steps(teacher, loader, settings['lr'], settings['teacher_epochs'])
    of_teacher = observe(teacher, images)  # it stays in evaluation mode
    losses = {
        'labels': sgd.cross_entropy,
        'teacher': distillation(teacher, settings['temperature']),
    }
    record = {'teacher_acc': airbench94.evaluate(teacher, tests), 'noise': {}}
    augmented = settings['student_augmented']
    loader, _ = sgd.loaders_of(place, settings['batch_size'], seed, augmented=augmented)
    for name, loss in losses.items():
        options = {'seed': seed, 'device': place.device, 'dtype': place.dtype}
        student = make_student(place.num_classes, share=settings['student_share'], **options)
        loader.epoch = 0  # both students see the same images in the same order
        sgd.train_by_steps(student, loader, settings['student_lr'], settings['epochs'], loss)
        layers = observe(student, images), of_teacher
        record[name] = {
            'val_acc': airbench94.evaluate(student, tests),
            'train_acc': airbench94.evaluate(student, loader),
            'similarities': similarities(*layers),
        }
        record['noise'][name] = noise_floors(*layers, seed)
    return record


#### What to show ##################################################################################


def matrices_of(records, name):
    """A student's (similarities to the teacher, noise floors), each (seeds, layers, layers)."""
    similar = np.array([record[name]['similarities'] for record in records])
    return similar, np.array([record['noise'][name] for record in records])


def gains_of(records):
    """How much more similar each layer becomes to the teacher's, and noise: (seeds, layers)."""
    pairs = zip(matrices_of(records, 'teacher'), matrices_of(records, 'labels'))
    return [(with_teacher - without).mean(2) for with_teacher, without in pairs]


def print_accuracies(records, settings):
    print(f'teacher: {describe(settings)}')
    kind = 'augmented' if settings['student_augmented'] else 'plain'
    print(f'students: {settings["student_share"]:g} of their widths, on {kind} images')
    print(f'n={len(records)}; accuracy in %, with its 95% interval')
    accuracies, rows = {}, []
    for name, title in STUDENTS.items():
        accuracies[name] = [100 * record[name]['val_acc'] for record in records]
        row = [title, mean_text(accuracies[name], '.2f'), '-', str(PUBLISHED[name])]
        if 'train_acc' in records[0][name]:  # the oldest records lack it
            row[2] = mean_text([100 * record[name]['train_acc'] for record in records], '.2f')
        rows.append(row)
    of_teacher = [100 * record['teacher_acc'] for record in records]
    rows.append(['teacher', mean_text(of_teacher, '.2f'), '-', '-'])
    print_table(['', 'test images', 'training images', 'paper, best of 5'], rows)
    p = paired_p(accuracies['teacher'], accuracies['labels'])
    print(f'teacher better than labels: one-sided p={p:.2g}')


def print_gains(gains, noise):
    print("\nsimilarity to the teacher's layers gained by distillation")
    pairs = zip(gains.T, noise.T)
    rows = [
        [str(i), mean_text(values, '+.3f'), f'{of_noise.mean():+.3f}']
        for i, (values, of_noise) in enumerate(pairs, 1)
    ]
    print_table(['layer', 'gain', 'noise'], rows)
    shallow, deep = gains[:, :CONVOLUTIONS].mean(1), gains[:, CONVOLUTIONS:].mean(1)
    p = paired_p(deep, shallow)
    print(f'the linear layers gain more than the convolutions: one-sided p={p:.2g}')


def draw_gains(gains, noise, stem):
    """How much more similar each layer becomes to the teacher's, on average. Crosses: noise."""
    figure = new_figure(6, 4)
    axes = figure.subplots()
    layers = range(1, gains.shape[1] + 1)
    means, halves = zip(*[mean_and_interval(values) for values in gains.T])
    axes.errorbar(layers, means, halves, fmt='o', color=COLOURS[0], capsize=3, label='95% interval')
    axes.plot(layers, noise.mean(0), 'x', color='grey', label='noise')
    axes.legend(loc='upper left')
    axes.axhline(0, color='grey', linewidth=0.8)
    axes.set(xlabel='layer of the student', ylabel='similarity gained\nby distillation')
    kinds = ['conv' if layer <= CONVOLUTIONS else 'linear' for layer in layers]
    axes.set_xticks(layers, [f'{layer}\n{kind}' for layer, kind in zip(layers, kinds)])
    save_both(figure, stem)


def show(config, records, folder):
    settings = config['settings']
    records = in_cell(whole_seeds(records, plan(settings, []), folder, least=2))
    print_accuracies(records, settings)
    gains, noise = gains_of(records)
    print_gains(gains, noise)
    matrices = {title: matrices_of(records, name) for name, title in STUDENTS.items()}
    draw_matrices(matrices, folder / 'svcca', 'student', 'teacher')
    draw_gains(gains, noise, folder / 'gains')


STUDY = Study('distill', __doc__, dict.fromkeys(NETS, SCALES), plan, train, show)

if __name__ == '__main__':
    sys.exit(run_study(STUDY))
