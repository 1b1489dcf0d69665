"""PFLOP (1e15 floating-point operations) per run, as torch's counter counts them.

Everything is computed from `hyp` on the `meta` device, which allocates and calculates nothing.
Convolutions count by their definition, whichever algorithm the device uses.
"""

import json
import math
from functools import cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from lab.networks import tta_level

ON_META = {'device': 'meta', 'dtype': torch.float32}
TTA_VIEWS = (1, 2, 6)  # how many views of an image each level evaluates


def flop_per_image(recipe, hyp, num_classes, size=32):
    """Operations for an image of size x size pixels: (in a training step, in a forward pass)."""
    return count_per_image(recipe, json.dumps(hyp), num_classes, size)


@cache  # a tenth of a second, which a fast GPU would notice after each run
def count_per_image(recipe, hyp_json, num_classes, size):
    hyp = json.loads(hyp_json)
    net = recipe.make_net(hyp, num_classes, **ON_META)
    images = torch.empty(2, 3, size, size, **ON_META)  # BatchNorm refuses a mean of one pixel
    labels = torch.empty(2, dtype=torch.int64, device='meta')
    with FlopCounterMode(display=False) as training:
        loss, _ = recipe.compute_loss(net, images, labels, 0.0)
        loss.backward()
    with FlopCounterMode(display=False) as view, torch.no_grad():
        net(images)
    return training.get_total_flops() / 2, view.get_total_flops() / 2


def views_per_image(hyp):
    """How many views of each test image a run evaluates at its end."""
    return TTA_VIEWS[tta_level(hyp)]


#### Recipes like airbench94 #######################################################################


