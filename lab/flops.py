"""PFLOP (1e15 floating-point operations) per run, as torch's counter counts them.

Everything is computed from `hyp` on the `meta` device, which allocates and calculates nothing.
Convolutions count by their definition, whichever algorithm the device uses.
"""

import math

import torch
from torch.utils.flop_counter import FlopCounterMode

ON_META = {'device': 'meta', 'dtype': torch.float32}
TTA_VIEWS = (1, 2, 6)  # how many views of an image each level evaluates


def flop_per_image(recipe, hyp, num_classes, size=32):
    """Operations for an image of size x size pixels: (in a training step, in a forward pass)."""
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
    level = hyp['net']['tta_level'] if hyp['aug']['flip'] else 0
    return TTA_VIEWS[level]


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


#### Any recipe ####################################################################################


def count_flop(recipe, hyp, n_train, n_test, num_classes, record):
    """Operations of a run whose recipe we know, and None for others."""
    if 'phase1' in hyp:
        return None
    if hasattr(recipe, 'plan_epochs'):
        return flop_of_growing(recipe, hyp, n_train, num_classes, record.get('views', 0))
    return flop_of_airbench(recipe, hyp, n_train, n_test, num_classes)


def pflop_of_run(recipe, hyp, n_train, n_test, num_classes, record):
    """PFLOP of one run, training and test-time augmentation, or None if we cannot count them."""
    try:
        flop = count_flop(recipe, hyp, n_train, n_test, num_classes, record)
    except Exception:  # an edited recipe may work differently, and need not work on `meta`
        return None
    return None if flop is None else 1e-15 * flop
