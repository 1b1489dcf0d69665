"""Recipes, loaded from files anywhere."""

import importlib.util
import sys
import tokenize
from pathlib import Path

from lab.errors import UserError, first_lines

# What the lab uses of every recipe.
NEEDED = """
hyp digits_hyp CIFAR_MEAN CIFAR_STD CIFAR_SHA256 load_cifar10 load_digits CifarLoader make_loaders
make_net train evaluate infer fast_path warm_up keep_freed_memory
""".split()


def load_recipe(path):
    """The module in a Python file, under the file's name without its suffix.

    The recipe may import what lies next to it. Raises UserError if the file is missing, cannot be
    imported, or lacks something that the lab needs.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f'{path}: there is no such file; the first argument must be a recipe')
    if path.suffix != '.py':
        raise UserError(f'{path}: a recipe is a Python file, like airbench94.py')
    name = path.stem
    loaded = sys.modules.get(name)
    if is_recipe(loaded) and Path(loaded.__file__).resolve() == path.resolve():
        return loaded
    if (loaded and not is_recipe(loaded)) or name in sys.stdlib_module_names:
        raise UserError(f'{path}: another Python module is called {name}; rename the recipe')

    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)
    spec = importlib.util.spec_from_file_location(name, path)
    recipe = importlib.util.module_from_spec(spec)
    sys.modules[name] = recipe  # torch.compile looks modules up by their names
    try:
        spec.loader.exec_module(recipe)
    except Exception as error:
        del sys.modules[name]
        kind = type(error).__name__
        raise UserError(f'{path}: cannot be imported: {kind}: {first_lines(error)}') from error
    missing = [needed for needed in NEEDED if not hasattr(recipe, needed)]
    if missing:
        del sys.modules[name]
        lacks = f'lacks {", ".join(missing)}'
        raise UserError(f'{path}: {lacks}; start from a copy of airbench94.py')
    return recipe


def is_recipe(module):
    return bool(getattr(module, '__file__', None)) and all(hasattr(module, n) for n in NEEDED)


def is_joint(recipe):
    """Whether all ranks together make each run, as in swap94. Otherwise they share the runs."""
    return hasattr(recipe, 'join_ranks')


def read_source(recipe):
    """The text of a recipe's file."""
    with tokenize.open(recipe.__file__) as file:  # in the encoding that the file declares
        return file.read()