def flop_of_airbench(recipe, hyp, n_train, n_test, num_classes):
    """A run in which all images are 32 x 32, training and test-time augmentation."""
    batch_size = hyp['opt']['batch_size']
    steps = math.ceil(n_train // batch_size * hyp['opt']['train_epochs'])
    of_training, of_view = flop_per_image(recipe, hyp, num_classes)
    return steps * batch_size * of_training + n_test * views_per_image(hyp) * of_view


#### Recipes with growing images, like record94 ####################################################


def image_sizes(recipe, hyp, n_train):
    """A list with the height and width of the images in each step."""
    total_steps = sum(steps for _, steps in recipe.plan_epochs(n_train, hyp))
    return [recipe.image_size(step, total_steps, hyp['growth']) for step in range(total_steps)]


def flop_per_step(recipe, hyp, num_classes, size, batch_size):
    """Operations in a step on images of `size` pixels, with the optimizer's matrix products."""
    return count_per_step(recipe, json.dumps(hyp), num_classes, size, batch_size)


@cache
def count_per_step(recipe, hyp_json, num_classes, size, batch_size):
    hyp = json.loads(hyp_json)
    net = recipe.make_net(hyp, num_classes, **ON_META)
    net[0].bias.requires_grad = size < 32
    optimizer, _ = recipe.make_optimizer(net, hyp, total_steps=1)
    images = torch.empty(batch_size, 3, size, size, **ON_META)
    labels = torch.empty(batch_size, dtype=torch.int64, device='meta')
    with FlopCounterMode(display=False) as counter:
        loss, _ = recipe.compute_loss(net, images, labels, 0.0)
        loss.backward()
        optimizer.step()
    return counter.get_total_flops()


def flop_of_growing(recipe, hyp, n_train, num_classes, views):
    """A run with growing images, which evaluates so many views of test images at its end."""
    _, of_view = flop_per_image(recipe, hyp, num_classes)
    flop = views * of_view
    sizes = image_sizes(recipe, hyp, n_train)
    for size in set(sizes):
        of_step = flop_per_step(recipe, hyp, num_classes, size, hyp['opt']['batch_size'])
        flop += sizes.count(size) * of_step
    return flop


#### swap94 ########################################################################################


def flop_of_steps(recipe, settings, images, num_classes, ranks=1):
    """A list with the operations of each step of a phase, on one of the ranks that share it.

    Each rank has its part of the batch, but runs the whole step of the optimizer.

    Args:
        settings: from swap94.phase_settings.
        images: how many the training set has.
    """
    part = settings['opt']['batch_size'] // ranks
    sizes = image_sizes(recipe, settings, images)
    of_size = {
        size: flop_per_step(recipe, settings, num_classes, size, part) for size in set(sizes)
    }
    return [of_size[size] for size in sizes]


def evaluated_images(hyp, images, tests, ranks=1):
    """How many images phase 3 sees on the rank that sees most, where each view counts.

    images: how many training images the last phase served in its last epoch.
    """
    statistics = hyp['statistics']
    images = min(statistics['images'], images)
    size = min(statistics['batch_size'], images)
    batches = math.ceil(images // size / ranks)
    return batches * size + math.ceil(tests / ranks) * views_per_image(hyp)


def phase_cost(recipe, hyp, phase, fits, images, num_classes, ranks):
    """What a phase costs in which `ranks` ranks together train each network of `fits`.

    fits: records of swap94.fit. Returns the same dict as swap_costs for one phase.
    """
    settings = recipe.phase_settings(hyp, phase)
    steps = max(fit['steps'] for fit in fits)
    epochs = max(len(fit['epochs']) + ('failed' in fit) for fit in fits)
    of_rank = sum(flop_of_steps(recipe, settings, images, num_classes, ranks)[:steps])
    alone = flop_of_steps(recipe, settings, images, num_classes)
    of_all = sum(sum(alone[: fit['steps']]) for fit in fits)
    cost = {'pflop': 1e-15 * of_rank, 'pflop_of_all': 1e-15 * of_all}
    if ranks == 1:
        return cost | {'all_reduces': 0, 'megabytes': 0.0}
    net = recipe.make_net(hyp, num_classes, **ON_META)
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    grown = image_sizes(recipe, settings, images)[:steps].count(32)
    numbers = steps * trained - grown * net[0].bias.numel()  # frozen for full-size images
    numbers += epochs * (2 + images)  # at the end of an epoch, the losses
    return cost | {'all_reduces': steps + epochs, 'megabytes': 4e-6 * numbers}


def swap_costs(recipe, hyp, images, tests, num_classes, record):
    """What the phases of a run cost, by phase.

    Returns:
        {'phase1': {'pflop', 'pflop_of_all', 'all_reduces', 'megabytes'}, 'phase2', 'phase3'}: pflop
        on the slowest of as many ranks as phase 1 has shards and a worker has ranks_per_worker, and
        on all ranks; how many all-reduces there are, and how much a rank sends with them, in fp32.
        Validation is not counted. A phase that did not run is left out.
    """
    ranks = hyp['phase1']['shards']
    known = (images, num_classes)
    costs = {'phase1': phase_cost(recipe, hyp, 'phase1', [record['phase1']], *known, ranks)}
    if record['workers']:
        per_worker = hyp['phase2']['ranks_per_worker']
        costs['phase2'] = phase_cost(recipe, hyp, 'phase2', record['workers'], *known, per_worker)
    if 'failed' in record:
        return costs
    last_phase = 'phase2' if record['workers'] else 'phase1'
    served, _ = recipe.plan_epochs(images, recipe.phase_settings(hyp, last_phase))[-1]
    _, of_view = flop_per_image(recipe, hyp, num_classes)
    of_rank, of_all = [evaluated_images(hyp, served, tests, size) for size in (ranks, 1)]
    net = recipe.make_net(hyp, num_classes, **ON_META)
    numbers = sum(value.numel() for name, value in net.named_buffers() if 'running' in name) + 2
    all_reduces = 2  # the statistics, and the number of correct predictions
    if record['workers']:
        all_reduces += 1
        numbers += sum(p.numel() for p in net.parameters()) + images + 1
    costs['phase3'] = {
        'pflop': 1e-15 * of_rank * of_view,
        'pflop_of_all': 1e-15 * of_all * of_view,
        'all_reduces': all_reduces,
        'megabytes': 4e-6 * numbers,
    }
    return costs


#### Any recipe ####################################################################################


def costs_of_run(recipe, hyp, n_train, n_test, num_classes, record):
    """What a run's record says about its operations.

    Returns:
        {'pflop': on all ranks, or None if we cannot count them}, and for swap94 also 'phases': what
        swap_costs returns, with the seconds of each phase.
    """
    try:
        if 'phase1' in hyp:
            phases = swap_costs(recipe, hyp, n_train, n_test, num_classes, record)
            pflop = sum(cost['pflop_of_all'] for cost in phases.values())
            for phase, cost in phases.items():
                phases[phase] = {'seconds': record['phase_seconds'][phase]} | cost
            return {'pflop': pflop, 'phases': phases}
        if hasattr(recipe, 'plan_epochs'):
            views = record.get('views', 0)
            flop = flop_of_growing(recipe, hyp, n_train, num_classes, views)
        else:
            flop = flop_of_airbench(recipe, hyp, n_train, n_test, num_classes)
    except Exception:  # an edited recipe may work differently, and need not work on `meta`
        return {'pflop': None}
    return {'pflop': 1e-15 * flop}
