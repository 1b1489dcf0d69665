"""Trained networks: saving, loading, and asking them what is in a picture."""

from pathlib import Path

import torch

from lab.data import read_tensors, stack_pictures
from lab.errors import UserError
from lab.pictures import PREPARATION
from lab.recipes import load_recipe, read_source
from lab.runs import write_tensors

ROOT = Path(__file__).parent.parent
CONTENT = {
    'recipe': str,
    'source': str,
    'hyp': dict,
    'classes': list,
    'mean': list,
    'std': list,
    'weights': dict,
}


def save_network(path, net, recipe, hyp, image_set):
    """Write all that `load_network` and `predict` need."""
    content = {
        'recipe': str(Path(recipe.__file__).resolve()),
        'source': read_source(recipe),
        'hyp': hyp,
        'classes': image_set.classes,
        'mean': list(image_set.mean),
        'std': list(image_set.std),
        'pictures': image_set.pictures,
        'weights': net.state_dict(),
    }
    write_tensors(path, content)


def has_content(saved):
    """Whether this is what `save_network` wrote."""
    return isinstance(saved, dict) and all(
        isinstance(saved.get(name), kind) for name, kind in CONTENT.items()
    )


def read_network(path):
    """What `save_network` wrote, as a dict. Raises UserError if the file is something else."""
    try:
        saved = read_tensors(path)
    except FileNotFoundError as error:
        raise UserError(f'{path}: there is no such file') from error
    except PermissionError:
        raise
    except Exception as error:
        raise UserError(f'{path}: is damaged, or not written by --save') from error
    if not has_content(saved):
        raise UserError(f'{path}: is damaged, or not written by --save')
    return saved


def find_recipe(path, saved):
    """The recipe that made a saved network: where it was then, or with the same name here."""
    made_by = Path(saved['recipe'])
    for file in (made_by, ROOT / made_by.name, ROOT / 'records' / made_by.name):
        if file.is_file():
            recipe = load_recipe(file)
            if read_source(recipe) != saved['source']:
                print(f'{file} has changed since it made {path}')
            return recipe
    raise UserError(f'{path}: was made by {made_by}, which is not here any more')


def load_network(path, recipe, device, dtype):
    """(network, what `save_network` wrote). Raises UserError.

    In what was written, mean and std normalize the images, in units of pixel / 255.
    """
    saved = read_network(path)
    name = Path(recipe.__file__).name
    made_by = Path(saved['recipe']).name
    try:
        classes = len(saved['classes'])
        net = recipe.make_net(saved['hyp'], classes, device=device, dtype=dtype)
        net.load_state_dict(saved['weights'])
    except KeyError as error:
        line = f'{path}: {made_by} wrote no {error} into its hyp, which {name} needs'
        raise UserError(line) from error
    except Exception as error:  # another recipe's hyp and weights fail in many ways
        line = f'{path}: its weights, made by {made_by}, do not fit the network of {name}'
        raise UserError(line) from error
    net.eval()
    return net, saved


def tta_level(hyp):
    """The level of test-time augmentation, which mirrors images only if training did."""
    return hyp['net']['tta_level'] if hyp['aug']['flip'] else 0


def check_preparation(path, saved):
    """Print it if `lab data` prepared the training pictures in another way than `predict` does."""
    prepared = saved.get('pictures')  # None: the set was not made of pictures, or by an older lab
    if prepared not in (None, PREPARATION):
        print(f'{path}: its training images were {prepared}; now pictures are {PREPARATION}')


def predict(path, pictures, device, dtype):
    """The probability of each class for some pictures: (class names, tensor (pictures, classes)).

    Args:
        path: a file that `save_network` wrote.
        pictures: picture files, which are prepared as `lab data` prepares a folder of them.
    """
    recipe = find_recipe(path, read_network(path))
    net, saved = load_network(path, recipe, device, dtype)
    check_preparation(path, saved)
    images = torch.from_numpy(stack_pictures(pictures))
    labels = torch.zeros(len(images), dtype=torch.int64)
    options = {'device': device, 'dtype': dtype, 'mean': saved['mean'], 'std': saved['std']}
    loader = recipe.CifarLoader(images, labels, **options)
    logits = recipe.infer(net, loader, tta_level(saved['hyp']))
    if not logits.isfinite().all():
        raise UserError(f'{path}: its outputs are not finite, so it says nothing about a picture')
    return saved['classes'], logits.float().softmax(1).cpu()


def print_predictions(path, pictures, device, dtype):
    """Print the three most probable classes for each picture."""
    classes, probabilities = predict(path, pictures, device, dtype)
    for picture, row in zip(pictures, probabilities):
        best = row.topk(min(3, len(classes)))
        names = [classes[i] for i in best.indices]
        ranking = [f'{name} {p:.1%}' for name, p in zip(names, best.values.tolist())]
        print(f'{picture}: {", ".join(ranking)}')
